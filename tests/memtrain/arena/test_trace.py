"""Plans of recorded steps: addresses by hand, and of random steps by the independent checker."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.arena.trace import ALIGNMENT_BYTES, ELSEWHERE, Trace, plan_step
from memtrain.planner.buffers import Buffer
from memtrain.planner.check_addresses import check_addresses


def test_what_dies_before_the_next_request_leaves_its_place_to_it() -> None:
    plan = plan_step(Trace(sizes=(100, 128, 64), deaths=(1, 3, 3)), time_limit_seconds=1.0)
    # 100 counts as 128 in the packing, and is gone when the second comes; 128 and 64 are together.
    assert plan.height_bytes == 192
    assert plan.load_bytes == 192
    assert sorted(plan.offsets[1:]) in ([0, 64], [0, 128])
    assert plan.outliving_bytes == 0


def test_the_load_is_of_the_bytes_that_were_asked_for() -> None:
    plan = plan_step(Trace(sizes=(100, 1), deaths=(2, 2)), time_limit_seconds=1.0)
    assert plan.load_bytes == 101
    assert plan.height_bytes == 192


def test_what_outlives_the_step_has_no_address() -> None:
    plan = plan_step(Trace(sizes=(64, 640, 64), deaths=(2, ELSEWHERE, 3)), time_limit_seconds=1.0)
    assert list(plan.offsets) == [0, ELSEWHERE, 0]
    assert plan.planned_requests == 2
    assert plan.outliving_bytes == 640
    assert plan.height_bytes == 64


def test_a_step_of_which_all_outlives_needs_no_arena() -> None:
    plan = plan_step(Trace(sizes=(64,), deaths=(ELSEWHERE,)), time_limit_seconds=1.0)
    assert plan.height_bytes == 0
    assert plan.load_bytes == 0


def test_of_two_steps_every_block_lives_as_long_as_in_either() -> None:
    first = Trace(sizes=(64, 64, 64), deaths=(1, 3, ELSEWHERE))
    second = Trace(sizes=(64, 64, 64), deaths=(2, ELSEWHERE, 3))
    assert first.is_like(second)
    assert list(first.joined(second).deaths) == [2, ELSEWHERE, ELSEWHERE]
    assert not first.is_like(Trace(sizes=(64, 64), deaths=(1, 2)))


@pytest.mark.parametrize(
    ("sizes", "deaths", "message"),
    [
        ((64, 64), (2,), "2 requests have 1 deaths"),
        ((64,), (0,), "request 0 of 1 dies at 0"),
        ((64, 64), (1, 3), "request 1 of 2 dies at 3"),
    ],
)
def test_a_trace_that_makes_no_sense_is_refused(
    sizes: tuple[int, ...], deaths: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Trace(sizes=sizes, deaths=deaths)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    sizes = draw(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
    deaths = [
        draw(st.one_of(st.just(ELSEWHERE), st.integers(index + 1, len(sizes)))) for index in range(len(sizes))
    ]
    return Trace(sizes=tuple(sizes), deaths=tuple(deaths))


@settings(max_examples=60, deadline=None)
@given(traces())
def test_addresses_of_random_steps_pass_the_checker(trace: Trace) -> None:
    plan = plan_step(trace, time_limit_seconds=0.05)
    planned = {str(i): offset for i, offset in enumerate(plan.offsets) if offset != ELSEWHERE}
    buffers = [Buffer(i, int(i), trace.deaths[int(i)], trace.sizes[int(i)]) for i in planned]
    faults = check_addresses(buffers, planned, capacity=plan.height_bytes, alignment=ALIGNMENT_BYTES)
    assert faults == ()
    assert {i for i, death in enumerate(trace.deaths) if death != ELSEWHERE} == {int(i) for i in planned}
    assert plan.load_bytes <= plan.height_bytes
