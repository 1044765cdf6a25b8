"""Addresses for buffers whose lifetimes are known (offline dynamic storage allocation), with a certificate.

The most bytes that live at once are a lower bound of every packing. A portfolio stops as soon as it reaches
the bound: greedy passes (``packing.greedy``), then an exact search (``packing.exact``) of what is not too
large for one, over parts of time that do not touch each other and in units of the sizes' greatest common
divisor. Without a capacity the search is repeated between the bound and the best height known, as long as
there is time.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, islice

from memtrain.planner.buffers import Buffer
from memtrain.planner.packing import greedy
from memtrain.planner.packing.exact import is_searched, search
from memtrain.planner.packing.grid import Component, Grid, components
from memtrain.planner.packing.skyline import Outcome
from memtrain.planner.units import round_up


class PackingStatus(str, Enum):
    """How good a packing is known to be."""

    OPTIMAL = "optimal"
    """No packing is lower: it reaches the load, or the search has proved it."""
    FITS = "fits"
    """Within the capacity; a lower one may exist."""
    HEURISTIC = "heuristic"
    """Time ran out: a lower one may exist, or one within the capacity."""
    INFEASIBLE = "infeasible"
    """Proved: no packing is within the capacity. The one given is above it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """Addresses, and what is known about them. All in bytes, sizes rounded up to the alignment."""

    offsets: Mapping[str, int]
    """By name, every buffer; free of overlaps whatever the status."""
    height: int
    """Where the highest buffer ends."""
    load: int
    """The most that lives at once."""
    lower_bound: int
    """No packing is lower; the load, or more if the search has proved more."""
    status: PackingStatus

    @property
    def fragmentation(self) -> float:
        """Height over load, less one."""
        return self.height / self.load - 1 if self.load else 0.0


def pack(
    buffers: Sequence[Buffer],
    capacity: int | None = None,
    *,
    time_limit_seconds: float,
    alignment: int = 1,
    seed: int = 0,
) -> Packing:
    """Give every buffer an address.

    Args:
        capacity: bytes that must suffice; the first packing within is returned. None asks for the lowest.
        time_limit_seconds: wall clock. The first greedy pass is always completed: 40 microseconds a buffer.
        alignment: bytes; every address is a multiple of it, every size counts as rounded up to it.
        seed: of the search's later orders. The answer is the same for the same arguments, unless the time
            limit cuts the search short.

    Raises:
        ValueError: two buffers of one name, or an argument out of range.
    """
    deadline = time.perf_counter() + time_limit_seconds
    _check_arguments(buffers, capacity, time_limit_seconds, alignment)
    if not buffers:
        return Packing(offsets={}, height=0, load=0, lower_bound=0, status=PackingStatus.OPTIMAL)
    sizes = [round_up(b.size, alignment) for b in buffers]
    unit = math.gcd(*sizes)
    spans = [(b.start, b.end, size // unit) for b, size in zip(buffers, sizes, strict=True)]
    parts = [_Part(component) for component in components(spans)]
    load = max(part.grid.load for part in parts)
    goal = load if capacity is None else capacity // unit
    for part in parts:
        part.pack_greedily(goal, deadline)
    _search(parts, goal, capacity is None, seed, deadline)
    offsets = {
        buffers[i].name: offset * unit
        for part in parts
        for i, offset in zip(part.component.members, part.offsets, strict=True)
    }
    height = max(part.height for part in parts) * unit
    lower_bound = max(part.lower_bound for part in parts) * unit
    return Packing(
        offsets={b.name: offsets[b.name] for b in buffers},
        height=height,
        load=load * unit,
        lower_bound=lower_bound,
        status=_status(height, lower_bound, capacity),
    )


def _check_arguments(
    buffers: Sequence[Buffer], capacity: int | None, time_limit_seconds: float, alignment: int
) -> None:
    if alignment < 1:
        raise ValueError(f"alignment is {alignment} bytes; it must be at least 1 (1: none)")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity is {capacity} bytes; it cannot be negative (None: as low as possible)")
    if not time_limit_seconds >= 0:
        raise ValueError(f"time_limit_seconds is {time_limit_seconds}; it cannot be negative")
    name, count = Counter(b.name for b in buffers).most_common(1)[0] if buffers else ("", 0)
    if count > 1:
        raise ValueError(f"{count} buffers are called {name!r}; addresses are given by name, make it unique")


def _status(height: int, lower_bound: int, capacity: int | None) -> PackingStatus:
    if capacity is not None and lower_bound > capacity:
        return PackingStatus.INFEASIBLE
    if height == lower_bound:
        return PackingStatus.OPTIMAL
    return PackingStatus.HEURISTIC if capacity is None or height > capacity else PackingStatus.FITS


class _Part:
    """One part of time that touches no other: its best packing so far and its proved bound, in units."""

    def __init__(self, component: Component) -> None:
        self.component = component
        self.grid: Grid = component.grid
        self.lower_bound = self.grid.load
        self.offsets: list[int] = []
        self.height = 0

    def pack_greedily(self, goal: int, deadline: float) -> None:
        """The lowest of the greedy passes, or the first within ``goal``.

        What is too large to be searched is complained about instead, before the passes take all the time.
        """
        attempts = greedy.passes(self.grid, deadline)
        if not is_searched(self.grid):
            attempts = chain(islice(attempts, 1), greedy.complaints(self.grid, goal, deadline), attempts)
        for offsets in attempts:
            self._keep(offsets)
            if self.height <= goal:
                return

    def try_below(self, ceiling: int, seed: int, deadline: float) -> Outcome:
        """Search for a packing of at most ``ceiling``; a proof that there is none raises the bound."""
        outcome, offsets = search(self.grid, ceiling, seed=seed, deadline=deadline)
        if outcome is Outcome.FOUND:
            self._keep(offsets)
        elif outcome is Outcome.IMPOSSIBLE:
            self.lower_bound = max(self.lower_bound, ceiling + 1)
        return outcome

    def lower(self, unreached: int, seed: int, deadline: float) -> None:
        """Bisect between ``unreached`` and the present height, half of the time left for each try."""
        while self.height - unreached > 1 and (now := time.perf_counter()) < deadline:
            ceiling = (unreached + self.height) // 2
            if self.try_below(ceiling, seed, now + (deadline - now) / 2) is not Outcome.FOUND:
                unreached = ceiling

    def _keep(self, offsets: list[int]) -> None:
        height = greedy.height(self.grid, offsets)
        if not self.offsets or height < self.height:
            self.offsets, self.height = offsets, height


def _search(parts: Sequence[_Part], goal: int, minimise: bool, seed: int, deadline: float) -> None:
    """Bring the parts above ``goal`` down to it, the highest first; they share the time evenly.

    Without a capacity the others need not be lower than a part that has not reached the goal.
    """
    above = sorted((part for part in parts if part.height > goal), key=lambda part: -part.height)
    for position, part in enumerate(above):
        now = time.perf_counter()
        if part.height <= goal or now >= deadline:
            continue
        until = now + (deadline - now) / (len(above) - position)
        outcome = part.try_below(goal, seed, now + (until - now) / 2 if minimise else until)
        if minimise and outcome is not Outcome.FOUND:
            part.lower(goal, seed, until)
            goal = max(goal, part.height)
