"""Sets of buffers as bits of an int, and what of a grid never changes during a search.

Bit i is buffer i; buffers are numbered from small to large, so a set's lowest bit is its smallest buffer.
Index letters as in ``grid``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from memtrain.planner.packing.grid import Grid


def lowest(members: int) -> int:
    """The number of the smallest buffer of a set that is not empty."""
    return (members & -members).bit_length() - 1


def numbers(members: int) -> Iterator[int]:
    """The numbers of a set's buffers, from small to large."""
    while members:
        bit = members & -members
        yield bit.bit_length() - 1
        members ^= bit


class SectionSets:
    """Which buffers live where, as sets, and their sizes as a matrix."""

    def __init__(self, grid: Grid) -> None:
        sections, intervals = grid.sections, grid.intervals
        self.sizes = [interval.size for interval in intervals]
        assert self.sizes == sorted(self.sizes), "the lowest bit of a set must be its smallest buffer"
        self.everyone = (1 << len(intervals)) - 1
        self.alive = [0] * sections
        """Per section those that live in it."""
        self.starting = [0] * (sections + 1)
        """Per section those that start in it or later."""
        self.ended = [0] * (sections + 1)
        """Per section those that have ended before it."""
        for i, interval in enumerate(intervals):
            bit = 1 << i
            for s in range(interval.first, interval.last):
                self.alive[s] |= bit
            for s in range(interval.first + 1):
                self.starting[s] |= bit
            for s in range(interval.last, sections + 1):
                self.ended[s] |= bit
        self.crossing = [0, *(left & right for left, right in pairwise(self.alive)), 0]
        """Per section those that live in it and in the one before."""
        self._bytes = (len(intervals) + 7) // 8
        self._matrix = np.zeros((len(intervals), sections), dtype=np.int64)
        for i, interval in enumerate(intervals):
            self._matrix[i, interval.first : interval.last] = interval.size
        self._ends = np.array([(i.first, i.last) for i in intervals], dtype=np.int64)

    def highest_stack(self, members: int, floors: Sequence[int], first: int, last: int) -> tuple[int, int]:
        """A lower bound of the height of ``members``, which live within sections ``[first, last)``.

        A buffer starts no lower than the highest of the ``floors`` (of those sections) below it. In each
        section they are stacked in the order of these earliest starts.

        Returns:
            The height of the highest stack, in units, and its section.
        """
        packed = np.frombuffer(members.to_bytes(self._bytes, "little"), dtype=np.uint8)
        rows = np.unpackbits(packed, bitorder="little").nonzero()[0]
        padded = np.array([*floors, 0], dtype=np.int64)
        earliest = np.maximum.reduceat(padded, (self._ends[rows] - first).ravel())[::2]
        order = np.argsort(-earliest, kind="stable")
        # From the latest start down: all that start as late or later lie above this start.
        heights = self._matrix[rows[order], first:last].cumsum(axis=0)
        heights += earliest[order, None]
        worst = int(heights.argmax())
        return int(heights.flat[worst]), first + worst % (last - first)
