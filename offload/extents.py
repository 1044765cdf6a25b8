"""Where a tensor's bytes lie on a tier, and how one knows that they are the right ones.

An *extent* is a tensor's reserved place. It is written in *chunks* (often one, the whole extent), each of
which carries the generation that wrote it and a checksum per *piece*, the unit of one system call. The
checksum is seeded with the tensor's identity, the generation and the piece's offset, so that a block of
another tensor, of an older write or from another offset is told apart even where its own bytes are intact.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import xxhash

from memtrain.offload.errors import ExtentStateError, OffloadError
from memtrain.planner.actions import Tier
from memtrain.planner.units import round_up

_MASK = (1 << 64) - 1
_GENERATION_STEP = 0x9E3779B97F4A7C15  # odd, so that no two generations share a seed


class FreeList:
    """Free runs of an arena, in units: best fit, lowest offset first, neighbours merged."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.free_bytes = capacity_bytes
        self._starts: list[int] = [0] if capacity_bytes else []
        self._lengths: list[int] = [capacity_bytes] if capacity_bytes else []

    @property
    def largest_bytes(self) -> int:
        """The longest free run."""
        return max(self._lengths, default=0)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Offset and length of each free run."""
        return list(zip(self._starts, self._lengths, strict=True))

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a run of ``nbytes``, or None where no run is long enough."""
        fitting = [
            (length, start)
            for start, length in zip(self._starts, self._lengths, strict=True)
            if length >= nbytes
        ]
        if not fitting:
            return None
        _, start = min(fitting)
        self.take(start, nbytes)
        return start

    def take(self, offset: int, nbytes: int) -> None:
        """Allocate exactly this run. Raises ValueError where part of it is taken or outside."""
        index = bisect.bisect_right(self._starts, offset) - 1
        end = self._starts[index] + self._lengths[index] if index >= 0 else 0
        if offset + nbytes > end:
            raise ValueError(f"run {offset}+{nbytes} is not free")
        start = self._starts[index]
        rest = [(start, offset - start), (offset + nbytes, end - offset - nbytes)]
        kept = [(at, length) for at, length in rest if length]
        self._starts[index : index + 1] = [at for at, _ in kept]
        self._lengths[index : index + 1] = [length for _, length in kept]
        self.free_bytes -= nbytes

    def free(self, offset: int, nbytes: int) -> None:
        """Give a run back. Raises ValueError where part of it is free already or outside."""
        index = bisect.bisect_left(self._starts, offset)
        before_end = self._starts[index - 1] + self._lengths[index - 1] if index else 0
        after_start = self._starts[index] if index < len(self._starts) else self.capacity_bytes
        if offset < before_end or offset + nbytes > after_start:
            raise ValueError(f"run {offset}+{nbytes} is not allocated")
        self._starts.insert(index, offset)
        self._lengths.insert(index, nbytes)
        self.free_bytes += nbytes
        if index + 1 < len(self._starts) and offset + nbytes == self._starts[index + 1]:
            self._lengths[index] += self._lengths.pop(index + 1)
            del self._starts[index + 1]
        if index and before_end == offset:
            self._lengths[index - 1] += self._lengths.pop(index)
            del self._starts[index]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of an extent as one write left it."""

    offset: int
    """From the start of the extent."""
    nbytes: int
    generation: int
    piece_bytes: int
    checksums: tuple[int, ...]
    """One per piece of ``piece_bytes``, the last one shorter."""

    @property
    def end(self) -> int:
        """First byte after the chunk."""
        return self.offset + self.nbytes


class Extent:
    """The reserved place of one tensor's bytes; made by ``Store.allocate``.

    Attributes:
        name: the tensor's.
        nbytes: bytes of the tensor; ``reserved_bytes`` are taken on the tier.
        dtype, shape: what the bytes mean, where the caller said so; part of the identity.
        generation: of the latest published write; 0 before the first.
    """

    __slots__ = (
        "_starts",
        "arena_offset",
        "chunks",
        "dtype",
        "failures",
        "freed",
        "generation",
        "identity",
        "name",
        "nbytes",
        "next_generation",
        "reserved_bytes",
        "shape",
        "store_id",
        "tier",
    )

    def __init__(
        self,
        *,
        name: str,
        tier: Tier,
        store_id: str,
        arena_offset: int,
        nbytes: int,
        reserved_bytes: int,
        dtype: str | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.name = name
        self.tier = tier
        self.store_id = store_id
        self.arena_offset = arena_offset
        self.nbytes = nbytes
        self.reserved_bytes = reserved_bytes
        self.dtype = dtype
        self.shape = shape
        self.identity = xxhash.xxh3_64_intdigest(
            f"{name}\0{dtype}\0{shape}\0{store_id}\0{arena_offset}".encode()
        )
        self.generation = 0
        self.next_generation = 1
        self.chunks: dict[int, Chunk] = {}
        self._starts: list[int] = []  # their offsets in order: a table by rows has tens of thousands
        self.failures: dict[int, OffloadError] = {}
        self.freed = False

    def __repr__(self) -> str:
        return (
            f"Extent({self.name!r}, {self.tier.value}, {self.nbytes} bytes at {self.arena_offset}, "
            f"generation {self.generation})"
        )

    def seed(self, generation: int, offset: int) -> int:
        """Seed of the checksum of the piece at ``offset`` of the extent, as written by ``generation``."""
        return (self.identity + generation * _GENERATION_STEP + offset) & _MASK

    def covering(self, offset: int, nbytes: int) -> list[Chunk]:
        """The chunks that make up exactly ``[offset, offset + nbytes)``, or whole pieces of one chunk.

        Raises:
            ExtentStateError: some of it was never written, a write of it failed, or a boundary cuts a piece.
        """
        if (part := self._pieces_of_one(offset, nbytes)) is not None:
            return [part]
        chunks: list[Chunk] = []
        position, end = offset, offset + nbytes
        while not chunks or position < end:
            chunk = self.chunks.get(position)
            if chunk is None or chunk.end > end:
                raise ExtentStateError(self._why_not(offset, end, position))
            chunks.append(chunk)
            position = chunk.end
        return chunks

    def check_replaceable(self, offset: int, nbytes: int) -> None:
        """Check that a write of the range replaces whole chunks. Raises ExtentStateError."""
        for chunk in self._touching(offset, offset + nbytes):
            if chunk.offset < offset or chunk.end > offset + nbytes:
                raise ExtentStateError(
                    f"tensor {self.name} on {self.tier.value}: a write of {offset}..{offset + nbytes} "
                    f"cuts the chunk {chunk.offset}..{chunk.end} that an earlier write left; "
                    "write whole chunks"
                )

    def retract(self, offset: int, nbytes: int) -> None:
        """Forget the chunks that a write of the range is about to replace."""
        for chunk in self._touching(offset, offset + nbytes):
            del self.chunks[chunk.offset]
            del self._starts[bisect.bisect_left(self._starts, chunk.offset)]
        for start in [s for s in self.failures if offset <= s < offset + max(nbytes, 1)]:
            del self.failures[start]

    def publish(self, chunk: Chunk) -> None:
        """Every byte of ``chunk`` is on the tier, and of no other one: readers may have it."""
        if chunk.offset not in self.chunks:
            bisect.insort(self._starts, chunk.offset)
        self.chunks[chunk.offset] = chunk
        self.generation = max(self.generation, chunk.generation)

    def _pieces_of_one(self, offset: int, nbytes: int) -> Chunk | None:
        """The range as a chunk of its own, where it is whole pieces of a longer one: each piece has its
        checksum, so they can be read apart."""
        before = bisect.bisect_right(self._starts, offset) - 1
        if before < 0 or not nbytes:
            return None
        chunk, end = self.chunks[self._starts[before]], offset + nbytes
        if end > chunk.end or nbytes == chunk.nbytes:
            return None
        first, rest_before = divmod(offset - chunk.offset, chunk.piece_bytes)
        count, rest_behind = divmod(nbytes, chunk.piece_bytes)
        if rest_before or (rest_behind and end != chunk.end):
            return None
        checksums = chunk.checksums[first : first + count + bool(rest_behind)]
        return Chunk(offset, nbytes, chunk.generation, chunk.piece_bytes, checksums)

    def _touching(self, start: int, end: int) -> list[Chunk]:
        """Those that share a byte with the range or begin where it does. Chunks share none with others."""
        found: list[Chunk] = []
        for index in range(max(0, bisect.bisect_right(self._starts, start) - 1), len(self._starts)):
            chunk = self.chunks[self._starts[index]]
            if chunk.offset >= max(end, start + 1):
                break
            if start < chunk.end or chunk.offset == start:
                found.append(chunk)
        return found

    def _why_not(self, start: int, end: int, position: int) -> str:
        where = f"tensor {self.name} on {self.tier.value}: bytes {start}..{end}"
        for offset, failure in self.failures.items():
            if start <= offset < max(end, start + 1):
                return f"{where} cannot be read, their last write failed: {failure}"
        if not self.chunks:
            return f"{where} cannot be read: the extent was never written"
        written = ", ".join(f"{c.offset}..{c.end}" for _, c in sorted(self.chunks.items())[:8])
        return (
            f"{where} cannot be read: no chunk starts at {position} and ends by {end}. Written chunks: "
            f"{written}; read whole chunks"
        )


def pieces(nbytes: int, piece_bytes: int) -> list[tuple[int, int]]:
    """``(offset, length)`` of the pieces of a chunk; none for an empty one."""
    return [(start, min(piece_bytes, nbytes - start)) for start in range(0, nbytes, piece_bytes)]


def reserved(nbytes: int, unit: int) -> int:
    """Bytes that a tensor takes on a tier; an empty tensor takes one unit, so that places stay distinct."""
    return round_up(max(nbytes, 1), unit)
