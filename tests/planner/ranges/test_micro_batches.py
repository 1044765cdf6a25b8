"""Gradient accumulation and several micro-batches in flight, by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.choices import KEEP, RECOMPUTE, Action, Kind
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import Place, Problem
from memtrain.planner.ranges.plan import RangePlan, make_plan
from memtrain.planner.ranges.simulate import simulate
from memtrain.planner.ranges.solve import SolveOptions, solve
from tests.planner.ranges.small import (
    block,
    hop,
    place,
    problem,
    some_decisions,
    states,
    tensors,
    update,
    with_state_anywhere,
)
from tests.planner.ranges.test_simulate import HOST, decide

FIELDS = {"status": "heuristic", "lower_bound_seconds": 0.0, "gap": 1.0, "solver": "by hand"}
EXACT = SolveOptions(gap=1e-5, seconds=20.0, isolated=False)


def times(plan: RangePlan, part: int = 0) -> dict[tuple[str, str], tuple[float, float]]:
    """Start and end of a part's events, since it began, those that take no time left out."""
    began = plan.parts[part].start_seconds
    return {
        (e.name, e.resource): (e.start_seconds - began, e.end_seconds - began)
        for e in plan.events
        if e.part == part and e.end_seconds > e.start_seconds
    }


def only(one: Problem) -> RangePlan:
    """The plan of a problem in which nothing is left to decide; it passes the checker."""
    formulated = formulate(one)
    plan = make_plan(formulated, some_decisions(formulated, 0), **FIELDS)
    assert check(plan, one) == []
    return plan


def test_micro_batches_without_state_are_alike() -> None:
    """Two blocks of 12 s, three times; what is moved and written counts three times, what lies there once."""
    host = place("host", 1000, write_limit_bytes=1000)
    one = problem(2, 500, host, micro_batches=3)
    formulated = formulate(one)
    timeline = simulate(formulated, decide(formulated, {"X": {HOST: 2}}, {}))
    assert [(p.name, p.times, p.start_seconds, p.end_seconds) for p in timeline.parts] == [
        ("micro-batches", 3, 0.0, 26.0)
    ]
    # 10 bytes at 10 B/s: forward 1 waits for the slot, backward 0 for the way back.
    assert timeline.step_seconds == 3 * 26.0
    assert timeline.moved_bytes == 3 * 2 * 10
    assert [(p.place, p.size_bytes) for p in timeline.peaks] == [("device", 120), ("host", 10)]
    row = next(r for r in formulated.form.rows if r.name == "bytes written to host")
    x = formulated.form.complete(decide(formulated, {"X": {HOST: 2}}, {}))
    assert row.expression.value(x) == 30


def state_problem(where: str, way: str, *more: Place, micro_batches: int) -> Problem:
    """One block of 4 + 8 s whose gradient of 4 bytes lies in ``where``; the rest is where it is updated."""
    on_cpu = way == "cpu"
    held = states(("device",), (where,), ("host" if on_cpu else "device",), sizes=(4, 4, 24))
    host = place("host", 1000, hop("pcie", 4.0, 2.0), cpu_bytes_per_second=8.0)
    return problem(
        1,
        1000,
        host,
        *more,
        blocks=(block(0, classes=(), states=held, device_update_seconds=1.0),),
        staging="host",
        updates=(update(way, "ahead"),),
        micro_batches=micro_batches,
    )


def test_gradients_on_the_device_stay_all_step_long() -> None:
    """4 + 24 bytes of state and a gradient of 4; from the second micro-batch on a new one of 4 beside it."""
    one, three = (only(state_problem("device", "device", micro_batches=m)) for m in (1, 3))
    assert one.step_seconds == 1.0 + 12.0
    assert one.peaks[0].size_bytes == 4 + 24 + 4
    assert three.step_seconds == 1.0 + 3 * 12.0
    assert three.peaks[0].size_bytes == 4 + 24 + 4 + 4
    assert three.peaks[0].position == "backward layers.0"
    assert [(p.name, p.times) for p in three.parts] == [
        ("first micro-batch", 1),
        ("further micro-batches", 2),
    ]
    assert three.moved_bytes == 0


def test_the_device_adds_to_gradients_that_lie_elsewhere() -> None:
    """First: read for the update (4 bytes, 2 s at 2 B/s), 1 s of update, 12 s, written (1 s at 4 B/s).

    Each further one: the sum is fetched behind forward, 0 to 2 s, and written after backward, 12 to 13.
    """
    plan = only(state_problem("host", "device", micro_batches=3))
    assert times(plan, 0) == {
        ("read update layers.0", "read:pcie"): (0.0, 2.0),
        ("update layers.0", "compute"): (2.0, 3.0),
        ("forward layers.0", "compute"): (3.0, 7.0),
        ("backward layers.0", "compute"): (7.0, 15.0),
        ("write gradient layers.0", "write:pcie"): (15.0, 16.0),
    }
    assert times(plan, 1) == {
        ("forward layers.0", "compute"): (0.0, 4.0),
        ("read gradient layers.0", "read:pcie"): (0.0, 2.0),
        ("backward layers.0", "compute"): (4.0, 12.0),
        ("write gradient layers.0", "write:pcie"): (12.0, 13.0),
    }
    assert plan.step_seconds == 16.0 + 2 * 13.0
    assert plan.moved_bytes == 2 * 4 + 2 * (4 + 4)
    # 28 bytes of state, two slots of 4 for sums, two for the update's gradient, and the new gradient.
    assert plan.peaks[0].size_bytes == 28 + 8 + 8 + 4


def test_the_cpu_adds_to_gradients_that_it_will_use() -> None:
    """The new gradient goes to staging, 1 s; the CPU reads it, reads and writes the sum: 12 bytes at 8 B/s.

    The first writes 4 bytes of gradient to their place, in 1 s as well.
    """
    plan = only(state_problem("host", "cpu", micro_batches=2))
    assert times(plan, 1) == {
        ("forward layers.0", "compute"): (0.0, 4.0),
        ("backward layers.0", "compute"): (4.0, 12.0),
        ("write gradient layers.0", "write:pcie"): (12.0, 13.0),
        ("add gradient layers.0", "cpu"): (13.0, 14.5),
    }
    # The first: 4 + 2 * 24 + 4 bytes at 8 B/s, new parameters 2 s at 2 B/s, 12 s, the gradient 1 s.
    assert plan.step_seconds == 7.0 + 2.0 + 12.0 + 1.0 + 14.5
    # Gradient and optimizer, two slots for arriving gradients, parameters that wait.
    assert {p.place: p.size_bytes for p in plan.peaks} == {"device": 4 + 2 * 4, "host": 28 + 8 + 4}


def test_the_cpu_adds_through_staging_on_the_way_to_nvme() -> None:
    """The old sum is read to staging (4 bytes at 2 B/s, behind forward), the new one written (1 s)."""
    nvme = place("nvme", 1000, hop("pcie", 4.0, 2.0), hop("nvme", 4.0, 2.0))
    one = state_problem("nvme", "cpu", nvme, micro_batches=2)
    plan = only(one)
    assert times(plan, 1) == {
        ("forward layers.0", "compute"): (0.0, 4.0),
        ("read gradient layers.0 by cpu", "read:nvme"): (0.0, 2.0),
        ("backward layers.0", "compute"): (4.0, 12.0),
        ("write gradient layers.0", "write:pcie"): (12.0, 13.0),
        ("add gradient layers.0", "cpu"): (13.0, 14.5),
        ("write gradient layers.0 by cpu", "write:nvme"): (14.5, 15.5),
    }
    # First 2 * 4 out and 4 in for the update; then 4 to staging and 4 + 4 over the second hop; 4 parameters.
    assert plan.moved_bytes == 3 * 4 + 3 * 4 + 4
    # Optimizer 24; slots: two of sums in staging and two of new gradients; parameters that wait.
    assert {p.place: p.size_bytes for p in plan.peaks}["host"] == 24 + 8 + 8 + 4


def test_updates_in_backward_are_for_one_micro_batch() -> None:
    one = state_problem("device", "device", micro_batches=2)
    with pytest.raises(ValueError, match=r"can be done in 2 micro-batches .* need one ahead"):
        formulate(dataclasses.replace(one, updates=(update("device", "backward"),)))


def test_in_flight_everything_leaves_and_what_is_kept_counts_for_each() -> None:
    """Two blocks of 60 bytes. Forward 0: 4 s, its X sent until 5; 1 waits for the slot: 5-9, sent 9-10.

    Backward 1 waits for its X: 0-1, then 1-9; X of 0 comes when it has left: 9-10, 10-18.
    """
    one = problem(2, 500, place("host", 1000), micro_batches=3, in_flight=3)
    formulated = formulate(one)
    sent = {"X": {HOST: 2}}
    plan = make_plan(formulated, decide(formulated, sent, sent), **FIELDS)
    assert check(plan, one) == []
    assert [(p.name, p.times, p.end_seconds - p.start_seconds) for p in plan.parts] == [
        ("forward, micro-batches", 3, 10.0),
        ("backward, micro-batches", 3, 18.0),
    ]
    assert plan.step_seconds == 3 * 28.0
    assert plan.moved_bytes == 3 * 4 * 10
    # Two others keep 100 bytes each; a slot of 10.
    assert {p.place: p.size_bytes for p in plan.peaks} == {"device": 3 * 100 + 10, "host": 3 * 20}
    with_slot = Action(kind=Kind.SLOT)
    assert all(with_slot not in chosen for block in formulated.choices.counts for chosen in block)


def test_in_flight_parameters_are_fetched_for_every_backward() -> None:
    """4 bytes of parameters at 2 B/s: 2 s before each forward and each backward of the only block."""
    held = states(("host",), ("device",), ("device",))
    host = place("host", 1000, hop("pcie", 4.0, 2.0), cpu_bytes_per_second=8.0)
    one = problem(
        1,
        1000,
        host,
        blocks=(block(0, classes=(), states=held),),
        staging="host",
        updates=(update("device", "ahead"),),
        micro_batches=2,
        in_flight=2,
    )
    plan = only(one)
    # The first forward finds them as the update has left them, which has to write them: 1 s behind forward.
    assert [part.end_seconds - part.start_seconds for part in plan.parts] == [4.0, 10.0, 6.0, 10.0]
    assert plan.step_seconds == 30.0


@pytest.mark.parametrize(("micro_batches", "in_flight"), [(0, 1), (2, 3), (2, 0)])
def test_impossible_numbers_are_refused(micro_batches: int, in_flight: int) -> None:
    with pytest.raises(ValueError, match="micro_batches"):
        problem(1, 100, micro_batches=micro_batches, in_flight=in_flight)


def test_a_pipeline_stage_keeps_less() -> None:
    """One block of 60 bytes on a device of 130: with one micro-batch in flight all is kept."""
    one = problem(1, 130, blocks=(block(0, classes=tensors(2)),), micro_batches=3)
    assert solve(one, EXACT).step_seconds == pytest.approx(36.0)
    three = dataclasses.replace(one, in_flight=3)
    plan = solve(three, EXACT)
    # A's 10 bytes cost 4 s and O's chunks of 20 a second each. Kept by three: X 10 and A 10, 60 in all, and
    # one chunk of O 60 more: 120, and the other restored beside them: 140. So O is recomputed whole: 100.
    assert plan.step_seconds == pytest.approx(3 * 14.0)
    assert plan.peaks[0].size_bytes == 100


SLOW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@SLOW
@given(st.integers(0, 10**6), st.sampled_from([1.0, 3.0, 10.0]), st.integers(2, 4))
def test_more_micro_batches_cost_what_a_further_one_takes(seed: int, rate: float, count: int) -> None:
    """Peaks do not depend on their number, from two on; the step grows by the same each time."""
    two, more = (formulate(with_state_anywhere(rate, micro_batches=m)) for m in (2, count))
    first, second = (simulate(f, some_decisions(f, seed)) for f in (two, more))
    assert [p.size_bytes for p in first.peaks] == [p.size_bytes for p in second.peaks]
    further = first.parts[1].end_seconds - first.parts[1].start_seconds
    assert second.step_seconds == pytest.approx(first.step_seconds + (count - 2) * further)


def test_recomputed_prefixes_stand_in_every_micro_batch() -> None:
    formulated = formulate(problem(1, 500, micro_batches=2))
    chosen = decide(formulated, {"A": {RECOMPUTE: 1, KEEP: 1}})
    assert simulate(formulated, chosen).step_seconds == 2 * 13.0
