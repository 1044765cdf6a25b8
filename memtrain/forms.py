"""The forms in which a model's blocks can run: treatments of ``memtrain.optim`` as choices of a plan.

A form is a policy (``optim.autograd.apply``) put on one block. ``exact`` gives the block's own bits and
saves less; the others are named after what compresses on top of it, and lose. Which modules a policy treats
is found once, on a few tokens; then a block's form is put on and taken off as a plan says. What a form takes,
and whether it keeps what its name promises at the batch that is trained on, is measured with the profile
(``planner.tracing.form_measures``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import memtrain.optim.autograd.lossy_treatments  # noqa: F401  (makes them known to policies)
from memtrain.optim.autograd import EXACT as EXACT_POLICY
from memtrain.optim.autograd import Policy, Rule, apply_to, revert
from memtrain.optim.autograd.apply import Row, TreatedForward
from memtrain.optim.autograd.sites import PROBE_TOKENS
from memtrain.optim.autograd.treatments import KEEP
from memtrain.planner.actions import EXACT


def _and(*rules: tuple[str, str]) -> Policy:
    """The exact treatments, and ``(kind, treatment)`` on top of them or in their place."""
    return EXACT_POLICY.followed_by(*(Rule(kind=kind, treatment=name) for kind, name in rules))


POLICIES: Mapping[str, Policy] = {
    EXACT: EXACT_POLICY,
    **{name: _and(("layer", name)) for name in ("int8", "int4")},
    **{name: _and(("mlp", name), ("gated_mlp", name)) for name in ("fewbit2", "fewbit3", "fewbit4")},
}
LOSSY = tuple(name for name in POLICIES if name != EXACT)
"""What may stand in ``PlannerOptions.allow_lossy``. Sampled rows (``wta``) may not: layers that share an
input find its sample by a weak reference, which dies where saved tensors are moved."""


class BlockForms:
    """Forms of the blocks of one model.

    Runs the model on the first tokens of one row of the batch, once for each form, without gradients. It is
    left as it was.

    Args:
        model: with its weights; the chunked loss may be installed.
        blocks: as ``find_blocks`` names them.
        sample_batch: a mapping (``model(**batch)``), a tuple or list (``model(*batch)``) or one tensor.
        names: of ``POLICIES``.
        present: as of ``apply_to``.

    Raises:
        ValueError: there is no such form; lists those that there are.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        sample_batch: Any,
        names: Sequence[str],
        *,
        present: Callable[[nn.Module], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._present = present
        self._blocks = dict(blocks)
        self._forwards: dict[tuple[str, str], dict[nn.Module, Any]] = {}
        self._missing: dict[str, dict[str, str]] = {name: {} for name in self._blocks}
        example = _on_few_tokens(model, sample_batch)
        for form in dict.fromkeys(names):
            if form not in POLICIES:
                raise ValueError(f"there is no form {form!r}; lossy ones are {', '.join(LOSSY)}")
            self._find(model, form, example)

    def _find(self, model: nn.Module, form: str, example: Callable[[], Any]) -> None:
        try:
            rows = apply_to(model, POLICIES[form], example=example, present=self._present).rows
        except ValueError as error:
            for missing in self._missing.values():
                missing[form] = str(error)
            return
        try:
            for name, block in self._blocks.items():
                inside = [row for row in rows if row.name == name or row.name.startswith(f"{name}.")]
                reason = _why_not(form, inside)
                if reason:
                    self._missing[name][form] = reason
                else:
                    replaced = ((module, module.__dict__.get("forward")) for module in block.modules())
                    self._forwards[name, form] = {
                        m: forward for m, forward in replaced if isinstance(forward, TreatedForward)
                    }
        finally:
            revert(model)

    def of(self, block: str) -> Mapping[str, Hashable]:
        """The forms that ``block`` can have beside the plain one, and what each treats of it: blocks that are
        alike differ where a treatment was refused."""
        names = {module: name for name, module in self._blocks[block].named_modules()}
        return {
            form: tuple(names[module] for module in forwards)
            for (name, form), forwards in self._forwards.items()
            if name == block
        }

    def missing(self, block: str) -> Mapping[str, str]:
        """Of the forms that it cannot have the reason."""
        return self._missing[block]

    def put_on(self, block: str, form: str) -> None:
        """Let the block run in ``form``. Raises KeyError: it cannot have it."""
        for module, forward in self._forwards[block, form].items():
            module.forward = forward

    def take_off(self, block: str) -> None:
        """Let the block run in the plain form."""
        revert(self._blocks[block])

    @contextmanager
    def worn(self, block: str, form: str) -> Iterator[None]:
        """For a while."""
        self.put_on(block, form)
        try:
            yield
        finally:
            self.take_off(block)

    def bypassing(self, block: str, form: str) -> list[nn.Module]:
        """Modules that, in this form, may use their children's weights without calling them."""
        return [module for module in self._forwards[block, form] if any(True for _ in module.children())]


def _why_not(form: str, rows: Sequence[Row]) -> str:
    """Why a block with these sites has not got the form; empty where it has.

    A lossy form whose lossy part was refused is the exact one, or less.
    """
    treated = [row for row in rows if row.treatment != KEEP]
    if any(form == EXACT or not row.exact for row in treated):
        return ""
    notes = {row.note for row in rows if row.note and row.treatment == KEEP}
    return "; ".join(sorted(notes)) or "no module of it is one that the form treats"


def _on_few_tokens(model: nn.Module, batch: Any) -> Callable[[], Any]:
    """Runs the model on the first tokens of the first row: of every tensor that has as many rows and tokens
    as the one of the fewest dimensions, two at least."""
    whole = dict(batch) if isinstance(batch, Mapping) else batch  # a tokenizer's BatchEncoding is no dict
    shapes = [leaf.shape for leaf in tree_leaves(whole) if isinstance(leaf, Tensor) and leaf.dim() >= 2]
    shape = min(shapes, key=len, default=None)

    def cut(tensor: Tensor) -> Tensor:
        alike = shape is not None and tensor.dim() >= 2 and tensor.shape[:2] == shape[:2]
        return tensor[:1, :PROBE_TOKENS] if alike else tensor

    few = tree_map_only(Tensor, cut, whole)

    def run() -> Any:
        if shape is None:  # a probe holds every activation: of a whole batch too much
            raise ValueError("the sample batch has no tensor of rows and tokens that could be made shorter")
        try:
            if isinstance(few, Mapping):
                return model(**few)
            return model(*few) if isinstance(few, (tuple, list)) else model(few)
        except Exception as error:  # whatever a model may raise that is not made for so short a batch
            raise ValueError(
                f"{type(model).__name__} cannot be tried on {PROBE_TOKENS} tokens of the sample batch "
                f"({type(error).__name__}: {error})"
            ) from error

    return run
