"""One buffer after the other to the lowest, or to the tightest, gap between those already placed.

Four orders times two rules, as compilers do it (XLA's heap simulator: size then duration, best fit; TFLite:
size, first fit). Each pass takes a millisecond per hundred buffers and is optimal on most transformer steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt

from memtrain.planner.packing.grid import Grid, Interval

Addresses = npt.NDArray[np.int64]

ORDERS: dict[str, Callable[[Interval], tuple[int, ...]]] = {
    "size": lambda i: (-i.size, i.first - i.last),
    "area": lambda i: (-i.size * (i.last - i.first), -i.size),
    "duration": lambda i: (i.first - i.last, -i.size),
    "start": lambda i: (i.first, i.first - i.last, -i.size),
}
"""Largest first, largest size times duration first, longest first, earliest first."""


def order_by(grid: Grid, name: str) -> list[int]:
    """Buffers in the order ``name`` of ``ORDERS``; ties keep the order of the grid."""
    key = ORDERS[name]
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
