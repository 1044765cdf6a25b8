"""The exact search as a portfolio: several orders, with and without learned weights, in growing rounds.

How long depth-first search takes varies by orders of magnitude between orders of equal merit (it is
heavy-tailed), so each gets a few thousand nodes, then all get three times as many, and what failed stays
failed. So all of MiniMalloc's A-K are packed within 2 s each on an idle core.
"""

from __future__ import annotations

import random
import time

from memtrain.planner.packing.greedy import order_by
from memtrain.planner.packing.grid import Grid
from memtrain.planner.packing.skyline import Outcome, SkylineSearch

GROWTH = 3
"""From round to round. With 1.6, and shaking from the second round, I took nine times as long, J twice."""
UNSHAKEN_ROUNDS = 2
SHAKING = 0.3
"""A buffer moves back by up to this part of the order."""
SEARCHED_CELLS = 1_000_000
"""Buffers times sections. Above, building the search takes longer than a second, a node 5 ms."""


def is_searched(grid: Grid) -> bool:
    """Whether ``search`` takes on so large a grid."""
    return len(grid.intervals) * grid.sections <= SEARCHED_CELLS


def search(grid: Grid, ceiling: int, *, seed: int, deadline: float) -> tuple[Outcome, list[int]]:
    """Pack below ``ceiling`` units, or prove that it cannot be done.

    Args:
        deadline: of ``time.perf_counter()``. The same grid, ceiling and seed give the same answer unless the
            deadline cuts it short.
    Returns:
        The outcome, and when FOUND the offsets in units.
    """
    if grid.load > ceiling:
        return Outcome.IMPOSSIBLE, []
    if not is_searched(grid):
        return Outcome.STOPPED, []
    skyline = SkylineSearch(grid, ceiling)
    orders = [_contended_first(grid), *(order_by(grid, name) for name in ("area", "size", "duration"))]
    chance = random.Random(seed)
    node_limit, rounds = 2 * len(grid.intervals) + 500, 0
    while True:
        for learned in (False, True):
            for order in orders:
                if rounds >= UNSHAKEN_ROUNDS:
                    order = _shaken(order, chance)
                outcome = skyline.run(order, learned=learned, node_limit=node_limit, deadline=deadline)
                if outcome is not Outcome.STOPPED or time.perf_counter() > deadline:
                    return outcome, skyline.offsets
        node_limit, rounds = node_limit * GROWTH, rounds + 1


def _contended_first(grid: Grid) -> list[int]:
    """By the fullest section a buffer lives in, then duration, then area, all from large to small."""

    def key(i: int) -> tuple[int, int, int]:
        interval = grid.intervals[i]
        duration = interval.last - interval.first
        return -max(grid.live[interval.first : interval.last]), -duration, -duration * interval.size

    return sorted(range(len(grid.intervals)), key=key)


def _shaken(order: list[int], chance: random.Random) -> list[int]:
    place = {i: position + chance.random() * SHAKING * len(order) for position, i in enumerate(order)}
    return sorted(order, key=place.__getitem__)
