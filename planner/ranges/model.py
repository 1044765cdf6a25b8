"""What is planned: one training step and the machine it runs on, as plain numbers.

A ``Problem`` is a chain of blocks, each with the tensors it saves for its backward (``TensorClass``), cut
into chunks of tokens, and the state it trains with (``StateClass``), cut into pieces. What stands before or
after the repeated blocks (embedding, head and loss) is a block without tensor classes. The words of the
machine are in ``machine`` and may be imported from here.

Index letters of the subpackage: ``l`` block, ``k`` tensor class, ``c`` chunk, ``a`` action, ``p`` place.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from enum import Enum

from memtrain.planner.ranges.machine import DEVICE, Hop, Machine, Place

__all__ = [
    "ALL_UPDATES",
    "DEVICE",
    "SEQUENTIAL_UPDATES",
    "Block",
    "Codec",
    "Hop",
    "Machine",
    "Place",
    "Problem",
    "Role",
    "StateClass",
    "TensorClass",
    "Update",
    "causal_attention_seconds",
    "even_seconds",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """A lossy compression that the user allowed."""

    name: str
    ratio: float
    """Compressed bytes over plain bytes."""
    compress_bytes_per_second: float
    decompress_bytes_per_second: float
    """Both of plain bytes; the arithmetic waits meanwhile."""
    error: float
    """What one compressed byte counts against the error budget."""
    places: tuple[str, ...] = ()
    """Where compressed tensors may be swapped to; on the device they may always stay."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"codec {self.name}: ratio must lie between 0 and 1, got {self.ratio}")
        for field in ("compress_bytes_per_second", "decompress_bytes_per_second"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(
                    f"codec {self.name}: {field} must be finite and > 0, got {getattr(self, field)}"
                )
        if not 0 <= self.error < math.inf:
            raise ValueError(f"codec {self.name}: error must be finite and >= 0, got {self.error}")

    def size(self, plain_bytes: int) -> int:
        """Compressed bytes of ``plain_bytes``, rounded up."""
        return math.ceil(plain_bytes * self.ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorClass:
    """Tensors of one block that its backward needs and that share a fate, cut into chunks of tokens."""

    name: str
    chunk_bytes: int
    chunks: int = 1
    """1 where the producing operation does not work token by token."""
    recompute_seconds: tuple[float, ...] = ()
    """Of each chunk, the first tokens first, never falling; empty where it cannot be recomputed. Recomputed
    chunks are always the first ones: under causal attention they are the cheapest, and need no others."""
    needs: tuple[str, ...] = ()
    """Classes of the block that a recompute reads; backward has restored them all before it begins."""
    lossy: bool = False
    """Whether the allowed codecs may be applied."""
    attention: bool = False
    """The attention kernel's output, which rules of other systems treat apart."""

    def __post_init__(self) -> None:
        if self.chunks < 1 or self.chunk_bytes < 0:
            raise ValueError(
                f"class {self.name}: need chunks >= 1 and chunk_bytes >= 0, "
                f"got {self.chunks} and {self.chunk_bytes}"
            )
        costs = self.recompute_seconds
        if costs and len(costs) != self.chunks:
            raise ValueError(f"class {self.name}: {len(costs)} recompute_seconds for {self.chunks} chunks")
        if any(cost < 0 for cost in costs) or any(a > b for a, b in itertools.pairwise(costs)):
            raise ValueError(f"class {self.name}: recompute_seconds must be >= 0 and never fall, got {costs}")

    @property
    def total_bytes(self) -> int:
        """All chunks."""
        return self.chunk_bytes * self.chunks


class Role(str, Enum):
    """What a class of state is to the step."""

    PARAMETER = "parameter"
    """The copy that forward and backward read; the update writes it."""
    GRADIENT = "gradient"
    """Backward writes it, the update reads it."""
    OPTIMIZER = "optimizer"
    """Master weights and moments: the update reads and writes them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateClass:
    """State of one block, cut into the block's ``pieces``."""

    name: str
    role: Role
    piece_bytes: int
    places: tuple[str, ...]
    """Where it may lie; ``device`` or names of places."""

    def __post_init__(self) -> None:
        if self.piece_bytes < 0 or not self.places:
            raise ValueError(
                f"state {self.name}: need piece_bytes >= 0 and at least one place, "
                f"got {self.piece_bytes} and {self.places}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """A way to do the optimizer's work of a piece."""

    on_cpu: bool
    ahead: bool
    """False: as soon as backward has made the gradient (no clipping by a global norm, one micro-batch).
    True: just before the next forward needs the block; the gradient waits until then."""
    apart: bool = False
    """The gradient waits likewise, but for the end of the last backward: a part of the step by itself does
    all updates then, and hides behind nothing. Sequential, in the words of ``actions``."""

    def __post_init__(self) -> None:
        if self.apart and not self.ahead:
            raise ValueError("an update that is apart comes when all gradients are there: set ahead too")

    @property
    def label(self) -> str:
        """``cpu-ahead``, ``device-in-backward``, ``cpu-sequential`` ..."""
        when = "sequential" if self.apart else "ahead" if self.ahead else "in-backward"
        return f"{'cpu' if self.on_cpu else DEVICE}-{when}"


ALL_UPDATES = tuple(Update(on_cpu=c, ahead=a) for c in (False, True) for a in (False, True))
SEQUENTIAL_UPDATES = tuple(Update(on_cpu=c, ahead=True, apart=True) for c in (False, True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One link of the chain."""

    name: str
    forward_seconds: float
    backward_seconds: float
    forward_transient_bytes: int = 0
    """The most that lives during its forward beside what stays of it, whatever is decided: tensors that are
    dropped, or compressed, live here until then."""
    backward_transient_bytes: int = 0
    """The most that lives during its backward beside saved and restored tensors and, with state classes,
    gradients."""
    classes: tuple[TensorClass, ...] = ()
    states: tuple[StateClass, ...] = ()
    pieces: int = 1
    device_update_seconds: float = 0.0
    """The optimizer's arithmetic for the whole block on the device."""

    def __post_init__(self) -> None:
        for names in ([c.name for c in self.classes], [s.name for s in self.states]):
            if len(set(names)) != len(names):
                raise ValueError(f"block {self.name}: two classes share a name: {names}")
        for field in ("forward_seconds", "backward_seconds", "device_update_seconds"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(
                    f"block {self.name}: {field} must be finite and >= 0, got {getattr(self, field)}"
                )
        for field in ("forward_transient_bytes", "backward_transient_bytes"):
            if getattr(self, field) < 0:
                raise ValueError(f"block {self.name}: {field} must be >= 0, got {getattr(self, field)}")
        if self.pieces < 1:
            raise ValueError(f"block {self.name}: pieces must be >= 1, got {self.pieces}")
        seen: set[str] = set()
        for tensor in self.classes:
            missing = [name for name in tensor.needs if name not in seen]
            if missing:
                raise ValueError(
                    f"block {self.name}: {tensor.name} needs {missing}, which do not stand before it; "
                    "list classes in the order in which backward can restore them"
                )
            seen.add(tensor.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """All that decides a plan."""

    blocks: tuple[Block, ...]
    machine: Machine
    codecs: tuple[Codec, ...] = ()
    error_budget: float = 0.0
    """Largest allowed ``sum(error * compressed plain bytes) / sum(all saved bytes)``."""
    reserved_bytes: int = 0
    """On the device whatever is decided: libraries, state without a class, the allocator's slack."""
    updates: tuple[Update, ...] = ALL_UPDATES
    """Allowed ways to update. Clipping by a global norm excludes those in backward, and the caller leaves
    them out; several micro-batches exclude them by themselves."""
    micro_batches: int = 1
    """Forward and backward passes of one step. ``blocks`` describe one micro-batch, and all are planned
    alike; their gradients are added up where they lie, by whoever updates them (see ``schedule``)."""
    in_flight: int = 1
    """Micro-batches whose saved tensors are held at once: a stage of a 1F1B pipeline holds as many as there
    are stages from it to the last. What a pipeline waits for is not in the step."""
    sequences: int = 1
    """In a micro-batch: where nothing fits, fewer are looked at."""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("a step needs at least one block")
        names = [b.name for b in self.blocks]
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ValueError(f"blocks need names of their own, {twice} stand there twice")
        if len({update.apart for update in self.updates}) > 1:
            raise ValueError(
                f"updates {[u.label for u in self.updates]} are partly sequential: all of them are, or none"
            )
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches must be >= 1, got {self.micro_batches}")
        if self.sequences < 1:
            raise ValueError(f"sequences must be >= 1, got {self.sequences}")
        if not 1 <= self.in_flight <= self.micro_batches:
            raise ValueError(
                f"in_flight must lie between 1 and the {self.micro_batches} micro_batches of the step, "
                f"got {self.in_flight}; a pipeline holds no more micro-batches than it is given"
            )
        if self.reserved_bytes < 0 or not 0 <= self.error_budget < math.inf:
            raise ValueError(
                "reserved_bytes and error_budget must be >= 0, "
                f"got {self.reserved_bytes} and {self.error_budget}"
            )
        known = {DEVICE, *(p.name for p in self.machine.places)}
        for block in self.blocks:
            for state in block.states:
                if not set(state.places) <= known:
                    raise ValueError(
                        f"state {state.name} of {block.name} names places beyond {sorted(known)}"
                    )
        for codec in self.codecs:
            if not set(codec.places) <= known - {DEVICE}:
                raise ValueError(f"codec {codec.name} names places beyond {sorted(known - {DEVICE})}")

    @property
    def updates_apart(self) -> bool:
        """Whether a part of the step by itself does the updates."""
        return any(update.apart for update in self.updates) and any(block.states for block in self.blocks)

    @property
    def saved_bytes(self) -> int:
        """What all blocks save for the backward of one micro-batch."""
        return sum(c.total_bytes for b in self.blocks for c in b.classes)

    @property
    def compute_seconds(self) -> float:
        """All forwards and backwards with nothing waited for: no plan takes less."""
        return self.micro_batches * math.fsum(b.forward_seconds + b.backward_seconds for b in self.blocks)

    @property
    def two_way_links(self) -> frozenset[str]:
        """Links over which state may travel, and copies both ways at once.

        Saved tensors alone never do, unless a link is the first hop to one place and the second to another:
        the first fetch of a backward waits until all that forward has sent has gone over its link, and the
        next forward until the queues are empty.
        """
        first = {place.hops[0].link for place in self.machine.places}
        second = {place.hops[1].link for place in self.machine.places if len(place.hops) == 2}
        names = {p for b in self.blocks for s in b.states for p in s.places} - {DEVICE}
        if self.machine.staging is not None and any(b.states for b in self.blocks):
            names.add(self.machine.staging)
        state = {hop.link for name in names for hop in self.machine.place(name).hops}
        return frozenset(state | (first & second))

    def rates(self) -> dict[Hop, tuple[float, float]]:
        """Bytes per second of every hop, written and read; on two-way links within their shares."""
        two_way, found = self.two_way_links, dict[Hop, tuple[float, float]]()
        for hop in (hop for place in self.machine.places for hop in place.hops):
            alone = hop.write_bytes_per_second, hop.read_bytes_per_second
            found[hop] = self.machine.shares(hop) if hop.link in two_way else alone
        return found


def causal_attention_seconds(attention_seconds: float, kv_seconds: float, chunks: int) -> tuple[float, ...]:
    """Recompute seconds per chunk of causal attention: chunk c (from 1) does 2c-1 of C*C parts of the work.

    Its keys and values are regenerated from the block's input, ``kv_seconds`` for all chunks together; those
    of earlier chunks are there already, because recomputed chunks are a prefix. Charged even where the plan
    happens to keep keys and values: an upper bound.
    """
    return tuple(
        attention_seconds * (2 * c - 1) / chunks**2 + kv_seconds / chunks for c in range(1, chunks + 1)
    )


def even_seconds(seconds: float, chunks: int) -> tuple[float, ...]:
    """Recompute seconds per chunk of an operation that costs the same for each (token-wise, or windowed)."""
    return (seconds / chunks,) * chunks
