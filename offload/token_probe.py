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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from memtrain.offload.block_runs import BlockRuns, Cuts, Kernel, tensors_of
from memtrain.offload.compare import Mismatch, TwoTokenAxes, difference, token_axis
from memtrain.offload.errors import TokenRangeError
from memtrain.offload.random_rows import DrawnAsBefore
from memtrain.offload.results import dropout, on_first_tokens
from memtrain.offload.token_kinds import Kind, TokenProbe
from memtrain.offload.token_rows import RowAxis, token_count

_MOST_ATTEMPTS = 256
"""Ways to cut the arguments that are tried; one is enough unless a size happens to equal the tokens."""
_ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference, in parts of a tensor's largest entry, that may come from rounding alone. Blocks of
SmolLM2's shapes and tiny ones of Llama and GPT-2 show up to 5e-7 in float32 and 8e-3 in bfloat16 on a CPU."""


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
        TokenRangeError: it is not causal, draws random numbers for each token otherwise than in a dropout,
            saves tensors in which tokens cannot be told apart, or gives other values for a prefix.
        ValueError: a prefix is not a part of the tokens.
    """
    tokens = token_count(args, kwargs)
    for prefix in (*prefixes, *attention_prefixes):
        if not 0 < prefix < tokens:
            raise ValueError(f"{name}: a prefix must have between 1 and {tokens - 1} tokens, got {prefix}")
    probing = _Probing(name, BlockRuns(function, args, kwargs, is_fixed))
    for prefix in sorted(set(prefixes), reverse=True):
        probing.look_at(prefix)
    for prefix in sorted(set(attention_prefixes), reverse=True):
        probing.look_at_attention(prefix)
    return probing.result()


@dataclass(slots=True)
class _Comparison:
    """A forward on a prefix beside the whole one."""

    cuts: Cuts
    kinds: list[RowAxis | Kind] = field(default_factory=list)
    drawn: tuple[RowAxis | None, ...] = ()
    difference: float = 0.0
    worst: int = 0
    """The saved tensor with the largest difference."""
    two_axes: set[int] = field(default_factory=set)
    """Saved tensors with tokens along two dimensions."""


class _Probing:
    """What the runs of one probe have shown so far."""

    def __init__(self, name: str, runs: BlockRuns) -> None:
        self._name = name
        self._runs = runs
        self._tokens = runs.tokens
        self._found: _Comparison | None = None
        self._attention: list[tuple[RowAxis | None, ...]] = [
            tuple(None for _ in kernel.outputs) for kernel in runs.kernels
        ]
        self._difference = 0.0

    def result(self) -> TokenProbe:
        """What was found."""
        found = self._found or _Comparison({})
        return TokenProbe(
            name=self._name,
            tokens=self._tokens,
            arguments=found.cuts,
            saved=tuple(found.kinds),
            attention=tuple(self._attention),
            is_random=self._runs.is_random,
            drawn=found.drawn,
            row_bytes=self._bytes(found, lambda kind: isinstance(kind, RowAxis)) // self._tokens,
            whole_bytes=self._bytes(found, lambda kind: kind is Kind.WHOLE),
            difference=self._difference,
            tolerance=self._tolerance(),
            chooses=self._chooses(found),
            witness=self._witness(found),
        )

    def look_at(self, prefix: int) -> None:
        """Compare the forward on the first ``prefix`` tokens with the whole one."""
        found = self._best_comparison(prefix)
        self._check_that_none_looks_ahead(prefix, found)
        if found.difference > self._tolerance():
            shape = tuple(self._runs.saved[found.worst].shape)
            raise self._refused(
                f"gives other values for the first {prefix} tokens alone: saved tensor {found.worst}, "
                f"{shape}, differs by {found.difference:.1e} of its largest entry, more than rounding "
                f"explains ({self._tolerance():.0e})"
            )
        if found.difference > 0.0 and self._chooses(found):
            raise self._refused(
                "chooses by value (it saves whole numbers, such as the experts of a token), and on this "
                "machine a prefix is not bit-equal: another choice might be made in backward"
            )
        self._difference = max(self._difference, found.difference)
        self._found = found

    def look_at_attention(self, prefix: int) -> None:
        """Compare the attention kernels on the first ``prefix`` tokens with those on all."""
        for number, kernel in enumerate(self._runs.kernels):
            if dropout(kernel.operator, kernel.args, kernel.kwargs) != 0.0:
                continue  # never stored
            self._check_that_it_can_be_cut(kernel)
            args, kwargs = on_first_tokens(kernel.operator, kernel.args, kernel.kwargs, self._tokens, prefix)
            with torch.no_grad():
                output = kernel.operator(*args, **kwargs)
            axes = []
            tolerance = _rounding(kernel.outputs)
            for whole, part in zip(kernel.outputs, tensors_of(output), strict=True):
                try:
                    axis, apart = token_axis(whole, part, self._tokens, prefix)
                except Mismatch as error:
                    raise self._refused(f"has attention that cannot be cut: {error}") from None
                if axis is not None and apart > tolerance:
                    raise self._refused(
                        f"is not causal: attention kernel {number} gives other values for the first {prefix} "
                        f"tokens alone, by {apart:.1e} of the largest"
                    )
                if axis is not None:  # otherwise all of it is stored
                    self._difference = max(self._difference, apart)
                axes.append(axis)
            self._attention[number] = tuple(axes)

    # one prefix -------------------------------------------------------------------------------

    def _best_comparison(self, prefix: int) -> _Comparison:
        """The first way to cut the arguments that gives the same rows; if none does, the first that runs."""
        first: _Comparison | None = None
        reason = ""
        ways = self._runs.ways_to_cut() if self._found is None else iter([self._found.cuts])
        for cuts in itertools.islice(ways, _MOST_ATTEMPTS):
            try:
                found = self._compare(cuts, prefix)
            except torch.OutOfMemoryError:
                raise
            except (Mismatch, RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
                reason = reason or str(error)
                continue
            if found.difference <= self._tolerance():
                return found
            first = first or found
        if first is None:
            raise self._refused(
                f"cannot be computed for the first {prefix} of {self._tokens} tokens alone ({reason})"
            )
        return first

    def _compare(self, cuts: Cuts, prefix: int) -> _Comparison:
        found = _Comparison(cuts)

        def visit(number: int, part: torch.Tensor) -> None:
            if number >= len(self._runs.saved):
                raise Mismatch(f"more than {len(self._runs.saved)} tensors are saved for backward")
            kind, apart = self._kind(number, part, prefix, found)
            if apart > found.difference:
                found.difference, found.worst = apart, number
            found.kinds.append(kind)

        drawn = DrawnAsBefore(self._runs.drawn, self._tokens, prefix)
        self._runs.on_prefix(cuts, prefix, visit, drawn.drawing())
        found.drawn = tuple(drawn.axes)
        return found

    def _kind(
        self, number: int, part: torch.Tensor, prefix: int, found: _Comparison
    ) -> tuple[RowAxis | Kind, float]:
        whole = self._runs.saved[number]
        if self._runs.is_given(whole):
            return Kind.GIVEN, 0.0
        try:
            axis, apart = token_axis(whole, part, self._tokens, prefix)
        except TwoTokenAxes:
            found.two_axes.add(number)
            return Kind.WHOLE, 0.0
        if axis is not None:
            return axis, apart
        was_whole = self._found is not None and self._found.kinds[number] is Kind.WHOLE
        return (Kind.WHOLE if was_whole or apart > 0.0 else Kind.AGAIN), 0.0

    def _check_that_none_looks_ahead(self, prefix: int, found: _Comparison) -> None:
        """Run on other tokens from ``prefix`` on. Raises TokenRangeError if a row before them notices."""

        def visit(number: int, other: torch.Tensor) -> None:
            if number >= len(self._runs.saved) or other.shape != self._runs.saved[number].shape:
                raise Mismatch(f"saved tensor {number} has another shape")
            whole, kind = self._runs.saved[number], found.kinds[number]
            if kind is Kind.AGAIN and difference(whole, other) != 0.0:
                found.kinds[number] = Kind.WHOLE
            if number in found.two_axes and difference(whole, other) != 0.0:
                raise self._refused(
                    f"saves a tensor of shape {tuple(whole.shape)} with tokens along two dimensions, as "
                    "attention does without a fused kernel (use scaled_dot_product_attention)"
                )
            if isinstance(kind, RowAxis):
                rows = (kind.rows(tensor, self._tokens, 0, prefix) for tensor in (whole, other))
                if difference(*rows) != 0.0:
                    raise self._refused(
                        f"is not causal: what it saves for the first {prefix} tokens (saved tensor {number}, "
                        f"{tuple(whole.shape)}) depends on the others"
                    )

        try:
            self._runs.with_other_tokens(prefix, visit)
        except Mismatch as error:
            raise self._refused(f"saves other tensors for other values of its input ({error})") from None

    # what follows -----------------------------------------------------------------------------

    def _check_that_it_can_be_cut(self, kernel: Kernel) -> None:
        query, key = (kernel.args[place].shape[-2] for place in range(2))
        if not kernel.operator._opname.startswith("_scaled_dot_product") or {query, key} != {self._tokens}:
            raise self._refused(
                f"runs attention kernel {kernel.operator._opname} on {query} queries and {key} keys, which "
                f"cannot be cut at a token of {self._tokens}"
            )

    def _chooses(self, found: _Comparison) -> bool:
        """Whether whole numbers are saved for each token; masks of dropouts and comparisons are none."""
        return any(
            isinstance(kind, RowAxis) and not tensor.is_floating_point() and tensor.dtype != torch.bool
            for kind, tensor in zip(found.kinds, self._runs.saved, strict=False)
        )

    def _witness(self, found: _Comparison) -> int | None:
        cut = [
            number
            for number, (kind, tensor) in enumerate(zip(found.kinds, self._runs.saved, strict=False))
            if isinstance(kind, RowAxis) and tensor.is_floating_point()
        ]
        return cut[-1] if cut else None

    def _bytes(self, found: _Comparison, counts: Callable[[RowAxis | Kind], bool]) -> int:
        """Of the unique storages of saved tensors of some kinds."""
        storages = {}
        for tensor, kind in zip(self._runs.saved, found.kinds, strict=False):
            if counts(kind):
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    def _tolerance(self) -> float:
        """The coarsest type among what is saved decides: what is computed from it is no finer."""
        return _rounding(self._runs.saved)

    def _refused(self, why: str) -> TokenRangeError:
        return TokenRangeError(
            f"{self._name}: {why}; plan without recomputed_tokens and attention_tokens for it"
        )


def _rounding(tensors: Sequence[torch.Tensor]) -> float:
    """What may come from rounding in tensors that are computed from each other."""
    return max((_ROUNDING[tensor.dtype] for tensor in tensors if tensor.dtype in _ROUNDING), default=0.0)
