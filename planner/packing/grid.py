"""Time cut into sections: between two neighbouring births or deaths the same buffers are alive.

Index letters: i buffer, s section. A buffer is alive in the sections ``first[i] .. last[i] - 1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Interval:
    """A buffer as the packers see it: sections ``[first, last)``, and a size in units."""

    first: int
    last: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Buffers that compete for one range of addresses, over ``sections`` consecutive sections."""

    intervals: tuple[Interval, ...]
    """From small to large."""
    sections: int
    live: tuple[int, ...]
    """Per section the units alive in it."""

    @property
    def load(self) -> int:
        """The most that is alive at once, in units: no packing is lower."""
        return max(self.live)


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """A grid, and which of the caller's buffers its intervals are."""

    members: tuple[int, ...]
    grid: Grid


def components(spans: Sequence[tuple[int, int, int]]) -> list[Component]:
    """Cut ``(start, end, size)`` where nobody lives across: the parts do not see each other.

    Parts come in the order of time, members of a part from small to large.
    """
    parts: list[list[int]] = []
    horizon = None
    for i in sorted(range(len(spans)), key=lambda i: (spans[i][:2], i)):
        start, end, _ = spans[i]
        if horizon is None or start >= horizon:
            parts.append([])
            horizon = end
        parts[-1].append(i)
        horizon = max(horizon, end)
    for part in parts:
        part.sort(key=lambda i: (spans[i][2], spans[i], i))
    return [Component(members=tuple(part), grid=_grid([spans[i] for i in part])) for part in parts]


def _grid(spans: Sequence[tuple[int, int, int]]) -> Grid:
    """Cut at births that follow a death only.

    Between two births with no death in between fewer buffers live than after the second: such a section
    says nothing that its successor does not say, and likewise at deaths. So a section ends where a birth
    follows a death.
    """
    events = sorted({(time, kind) for start, end, _ in spans for time, kind in ((end, 0), (start, 1))})
    section_of: dict[tuple[int, int], int] = {}
    section, dying = 0, False
    for time, kind in events:
        if kind == 1 and dying:
            section += 1
        dying = kind == 0
        section_of[time, kind] = section
    intervals = tuple(
        Interval(section_of[start, 1], section_of[end, 0] + 1, size) for start, end, size in spans
    )
    change = [0] * (section + 2)
    for interval in intervals:
        change[interval.first] += interval.size
        change[interval.last] -= interval.size
    return Grid(intervals=intervals, sections=section + 1, live=tuple(accumulate(change[:-1])))
