"""Weights in the mixed-integer program: where each unit's are, how many windows there are, and what follows.

Part of ``choices`` (bytes, which are the bill's) and ``program`` (seconds). A window may hold a unit that a
pass finds there: of what a pass reads, as much as all windows hold is given away where it begins and where it
turns round, so that the rows stay below every plan. What a unit borrows of another one is not counted: it may
be there already.

Index letters: ``u`` unit, ``t`` tier, ``n`` windows.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import pulp

from memtrain.planner.actions import StateDecision, Tier
from memtrain.planner.plan import WindowClass
from memtrain.planner.profile import UnitProfile
from memtrain.planner.weight_coding import weight_room_bytes, weight_ways
from memtrain.planner.weight_windows import WANTED_WINDOWS, WantedWindows, ordinary_bytes, weight_windows

if TYPE_CHECKING:
    from memtrain.planner.choices import Request

Expression: TypeAlias = Any
"""An affine expression of PuLP, which is not typed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """What moves on one tier: seconds of its queue, and seconds of the arithmetic."""

    queue: Expression
    arithmetic: Expression


class WeightChoices:
    """Binary variables and expressions; all of them constants where every unit has one place.

    Args:
        request: what is planned.
        problem: rows are added to it.
    """

    def __init__(self, request: Request, problem: Any) -> None:
        self._units, self._machine = request.profile.units, request.machine
        self._open = request.space.weights
        self._problem = problem
        self._ways = weight_ways(request.machine, request.space.coded_weights)
        self._coded = {each.tier: each for each in request.space.coded_weights}
        self.places = [self._places(index) for index in range(len(self._units))]
        """Per unit whether its weights are in a tier, in the order of ``Space.weights``."""
        movable = [u for u in range(len(self._units)) if set(self._open[u]) != {Tier.DEVICE}]
        sizes = {u: self._units[u].largest_window_bytes for u in movable}
        extents = {u: self._units[u].weight_extent_bytes for u in movable}
        self._largest = max(extents.values(), default=0)
        ordinary = ordinary_bytes(request.profile)
        self._ordinary = max((size for size in sizes.values() if size <= ordinary), default=0)
        """Of the largest unit that goes through a small window, where there are two sizes."""
        self._ordinary_extent = max((extents[u] for u in movable if sizes[u] <= ordinary), default=0)
        """The most that one of those reads, in tiles or not."""
        self.ring: dict[WantedWindows | None, pulp.LpVariable] = {}
        self._made: dict[WantedWindows, tuple[WindowClass, ...]] = {}
        """The most windows that each comes to: those with all units away that may be."""
        if movable:
            two_sizes = 0 < self._ordinary < max(sizes.values())
            open_to = [wanted for wanted in WANTED_WINDOWS if two_sizes or not wanted.sized]
            self.ring[None] = self._binary("no_windows")
            gone = tuple(
                StateDecision(
                    unit=unit.name, weight_tier=next((t for t in tiers if t is not Tier.DEVICE), Tier.DEVICE)
                )
                for unit, tiers in zip(self._units, self._open, strict=True)
            )
            for wanted in open_to:
                self._made[wanted] = weight_windows(request.profile, gone, wanted)
                self.ring[wanted] = self._binary(f"windows_{wanted.slots}{'_sized' * wanted.sized}")
            self._add(pulp.lpSum(self.ring.values()) == 1)
            for index in movable:
                self._add(self.away(index) <= 1 - self.ring[None])
        self.window_bytes = self._window_bytes(sizes)

    def _binary(self, name: str) -> pulp.LpVariable:
        return self._problem.add_variable(name, cat=pulp.LpBinary)

    def _add(self, constraint: Any) -> None:
        # PuLP folds a row without variables to a bool: such a row holds, or the options are at odds.
        if not isinstance(constraint, bool):
            self._problem.addConstraint(constraint)

    def _places(self, index: int) -> list[Expression]:
        tiers = self._open[index]
        if len(tiers) == 1:
            return [pulp.LpAffineExpression(constant=1)]
        found = [self._binary(f"w_{index:03d}_{tier.value}") for tier in tiers]
        self._add(pulp.lpSum(found) == 1)
        return found

    def open_on(self, tier: Tier) -> bool:
        """Whether any unit's weights may be there."""
        return any(tier in tiers for tiers in self._open)

    def chosen(self, names: Container[str]) -> list[Tier]:
        """The place of each unit's weights, once the solver has set the variables that are named to 1."""
        return [
            tiers[0]
            if len(tiers) == 1
            else next(t for v, t in zip(row, tiers, strict=True) if v.name in names)
            for row, tiers in zip(self.places, self._open, strict=True)
        ]

    def chosen_windows(self, names: Container[str]) -> WantedWindows | None:
        """The windows, likewise; None where there are none."""
        return next((wanted for wanted, v in self.ring.items() if v.name in names), None)

    def sum(self, index: int, value: Callable[[UnitProfile, Tier], float]) -> Expression:
        """The value of whichever place the weights of unit ``index`` get."""
        unit = self._units[index]
        found = ((v, value(unit, t)) for v, t in zip(self.places[index], self._open[index], strict=True))
        return pulp.lpSum(worth * v for v, worth in found if worth)

    def away(self, index: int) -> Expression:
        """1 if the unit takes turns in windows."""
        return self.sum(index, lambda _, t: float(t is not Tier.DEVICE))

    def freed_bytes(self) -> Expression:
        """Of the device, windows not counted."""
        units = range(len(self._units))
        return pulp.lpSum(
            self.sum(u, lambda p, t: p.movable_weight_bytes * (t is not Tier.DEVICE)) for u in units
        )

    def extent_bytes(self, tier: Tier) -> Expression:
        """What weights take of ``tier``."""
        coded = self._coded.get(tier)
        units = range(len(self._units))
        return pulp.lpSum(self.sum(u, lambda p, t: weight_room_bytes(p, coded) * (t is tier)) for u in units)

    def _lives_on(self, tier: Tier, index: int) -> Expression:
        return self.sum(index, lambda _, t: float(t is tier))

    def coding_bytes(self) -> Expression:
        """Memory of coding, on tiers where weights live."""
        total = pulp.LpAffineExpression()
        for tier, coded in self._coded.items():
            used = self._problem.add_variable(f"codes_weights_{tier.value}", lowBound=0, upBound=1)
            for index in range(len(self._units)):
                self._add(used >= self._lives_on(tier, index))
            total += coded.staging_bytes * used
        return total

    def _window_bytes(self, sizes: dict[int, int]) -> Expression:
        """Windows times the largest unit that takes turns in them.

        Args:
            sizes: of units that may be away.
        """
        if not sizes:
            return pulp.LpAffineExpression()
        equal = {n.slots: v for n, v in self.ring.items() if n is not None and not n.sized}
        alike = self._problem.add_variable("window_megabytes", lowBound=0)
        self._ring_rows(alike, equal, sizes)
        of_two = [v for n, v in self.ring.items() if n is not None and n.sized]
        if not of_two:
            return 1e6 * alike
        either = pulp.lpSum(of_two)
        small = {u: size for u, size in sizes.items() if size <= self._ordinary}
        large = {u: size for u, size in sizes.items() if u not in small}
        for kind in (small, large):  # two sizes only where units of both are away
            self._add(pulp.lpSum(self.away(u) for u in kind) >= either)
        most = 1 + any(self._units[u].tiled for u in large)
        sized: dict[int, Expression] = {}
        for n, v in self.ring.items():
            if n is not None and n.sized:
                count = max(1, n.slots - most)
                sized[count] = sized.get(count, 0) + v
        self._ring_rows(alike, sized, small)
        beside = self._problem.add_variable("large_window_megabytes", lowBound=0)
        self._ring_rows(beside, {1: either}, large)
        in_tiles = {u: size for u, size in large.items() if self._units[u].tiled}
        for u, size in in_tiles.items():  # a tile, and the next or the rest of its unit
            self._add(beside >= 2e-6 * size * (self.away(u) + either - 1))
        return 1e6 * (alike + beside)

    def _ring_rows(self, total: Any, ring: dict[int, Expression], sizes: dict[int, int]) -> None:
        """``total``, in megabytes, is at least what the chosen windows take for units of these sizes."""
        least, most = min(sizes.values()) * 1e-6, max(sizes.values()) * 1e-6
        self._add(total >= pulp.lpSum(n * least * v for n, v in ring.items()))
        for u, size in sizes.items():
            for n, v in ring.items():
                self._add(total >= n * size * 1e-6 * self.away(u) - n * most * (1 - v))

    # -- seconds --------------------------------------------------------------------------------------

    def read(self, tier: Tier, index: int) -> Amount:
        """Unit ``index`` comes into a window."""
        return self._amount(tier, index, lambda p: p.weight_extent_bytes, read=True)

    def read_for_update(self, tier: Tier, index: int) -> Amount:
        """The same where nothing but its update needs it."""

        def size(unit: UnitProfile) -> int:
            return unit.weight_extent_bytes if unit.written_extent_bytes and not unit.overwritten else 0

        return self._amount(tier, index, size, read=True)

    def written(self, tier: Tier, index: int) -> Amount:
        """What its update has changed leaves."""
        return self._amount(tier, index, lambda p: p.written_extent_bytes, read=False)

    def _amount(self, tier: Tier, index: int, size: Callable[[UnitProfile], int], *, read: bool) -> Amount:
        link, cpu_seconds = self._machine.link(tier), self._ways[tier].cpu_seconds
        rate = self._rate(tier, read=read)

        def seconds(unit: UnitProfile, where: Tier) -> float:
            return size(unit) / rate + link.latency_seconds if where is tier and size(unit) else 0.0

        return Amount(
            queue=self.sum(index, seconds),
            arithmetic=self.sum(index, lambda p, t: size(p) * cpu_seconds * (t is tier)),
        )

    def _rate(self, tier: Tier, *, read: bool) -> float:
        """Plain bytes a second."""
        link = self._machine.link(tier)
        rate = link.read_bytes_per_second if read else link.write_bytes_per_second
        return rate / self._ways[tier].load(read=read)

    def held(self, tier: Tier, *, read: bool, in_use: int | None = None) -> Amount:
        """The most that windows can hold of one tier: read ahead or found there, or not yet written; without
        the window of unit ``in_use``."""
        if not self.open_on(tier):
            return Amount(queue=pulp.LpAffineExpression(), arithmetic=pulp.LpAffineExpression())
        link = self._machine.link(tier)
        rate = self._rate(tier, read=read)
        most = {n: windows[-1].slots * self._largest for n, windows in self._made.items()}
        for n, (first, *others) in self._made.items():
            most[n] += first.slots * self._ordinary_extent if others else 0
        size = pulp.lpSum(most[n] * v for n, v in self.ring.items() if n is not None)
        slots = pulp.lpSum(
            sum(each.slots for each in self._made[n]) * v for n, v in self.ring.items() if n is not None
        )
        if in_use is not None:
            small = self._units[in_use].largest_window_bytes <= self._ordinary
            size = size - (self._ordinary_extent if small else self._largest) * self.away(in_use)
            slots = slots - self.away(in_use)
        return Amount(
            queue=size * (1 / rate) + 2 * link.latency_seconds * slots,
            arithmetic=size * self._ways[tier].cpu_seconds,
        )
