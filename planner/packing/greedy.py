"""One buffer after the other to the lowest, or to the tightest, gap between those already placed.

Four orders times two rules, as compilers do it (XLA's heap simulator: size then duration, best fit; TFLite:
size, first fit), and one of our own that begins with the fullest moment. Each pass takes a millisecond per
hundred buffers and is optimal on most transformer steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from memtrain.planner.packing.grid import Grid, Interval

Addresses = npt.NDArray[np.int64]

Key = Callable[[Interval], tuple[int, ...]]


def _from_the_fullest(grid: Grid) -> Key:
    """Whoever lives in the fullest section, earliest first; then all others, largest first.

    Where one moment stands out, as the loss of a language model does, no gap may be left in it: so its
    buffers become a stack, which by birth is full from the ground at every moment before. The rest has room.
    """
    fullest = grid.live.index(grid.load)

    def key(interval: Interval) -> tuple[int, ...]:
        if interval.first <= fullest < interval.last:
            return 0, interval.first, -interval.last, -interval.size
        return 1, -interval.size, interval.first - interval.last, 0

    return key


ORDERS: dict[str, Callable[[Grid], Key]] = {
    "size": lambda grid: lambda i: (-i.size, i.first - i.last),
    "area": lambda grid: lambda i: (-i.size * (i.last - i.first), -i.size),
    "duration": lambda grid: lambda i: (i.first - i.last, -i.size),
    "start": lambda grid: lambda i: (i.first, i.first - i.last, -i.size),
    "fullest": _from_the_fullest,
}
"""Largest first, largest size times duration first, longest first, earliest first, fullest moment first."""

ROUNDS = 8
"""Of complaints. SmolLM2's 7,780 requests at sequence 512 need four."""


def order_by(grid: Grid, name: str) -> list[int]:
    """Buffers in the order ``name`` of ``ORDERS``; ties keep the order of the grid."""
    key = ORDERS[name](grid)
    return sorted(range(len(grid.intervals)), key=lambda i: key(grid.intervals[i]))


def height(grid: Grid, offsets: Sequence[int]) -> int:
    """Where the highest buffer ends, in units."""
    return max(o + i.size for o, i in zip(offsets, grid.intervals, strict=True))


def place(grid: Grid, order: Sequence[int], *, best_fit: bool) -> list[int]:
    """Offsets in units, one a buffer: the lowest gap that holds it, with ``best_fit`` the tightest one.

    Only what no gap holds goes into the open space above.
    """
    offsets = [0] * len(grid.intervals)
    # Those already placed, by offset: first section, last section, low and high address.
    placed = np.empty((4, len(order)), dtype=np.int64)
    for count, i in enumerate(order):
        interval = grid.intervals[i]
        first, last, low, high = placed[:, :count]
        beside = (first < interval.last) & (last > interval.first)
        offset = _gap(low[beside], high[beside], interval.size, best_fit)
        offsets[i] = offset
        rank = int(low.searchsorted(offset))
        placed[:, rank + 1 : count + 1] = placed[:, rank:count].copy()
        placed[:, rank] = interval.first, interval.last, offset, offset + interval.size
    return offsets


def _gap(low: Addresses, high: Addresses, size: int, best_fit: bool) -> int:
    """Where ``size`` units go between spans ``[low, high)`` that are sorted by ``low`` and may overlap."""
    if not len(low):
        return 0
    floors = np.concatenate(([0], np.maximum.accumulate(high)))
    room = low - floors[:-1]
    fits = np.flatnonzero(room >= size)
    if not len(fits):
        return int(floors[-1])
    return int(floors[fits[room[fits].argmin()] if best_fit else fits[0]])


def passes(grid: Grid, deadline: float) -> Iterator[list[int]]:
    """The offsets of every order with either rule; at least one, no more once ``deadline``
    (``time.perf_counter()``) has passed."""
    for name, best_fit in product(ORDERS, (False, True)):
        yield place(grid, order_by(grid, name), best_fit=best_fit)
        if time.perf_counter() > deadline:
            return


def complaints(grid: Grid, goal: int, deadline: float) -> Iterator[list[int]]:
    """From the fullest moment, again and again: what came to lie above ``goal`` units goes first the next
    time (squeaky wheel optimisation, Joslin and Clements 1999). Ends at the goal, where nothing changes,
    after ``ROUNDS``, or at the ``deadline``, before which there may be none."""
    order = order_by(grid, "fullest")
    for _ in range(ROUNDS):
        if time.perf_counter() > deadline:
            return
        offsets = place(grid, order, best_fit=False)
        yield offsets
        if height(grid, offsets) <= goal:
            return
        above = {i for i in order if offsets[i] + grid.intervals[i].size > goal}
        before, order = order, sorted(order, key=lambda i: i not in above)
        if order == before:
            return
