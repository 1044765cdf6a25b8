"""Results of costly operators, stored by a block's first forward and handed out in its second.

A dispatch mode records the outputs of the chosen operators in the order in which they run; in the second
forward another one answers the same calls with what was recorded. Both are on only around calls that may
reach such an operator: a dispatch mode sends every operator through Python, 2 ms for a block of SmolLM2.

Kernels that draw random numbers are computed again: skipping them would leave the generator behind, and every
later dropout mask of the block would differ.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memtrain.offload.compare import beyond_rounding
from memtrain.offload.refusals import differs, prefix_differs
from memtrain.offload.token_rows import RowAxis, Unpack, empty_in_order
from memtrain.planner.operators import ATTENTION_OPERATORS, PRODUCT_OPERATORS

Pack = Callable[[torch.Tensor], Any]

_PRODUCT_CALLS = PRODUCT_OPERATORS | {
    "linear", "matmul", "__matmul__", "__rmatmul__", "einsum", "bilinear", "tensordot", "multi_dot",
}  # fmt: skip
"""Functions of torch that may reach a matrix product."""


def is_attention(func: Any) -> bool:
    """Whether an operator is a forward attention kernel."""
    return func.namespace == "aten" and func._opname in ATTENTION_OPERATORS


def is_product_or_attention(func: Any) -> bool:
    """Whether an operator is a matrix product or a forward attention kernel."""
    return is_attention(func) or (func.namespace == "aten" and func._opname in PRODUCT_OPERATORS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """Whose results are stored."""

    operator: Callable[[Any], bool]
    """Of an operator below autograd: whether it is one of them."""
    call: Callable[[str], bool]
    """Of a function of torch, by its name: whether it may reach one of them."""


ATTENTION = Chosen(operator=is_attention, call=lambda name: "attention" in name)
PRODUCTS_AND_ATTENTION = Chosen(
    operator=is_product_or_attention, call=lambda name: "attention" in name or name in _PRODUCT_CALLS
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultRows:
    """Which tokens of attention's results are stored: ``first`` to ``stop`` of ``tokens``.

    In the second forward, which has ``stop`` tokens, the kernels run on the first ``first`` of them.
    """

    tokens: int
    first: int
    stop: int
    tolerance: float
    """What of a difference between a kernel's prefix and the whole may come from rounding."""
    axes: tuple[tuple[RowAxis | None, ...], ...]
    """Of each kernel's output tensors; None where one has no tokens."""


class QuietMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode without torch's wrapper, which imports the compiler in the middle of a forward pass."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class ResultTape:
    """Results of one forward, in the order of their operators.

    Args:
        name: of the block, for errors.
        chosen: whose results.
        pack: how one is stored.
        unpack: brings back what ``pack`` sent away.
        wanted: numbers of the results to store, the others are computed again; None: all.
        rows: which tokens of each; None: all.
    """

    def __init__(
        self,
        name: str,
        chosen: Chosen,
        pack: Pack,
        unpack: Unpack,
        *,
        wanted: frozenset[int] | None = None,
        rows: ResultRows | None = None,
    ) -> None:
        self.name = name
        self.chosen = chosen
        self._pack = pack
        self._unpack = unpack
        self._wanted = wanted
        self._rows = rows
        self._results: list[Any] = []

    def __len__(self) -> int:
        return len(self._results)

    def recording(self) -> contextlib.AbstractContextManager[Any]:
        """Record what runs inside."""
        return AroundCalls(_Recording(self), self.chosen.call)

    def replaying(self) -> contextlib.AbstractContextManager[Any]:
        """Answer with what was recorded, from the start."""
        return AroundCalls(_Replaying(self), self.chosen.call)

    def store(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Store the result of the next operator."""
        number = len(self._results)
        wanted = self._wanted is None or number in self._wanted
        if not wanted or dropout(func, args, kwargs) != 0.0:
            self._results.append(None)
            return
        axes = self._axes(number)
        leaves, spec = pytree.tree_flatten(output)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                axis = next(axes)
                leaf = leaf.detach()
                leaves[index] = _Stored(self._pack(self._part(leaf, axis)), axis, self._witness(leaf, axis))
        self._results.append((leaves, spec))

    def hand_out(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operator of this number gave."""
        if number >= len(self._results):
            raise differs(self.name, "more matrix products or attention kernels ran")
        result = self._results[number]
        if result is None:
            return func(*args, **kwargs)
        leaves, spec = result
        rows = self._rows
        computed: list[Any] = [None] * len(leaves)
        if rows is not None and rows.first:
            args, kwargs = on_first_tokens(func, args, kwargs, rows.stop, rows.first)
            computed = pytree.tree_leaves(func(*args, **kwargs))
        found = [self._whole(leaf, own) for leaf, own in zip(leaves, computed, strict=True)]
        return pytree.tree_unflatten(found, spec)

    def _axes(self, number: int) -> Iterator[RowAxis | None]:
        if self._rows is None:
            return itertools.repeat(None)
        if number >= len(self._rows.axes):
            raise differs(self.name, "more attention kernels ran")
        return iter(self._rows.axes[number])

    def _part(self, tensor: torch.Tensor, axis: RowAxis | None) -> torch.Tensor:
        rows = self._rows
        if rows is None or axis is None:
            return tensor
        return axis.rows(tensor, rows.tokens, rows.first, rows.stop)

    def _witness(self, tensor: torch.Tensor, axis: RowAxis | None) -> torch.Tensor | None:
        rows = self._rows
        if rows is None or axis is None or rows.first == 0 or not tensor.is_floating_point():
            return None
        return axis.rows(tensor, rows.tokens, rows.first - 1, rows.first).clone()

    def _whole(self, leaf: Any, computed: Any) -> Any:
        if not isinstance(leaf, _Stored):
            return leaf
        stored = self._unpack(leaf.packed)
        if self._rows is None or leaf.axis is None or computed is None:
            # A new tensor each time: autograd makes it an output of the second graph, which must die with it.
            return stored.detach()
        stop, first = self._rows.stop, self._rows.first
        if leaf.witness is not None:
            row = leaf.axis.rows(computed, first, first - 1, first)
            apart = beyond_rounding(leaf.witness, row, self._rows.tolerance)
            if apart:
                raise prefix_differs(self.name, "an attention kernel's result", first, apart)
        whole = empty_in_order(computed, leaf.axis.resized(computed.shape, first, stop))
        leaf.axis.rows(whole, stop, 0, first).copy_(computed)
        leaf.axis.rows(whole, stop, first, stop).copy_(stored)
        return whole


@dataclass(frozen=True, slots=True)
class _Stored:
    """A stored tensor."""

    packed: Any
    axis: RowAxis | None
    witness: torch.Tensor | None
    """The row before it, of those that are computed again: compared, for the probe has seen another batch."""


class _Recording(QuietMode):  # type: ignore[no-untyped-call]
    def __init__(self, tape: ResultTape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._tape.chosen.operator(func):
            self._tape.store(func, args, kwargs or {}, output)
        return output


class _Replaying(QuietMode):  # type: ignore[no-untyped-call]
    def __init__(self, tape: ResultTape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._tape.chosen.operator(func):
            return func(*args, **(kwargs or {}))
        self._next += 1
        return self._tape.hand_out(self._next - 1, func, args, kwargs or {})


class AroundCalls(TorchFunctionMode):
    """Enters ``inside`` for functions of torch whose name ``wanted`` accepts, and for no others."""

    def __init__(self, inside: contextlib.AbstractContextManager[Any], wanted: Callable[[str], bool]) -> None:
        super().__init__()
        self._inside = inside
        self._wanted = wanted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # the compiler looks in here, and cannot follow into the mode
            return func(*args, **(kwargs or {}))
        around: Any = (
            self._inside if self._wanted(getattr(func, "__name__", "")) else contextlib.nullcontext()
        )
        with around:
            return func(*args, **(kwargs or {}))


def argument(func: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    """What an operator is given, or gives itself, for the argument ``name``; None where it has none."""
    for position, declared in enumerate(func._schema.arguments):
        if declared.name == name:
            if name in kwargs:
                return kwargs[name]
            return args[position] if position < len(args) else declared.default_value
    return None


def dropout(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> float:
    """The probability with which an attention kernel drops; 0 for an operator that does not."""
    return float(argument(func, args, kwargs, "dropout_p") or 0.0)


def on_first_tokens(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], tokens: int, count: int
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a ``_scaled_dot_product_*`` kernel of ``tokens`` queries and keys, for ``count`` of them.

    Query, key and value are [B, H, T, D]; a mask or bias ends in [T or 1, T or 1].
    """

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if name in ("query", "key", "value"):
            return value.narrow(-2, 0, count)
        if name in ("attn_mask", "attn_bias"):
            for dim in (-2, -1):
                if value.shape[dim] == tokens:
                    value = value.narrow(dim, 0, count)
        return value

    names = [declared.name for declared in func._schema.arguments]
    return (
        [cut(name, value) for name, value in zip(names, args, strict=False)],
        {name: cut(name, value) for name, value in kwargs.items()},
    )
