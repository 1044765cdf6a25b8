"""Updates in a part of the step by themselves: figures by hand, the checker, and what it finds."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import (
    ALL_UPDATES,
    DEVICE,
    SEQUENTIAL_UPDATES,
    Block,
    Problem,
    Update,
)
from memtrain.planner.ranges.plan import RangePlan, make_plan
from memtrain.planner.ranges.solve import SolveOptions, solve
from tests.planner.ranges.small import (
    block,
    hop,
    place,
    problem,
    some_decisions,
    stateful_problems,
    states,
    with_state_anywhere,
)
from tests.planner.ranges.test_program import check_events

BY_DEVICE, BY_CPU = SEQUENTIAL_UPDATES
MANY = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def sequential(one: Problem) -> Problem:
    """Updated on the same sides as before."""
    sides = {update.on_cpu for update in one.updates}
    return dataclasses.replace(one, updates=tuple(u for u in SEQUENTIAL_UPDATES if u.on_cpu in sides))


def one_block(update: Update, gradients: str, **changes: object) -> Problem:
    """Parameters (4 bytes) and gradients (4) on the device and in ``gradients``, optimizer state (24) on the
    host; 10 bytes a second over the bus, 7 for the CPU; a second of update on the device."""
    held = states((DEVICE,), (gradients,), ("host",))
    only: Block = block(classes=(), states=held, device_update_seconds=1.0, **changes)
    host = place("host", 1000, hop("pcie"), cpu_bytes_per_second=7.0)
    return problem(1, 1000, host, blocks=(only,), staging="host", updates=(update,))


def planned(one: Problem, seed: int = 0) -> RangePlan:
    formulated = formulate(one)
    return make_plan(
        formulated,
        some_decisions(formulated, seed),
        status="heuristic",
        lower_bound_seconds=0.0,
        gap=1.0,
        solver="by hand",
    )


def test_a_sequential_update_hides_behind_nothing() -> None:
    plan = planned(one_block(BY_DEVICE, DEVICE))
    assert [(part.name, part.times) for part in plan.parts] == [("forward and backward", 1), ("update", 1)]
    assert plan.step_seconds == pytest.approx(4 + 8 + 2.4 + 1 + 2.4)  # read, compute, write
    assert check(plan, one_block(BY_DEVICE, DEVICE)) == []


def test_the_cpu_brings_its_parameters_to_the_device_in_the_end() -> None:
    plan = planned(one_block(BY_CPU, "host"))
    # The gradient leaves behind backward; it is read, state is read and written, parameters are written.
    assert plan.step_seconds == pytest.approx(4 + 8 + 0.4 + (4 + 2 * 24 + 4) / 7 + 0.4)
    assert plan.moved_bytes == 4 + 4
    assert check(plan, one_block(BY_CPU, "host")) == []


def test_gradients_are_gone_when_the_next_forward_begins() -> None:
    for update, peak in ((BY_DEVICE, 62), (Update(on_cpu=False, ahead=True), 66)):
        one = one_block(update, DEVICE, forward_transient_bytes=10)
        plan = planned(one)
        # Parameters, two slots of state, the transient; and gradients that wait for an update ahead.
        assert {p.place: p.size_bytes for p in plan.peaks}["device"] == peak
        assert check(plan, one) == []


@MANY
@given(stateful_problems(), st.integers(0, 10**6), st.integers(1, 3))
def test_nothing_to_say(one: Problem, seed: int, batches: int) -> None:
    several = dataclasses.replace(sequential(one), micro_batches=batches, in_flight=1 + seed % batches)
    assert check(planned(several, seed), several) == []


@settings(MANY, max_examples=30)
@given(stateful_problems(), st.integers(0, 10**6))
def test_events_of_the_program_are_those_of_the_simulator(one: Problem, seed: int) -> None:
    formulated = formulate(sequential(one))
    check_events(formulated, some_decisions(formulated, seed))


@MANY
@given(stateful_problems(uniform=True), st.integers(0, 10**6))
def test_no_update_can_begin_earlier(one: Problem, seed: int) -> None:
    apart = sequential(one)
    plan = planned(apart, seed)
    (number,) = (
        (n for n, part in enumerate(plan.parts) if part.name == "update")
        if any(b.states for b in one.blocks)
        else (None,)
    )
    events = [
        e
        for e in plan.events
        if e.part == number
        and e.start_seconds > plan.parts[e.part].start_seconds + 0.02
        and e.end_seconds > e.start_seconds + 0.02
    ]
    for event in random.Random(seed).sample(events, min(4, len(events))):
        early = dataclasses.replace(
            event, start_seconds=event.start_seconds - 0.01, end_seconds=event.end_seconds - 0.01
        )
        changed = tuple(early if e is event else e for e in plan.events)
        assert check(dataclasses.replace(plan, events=changed), apart), event


def test_the_checker_finds_updates_that_are_left_out_or_hidden() -> None:
    one = sequential(with_state_anywhere())
    plan = solve(one, SolveOptions(isolated=False))
    assert check(plan, one) == []
    last = len(plan.parts) - 1
    without = tuple(e for e in plan.events if not (e.part == last and e.name.startswith("update")))
    found = {fault.rule for fault in check(dataclasses.replace(plan, events=without), one)}
    assert found == {"DEPENDENCY"}
    fewer = dataclasses.replace(plan, parts=plan.parts[:-1])
    assert "PARTS" in {fault.rule for fault in check(fewer, one)}
    ahead = dataclasses.replace(one, updates=tuple(u for u in ALL_UPDATES if u.ahead))
    assert solve(ahead, SolveOptions(isolated=False)).step_seconds <= plan.step_seconds * 1.001


def test_all_updates_are_apart_or_none() -> None:
    with pytest.raises(ValueError, match="device-sequential', 'cpu-ahead'] are partly sequential"):
        problem(updates=(BY_DEVICE, Update(on_cpu=True, ahead=True)))
    with pytest.raises(ValueError, match="set ahead too"):
        Update(on_cpu=True, ahead=False, apart=True)
