"""Exact search: can these buffers be packed below a ceiling?

After MiniMalloc (Moffitt, "MiniMalloc: A Lightweight Memory Allocator for Hardware-Accelerated Machine
Learning", ASPLOS 2023) in this: only canonical packings are looked for, in which no buffer can be let down;
every section has a floor that only rises; a choice that leaves a hole for a buffer not yet placed is
dominated; what no longer touches in time is searched apart. The search itself departs from it, because
Python must find in thousands of nodes what C++ may find in millions:

- It branches on a section, not on a buffer: a valley of the skyline of floors must be filled from its bottom,
  in each of its sections either by one of the buffers that fit between its walls or by nothing, which raises
  the floor there and uses up the section's slack. The section with the fewest possibilities is next; where
  there is one, nothing is guessed, and where there is none, the branch is dead.
- The buffers over a section can start no lower than the highest floor below them: stacked in the order of
  these earliest starts they must end below the ceiling (one machine with release dates, in scheduling).
- What failed is remembered: floors and remaining buffers that were searched before are not searched again,
  not even after a restart in another order.
- Sections in which branches die weigh more when sections are compared (as constraint solvers' dom/wdeg).

Index letters as in ``grid``; floors, slacks and sizes in units.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from memtrain.planner.packing.grid import Grid, Interval
from memtrain.planner.packing.sets import SectionSets, lowest, numbers

NODES_PER_LOOK_AT_THE_CLOCK = 32
"""A node takes 50 to 500 microseconds: the clock is overrun by less than 20 ms."""
REMEMBERED_FLOORS = 5_000_000
"""States times sections, 8 to 16 bytes each. A search that lasts longer forgets all and goes on."""
REMEMBERED_VALLEYS = 100_000
"""About 400 bytes each."""
_WALL = 1 << 62


class Outcome(Enum):
    """How one search ended."""

    FOUND = "found"
    IMPOSSIBLE = "impossible"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class _Branch:
    """The possibilities of one section: its buffers (a bit set), and the level it may be raised to."""

    weight: tuple[float, int, int]
    section: int
    buffers: int
    level: int | None


@dataclass(slots=True)
class _Frame:
    """One component under search: the state at its entry, and the possibilities not yet tried."""

    first: int
    last: int
    remaining: int
    floors: list[int]
    tops: list[int]
    slacks: list[int]
    key: tuple[object, ...]
    options: Iterator[tuple[int, int | None]]
    parts: list[tuple[int, int]] = field(default_factory=list)
    """Components into which the present option has cut this one, those still to be searched."""


class SkylineSearch:
    """The search below ``ceiling`` units; ``run`` may be called again and again with another order."""

    def __init__(self, grid: Grid, ceiling: int) -> None:
        self.grid = grid
        self.ceiling = ceiling
        self.nodes = 0
        self.offsets = [0] * len(grid.intervals)
        self._weights = [1.0] * grid.sections
        self._failed: set[tuple[object, ...]] = set()
        self._valleys: dict[tuple[int, ...], _Branch | None] = {}
        self._rank: Sequence[int] = ()
        self._learned = True
        self._sets = SectionSets(grid)
        self._reset()

    def _reset(self) -> None:
        self._remaining = self._sets.everyone
        self._floors = [0] * self.grid.sections
        # A section's floor is above the top of its highest buffer where it was raised.
        self._tops = [0] * self.grid.sections
        self._slacks = [self.ceiling - live for live in self.grid.live]

    def run(self, order: Sequence[int], *, learned: bool, node_limit: int, deadline: float) -> Outcome:
        """Search all, trying the buffers of a section in ``order``.

        Args:
            order: a permutation of the buffers.
            learned: compare sections by possibilities per weight; else by possibilities, then height.
            node_limit: stop after so many nodes more.
            deadline: stop at this ``time.perf_counter()``.
        Returns:
            FOUND leaves the packing in ``offsets``.
        """
        if min(self._slacks) < 0:
            return Outcome.IMPOSSIBLE
        self._reset()
        rank = [0] * len(order)
        for position, i in enumerate(order):
            rank[i] = position
        self._rank, self._learned = rank, learned
        self._valleys.clear()
        return self._search(self.nodes + node_limit, deadline)

    def _search(self, last_node: int, deadline: float) -> Outcome:
        """Depth first, over a stack of components each of which is done for all or not at all."""
        root = _Frame(0, self.grid.sections, self._remaining, [], [], [], (), iter(()))
        root.parts = [(0, self.grid.sections)]
        stack = [root]
        failed = False
        while stack:
            frame = stack[-1]
            if failed and not self._next_option(frame):
                stack.pop()
                if frame.key:
                    self._remember(frame.key)
                continue
            if not frame.parts:
                # All parts of its present option are packed, and so is this component.
                stack.pop()
                failed = False
                continue
            self.nodes += 1
            if self.nodes % NODES_PER_LOOK_AT_THE_CLOCK == 0 and time.perf_counter() > deadline:
                return Outcome.STOPPED
            if self.nodes > last_node:
                return Outcome.STOPPED
            child = self._open(*frame.parts.pop())
            if child is not None:
                stack.append(child)
            failed = True  # A new component has no option yet: the next turn takes its first.
        return Outcome.IMPOSSIBLE if failed else Outcome.FOUND

    def _next_option(self, frame: _Frame) -> bool:
        """Restore the component and apply its next possibility. False when none is left."""
        if not frame.key:
            return False
        first, last = frame.first, frame.last
        for i, level in frame.options:
            self._remaining = frame.remaining
            self._floors[first:last] = frame.floors
            self._tops[first:last] = frame.tops
            self._slacks[first:last] = frame.slacks
            if level is None:
                self._place(i)
                frame.parts = self._parts(first, last, self.grid.intervals[i])
            elif self._raise(i, level):
                frame.parts = [(first, last)]
            else:
                continue
            return True
        return False

    def _remember(self, key: tuple[object, ...]) -> None:
        if len(self._failed) * self.grid.sections > REMEMBERED_FLOORS:
            self._failed.clear()
        self._failed.add(key)

    def _open(self, first: int, last: int) -> _Frame | None:
        """The component of sections ``[first, last)`` with its possibilities, or None if it is dead."""
        inside = self._remaining & self._sets.starting[first] & self._sets.ended[last]
        floors, tops = self._floors[first:last], self._tops[first:last]
        key = (inside, tuple(floors), tuple(tops) if tops != floors else ())
        if key in self._failed:
            return None
        branch = self._choose(first, last, inside)
        while branch is not None and not branch.buffers:
            # Nothing but to raise it, which is no choice.
            assert branch.level is not None, "a section without possibilities is no branch"
            raised = self._raise(branch.section, branch.level)
            branch = self._choose(first, last, inside) if raised else None
        floors = self._floors[first:last]
        if branch is None or not self._stacks(inside, floors, first, last):
            self._remember(key)
            return None
        # Of buffers that are alike one is enough.
        alike = {self.grid.intervals[i]: i for i in numbers(branch.buffers)}
        options: list[tuple[int, int | None]] = [
            (i, None) for i in sorted(alike.values(), key=self._rank.__getitem__)
        ]
        if branch.level is not None:
            options.append((branch.section, branch.level))
        slacks = self._slacks[first:last]
        return _Frame(first, last, self._remaining, floors, tops, slacks, key, iter(options))

    def _stacks(self, inside: int, floors: Sequence[int], first: int, last: int) -> bool:
        """Whether the bound allows the ceiling."""
        height, section = self._sets.highest_stack(inside, floors, first, last)
        if height > self.ceiling:
            self._weights[section] += 1
        return height <= self.ceiling

    def _place(self, i: int) -> None:
        """Buffer i onto the floor of its valley."""
        interval = self.grid.intervals[i]
        first, last = interval.first, interval.last
        offset = self._floors[first]
        self.offsets[i] = offset
        self._remaining &= ~(1 << i)
        self._floors[first:last] = self._tops[first:last] = [offset + interval.size] * (last - first)

    def _raise(self, section: int, level: int) -> bool:
        """Nothing rests on this section's floor. False when a buffer not yet placed fits into the hole."""
        floors, tops = self._floors, self._tops
        self._slacks[section] -= level - floors[section]
        floors[section] = level
        start, end = section, section + 1
        while start and floors[start - 1] > tops[start - 1]:
            start -= 1
        while end < len(floors) and floors[end] > tops[end]:
            end += 1
        small = (1 << bisect_right(self._sets.sizes, level - tops[section])) - 1
        inside = (
            self._sets.alive[section]
            & self._remaining
            & self._sets.starting[start]
            & self._sets.ended[end]
            & small
        )
        for i in numbers(inside):
            interval = self.grid.intervals[i]
            over = slice(interval.first, interval.last)
            if max(tops[over]) + interval.size <= min(floors[over]):
                return False
        return True

    def _parts(self, first: int, last: int, placed: Interval) -> list[tuple[int, int]]:
        """What is left of component ``[first, last)`` where only ``placed`` crossed, the shortest last."""
        crossing, remaining = self._sets.crossing, self._remaining
        cuts = [s for s in range(placed.first + 1, placed.last) if not crossing[s] & remaining]
        parts = [
            (start, end)
            for start, end in pairwise((first, *cuts, last))
            if remaining & self._sets.starting[start] & self._sets.ended[end]
        ]
        parts.sort(key=lambda part: part[0] - part[1])
        return parts

    def _choose(self, first: int, last: int, inside: int) -> _Branch | None:
        """The section with the fewest possibilities, or None if one has none."""
        best: _Branch | None = None
        floors = self._floors
        before, start = _WALL, first
        while start < last:
            level, end = floors[start], start + 1
            while end < last and floors[end] == level:
                end += 1
            after = floors[end] if end < last else _WALL
            if before > level < after:
                touching = inside & ~self._sets.ended[start] & ~self._sets.starting[end]
                wall = min(before, after)
                key = (start, end, level, wall, touching)
                if key in self._valleys:
                    branch = self._valleys[key]
                else:
                    if len(self._valleys) >= REMEMBERED_VALLEYS:
                        self._valleys.clear()
                    branch = self._valleys[key] = self._valley(start, end, level, wall, touching)
                if branch is None:
                    return None
                if best is None or branch.weight < best.weight:
                    best = branch
            before, start = level, end
        assert best is not None, "a component holds buffers, so its skyline has a valley"
        return best

    def _valley(self, start: int, end: int, level: int, wall: int, touching: int) -> _Branch | None:
        """The section of one valley with the fewest possibilities, or None if one has none."""
        best: _Branch | None = None
        fitting = touching & self._sets.starting[start] & self._sets.ended[end]
        sizes = self._sets.sizes
        for s in range(start, end):
            over = self._sets.alive[s] & touching
            here = fitting & over
            slack = self._slacks[s]
            # If nothing rests here, the next buffer over s lies across a wall, or rests on one that stands
            # beside s, either in this valley or across a wall.
            raised = wall if over & ~fitting else _WALL
            if slack and here:
                if beside := fitting & ~over:
                    raised = min(raised, level + sizes[lowest(beside)])
                if raised > wall and (beside := touching & ~fitting & ~over):
                    raised = min(raised, wall + sizes[lowest(beside)])
            rising = raised - level <= slack
            count = here.bit_count() + rising
            if count == 0:
                self._weights[s] += 1
                return None
            weight = (count / self._weights[s], slack, level) if self._learned else (count, level, slack)
            if best is None or weight < best.weight:
                best = _Branch(weight, s, here, raised if rising else None)
        assert best is not None, "a valley has sections"
        return best
