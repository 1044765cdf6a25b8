"""The program against enumeration, against the simulator's events, and in the directions it must move."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pulp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.formulate import Decisions, Formulated, formulate
from memtrain.planner.ranges.highs import Solver
from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.plan import make_plan
from memtrain.planner.ranges.program import TIE_BREAK, build, rounded
from memtrain.planner.ranges.simulate import simulate, step_seconds
from tests.planner.ranges.small import (
    INT8,
    best_of_all,
    block,
    every,
    hop,
    place,
    problem,
    problems,
    some_state,
    states,
    update,
    with_state_anywhere,
)

SLOW = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def optimum(formulated: Formulated) -> float:
    """The step of the program's best decisions, simulated; inf when there are none."""
    found = Solver(build(formulated)).solve(30.0, 0.0)
    if not found.solved:
        assert found.status == "Infeasible"
        return math.inf
    decisions = rounded(formulated, found.values)
    assert not formulated.excess(decisions)
    seconds = step_seconds(formulated, decisions)
    assert found.bound <= seconds * (1 + 2 * TIE_BREAK)
    return seconds


def tolerance(one: Problem) -> float:
    """The tie-break may cost as much; HiGHS stops within 1e-6."""
    return 4 * TIE_BREAK * one.compute_seconds + 1e-5


@SLOW
@given(problems())
def test_optimum_is_that_of_enumeration(one: Problem) -> None:
    formulated = formulate(one)
    while sum(1 for _ in itertools.islice(every(formulated), 3001)) > 3000:
        fewer = {"blocks": one.blocks[:-1]} if len(one.blocks) > 1 else {"codecs": ()}
        one = dataclasses.replace(one, **fewer)
        formulated = formulate(one)
    assert optimum(formulated) == pytest.approx(best_of_all(formulated), abs=tolerance(one))


@pytest.mark.parametrize(
    ("device", "host", "updates", "batches"),
    [
        (70, 70, (update("device", "backward"),), 1),
        (40, 70, (update("cpu", "ahead"), update("cpu", "backward")), 1),
        (40, 78, (update("cpu", "ahead"),), 3),
        (75, 70, (update("device", "ahead"),), 2),
    ],
)
def test_optimum_with_state_is_that_of_enumeration(
    device: int, host: int, updates: tuple[object, ...], batches: int
) -> None:
    held = states(("device", "host"), ("device", "host"), ("device", "host", "nvme"), pieces=2)
    blocks = tuple(block(i, states=held, pieces=2, device_update_seconds=1.0, classes=()) for i in range(2))
    one = problem(
        2,
        device,
        place("host", host, hop("pcie", 10.0, 7.0), cpu_bytes_per_second=11.0),
        place("nvme", 100, hop("pcie", 10.0, 7.0), hop("nvme", 5.0, 3.0)),
        blocks=blocks,
        staging="host",
        updates=updates,
        micro_batches=batches,
    )
    formulated = formulate(one)
    expected = best_of_all(formulated)
    assert math.isfinite(expected)
    assert optimum(formulated) == pytest.approx(expected, abs=tolerance(one))


def check_events(formulated: Formulated, decisions: Decisions) -> None:
    """Decisions held, the least events that the rows allow are the simulator's, each of them."""
    program = build(formulated)
    x = formulated.form.complete(decisions)
    for variable, value in zip(program.variables, x, strict=True):
        if variable.cat == pulp.LpInteger:
            variable.lowBound = variable.upBound = value
    ends = [v for v in program.problem.variables() if v.name.startswith("e") or v is program.step]
    program.problem.setObjective(pulp.lpSum(ends))
    program.problem.solve(pulp.HiGHS(msg=False))
    timeline = simulate(formulated, decisions)
    assert program.step.varValue == pytest.approx(timeline.step_seconds, abs=1e-6)
    by_name = {v.name: v.varValue for v in ends}
    for index, event in enumerate(timeline.events):
        end = event.end_seconds - timeline.parts[event.part].start_seconds
        assert by_name[f"e{index}"] == pytest.approx(end, abs=1e-6), event


@SLOW
@given(problems(), st.integers(0, 300))
def test_events_of_the_program_are_those_of_the_simulator(one: Problem, number: int) -> None:
    machine = one.machine
    places = tuple(
        dataclasses.replace(p, capacity_bytes=10_000, write_limit_bytes=None) for p in machine.places
    )
    roomy = dataclasses.replace(machine, device_capacity_bytes=10_000, places=places)
    formulated = formulate(dataclasses.replace(one, machine=roomy, error_budget=1.0))
    check_events(formulated, next(itertools.islice(every(formulated), number, None), next(every(formulated))))


@settings(SLOW, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 3.0, 10.0]), st.integers(1, 3))
def test_events_of_updates_are_those_of_the_simulator(number: int, rate: float, batches: int) -> None:
    formulated = formulate(with_state_anywhere(rate, micro_batches=batches))
    check_events(formulated, some_state(formulated, number))


@SLOW
@given(problems(most_blocks=2), st.sampled_from(["device", "capacity", "bandwidth", "error"]))
def test_more_never_costs_time(one: Problem, what: str) -> None:
    machine = one.machine
    if what == "device":
        machine = dataclasses.replace(machine, device_capacity_bytes=machine.device_capacity_bytes + 7)
    if what == "capacity":
        places = tuple(dataclasses.replace(p, capacity_bytes=p.capacity_bytes + 5) for p in machine.places)
        machine = dataclasses.replace(machine, places=places)
    if what == "bandwidth":
        places = tuple(
            dataclasses.replace(
                p,
                hops=tuple(
                    hop(h.link, h.write_bytes_per_second * 2, h.read_bytes_per_second * 2) for h in p.hops
                ),
            )
            for p in machine.places
        )
        machine = dataclasses.replace(machine, places=places)
    more = dataclasses.replace(
        one, machine=machine, error_budget=one.error_budget + (0.5 if what == "error" else 0.0)
    )
    assert optimum(formulate(more)) <= optimum(formulate(one)) + tolerance(one)


def test_swap_hides_behind_forward_and_backward() -> None:
    """Four blocks of 60 bytes and two slots in 160 bytes: the last two blocks take 120, slots included.

    The first two keep 40 bytes together and send 40 each, 4 s at 10 B/s: the time of a forward. Their slots
    are free when forward 2 and 3 begin, and they are back before backward 1 and 0, which take 8 s. With a
    byte less, a chunk more must be sent or recomputed.
    """
    one = problem(4, 160, place("host", 1000), slots=2)
    assert optimum(formulate(one)) == pytest.approx(48.0, abs=1e-3)
    less = problem(4, 159, place("host", 1000), slots=2)
    assert optimum(formulate(less)) >= 48.5 - 1e-3


def test_codec_only_within_its_error_budget() -> None:
    """Two blocks of 10 bytes, in 16: the first must lie there as 6, half of all bytes with an error of 1."""
    free = dataclasses.replace(
        INT8, compress_bytes_per_second=1e9, decompress_bytes_per_second=1e9, places=()
    )
    blocks = tuple(block(i, classes=block().classes[:1]) for i in range(2))
    one = problem(2, 16, blocks=blocks, codecs=(free,), error_budget=0.5)
    assert optimum(formulate(one)) == pytest.approx(24.0, abs=1e-3)
    assert optimum(formulate(dataclasses.replace(one, error_budget=0.49))) == math.inf


def test_what_backward_makes_again_goes_into_the_room_that_its_block_leaves_of_a_slot() -> None:
    # Blocks 0 and 1 send X (10 bytes) and make A and O (10 and 40) again; the last two stay in slots whole.
    one = problem(4, 1000, place("host", 1000), slots=2)
    formulated = formulate(one)
    counts = {}
    for index, chosen in enumerate(formulated.choices.counts):
        wanted = ("slot",) * 3 if index >= 2 else ("swap:host", "recompute", "recompute")
        for label, options in zip(wanted, chosen, strict=True):
            counts[next(v for a, v in options.items() if a.label == label)] = 2
    decisions = formulated.decisions(counts)
    at = {name: size for name, where, size in simulate(formulated, decisions).positions if where == "device"}
    # Two slots of 60 bytes; 50 bytes made again beside 10 that were sent.
    assert set(at.values()) == {120}
    plan = make_plan(
        formulated, decisions, status="heuristic", lower_bound_seconds=0.0, gap=1.0, solver="by hand"
    )
    assert check(plan, one) == []
