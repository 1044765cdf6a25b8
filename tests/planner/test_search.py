from __future__ import annotations

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from memtrain.planner.parallel import Degrees
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import Problem
from memtrain.planner.search import RESOLUTION, feasible, furthest, sequence_unit
from tests.planner.ranges.small import every, place, problem, problems


def test_the_unit_is_what_the_degrees_cut() -> None:
    assert sequence_unit(Degrees()) == 1
    assert sequence_unit(Degrees(), 128) == 128
    # A ring of 8 has two pieces a rank, each cut in two by sequence parallelism: 32 pieces.
    assert sequence_unit(Degrees(context=8, tensor=2)) == 32
    assert sequence_unit(Degrees(context=8, tensor=2, sequence_parallel=False)) == 16
    assert sequence_unit(Degrees(context=3, context_method="ulysses"), 128) == 129


def test_doubling_and_bisection() -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= 1000

    found = furthest(fits, unit=1, start=100, most=100_000)
    assert asked == [100, 200, 400, 800, 1600, 1200, 1000, 1100, 1050, 1025]
    assert (found.largest, found.smallest_too_large) == (1000, 1025)
    assert found.tried == tuple((size, size <= 1000) for size in asked)


def test_the_search_goes_down_where_the_start_does_not_fit() -> None:
    found = furthest(lambda size: size <= 96, unit=32, start=1000, most=100_000)
    assert (found.largest, found.smallest_too_large) == (96, 128)


def test_nothing_and_everything() -> None:
    nothing = furthest(lambda size: False, unit=128, start=8192, most=1 << 20)
    assert (nothing.largest, nothing.smallest_too_large) == (0, 128)
    everything = furthest(lambda size: True, unit=128, start=8192, most=20_000)
    assert (everything.largest, everything.smallest_too_large) == (19_968, None)
    with pytest.raises(ValueError, match="the largest size 100 is below the unit 128"):
        furthest(lambda size: True, unit=128, start=1, most=100)


@seed(1)
@settings(max_examples=200, deadline=None)
@given(limit=st.integers(0, 10**6), unit=st.integers(1, 300), start=st.integers(1, 10**6))
def test_what_is_told_is_true_and_near(limit: int, unit: int, start: int) -> None:
    found = furthest(lambda size: size <= limit, unit=unit, start=start, most=10**6)
    assert found.largest % unit == 0
    assert found.largest <= limit
    if found.smallest_too_large is None:
        assert found.largest == 10**6 // unit * unit
    else:
        assert found.smallest_too_large > limit
        assert found.smallest_too_large - found.largest <= max(unit, found.largest * RESOLUTION)


def fits_by_enumeration(one: Problem) -> bool:
    formulated = formulate(one)
    return any(not formulated.excess(decisions) for decisions in every(formulated))


@pytest.mark.parametrize("device", [10, 40, 60, 70, 75, 80, 100, 200])
def test_feasible_is_what_enumeration_says(device: int) -> None:
    one = problem(2, device, place("host", 30))
    assert feasible(one) is fits_by_enumeration(one)


@seed(2)
@settings(max_examples=25, deadline=None)
@given(one=problems())
def test_feasible_of_random_problems(one: Problem) -> None:
    assert feasible(one) is fits_by_enumeration(one)
