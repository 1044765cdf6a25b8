"""The parts of the packer against brute force: the grid, the greedy passes, the exact search."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings

from benchmarks._rectangles import cut_rectangle
from memtrain.planner.addresses import pack
from memtrain.planner.packing import exact
from memtrain.planner.packing.exact import SEARCHED_CELLS, search
from memtrain.planner.packing.greedy import ROUNDS, complaints, height, order_by, passes, place
from memtrain.planner.packing.grid import Grid, Interval, components
from memtrain.planner.packing.skyline import Outcome, SkylineSearch
from tests.planner.packings import Span, load, lowest, named, spans

NEVER = math.inf
# Rarer than one in 5,000 among dense random instances of this size.
CONFLICTS = [
    [(0, 2, 2), (3, 6, 2), (4, 6, 4), (1, 4, 3), (2, 4, 1), (2, 3, 1), (1, 3, 1), (0, 1, 2), (0, 1, 2)],
    [(4, 5, 2), (3, 5, 1), (0, 2, 3), (0, 1, 3), (3, 5, 3), (1, 3, 2), (1, 4, 1), (2, 4, 1), (2, 3, 2)],
    [(1, 4, 2), (2, 3, 1), (0, 1, 4), (4, 5, 3), (2, 5, 1), (1, 2, 2), (3, 4, 2), (4, 5, 1), (0, 3, 1)],
]
"""The lowest packing is one unit higher than what lives at once."""


def overlapping(grid: Grid, offsets: list[int]) -> list[tuple[int, int]]:
    pairs = []
    for i, a in enumerate(grid.intervals):
        for j, b in enumerate(grid.intervals[:i]):
            at_once = a.first < b.last and b.first < a.last
            if at_once and offsets[i] < offsets[j] + b.size and offsets[j] < offsets[i] + a.size:
                pairs.append((i, j))
    return pairs


def test_sections_begin_where_a_birth_follows_a_death() -> None:
    # Lives 0-3 and 1-4 meet; 3-5 is born as the first dies, 4-6 as the second does.
    (part,) = components([(0, 3, 5), (1, 4, 2), (3, 5, 4), (4, 6, 8)])
    assert part.members == (1, 2, 0, 3)
    assert part.grid.intervals == (Interval(0, 2, 2), Interval(1, 3, 4), Interval(0, 1, 5), Interval(2, 3, 8))
    assert part.grid.live == (7, 6, 12)
    assert part.grid.load == 12


def test_parts_that_only_touch_are_apart() -> None:
    parts = components([(5, 9, 1), (0, 5, 3), (2, 4, 2), (9, 10, 7)])
    assert [part.members for part in parts] == [(2, 1), (0,), (3,)]
    assert [part.grid.load for part in parts] == [5, 1, 7]


@given(spans(12, times=12))
def test_the_grid_keeps_load_and_neighbours(items: list[Span]) -> None:
    parts = components(items)
    assert sorted(i for part in parts for i in part.members) == list(range(len(items)))
    assert max(part.grid.load for part in parts) == load(items)
    where = {
        i: (number, interval.first, interval.last)
        for number, part in enumerate(parts)
        for i, interval in zip(part.members, part.grid.intervals, strict=True)
    }
    for i, (start, end, _) in enumerate(items):
        for j, (other_start, other_end, _) in enumerate(items[:i]):
            (part_i, first_i, last_i), (part_j, first_j, last_j) = where[i], where[j]
            in_grid = part_i == part_j and first_i < last_j and first_j < last_i
            assert in_grid == (start < other_end and other_start < end)


def test_first_fit_takes_the_lowest_gap_and_best_fit_the_tightest() -> None:
    # In section 1, where the first buffer is born, two have died: free are 5 units at 0 and 2 at 6.
    intervals = (
        Interval(1, 2, 2),
        Interval(0, 1, 5),
        Interval(0, 2, 1),
        Interval(0, 1, 2),
        Interval(0, 2, 3),
    )
    grid = Grid(intervals=intervals, sections=2, live=(11, 6))
    assert place(grid, [1, 2, 3, 4, 0], best_fit=False) == [0, 0, 5, 6, 8]
    assert place(grid, [1, 2, 3, 4, 0], best_fit=True) == [6, 0, 5, 6, 8]
    # What is free in one section only does not hold a buffer that lives in both.
    both = Grid(intervals=(Interval(0, 2, 2), *intervals[1:]), sections=2, live=(13, 6))
    assert place(both, [1, 2, 3, 4, 0], best_fit=False)[0] == 11


STUBBORN: list[Span] = [
    *((5, 6, 5), (6, 8, 6), (7, 8, 4), (4, 7, 3)),
    *((0, 3, 6), (2, 5, 6), (5, 8, 6), (5, 6, 2)),
]
"""No pass reaches what lives at once, and the fifth round of complaints does."""


def test_complaints_close_the_gap_that_every_pass_leaves() -> None:
    (part,) = components(STUBBORN)
    grid = part.grid
    assert min(height(grid, offsets) for offsets in passes(grid, NEVER)) > grid.load
    *others, last = complaints(grid, grid.load, NEVER)
    assert len(others) == 4
    assert not overlapping(grid, last)
    assert height(grid, last) == grid.load
    assert all(height(grid, offsets) > grid.load for offsets in others)


@settings(max_examples=200)
@given(spans(12, times=12))
def test_complaints_never_overlap_and_end_at_the_goal(items: list[Span]) -> None:
    for part in components(items):
        heights = []
        for offsets in complaints(part.grid, part.grid.load, NEVER):
            assert not overlapping(part.grid, offsets)
            heights.append(height(part.grid, offsets))
        assert 1 <= len(heights) <= ROUNDS
        assert all(found > part.grid.load for found in heights[:-1])


def test_what_is_too_large_to_be_searched_is_complained_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "SEARCHED_CELLS", 0)
    packing = pack(named(STUBBORN), time_limit_seconds=5)
    assert packing.height == packing.load == load(STUBBORN)


@given(spans(12, times=12))
def test_greedy_passes_never_overlap_and_never_go_below_the_load(items: list[Span]) -> None:
    for part in components(items):
        tried = list(passes(part.grid, NEVER))
        assert len(tried) == 10
        for offsets in tried:
            assert min(offsets) >= 0
            assert not overlapping(part.grid, offsets)
            assert height(part.grid, offsets) >= part.grid.load


def test_passes_stop_at_the_deadline_after_one() -> None:
    (part,) = components([(0, 2, 1), (1, 3, 1)])
    assert len(list(passes(part.grid, time.perf_counter() - 1))) == 1


@pytest.mark.parametrize("items", CONFLICTS)
def test_an_optimum_above_the_load_is_proved(items: list[Span]) -> None:
    optimum = load(items) + 1
    assert lowest(items) == optimum
    (part,) = components(items)
    assert search(part.grid, optimum - 1, seed=0, deadline=NEVER)[0] is Outcome.IMPOSSIBLE
    outcome, offsets = search(part.grid, optimum, seed=0, deadline=NEVER)
    assert outcome is Outcome.FOUND
    assert height(part.grid, offsets) == optimum
    assert not overlapping(part.grid, offsets)


@settings(max_examples=300)
@given(spans(6))
def test_the_search_finds_the_optimum_and_proves_it(items: list[Span]) -> None:
    optimum = lowest(items)
    parts = components(items)
    found = [search(part.grid, optimum, seed=0, deadline=NEVER) for part in parts]
    assert {outcome for outcome, _ in found} == {Outcome.FOUND}
    for part, (_, offsets) in zip(parts, found, strict=True):
        assert height(part.grid, offsets) <= optimum
        assert min(offsets) >= 0
        assert not overlapping(part.grid, offsets)
    below = [search(part.grid, optimum - 1, seed=0, deadline=NEVER)[0] for part in parts]
    assert Outcome.IMPOSSIBLE in below


@settings(max_examples=100)
@given(spans(6, times=4, sizes=9))
def test_every_order_answers_alike_and_remembering_changes_nothing(items: list[Span]) -> None:
    optimum = lowest(items)
    for part in components(items):
        for ceiling in range(part.grid.load, optimum + 1):
            searches = SkylineSearch(part.grid, ceiling)
            answers = set()
            for name in ("size", "area", "duration", "start"):
                for learned in (False, True):
                    order = order_by(part.grid, name)
                    arguments = {"learned": learned, "node_limit": 100_000, "deadline": NEVER}
                    answers.add(searches.run(order, **arguments))
                    answers.add(SkylineSearch(part.grid, ceiling).run(order, **arguments))
            assert len(answers) == 1


def test_zero_slack_is_packed_to_the_bound() -> None:
    for seed in range(5):
        for width, top in ((1 << 20, 1 << 20), (16, 200)):
            for part in components([(b.start, b.end, b.size) for b in cut_rectangle(40, seed, width, top)]):
                outcome, offsets = search(part.grid, top, seed=0, deadline=time.perf_counter() + 5)
                assert outcome is Outcome.FOUND
                assert not overlapping(part.grid, offsets)
                assert height(part.grid, offsets) <= top


def test_the_search_stops_when_it_is_told() -> None:
    (part,) = components([(b.start, b.end, b.size) for b in cut_rectangle(60, 0, 1 << 20, 1 << 20)])
    searches = SkylineSearch(part.grid, 1 << 20)
    order = order_by(part.grid, "size")
    assert searches.run(order, learned=True, node_limit=10, deadline=NEVER) is Outcome.STOPPED
    assert searches.nodes == 11
    late = time.perf_counter() - 1
    assert searches.run(order, learned=True, node_limit=100_000, deadline=late) is Outcome.STOPPED
    assert searches.nodes == 32
    assert searches.run(order, learned=True, node_limit=100_000, deadline=NEVER) is Outcome.FOUND


def test_what_is_too_large_is_not_searched() -> None:
    sections = SEARCHED_CELLS // 2 + 1
    grid = Grid(
        intervals=(Interval(0, sections, 1), Interval(0, sections, 1)),
        sections=sections,
        live=(2,) * sections,
    )
    assert search(grid, 2, seed=0, deadline=NEVER) == (Outcome.STOPPED, [])
    assert search(grid, 1, seed=0, deadline=NEVER) == (Outcome.IMPOSSIBLE, [])


def test_a_search_wants_its_buffers_from_small_to_large() -> None:
    grid = Grid(intervals=(Interval(0, 1, 2), Interval(0, 1, 1)), sections=1, live=(3,))
    with pytest.raises(AssertionError, match="smallest"):
        SkylineSearch(grid, 3)
