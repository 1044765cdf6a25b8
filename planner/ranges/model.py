"""What is planned: one training step and the machine it runs on, as plain numbers.

A ``Problem`` is a chain of blocks, each with the tensors it saves for its backward (``TensorClass``), cut
into chunks of tokens, and the state it trains with (``StateClass``), cut into pieces. What stands before or
after the repeated blocks (embedding, head and loss) is a block without tensor classes. The machine is a
device, the places beside it, and the links that lead there, each a first-in-first-out queue per direction.

Index letters of the subpackage: ``l`` block, ``k`` tensor class, ``c`` chunk, ``a`` action, ``p`` place.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from enum import Enum

DEVICE = "device"
"""The name of the device among the places of state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hop:
    """One copy over one link; every link has a queue for each direction."""

    link: str
    write_bytes_per_second: float
    """Away from the device."""
    read_bytes_per_second: float
    """Towards the device."""

    def __post_init__(self) -> None:
        for name in ("write_bytes_per_second", "read_bytes_per_second"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"link {self.link}: {name} must be finite and > 0, got {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A store of bytes beside the device: host memory, one CXL device, one NVMe directory."""

    name: str
    capacity_bytes: int
    hops: tuple[Hop, ...]
    """The way there. One hop is direct; two store and forward through slots of ``Machine.staging``."""
    cpu_bytes_per_second: float = 0.0
    """Bytes that the CPU's optimizer reads and writes here in a second; 0 where it cannot address them."""
    write_limit_bytes: int | None = None
    """Bytes that may be written here in one step (endurance of flash); None is no limit."""
    compute_seconds_per_byte: float = 0.0
    """Arithmetic that a byte written or read costs, where device and processor are the same."""

    def __post_init__(self) -> None:
        if self.name == DEVICE or not self.name:
            raise ValueError(f"a place needs a name other than {DEVICE!r}, got {self.name!r}")
        if self.capacity_bytes < 0:
            raise ValueError(f"place {self.name}: capacity_bytes must be >= 0, got {self.capacity_bytes}")
        if len(self.hops) not in (1, 2):
            raise ValueError(f"place {self.name}: one hop or two lead to a place, got {len(self.hops)}")
        if len({hop.link for hop in self.hops}) != len(self.hops):
            raise ValueError(f"place {self.name}: both hops use link {self.hops[0].link}; give each its own")
        if self.write_limit_bytes is not None and self.write_limit_bytes < 0:
            raise ValueError(
                f"place {self.name}: write_limit_bytes must be >= 0, got {self.write_limit_bytes}"
            )
        if self.cpu_bytes_per_second < 0 or self.compute_seconds_per_byte < 0:
            raise ValueError(f"place {self.name}: rates and costs must be >= 0")


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
        if min(self.compress_bytes_per_second, self.decompress_bytes_per_second) <= 0 or self.error < 0:
            raise ValueError(f"codec {self.name}: rates must be > 0 and error >= 0")

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
            raise ValueError(f"state {self.name}: need piece_bytes >= 0 and at least one place")


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """A way to do the optimizer's work of a piece."""

    on_cpu: bool
    ahead: bool
    """False: as soon as backward has made the gradient (no clipping by a global norm, no accumulation).
    True: just before the next forward needs the block; the gradient waits until then."""

    @property
    def label(self) -> str:
        """``cpu-ahead``, ``device-in-backward`` ..."""
        return f"{'cpu' if self.on_cpu else DEVICE}-{'ahead' if self.ahead else 'in-backward'}"


ALL_UPDATES = tuple(Update(on_cpu=c, ahead=a) for c in (False, True) for a in (False, True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One link of the chain."""

    name: str
    forward_seconds: float
    backward_seconds: float
    forward_transient_bytes: int = 0
    """The most that lives during its forward beside what is kept of it."""
    backward_transient_bytes: int = 0
    """The most that lives during its backward beside saved tensors and, with state classes, gradients."""
    classes: tuple[TensorClass, ...] = ()
    states: tuple[StateClass, ...] = ()
    pieces: int = 1
    device_update_seconds: float = 0.0
    """The optimizer's arithmetic for the whole block on the device."""

    def __post_init__(self) -> None:
        names = [c.name for c in self.classes]
        if len(set(names)) != len(names):
            raise ValueError(f"block {self.name}: two classes share a name: {names}")
        if (
            min(self.forward_seconds, self.backward_seconds, self.device_update_seconds) < 0
            or self.pieces < 1
        ):
            raise ValueError(f"block {self.name}: seconds must be >= 0 and pieces >= 1")
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
class Machine:
    """The device, what stands beside it, and the staging between them."""

    device_capacity_bytes: int
    places: tuple[Place, ...] = ()
    """From fast to slow: ranges are laid out in this order."""
    slots: int = 2
    """Staging slots of the device; each holds what one block swaps. Two are MEMO's rounding buffers."""
    staging: str | None = None
    """The place whose slots bytes pass through on a way of two hops, and where the CPU's optimizer works."""
    forwarding_slots: int = 4
    """Such slots; each holds what one block sends further."""

    def __post_init__(self) -> None:
        names = [p.name for p in self.places]
        if len(set(names)) != len(names):
            raise ValueError(f"two places share a name: {names}")
        if self.places and (self.slots < 1 or self.forwarding_slots < 1):
            raise ValueError(
                "places can be reached through slots only: slots and forwarding_slots must be >= 1"
            )
        if self.staging is not None and (
            self.staging not in names or len(self.place(self.staging).hops) != 1
        ):
            raise ValueError(f"staging must name a place one hop away, got {self.staging!r} of {names}")
        if self.staging is None and any(len(p.hops) > 1 for p in self.places):
            raise ValueError("a way of two hops needs a staging place")

    def place(self, name: str) -> Place:
        """The place called ``name``. Raises KeyError with the names that exist."""
        for place in self.places:
            if place.name == name:
                return place
        raise KeyError(f"no place {name!r}; there are {[p.name for p in self.places]}")

    @property
    def links(self) -> tuple[str, ...]:
        """Names of all links, in the order of their first mention."""
        return tuple(dict.fromkeys(hop.link for place in self.places for hop in place.hops))


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
    """Allowed ways to update; clipping and accumulation exclude those in backward."""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("a step needs at least one block")
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
    def saved_bytes(self) -> int:
        """What all blocks save for backward."""
        return sum(c.total_bytes for b in self.blocks for c in b.classes)

    @property
    def compute_seconds(self) -> float:
        """Forward and backward with nothing waited for: no plan takes less."""
        return math.fsum(b.forward_seconds + b.backward_seconds for b in self.blocks)


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
