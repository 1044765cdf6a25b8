"""What a store has moved so far, and in how many seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

from memtrain.offload.contents import Content, content_of
from memtrain.offload.io import Direction, IORequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """What a store has moved so far. Seconds are those in which the direction had work."""

    bytes_read: int
    bytes_written: int
    read_seconds: float
    write_seconds: float
    used_bytes: int
    peak_used_bytes: int
    second_reads: int
    """Pieces whose first read failed or found other bytes, and whose second did not."""


class StoreMeter:
    """Counts of one store, whose lock is held by who calls.

    Attributes:
        moved_bytes: by direction.
        written_bytes: given to the store to write, by what they are of.
    """

    def __init__(self) -> None:
        self.moved_bytes = dict.fromkeys(Direction, 0)
        self.written_bytes = dict.fromkeys(Content, 0)
        self._busy_seconds = dict.fromkeys(Direction, 0.0)
        self._busy_since = dict.fromkeys(Direction, 0.0)
        self._active = dict.fromkeys(Direction, 0)
        self._second_reads = 0

    def begin(self, direction: Direction, name: str, nbytes: int) -> None:
        """A transfer of tensor ``name`` was given to the store."""
        if self._active[direction] == 0:
            self._busy_since[direction] = time.perf_counter()
        self._active[direction] += 1
        if direction is Direction.WRITE:
            self.written_bytes[content_of(name)] += nbytes

    def note_piece(self, request: IORequest) -> None:
        """One piece has been moved."""
        self.moved_bytes[request.direction] += request.nbytes
        self._second_reads += request.reread

    def end(self, direction: Direction) -> None:
        """A transfer is over, or given up."""
        self._active[direction] -= 1
        if self._active[direction] == 0:
            self._busy_seconds[direction] += time.perf_counter() - self._busy_since[direction]

    def statistics(self, *, used_bytes: int, peak_used_bytes: int) -> Statistics:
        """Bytes and seconds so far, beside what the store has reserved."""
        now = time.perf_counter()
        seconds = {
            d: self._busy_seconds[d] + (now - self._busy_since[d] if self._active[d] else 0.0)
            for d in Direction
        }
        return Statistics(
            bytes_read=self.moved_bytes[Direction.READ],
            bytes_written=self.moved_bytes[Direction.WRITE],
            read_seconds=seconds[Direction.READ],
            write_seconds=seconds[Direction.WRITE],
            used_bytes=used_bytes,
            peak_used_bytes=peak_used_bytes,
            second_reads=self._second_reads,
        )
