"""What can happen to a chunk of tokens, as integer counts per block, class and action.

Chunks of a class are interchangeable, so counting them instead of numbering them removes their permutations
from the search. Recomputed chunks are the exception, for their costs rise along the sequence: they are the
first ones, and a share per chunk in 0..1, filled in order, gives the cost. The shares need not be integer:
costs never fall, so that the cheapest way to make up an integer count is a prefix of whole chunks.

Index letters: ``k`` tensor class, ``a`` action.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from memtrain.planner.ranges.model import Codec, Problem, TensorClass
from memtrain.planner.ranges.terms import Formulation, Linear, Load, Loads, Prefix, Row, Unit


class Kind(str, Enum):
    """What happens to a chunk between its forward and its backward."""

    RECOMPUTE = "recompute"
    COMPRESS = "compress"
    """It stays on the device, compressed."""
    COMPRESS_SWAP = "compress-swap"
    SWAP = "swap"
    SLOT = "slot"
    """It stays in its block's staging slot: offered for the last blocks, whose slots nothing takes over."""
    KEEP = "keep"


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """A kind with its place and codec."""

    kind: Kind
    place: str = ""
    codec: str = ""

    @property
    def label(self) -> str:
        """``keep``, ``swap:nvme``, ``compress:int8``, ``compress-swap:int8:host`` ..."""
        return ":".join(part for part in (self.kind.value, self.codec, self.place) if part)


KEEP = Action(kind=Kind.KEEP)
SLOT = Action(kind=Kind.SLOT)
RECOMPUTE = Action(kind=Kind.RECOMPUTE)


def in_slots(problem: Problem, block: int) -> bool:
    """Whether the slot of ``block`` is taken over by nothing: what it holds need not leave.

    So for the last blocks, unless another micro-batch's forward comes before their backward.
    """
    return problem.in_flight == 1 and block >= len(problem.blocks) - problem.machine.slots


def actions(problem: Problem, block: int, tensor: TensorClass) -> tuple[Action, ...]:
    """Open to ``tensor``, in the order in which ranges are laid out, from the first token to the last."""
    places = [p.name for p in problem.machine.places]
    leaves = bool(places) and not in_slots(problem, block)
    codecs = problem.codecs if tensor.lossy else ()
    found = [RECOMPUTE] if tensor.recompute_seconds else []
    found += [Action(kind=Kind.COMPRESS, codec=c.name) for c in codecs]
    if leaves:
        found += [
            Action(kind=Kind.COMPRESS_SWAP, codec=c.name, place=p)
            for c in codecs
            for p in reversed(places)
            if p in c.places
        ]
        found += [Action(kind=Kind.SWAP, place=p) for p in reversed(places)]
    elif places:
        found.append(SLOT)
    return (*found, KEEP)


def codec_of(problem: Problem, action: Action) -> Codec:
    """The codec that ``action`` names."""
    return next(c for c in problem.codecs if c.name == action.codec)


def stored_bytes(problem: Problem, tensor: TensorClass, action: Action) -> int:
    """What one chunk weighs between forward and backward, wherever it lies; 0 when recomputed."""
    if action.kind is Kind.RECOMPUTE:
        return 0
    if action.codec:
        return codec_of(problem, action).size(tensor.chunk_bytes)
    return tensor.chunk_bytes


class Choices:
    """The counts of a problem, and what they sum to per block."""

    def __init__(self, problem: Problem, form: Formulation) -> None:
        self.problem, self.form = problem, form
        self.counts: list[list[dict[Action, int]]] = []
        """Variables, by block, class and action."""
        self._shares: dict[tuple[int, int], list[int]] = {}
        for index, block in enumerate(problem.blocks):
            self.counts.append([self._of_class(index, k, tensor) for k, tensor in enumerate(block.classes)])
        self._error_row()

    def _of_class(self, index: int, k: int, tensor: TensorClass) -> dict[Action, int]:
        name = f"n_{index}_{tensor.name}"
        chosen = {
            a: self.form.variable(f"{name}_{a.label}", tensor.chunks, integer=True)
            for a in actions(self.problem, index, tensor)
        }
        all_chunks = Linear()
        for variable in chosen.values():
            all_chunks.add(variable, 1)
        self.form.rows.append(Row(f"{name} chunks", all_chunks, tensor.chunks, Unit.COUNT, equal=True))
        costs = tensor.recompute_seconds
        if costs and costs[0] != costs[-1]:
            shares = [self.form.variable(f"r_{index}_{tensor.name}_{c}", 1) for c in range(tensor.chunks)]
            self._shares[index, k] = shares
            self.form.derived.append(Prefix(shares, chosen[RECOMPUTE]))
        return chosen

    def _each(self, index: int) -> Iterator[tuple[TensorClass, Action, int]]:
        for tensor, chosen in zip(self.problem.blocks[index].classes, self.counts[index], strict=True):
            for action, variable in chosen.items():
                yield tensor, action, variable

    def _error_row(self) -> None:
        total = max(1, self.problem.saved_bytes)
        error = Linear()
        for index in range(len(self.problem.blocks)):
            for tensor, action, variable in self._each(index):
                if action.codec:
                    weight = codec_of(self.problem, action).error * tensor.chunk_bytes / total
                    error.add(variable, weight)
        if error.terms:
            self.form.rows.append(Row("error budget", error, self.problem.error_budget, Unit.RATIO))

    def kept_bytes(self, index: int) -> Linear:
        """On the device outside slots, from forward to backward."""
        return self._bytes(index, {Kind.KEEP, Kind.COMPRESS})

    def slot_bytes(self, index: int) -> Linear:
        """In the block's staging slot."""
        return self._bytes(index, {Kind.SWAP, Kind.COMPRESS_SWAP, Kind.SLOT})

    def restored_bytes(self, index: int) -> Linear:
        """What backward makes again beside what was stored: recomputed and decompressed chunks."""
        total = Linear()
        for tensor, action, variable in self._each(index):
            if action.kind is Kind.RECOMPUTE or action.codec:
                total.add(variable, tensor.chunk_bytes)
        return total

    def sent(self, index: int) -> Loads:
        """What leaves for each place."""
        found: Loads = {}
        for tensor, action, variable in self._each(index):
            if action.place:
                load = found.setdefault(action.place, Load())
                load.add(variable, stored_bytes(self.problem, tensor, action))
        return found

    def _bytes(self, index: int, kinds: set[Kind]) -> Linear:
        total = Linear()
        for tensor, action, variable in self._each(index):
            if action.kind in kinds:
                total.add(variable, stored_bytes(self.problem, tensor, action))
        return total

    def forward_seconds(self, index: int) -> Linear:
        """The block's forward, compression, and the arithmetic that sending costs."""
        total = Linear(self.problem.blocks[index].forward_seconds)
        for tensor, action, variable in self._each(index):
            if action.codec:
                rate = codec_of(self.problem, action).compress_bytes_per_second
                total.add(variable, tensor.chunk_bytes / rate)
        return total.plus(self._moving_seconds(index))

    def backward_seconds(self, index: int) -> Linear:
        """Fetching, recompute, decompression and the block's backward."""
        block = self.problem.blocks[index]
        total = Linear(block.backward_seconds)
        for k, (tensor, chosen) in enumerate(zip(block.classes, self.counts[index], strict=True)):
            for action, variable in chosen.items():
                if action.codec:
                    rate = codec_of(self.problem, action).decompress_bytes_per_second
                    total.add(variable, tensor.chunk_bytes / rate)
            if (index, k) in self._shares:
                for share, seconds in zip(self._shares[index, k], tensor.recompute_seconds, strict=True):
                    total.add(share, seconds)
            elif tensor.recompute_seconds:
                total.add(chosen[RECOMPUTE], tensor.recompute_seconds[0])
        return total.plus(self._moving_seconds(index))

    def _moving_seconds(self, index: int) -> Linear:
        total = Linear()
        for place, load in self.sent(index).items():
            total.plus(load.size, self.problem.machine.place(place).compute_seconds_per_byte)
        return total
