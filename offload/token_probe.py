"""Finds out whether the first tokens of a block can be computed again without the others, and how exactly.

The block runs on what it is given: on all tokens, on a prefix of them, and on all with the tokens behind the
prefix replaced. From the first two follow the token axis of every argument and of every tensor that is saved
for backward, and by how much the rows of a prefix differ from those of the whole (matrix products of some
shapes depend on the number of rows). The third must leave every row of the prefix bit for bit as it was:
then no token looks ahead. Nothing is known by name but the arguments of attention kernels.

All tokens means ``T``, dimension -2 of the block's first tensor argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch.utils import _pytree as pytree

from memtrain.offload.compare import Mismatch, TwoTokenAxes, difference, token_axis
from memtrain.offload.errors import TokenRangeError
from memtrain.offload.random_rows import DrawnAsBefore, ShapesDrawn
from memtrain.offload.results import ATTENTION, AroundCalls, QuietMode, dropout, on_first_tokens
from memtrain.offload.surroundings import Surroundings
from memtrain.offload.token_rows import RowAxis
from memtrain.offload.unmoved import shared_storages

_MOST_ATTEMPTS = 256
"""Ways to cut the arguments that are tried; one is enough unless a size happens to equal the tokens."""
_ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference, in parts of a tensor's largest entry, that may come from rounding alone. Blocks of
SmolLM2 and GPT-2 on a CPU show up to 2e-6 in float32 and 2e-2 in bfloat16; a token that looks ahead, 1e-1."""


class Kind(Enum):
    """Of a saved tensor that is not cut."""

    AGAIN = "again"
    """A prefix gives the same, such as a weight in the precision of autocast: it is computed again."""
    WHOLE = "whole"
    """All of it is stored: it depends on all tokens, or has them along two dimensions, such as a mask."""
    GIVEN = "given"
    """It lies in an argument other than the input, which is there in backward anyway."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenProbe:
    """How the tokens lie in the tensors of one block, and how exact a prefix is."""

    name: str
    """Of the block."""
    tokens: int
    """In a row of the batch that was looked at."""
    arguments: dict[int, tuple[int, ...]]
    """Dimensions to cut of every tensor among the leaves of arguments and keyword arguments."""
    saved: tuple[RowAxis | Kind, ...]
    """Every tensor that is saved for backward, parameters and buffers left out."""
    attention: tuple[tuple[RowAxis | None, ...], ...]
    """The output tensors of every attention kernel."""
    is_random: bool
    """Whether the block draws random numbers."""
    drawn: tuple[RowAxis | None, ...]
    """What its dropouts draw."""
    row_bytes: int
    """Of the storages that are cut, a token's part."""
    whole_bytes: int
    """Of the storages that are stored whole."""
    difference: float
    """Largest difference between rows of a prefix and of the whole, in parts of the largest entry of their
    tensor, over all saved tensors, attention's outputs and prefixes that were looked at."""

    @property
    def bit_equal(self) -> bool:
        """Whether there was no difference at all."""
        return self.difference == 0.0


@dataclass(frozen=True, slots=True)
class _Kernel:
    """An attention kernel of the whole forward."""

    operator: Any
    args: Any
    kwargs: Any
    outputs: list[torch.Tensor]


@dataclass(slots=True)
class _Comparison:
    """A forward on a prefix beside the whole one."""

    arguments: dict[int, tuple[int, ...]]
    kinds: list[RowAxis | Kind]
    difference: float = 0.0
    worst: int = 0
    """The saved tensor with the largest difference."""
    two_axes: set[int] = field(default_factory=set)
    """Saved tensors with tokens along two dimensions."""
    drawn: tuple[RowAxis | None, ...] = ()


def token_count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens in a row of the batch: dimension -2 of the first tensor among the arguments, 0 without one."""
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor):
            return leaf.shape[-2] if leaf.dim() > 1 else 0
    return 0


def probe_tokens(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    is_fixed: Callable[[torch.Tensor], bool],
    prefixes: Sequence[int] = (),
    attention_prefixes: Sequence[int] = (),
) -> TokenProbe:
    """Look at one block on real arguments.

    What is saved for backward is held once while this runs; arguments, gradients and random numbers are left
    as they are.

    Args:
        name: of the block, for errors.
        function: its forward.
        args, kwargs: what it is called with.
        is_fixed: whether a tensor is a parameter or buffer.
        prefixes: numbers of tokens for which the block is to be computed again, each below ``T``.
        attention_prefixes: numbers of tokens for which the attention kernels are, each below ``T``.

    Raises:
        TokenRangeError: it is not causal, draws random numbers, saves tensors in which tokens cannot be told
            apart, or gives other values for a prefix.
    """
    probing = _Probing(name, function, args, kwargs, is_fixed)
    prefixes = sorted(set(prefixes), reverse=True)
    for prefix in (*prefixes, *attention_prefixes):
        if not 0 < prefix < probing.tokens:
            raise ValueError(f"{name}: a prefix of {prefix} tokens is none of {probing.tokens}")
    for prefix in prefixes:
        probing.look_at(prefix)
    for prefix in sorted(set(attention_prefixes), reverse=True):
        probing.look_at_attention(prefix)
    return probing.result()


class _Probing:
    """The runs of one probe, and what they have shown so far."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_fixed: Callable[[torch.Tensor], bool],
    ) -> None:
        self.name = name
        self.tokens = token_count(args, kwargs)
        self._function = function
        self._is_fixed = is_fixed
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._tensors = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, torch.Tensor)]
        self._input = self._leaves[self._tensors[0]]
        self._given = shared_storages(args, kwargs)
        self._surroundings = Surroundings(self._input.device)
        self._saved: list[torch.Tensor] = []
        self._kernels: list[_Kernel] = []
        shapes = ShapesDrawn()
        watch = AroundCalls(_KernelWatch(self._kernels), ATTENTION.call)
        self._is_random = self._run(
            self._leaves, lambda _, tensor: self._saved.append(tensor), watch, shapes.watching()
        )
        self._drawn_shapes = shapes.shapes
        self._found: _Comparison | None = None
        self._attention: list[tuple[RowAxis | None, ...]] = [
            tuple(None for _ in kernel.outputs) for kernel in self._kernels
        ]
        self._difference = 0.0

    def result(self) -> TokenProbe:
        """What was found."""
        return TokenProbe(
            name=self.name,
            tokens=self.tokens,
            arguments=self._found.arguments if self._found else {},
            saved=tuple(self._found.kinds) if self._found else (),
            attention=tuple(self._attention),
            is_random=self._is_random,
            drawn=self._found.drawn if self._found else (),
            row_bytes=self._bytes(lambda kind: isinstance(kind, RowAxis)) // self.tokens,
            whole_bytes=self._bytes(lambda kind: kind is Kind.WHOLE),
            difference=self._difference,
        )

    def look_at(self, prefix: int) -> None:
        """Compare the forward on the first ``prefix`` tokens with the whole one."""
        first: _Comparison | None = None
        reason = ""
        ways = self._ways() if self._found is None else iter([self._found.arguments])
        for arguments in itertools.islice(ways, _MOST_ATTEMPTS):
            try:
                found = self._compare(arguments, prefix)
            except torch.OutOfMemoryError:
                raise
            except (Mismatch, RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
                reason = reason or str(error)
                continue
            first = first or found
            if found.difference <= self._tolerance():
                first = found
                break
        if first is None:
            raise self._refused(f"does not run on the first {prefix} of {self.tokens} tokens ({reason})")
        self._replace_the_others(prefix, first)
        self._judge(prefix, first)
        self._difference = max(self._difference, first.difference)
        self._found = first

    def look_at_attention(self, prefix: int) -> None:
        """Compare the attention kernels on the first ``prefix`` tokens with those on all."""
        for number, kernel in enumerate(self._kernels):
            operator = kernel.operator
            if dropout(operator, kernel.args, kernel.kwargs) != 0.0:
                continue  # never stored
            query, key = kernel.args[:2]
            if not operator._opname.startswith("_scaled_dot_product") or not (
                query.shape[-2] == key.shape[-2] == self.tokens
            ):
                raise self._refused(
                    f"runs attention kernel {operator._opname} on {query.shape[-2]} queries and "
                    f"{key.shape[-2]} keys, which cannot be cut at a token of {self.tokens}"
                )
            args, kwargs = on_first_tokens(operator, kernel.args, kernel.kwargs, self.tokens, prefix)
            with torch.no_grad():
                output = operator(*args, **kwargs)
            axes = []
            for whole, part in zip(kernel.outputs, _tensors(output), strict=True):
                axis, apart = token_axis(whole, part, self.tokens, prefix)
                if apart > self._tolerance():
                    raise self._refused(
                        f"attention kernel {number} gives other values for the first {prefix} tokens (by "
                        f"{apart:.1e} of the largest): it is not causal"
                    )
                self._difference = max(self._difference, apart)
                axes.append(axis)
            self._attention[number] = tuple(axes)

    # runs -------------------------------------------------------------------------------------

    def _run(
        self,
        leaves: list[Any],
        visit: Callable[[int, torch.Tensor], Any],
        *around: AbstractContextManager[Any],
    ) -> bool:
        """One forward inside ``around``; ``visit`` is shown what is saved. Whether random numbers were drawn."""
        count = 0

        def pack(tensor: torch.Tensor) -> None:
            nonlocal count
            if not self._is_fixed(tensor):
                visit(count, tensor.detach())
                count += 1

        given = list(leaves)
        for index in self._tensors:
            given[index] = given[index].detach().requires_grad_(self._leaves[index].requires_grad)
        args, kwargs = pytree.tree_unflatten(given, self._spec)
        with ExitStack() as stack:
            stack.enter_context(self._surroundings.again())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, _never))
            for context in around:
                stack.enter_context(context)
            self._function(*args, **kwargs)
            is_random = self._surroundings.random_numbers_drawn
        if count != len(self._saved):
            raise Mismatch(f"{count} tensors are saved for backward instead of {len(self._saved)}")
        return is_random

    def _compare(self, arguments: dict[int, tuple[int, ...]], prefix: int) -> _Comparison:
        found = _Comparison(arguments, [])
        known = None if self._found is None else self._found.kinds

        def visit(number: int, part: torch.Tensor) -> None:
            if number >= len(self._saved):
                raise Mismatch(f"more than {len(self._saved)} tensors are saved for backward")
            whole = self._saved[number]
            kind: RowAxis | Kind
            if whole.untyped_storage().data_ptr() in self._given:
                kind = Kind.GIVEN
            else:
                kind, apart = self._kind(number, part, prefix, found)
                if apart > found.difference:
                    found.difference, found.worst = apart, number
            whole_before = known is not None and known[number] is Kind.WHOLE
            found.kinds.append(Kind.WHOLE if whole_before else kind)

        leaves = list(self._leaves)
        for index, dims in arguments.items():
            for dim in dims:
                leaves[index] = leaves[index].narrow(dim, 0, prefix)
        first = self._tensors[0]
        leaves[first] = leaves[first].contiguous()  # as it comes back from where it was stored
        drawn = DrawnAsBefore(self._drawn_shapes, self.tokens, prefix)
        self._run(leaves, visit, drawn.drawing())
        found.drawn = tuple(drawn.axes)
        return found

    def _kind(
        self, number: int, part: torch.Tensor, prefix: int, found: _Comparison
    ) -> tuple[RowAxis | Kind, float]:
        try:
            axis, apart = token_axis(self._saved[number], part, self.tokens, prefix)
        except TwoTokenAxes:
            found.two_axes.add(number)
            return Kind.WHOLE, 0.0
        if axis is None:
            return (Kind.AGAIN if apart == 0.0 else Kind.WHOLE), 0.0
        return axis, apart

    def _replace_the_others(self, prefix: int, found: _Comparison) -> None:
        """Run on other tokens from ``prefix`` on. Raises TokenRangeError if a row before them notices."""
        behind = self._input[..., prefix:, :]
        generator = torch.Generator(self._input.device).manual_seed(prefix)
        noise = torch.randn(
            behind.shape, generator=generator, device=behind.device, dtype=torch.float32
        ).mul_(4.0 * float(behind.detach().float().square().mean().sqrt()) or 1.0)
        leaves = list(self._leaves)
        leaves[self._tensors[0]] = torch.cat(
            [self._input.detach()[..., :prefix, :], noise.to(self._input.dtype)], dim=-2
        )

        def visit(number: int, other: torch.Tensor) -> None:
            if number >= len(self._saved) or other.shape != self._saved[number].shape:
                raise Mismatch(f"saved tensor {number} has another shape")
            whole, kind = self._saved[number], found.kinds[number]
            if kind is Kind.AGAIN and difference(whole, other) != 0.0:
                found.kinds[number] = Kind.WHOLE
            if number in found.two_axes and difference(whole, other) != 0.0:
                raise self._refused(
                    f"saves a tensor of shape {tuple(whole.shape)} with tokens along two dimensions, as "
                    "attention does without a fused kernel (use scaled_dot_product_attention)"
                )
            if isinstance(kind, RowAxis):
                rows = (kind.rows(tensor, self.tokens, 0, prefix) for tensor in (whole, other))
                if difference(*rows) != 0.0:
                    raise self._refused(
                        f"is not causal: what it saves for the first {prefix} tokens (saved tensor {number}, "
                        f"{tuple(whole.shape)}) depends on the others"
                    )

        try:
            self._run(leaves, visit)
        except Mismatch as error:
            raise self._refused(f"saves what depends on the values of its input ({error})") from None

    def _judge(self, prefix: int, found: _Comparison) -> None:
        if found.difference > self._tolerance():
            shape = tuple(self._saved[found.worst].shape)
            raise self._refused(
                f"gives other values for the first {prefix} tokens alone: saved tensor {found.worst}, "
                f"{shape}, differs by {found.difference:.1e} of its largest entry, more than rounding "
                f"explains ({self._tolerance():.0e})"
            )
        integers = any(
            isinstance(kind, RowAxis) and not tensor.is_floating_point() and tensor.dtype != torch.bool
            for kind, tensor in zip(found.kinds, self._saved, strict=True)
        )
        if integers and found.difference > 0.0:
            raise self._refused(
                "chooses by value (it saves whole numbers, such as the experts of a token), and on this "
                "machine a prefix is not bit-equal: another choice might be made in backward"
            )

    # tensors ----------------------------------------------------------------------------------

    def _ways(self) -> Iterator[dict[int, tuple[int, ...]]]:
        """Ways to cut the arguments: at first every dimension with as many entries as there are tokens."""
        choices: list[list[tuple[int, ...]]] = []
        for index in self._tensors:
            tensor = self._leaves[index]
            if index == self._tensors[0]:
                choices.append([(tensor.dim() - 2,)])
                continue
            dims = [dim for dim, size in enumerate(tensor.shape) if size == self.tokens]
            sizes = range(len(dims), -1, -1)
            choices.append([chosen for size in sizes for chosen in itertools.combinations(dims, size)])
        for way in itertools.product(*choices):
            yield dict(zip(self._tensors, way, strict=True))

    def _bytes(self, counts: Callable[[RowAxis | Kind], bool]) -> int:
        """Of the unique storages of saved tensors of some kinds."""
        kinds = self._found.kinds if self._found else []
        storages = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for tensor, kind in zip(self._saved, kinds, strict=bool(kinds))
            if counts(kind)
        }
        return sum(storages.values())

    def _tolerance(self) -> float:
        return max((_ROUNDING[t.dtype] for t in self._saved if t.dtype in _ROUNDING), default=0.0)

    def _refused(self, why: str) -> TokenRangeError:
        return TokenRangeError(
            f"{self.name}: {why}; plan without recomputed_tokens and attention_tokens for it"
        )


class _KernelWatch(QuietMode):  # type: ignore[no-untyped-call]
    """Notes the attention kernels that run."""

    def __init__(self, kernels: list[_Kernel]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels = kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if ATTENTION.operator(func):
            self._kernels.append(_Kernel(func, args, kwargs or {}, _tensors(output)))
        return output


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _never(_: Any) -> torch.Tensor:
    raise AssertionError("a probe's graph is thrown away")
