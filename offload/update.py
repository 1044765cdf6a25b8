"""One update: what ``step`` found, and how a shard is stepped by the optimizer's own code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from memtrain.offload.clipping import clips_of
from memtrain.offload.errors import OffloadError, PlanMismatchError
from memtrain.offload.gradient_home import GradientValue, OffloadedGradient, Ticket
from memtrain.offload.gradients import GradientStore
from memtrain.offload.lower_halves import LOWER_KEY, digest, followed, one_thread, step_in_slices
from memtrain.offload.offloaded_grad import OffloadedGrad
from memtrain.offload.optimizer_layout import OptimizerLayout
from memtrain.offload.optimizer_probe import Original, Runner, hyperparameters
from memtrain.offload.optimizer_state import RecordStore
from memtrain.offload.shards import MASTER_KEY, Piece, Shard
from memtrain.offload.state_cuts import same_scalar
from memtrain.optim.kernels import fused_adamw, native

_FOLLOW_ELEMENTS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundGradient:
    """A parameter's gradient as ``step`` found it."""

    tensor: Tensor | None = None
    version: int = 0
    home: OffloadedGradient | None = None
    value: GradientValue | None = None
    clips: tuple[Tensor, ...] = ()
    """Factors for the fp32 gradient (master weights)."""


class Update:
    """A step that has been asked for, with hyper-parameters and gradients as they were then.

    Shards may be stepped later and in any order, each once.

    Args:
        names: the parameters that are updated; None: all that have a gradient. ``take`` adds others.
    """

    def __init__(
        self,
        layout: OptimizerLayout,
        records: RecordStore,
        gradients: GradientStore,
        names: Iterable[str] | None = None,
    ) -> None:
        self._layout, self._records, self._store = layout, records, gradients
        self._runner = Runner(layout.optimizer)
        self._groups = [hyperparameters(group) for group in layout.param_groups]
        self.refusals = [fused_adamw.refusal(layout.optimizer, group) for group in self._groups]
        """By parameter group: why it is stepped by the optimizer's own code, None where in one pass."""
        self._runner.count_step()
        self.gradients: dict[str, FoundGradient] = {}
        self._versions: dict[str, int] = {}
        """Of the weights, as ``step`` found them or as the shards stepped so far have left them."""
        self._rewritten: set[str] = set()
        """Parameters whose weights somebody has written since their last update (or may have)."""
        self._unmoved: set[str] = set()
        """Parameters whose weights may come out of the step as they are: so in the first of a warm-up."""
        self.replaced: set[str] = set()
        """Parameters whose new weights do not depend on the old ones: they are rounded masters."""
        self.waiting: dict[str, list[Shard]] = {}
        """Shards still to be stepped, by unit."""
        self._pieces_left: dict[str, int] = {}
        self._scalars: dict[str, dict[str, Any]] = {}
        """What the pieces stepped so far have made of their parameter's scalars."""
        self.take(layout.index.parameters if names is None else names)

    def take(self, names: Iterable[str]) -> None:
        """Note the gradients and weights of these parameters as they are now; one without a gradient is left
        out.

        Raises:
            WeightsWrittenError: nothing has been done then.
        """
        names = [name for name in names if self._layout.index.parameters[name].grad is not None]
        self._records.check_weights(names)
        for name in names:
            parameter = self._layout.index.parameters[name]
            self.gradients[name] = found(name, parameter.grad)
            self._versions[name] = parameter._version
            self._pieces_left[name] = len(self._layout.index.pieces[name])
            group = self._groups[self._layout.group_of[name]]
            if parameter.device.type == "cpu" and _is_zero(group.get("lr")):
                self._unmoved.add(name)
            if name in self._layout.halves:
                continue  # new weights depend on the old ones
            if parameter._version != self._records.weight_versions.get(name):
                self._rewritten.add(name)
            elif name in self._layout.masters and name in self._records.initialised:
                self.replaced.add(name)
        self.replaced -= self._unmoved  # whether they moved is seen by comparing with what they were

    def forget(self, names: Iterable[str]) -> None:
        """These have been stepped: their gradients are not held any longer."""
        for name in names:
            self.gradients[name] = FoundGradient()

    @property
    def holds_tensors(self) -> bool:
        """Whether gradients in memory are used that somebody could still overwrite."""
        return any(gradient.tensor is not None for gradient in self.gradients.values())

    def needs_slot(self, shard: Shard) -> bool:
        """Whether anything of the shard passes through a slot."""
        if shard.small:
            return False
        if self._records.on_tier(shard):
            return True
        found = (self.gradients.get(piece.name) for piece in shard.pieces)
        return any(gradient is not None and gradient.home is not None for gradient in found)

    def read(self, shard: Shard, slot: Tensor) -> list[Ticket]:
        """Start reading record and gradients into the slot."""
        tickets = self._records.read(shard, slot)
        for piece in shard.pieces:
            gradient = self.gradients.get(piece.name)
            if gradient is not None and gradient.home is not None and gradient.value is not None:
                region = self._layout.shards[shard].gradient_bytes(slot, piece)
                tickets += self._store.load(gradient.home, gradient.value, piece, region)
        return tickets

    def incoming(self, shard: Shard) -> list[slice]:
        """What ``read`` puts into the slot."""
        homes = {name for name, gradient in self.gradients.items() if gradient.home is not None}
        layout = self._layout.shards[shard]
        spans = [layout.gradient_span(piece) for piece in shard.pieces if piece.name in homes]
        return [*self._records.span(shard), *spans]

    def step(self, shard: Shard, slot: Tensor | None) -> None:
        """Update the shard's weights, and its state in the slot, or its mirror (or in memory, without one).

        Raises:
            OffloadError: weights or gradients were changed by somebody else since the update was asked for.
        """
        self._check_weights(shard)
        # What a tier delivers is stepped faster by one processor, which leaves the others to its threads.
        with nullcontext() if slot is None else native.one_thread():
            self._step(shard, slot)

    def _step(self, shard: Shard, slot: Tensor | None) -> None:
        record = self._records.memory(shard, slot)
        groups: dict[int, dict[str, Any]] = {}
        state: dict[Tensor, dict[str, Any]] = {}
        at_work: list[tuple[Piece, Tensor, dict[str, Tensor]]] = []
        for piece in shard.pieces:
            if piece.name not in self.gradients:
                continue
            views = self._layout.shards[shard].state(record, piece)
            if LOWER_KEY in views:
                self._step_lower_half(shard, piece, slot, views)
                continue
            master = views.pop(MASTER_KEY, None)
            work = piece.weight() if master is None else master
            first = piece.name not in self._records.initialised
            if master is not None and first:
                master.copy_(piece.weight())
            elif master is not None and piece.name in self._rewritten:
                _follow(master, piece.weight())
            if self._step_in_one_pass(shard, piece, slot, master, views):
                continue
            if not first:
                scalars = self._records.scalars[piece.name]
                state[work] = {**views, **{key: _copy_scalar(value) for key, value in scalars.items()}}
            work.grad = self._gradient(shard, piece, slot, self.gradients[piece.name])
            number = self._layout.group_of[piece.name]
            groups.setdefault(number, {**self._groups[number], "params": []})["params"].append(work)
            at_work.append((piece, work, views))
        originals: dict[Tensor, Original] = {w: (piece.parameter, piece.start) for piece, w, _ in at_work}
        if not groups:
            return
        idle = [_Idle(piece) for piece, _, _ in at_work if piece.name in self._unmoved]
        after = self._runner.run([groups[number] for number in sorted(groups)], state, originals)
        for piece, work, views in at_work:
            work.grad = None
            self._keep_state(piece, views, after.get(work, {}))
            if piece.name in self._layout.masters:
                piece.weight().copy_(work)
        same = {one.piece for one in idle if one.restore()}
        for piece, _, _ in at_work:
            self._note_stepped(shard, piece, weight_changed=piece not in same)

    def _step_lower_half(
        self, shard: Shard, piece: Piece, slot: Tensor | None, stored: dict[str, Tensor]
    ) -> None:
        """Of a piece whose master is its weight and the lower half in ``stored``."""
        first = piece.name not in self._records.initialised
        views = {key: view for key, view in stored.items() if key != LOWER_KEY}
        scalars = {} if first else self._records.scalars[piece.name]
        if first:
            stored[LOWER_KEY].zero_()
        else:
            self._records.halves.check_piece(piece)
        if self._step_in_one_pass(shard, piece, slot, stored[LOWER_KEY], views):
            return
        found = self.gradients[piece.name]
        gradient = self._narrow_gradient(shard, piece, slot, found)
        if found.value is not None:
            found.value.apply(gradient)
        group = self._groups[self._layout.group_of[piece.name]]

        def step(master: Tensor, state: dict[str, Tensor]) -> dict[str, Any]:
            before = {**state, **{key: _copy_scalar(value) for key, value in scalars.items()}}
            after = self._runner.run(
                [{**group, "params": [master]}],
                {} if first else {master: before},
                {master: piece.parameter},
            )
            master.grad = None
            self._keep_tensors(piece.name, state, kept := after.get(master, {}))
            return kept

        idle = _Idle(piece) if piece.name in self._unmoved else None
        with nullcontext() if slot is None else one_thread():
            after = step_in_slices(piece, stored, gradient, found.clips, step, first=first)
        self._keep_scalars(piece, after)
        self._note_stepped(shard, piece, weight_changed=idle is None or not idle.restore())

    def _step_in_one_pass(
        self,
        shard: Shard,
        piece: Piece,
        slot: Tensor | None,
        master: Tensor | None,
        views: dict[str, Tensor],
    ) -> bool:
        """Whether the piece could be stepped without the optimizer's own code, to the same bits; and has
        been. ``master``, or the lower half of it, is that of the weight."""
        number, found, weight = self._layout.group_of[piece.name], self.gradients[piece.name], piece.weight()
        if self.refusals[number] is not None or views.keys() != fused_adamw.STATE:
            return False
        if piece.name in self._unmoved:
            return False
        first = piece.name not in self._records.initialised
        scalars = fused_adamw.first_scalars() if first else self._records.scalars[piece.name]
        if scalars.keys() != {"step"} or not isinstance(scalars["step"], Tensor):
            return False
        gradient = self._narrow_gradient(shard, piece, slot, found)
        if not fused_adamw.serves(weight, gradient, master, found.clips):
            return False
        if found.value is not None:
            found.value.apply(gradient)
        if first:
            for moment in views.values():
                moment.zero_()
        after = scalars["step"] + 1
        fused_adamw.step(
            weight,
            gradient,
            master,
            views["exp_avg"],
            views["exp_avg_sq"],
            group=self._groups[number],
            number=after.item(),
            clips=found.clips,
        )
        self._keep_state(piece, views, {**views, "step": after})
        self._note_stepped(shard, piece, weight_changed=True)
        return True

    def _check_weights(self, shard: Shard) -> None:
        """A master would overwrite what somebody wrote into the weight; a step upon it would be another."""
        for piece in shard.pieces:
            if piece.name in self.gradients and piece.parameter._version != self._versions[piece.name]:
                raise OffloadError(
                    f"{piece.name} was changed in place while an update of it was pending: call flush() on "
                    f"the session or the optimizer before changing weights"
                )

    def _gradient(self, shard: Shard, piece: Piece, slot: Tensor | None, gradient: FoundGradient) -> Tensor:
        grad = self._narrow_gradient(shard, piece, slot, gradient)
        if gradient.value is None:
            grad = grad.float() if piece.name in self._layout.masters else grad
        else:
            assert slot is not None
            gradient.value.apply(grad)
            if piece.name in self._layout.masters:
                grad = self._layout.shards[shard].widen(slot, piece)
        if gradient.clips and gradient.tensor is not None and piece.name not in self._layout.masters:
            # Clipping is not to show in param.grad for some parameters and not for others.
            grad = grad.clone()
        for factor in gradient.clips:
            grad.mul_(factor)
        return grad

    def _narrow_gradient(
        self, shard: Shard, piece: Piece, slot: Tensor | None, gradient: FoundGradient
    ) -> Tensor:
        """In the parameter's own dtype, neither scaled nor clipped."""
        if gradient.tensor is None:
            assert slot is not None
            return self._layout.shards[shard].gradient(slot, piece)
        if gradient.tensor._version != gradient.version:
            raise OffloadError(
                f"the gradient of {piece.name} was changed in place while an update waited for it: use "
                f"zero_grad(set_to_none=True), or call flush() before changing gradients"
            )
        return piece.of(gradient.tensor.contiguous())

    def _keep_state(self, piece: Piece, views: Mapping[str, Tensor], after: Mapping[str, Any]) -> None:
        """State that the optimizer made anew goes to its place; views it changed in place are there
        already."""
        self._keep_tensors(piece.name, views, after)
        self._keep_scalars(piece, after)

    def _keep_tensors(self, name: str, views: Mapping[str, Tensor], after: Mapping[str, Any]) -> None:
        spec = self._layout.specs[name]
        if after.keys() != views.keys() | spec.scalars:
            raise PlanMismatchError(
                f"the optimizer now keeps {sorted(after)} for {name}, it was planned with "
                f"{sorted(views.keys() | spec.scalars)}: plan again for its present settings"
            )
        for key, view in views.items():
            made = after[key]
            if made.dtype != view.dtype or made.shape != view.shape:
                raise PlanMismatchError(
                    f"state {key!r} of {name} is {made.dtype} {tuple(made.shape)}, planned as "
                    f"{view.dtype} "
                    f"{tuple(view.shape)}: plan again for the optimizer's present settings"
                )
            if made is not view:
                view.copy_(made)

    def _keep_scalars(self, piece: Piece, after: Mapping[str, Any]) -> None:
        scalars = {key: after[key] for key in self._layout.specs[piece.name].scalars}
        known = self._scalars.setdefault(piece.name, scalars)
        if any(not same_scalar(known[key], scalars[key]) for key in scalars):
            raise OffloadError(
                f"pieces of {piece.name} disagree about {sorted(scalars)}: {known} and {scalars}. The "
                f"optimizer is not "
                f"elementwise: use OptimizerConfig(elementwise=False)"
            )
        self._pieces_left[piece.name] -= 1
        if self._pieces_left[piece.name] == 0 and (after or piece.name in self._layout.masters):
            self._records.scalars[piece.name] = known
            self._records.initialised.add(piece.name)

    def _note_stepped(self, shard: Shard, piece: Piece, *, weight_changed: bool) -> None:
        self._records.note_stepped(shard, piece, weight_changed=weight_changed)
        if piece.name in self._layout.halves:
            self._records.halves.note(piece)
        if weight_changed and piece.parameter._version == self._versions[piece.name]:
            # torch's fused AdamW on a CPU does not count: a streamed weight would pass for one that is on its
            # tier already.
            increment_version(piece.parameter)
        self._versions[piece.name] = piece.parameter._version
        if self._pieces_left[piece.name] == 0:
            self._records.weight_versions[piece.name] = piece.parameter._version


class _Idle:
    """A piece whose weights may be what they were when it has been stepped. If they are, bit for bit, their
    version is what it was too: then nobody writes them back."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self._version, self._digest = piece.parameter._version, digest(piece.weight())

    def restore(self) -> bool:
        """Whether the bits are the same; sets the version back then."""
        same = digest(self.piece.weight()) == self._digest
        if same:
            torch._C._autograd._unsafe_set_version_counter((self.piece.parameter,), (self._version,))
        return same


def _is_zero(learning_rate: Any) -> bool:
    """Whether it is the number 0: optimizers that find their own rate (Adafactor) have None there."""
    return isinstance(learning_rate, (int, float, Tensor)) and float(learning_rate) == 0.0


def found(name: str, grad: Tensor) -> FoundGradient:
    """The gradient of parameter ``name``, to be used later."""
    clips = clips_of(grad)
    if isinstance(grad, OffloadedGrad):
        home = grad._live()
        assert isinstance(home, OffloadedGradient)
        return FoundGradient(home=home, value=home.value, clips=clips)
    if grad.layout is not torch.strided:
        raise PlanMismatchError(
            f"the gradient of {name} is {grad.layout}: only dense gradients can be streamed. Make the "
            f"layer with sparse=False, or give its table to torch.optim.SparseAdam in a RowSparseOptimizer"
        )
    return FoundGradient(tensor=grad, version=grad._version, clips=clips)


def _follow(master: Tensor, weight: Tensor) -> None:
    """Let a master weight be what somebody wrote into its weight, where that is not its rounding any more.

    Elsewhere it keeps its lower bits: weights that were swapped out and back in lose nothing. A slice at a
    time, for these temporaries are on nobody's bill.
    """
    for part, narrow in zip(master.split(_FOLLOW_ELEMENTS), weight.split(_FOLLOW_ELEMENTS), strict=True):
        part.copy_(followed(part, narrow))


def _copy_scalar(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
