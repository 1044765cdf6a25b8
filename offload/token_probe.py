"""Finds out whether the first tokens of a block can be computed again without the others, and how exactly.

The block runs on what it is given: on all tokens, on a prefix of them, and on all with the tokens behind the
prefix replaced. From the first two follow the token axis of every argument and of every tensor that is saved
for backward, and by how much the rows of a prefix differ from those of the whole (matrix products of some
shapes depend on the number of rows). The third must leave every row of the prefix bit for bit as it was:
then no token looks ahead. Nothing is known by name but the arguments of attention kernels.

All of this must find room where a forward does that saves its tensors once. So the prefix runs first, and
what it saves is held until the run on all tokens has come to the same tensor; of that run nothing is held but
128 bits for each tensor, to which the third run is compared. The price is a run more: what dropouts draw for
all tokens must be known before the prefix runs.

All tokens means ``T``, dimension -2 of the block's first tensor argument.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from memtrain.offload.attention_probe import AttentionProbe
from memtrain.offload.block_runs import BlockRuns, Cuts
from memtrain.offload.compare import Mismatch, TwoTokenAxes, fingerprint, token_axis
from memtrain.offload.errors import TokenRangeError
from memtrain.offload.random_rows import DrawnAsBefore
from memtrain.offload.refusals import cannot_be_cut
from memtrain.offload.token_kinds import Kind, TokenProbe, rounding
from memtrain.offload.token_rows import RowAxis, token_count

_MOST_ATTEMPTS = 256
"""Ways to cut the arguments that are tried; one is enough unless a size happens to equal the tokens."""


def probe_tokens(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    is_fixed: Callable[[torch.Tensor], bool],
    prefix: int | None = None,
    attention_prefixes: Sequence[int] = (),
) -> TokenProbe:
    """Look at one block on real arguments; these, gradients and random numbers are left as they are.

    Args:
        name: of the block, for errors.
        function: its forward.
        args, kwargs: what it is called with.
        is_fixed: whether a tensor is a parameter or buffer.
        prefix: number of tokens for which the block is to be computed again, below ``T``; None: not in part.
        attention_prefixes: numbers of tokens for which the attention kernels are, each below ``T``.

    Raises:
        TokenRangeError: it is not causal, draws random numbers for each token otherwise than in a dropout,
            saves tensors in which tokens cannot be told apart, or gives other values for a prefix; or its
            input is not finite.
        ValueError: a prefix is not a part of the tokens.
    """
    tokens = token_count(args, kwargs)
    for length in (*([] if prefix is None else [prefix]), *attention_prefixes):
        if not 0 < length < tokens:
            raise ValueError(f"{name}: a prefix must have between 1 and {tokens - 1} tokens, got {length}")
    attention = AttentionProbe(name, tokens, attention_prefixes)
    try:
        runs = BlockRuns(function, args, kwargs, is_fixed, attention.watching())
        found = _Comparison({}) if prefix is None else _Probing(name, runs, prefix).look()
    except TokenRangeError as error:
        entry = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        if bool(entry.isfinite().all()):
            raise
        # A kernel's mask adds -inf to a score, and nan stays nan: such values are seen by all tokens.
        raise cannot_be_cut(
            name, "was given values that are not finite, in which its tokens cannot be told apart"
        ) from error
    witness = found.witness
    return TokenProbe(
        name=name,
        tokens=tokens,
        arguments=found.cuts,
        saved=tuple(saved.kind for saved in found.saved),
        attention=tuple(attention.axes),
        attention_whole_bytes=attention.whole_bytes,
        is_random=runs.is_random,
        drawn=found.drawn,
        row_bytes=found.storage_bytes(lambda kind: isinstance(kind, RowAxis)) // tokens,
        whole_bytes=found.storage_bytes(lambda kind: kind is Kind.WHOLE),
        difference=max(found.difference, attention.difference),
        tolerance=rounding(runs.saved_dtypes),
        chooses=found.chooses,
        witness=witness,
        witness_bytes=attention.row_bytes + (0 if witness is None else found.saved[witness].nbytes // tokens),
    )


@dataclass(slots=True)
class _Saved:
    """What is remembered of a saved tensor of all tokens, which is gone."""

    kind: RowAxis | Kind
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int
    storage: StorageWeakRef
    """Keeps the identity of its storage from being given to another one."""
    storage_bytes: int
    bits: bytes | None
    """Stands for what must not depend on the tokens behind the prefix; None: all of it may."""
    has_two_axes: bool


@dataclass(slots=True)
class _Comparison:
    """A forward on a prefix beside the whole one."""

    cuts: Cuts
    saved: list[_Saved] = field(default_factory=list)
    drawn: tuple[RowAxis | None, ...] = ()
    difference: float = 0.0
    worst: int = 0
    """The saved tensor with the largest difference."""

    @property
    def chooses(self) -> bool:
        """Whether whole numbers are saved for each token; masks of dropouts and comparisons are none."""
        return any(
            isinstance(saved.kind, RowAxis)
            and not saved.dtype.is_floating_point
            and saved.dtype != torch.bool
            for saved in self.saved
        )

    @property
    def witness(self) -> int | None:
        """The last saved tensor of real numbers that is cut."""
        cut = [
            number
            for number, saved in enumerate(self.saved)
            if isinstance(saved.kind, RowAxis) and saved.dtype.is_floating_point
        ]
        return cut[-1] if cut else None

    def storage_bytes(self, counts: Callable[[RowAxis | Kind], bool]) -> int:
        """Of the unique storages of saved tensors of some kinds."""
        counted = {saved.storage.cdata: saved.storage_bytes for saved in self.saved if counts(saved.kind)}
        return sum(counted.values())


class _Probing:
    """One block and one prefix."""

    def __init__(self, name: str, runs: BlockRuns, prefix: int) -> None:
        self._name = name
        self._runs = runs
        self._prefix = prefix
        self._tolerance = rounding(runs.saved_dtypes)

    def look(self) -> _Comparison:
        """Compare the forward on the prefix with the whole one. Raises TokenRangeError."""
        found = self._best_comparison()
        self._check_that_none_looks_ahead(found)
        if found.difference > self._tolerance:
            raise self._refused(
                f"gives other values for the first {self._prefix} tokens alone: saved tensor {found.worst}, "
                f"{tuple(found.saved[found.worst].shape)}, differs by {found.difference:.1e} of its largest "
                f"entry, more than rounding explains ({self._tolerance:.0e})"
            )
        if found.difference > 0.0 and found.chooses:
            raise self._refused(
                "chooses by value (it saves whole numbers, such as the experts of a token), and on this "
                "machine a prefix is not bit-equal: another choice might be made in backward"
            )
        return found

    def _best_comparison(self) -> _Comparison:
        """The first way to cut the arguments that gives the same rows; if none does, the first that runs."""
        first: _Comparison | None = None
        reason = ""
        for cuts in itertools.islice(self._runs.ways_to_cut(), _MOST_ATTEMPTS):
            try:
                found = self._compare(cuts)
            except torch.OutOfMemoryError:
                raise
            except (Mismatch, RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
                reason = reason or str(error)
                continue
            if found.difference <= self._tolerance:
                return found
            first = first or found
        if first is None:
            raise self._refused(
                f"cannot be computed for the first {self._prefix} of {self._runs.tokens} tokens alone "
                f"({reason})"
            )
        return first

    def _compare(self, cuts: Cuts) -> _Comparison:
        found = _Comparison(cuts)
        parts: list[torch.Tensor | None] = []
        drawn = DrawnAsBefore(self._runs.drawn, self._runs.tokens, self._prefix)
        self._runs.on_prefix(cuts, self._prefix, lambda _, part: parts.append(part), drawn.drawing())
        found.drawn = tuple(drawn.axes)

        def visit(number: int, whole: torch.Tensor) -> None:
            part, parts[number] = parts[number], None  # given up as soon as it has been compared
            assert part is not None
            saved, apart = self._saved(whole, part)
            if apart > found.difference:
                found.difference, found.worst = apart, number
            found.saved.append(saved)

        self._runs.on_all(visit)
        return found

    def _saved(self, whole: torch.Tensor, part: torch.Tensor) -> tuple[_Saved, float]:
        kind, apart, has_two_axes = self._kind(whole, part)
        storage = whole.untyped_storage()
        saved = _Saved(
            kind=kind,
            shape=whole.shape,
            dtype=whole.dtype,
            nbytes=whole.nbytes,
            storage=StorageWeakRef(storage),  # type: ignore[no-untyped-call]
            storage_bytes=storage.nbytes(),
            bits=None,
            has_two_axes=has_two_axes,
        )
        saved.bits = self._bits(whole, saved)
        return saved, apart

    def _kind(self, whole: torch.Tensor, part: torch.Tensor) -> tuple[RowAxis | Kind, float, bool]:
        """Of a saved tensor, by how much the prefix differs, and whether tokens lie along two dimensions."""
        if self._runs.is_given(whole):
            return Kind.GIVEN, 0.0, False
        try:
            axis, apart = token_axis(whole, part, self._runs.tokens, self._prefix)
        except TwoTokenAxes:
            return Kind.WHOLE, 0.0, True
        if axis is not None:
            return axis, apart, False
        return Kind.WHOLE if apart > 0.0 else Kind.AGAIN, 0.0, False

    def _bits(self, tensor: torch.Tensor, saved: _Saved) -> bytes | None:
        """What stands for that part of a tensor which must not depend on the tokens behind the prefix."""
        if isinstance(saved.kind, RowAxis):
            return fingerprint(saved.kind.rows(tensor, self._runs.tokens, 0, self._prefix))
        return fingerprint(tensor) if saved.kind is Kind.AGAIN or saved.has_two_axes else None

    def _check_that_none_looks_ahead(self, found: _Comparison) -> None:
        """Run on other tokens behind the prefix. Raises TokenRangeError if a row before them notices."""

        def visit(number: int, other: torch.Tensor) -> None:
            saved = found.saved[number]
            if other.shape != saved.shape:
                raise Mismatch(f"saved tensor {number} has another shape")
            if self._bits(other, saved) == saved.bits:
                return
            if saved.has_two_axes:
                raise self._refused(
                    f"saves a tensor of shape {tuple(saved.shape)} with tokens along two dimensions, as "
                    "attention does without a fused kernel (use scaled_dot_product_attention)"
                )
            if isinstance(saved.kind, RowAxis):
                raise self._refused(
                    f"is not causal: what it saves for the first {self._prefix} tokens (saved tensor "
                    f"{number}, {tuple(saved.shape)}) depends on the others"
                )
            saved.kind = Kind.WHOLE

        try:
            self._runs.with_other_tokens(self._prefix, visit)
        except Mismatch as error:
            raise self._refused(f"saves other tensors for other values of its input ({error})") from None

    def _refused(self, why: str) -> TokenRangeError:
        return cannot_be_cut(self._name, why)
