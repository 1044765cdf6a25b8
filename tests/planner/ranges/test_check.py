"""The checker: silent on what the simulator makes, and every seeded fault is found and named."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.choices import KEEP, RECOMPUTE, SLOT
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.plan import BlockPlan, Range, RangePlan, make_plan
from tests.planner.ranges.small import (
    DEVICE,
    INT8,
    block,
    every,
    hop,
    place,
    problem,
    problems,
    some_decisions,
    some_state,
    stateful_problems,
    states,
    update,
    with_state_anywhere,
)
from tests.planner.ranges.test_simulate import HOST, NVME, decide


def planned(one: Problem, *blocks: dict[str, Any]) -> RangePlan:
    formulated = formulate(one)
    return heuristic(formulated, decide(formulated, *blocks))


def heuristic(formulated: Any, decisions: Any) -> RangePlan:
    fields = {"status": "heuristic", "lower_bound_seconds": 0.0, "gap": 1.0, "solver": "by hand"}
    return make_plan(formulated, decisions, **fields)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problems(), st.integers(0, 400))
def test_nothing_to_say_about_what_the_simulator_makes(one: Problem, number: int) -> None:
    formulated = formulate(one)
    decisions = next(itertools.islice(every(formulated), number, None), next(every(formulated)))
    found = {fault.rule for fault in check(heuristic(formulated, decisions), one)}
    rows = set(formulated.excess(decisions))
    expected = {"CAPACITY"} if any(" on " in row for row in rows) else set()
    expected |= {"WRITE_LIMIT"} if any("written" in row for row in rows) else set()
    expected |= {"ERROR_BUDGET"} if "error budget" in rows else set()
    assert found == expected


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 3.0, 10.0]), st.sampled_from([1.0, 4.0]))
def test_nothing_to_say_about_state(number: int, rate: float, seconds: float) -> None:
    one = with_state_anywhere(rate, seconds)
    formulated = formulate(one)
    assert check(heuristic(formulated, some_state(formulated, number)), one) == []


PCIE = hop("pcie")
THREE = problem(
    3,
    100,
    place("host", 200, PCIE),
    place("nvme", 200, PCIE, hop("nvme", 5.0), write_limit_bytes=50),
    staging="host",
    codecs=(INT8,),
    error_budget=0.0,
)
GOOD = planned(
    THREE,
    {"X": {HOST: 2}, "A": {RECOMPUTE: 1, HOST: 1}, "O": {RECOMPUTE: 2}},
    {"X": {HOST: 1, NVME: 1}, "A": {HOST: 2}, "O": {RECOMPUTE: 1, KEEP: 1}},
    {"X": {SLOT: 2}, "A": {SLOT: 2}, "O": {RECOMPUTE: 2}},
)
Change = Callable[[RangePlan], RangePlan]


def with_block(index: int, change: Callable[[BlockPlan], BlockPlan]) -> Change:
    def apply(plan: RangePlan) -> RangePlan:
        blocks = list(plan.blocks)
        blocks[index] = change(blocks[index])
        return dataclasses.replace(plan, blocks=tuple(blocks))

    return apply


def with_range(index: int, tensor: str, *ranges: tuple[int, int, str]) -> Change:
    new = tuple(Range(tensor=tensor, start=a, stop=b, action=action) for a, b, action in ranges)

    def change(one: BlockPlan) -> BlockPlan:
        return dataclasses.replace(one, ranges=(*(r for r in one.ranges if r.tensor != tensor), *new))

    return with_block(index, change)


def moved(name: str, resource: str, seconds: float, *, longer: float = 0.0) -> Change:
    """One event earlier or later, or longer."""

    def apply(plan: RangePlan) -> RangePlan:
        events = [
            dataclasses.replace(
                e, start_seconds=e.start_seconds + seconds, end_seconds=e.end_seconds + seconds + longer
            )
            if (e.name, e.resource) == (name, resource)
            else e
            for e in plan.events
        ]
        assert tuple(events) != plan.events
        return dataclasses.replace(plan, events=tuple(events))

    return apply


def without(name: str, resource: str) -> Change:
    def apply(plan: RangePlan) -> RangePlan:
        events = tuple(e for e in plan.events if (e.name, e.resource) != (name, resource))
        assert len(events) < len(plan.events)
        return dataclasses.replace(plan, events=events)

    return apply


def test_the_plan_that_faults_are_seeded_into_is_good() -> None:
    assert check(GOOD, THREE) == []


@pytest.mark.parametrize(
    ("change", "rule", "words"),
    [
        (with_range(0, "X", (0, 1, "swap:host")), "CHUNKS", "layers.0.X: chunk 1 has 0 actions"),
        (
            with_range(0, "X", (0, 2, "swap:host"), (1, 2, "keep")),
            "CHUNKS",
            "layers.0.X: chunk 1 has 2 actions",
        ),
        (with_range(0, "X", (0, 2, "recompute")), "ACTION", "layers.0.X cannot be recomputed"),
        (
            with_range(0, "A", (0, 1, "swap:host"), (1, 2, "recompute")),
            "ACTION",
            "layers.0.A: recomputed chunks 1-2 are no prefix",
        ),
        (with_range(2, "X", (0, 2, "swap:host")), "ACTION", "layers.2.X: swap:host is not allowed"),
        (with_range(0, "X", (0, 2, "slot")), "ACTION", "layers.0.X: its slot is taken over by a later block"),
        (with_range(0, "X", (0, 2, "swap:tape")), "ACTION", "layers.0.X: swap:tape is not allowed"),
        (
            with_range(0, "O", (0, 2, "keep")),
            "PEAK",
            "device: 120 bytes at backward layers.2, the plan says 80",
        ),
        (
            with_range(0, "O", (0, 2, "compress:int8")),
            "ERROR_BUDGET",
            "error 0.2222222222222222 exceeds the budget of 0.0",
        ),
        (moved("read layers.0", "read:pcie", -1.0), "DEPENDENCY", "read layers.0 on read:pcie starts before"),
        (
            moved("read layers.0", "read:pcie", 0.5),
            "DEPENDENCY",
            "backward layers.0 starts before read layers.0",
        ),
        (
            moved("write layers.1", "write:nvme", -0.5),
            "DEPENDENCY",
            "starts before write layers.1 on write:pcie is over",
        ),
        (
            moved("write layers.0", "write:pcie", 0.0, longer=99.0),
            "OVERLAP",
            "write:pcie: write layers.1 starts",
        ),
        (moved("read layers.1", "read:pcie", 0.0, longer=-0.1), "DURATION", "read layers.1 takes"),
        (moved("backward layers.1", "compute", 0.0, longer=-0.1), "DURATION", "backward layers.1 takes"),
        (without("read layers.0", "read:pcie"), "DEPENDENCY", "read layers.0 never happens on read:pcie"),
        (without("forward layers.1", "compute"), "DEPENDENCY", "forward layers.1 never happens on compute"),
        (lambda plan: dataclasses.replace(plan, moved_bytes=1), "BYTES_MOVED", "the plan says 1"),
        (
            lambda plan: dataclasses.replace(plan, lower_bound_seconds=99.0),
            "CERTIFICATE",
            "its bound is 99.0",
        ),
        (
            lambda plan: dataclasses.replace(plan, gap=0.5),
            "CERTIFICATE",
            "a gap of 1.000000000, the plan says",
        ),
        (lambda plan: dataclasses.replace(plan, status="good"), "CERTIFICATE", "'good' is no status"),
        (lambda plan: dataclasses.replace(plan, problem_digest="0"), "PROBLEM", "the plan is of 0,"),
        (lambda plan: dataclasses.replace(plan, step_seconds=1.0), "STEP_SECONDS", "the step takes 1.0"),
    ],
)
def test_every_seeded_fault_is_named(change: Change, rule: str, words: str) -> None:
    found = check(change(GOOD), THREE)
    assert any(fault.rule == rule and words in fault.message for fault in found), found


def streaming(update_way: str, *, micro_batches: int = 1, **where: str) -> tuple[RangePlan, Problem]:
    """Five blocks, 2 s forward and 3 s backward; state where it is said, else on the device or the host.

    8 bytes of each role; 5 B/s over PCIe, 2 B/s over NVMe's own link, the CPU at 16 B/s.
    """
    on_cpu = update_way.startswith("cpu")
    default = "host" if on_cpu else DEVICE
    roles = ("parameter", "gradient", "optimizer")
    held = states(*((where.get(role, default),) for role in roles), sizes=(8, 8, 8))
    pcie = hop("pcie", 5.0)
    times = {"forward_seconds": 2.0, "backward_seconds": 3.0, "device_update_seconds": 0.5}
    one = problem(
        5,
        1000,
        place("host", 1000, pcie, cpu_bytes_per_second=16.0),
        place("nvme", 1000, pcie, hop("nvme", 2.0)),
        blocks=tuple(block(i, classes=(), states=held, **times) for i in range(5)),
        staging="host",
        updates=(update(*update_way.split("-", 1)),),
        micro_batches=micro_batches,
    )
    formulated = formulate(one)
    plan = heuristic(formulated, some_decisions(formulated, 0))
    assert check(plan, one) == []
    return plan, one


@pytest.mark.parametrize(
    ("way", "where", "event", "words"),
    [
        (
            "device-backward",
            {"optimizer": "host"},
            ("read update layers.2", "read:pcie"),
            "starts before write update layers.4 on write:pcie is over",
        ),
        (
            "device-ahead",
            {"optimizer": "nvme"},
            ("read update layers.3", "read:nvme"),
            "starts before write update layers.1 on write:nvme is over",
        ),
        (
            "device-ahead",
            {"parameter": "nvme"},
            ("write update layers.3", "write:pcie"),
            "starts before write update layers.1 on write:nvme is over",
        ),
        (
            "cpu-ahead",
            {"optimizer": "nvme"},
            ("read update layers.2", "read:nvme"),
            "starts before write update layers.0 by cpu on write:nvme is over",
        ),
        (
            "device-ahead",
            {"gradient": "nvme"},
            ("backward layers.0", "compute"),
            "starts before write gradient layers.2 on write:pcie is over",
        ),
        (
            "device-ahead",
            {"gradient": "nvme"},
            ("write gradient layers.1", "write:pcie"),
            "starts before write gradient layers.3 on write:nvme is over",
        ),
        (
            "cpu-ahead",
            {"parameter": "nvme"},
            ("read parameters layers.3", "read:nvme"),
            "starts before forward layers.2 on compute is over",
        ),
        (
            "cpu-backward",
            {"parameter": "nvme"},
            ("read layers.1", "read:nvme"),
            "starts before read layers.3 on read:pcie is over",
        ),
    ],
)
def test_slots_that_are_taken_over_too_early(
    way: str, where: dict[str, str], event: tuple[str, str], words: str
) -> None:
    """Most of these events begin when what they wait for is over, backward layers.0 less than 3 s later."""
    plan, one = streaming(way, **where)
    found = check(moved(*event, -3.0 if event[1] == "compute" else -0.01)(plan), one)
    assert any(fault.rule == "DEPENDENCY" and words in fault.message for fault in found), found


def test_a_forwarding_slot_that_is_taken_over_too_early() -> None:
    """One slot: X of block 1 may not come to the host before that of block 0 has gone on to NVMe."""
    pcie = hop("pcie", 50.0)
    places = (place("host", 500, pcie), place("nvme", 500, pcie, hop("nvme", 1.0)))
    one = problem(3, 500, *places, staging="host", forwarding_slots=1)
    plan = planned(one, {"X": {NVME: 2}}, {"X": {NVME: 2}}, {})
    early = moved("write layers.1", "write:pcie", -0.01)(plan)
    words = "write layers.1 on write:pcie starts before write layers.0 on write:nvme is over"
    assert any(fault.message == words for fault in check(early, one))


MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@MANY
@given(stateful_problems(uniform=True), st.integers(0, 10**6))
def test_nothing_about_state_can_begin_earlier(one: Problem, seed: int) -> None:
    """The simulator starts everything as soon as its rules allow; the checker's rules allow no sooner.

    But for saved tensors: what several places take of a block is copied as one, and waits for all of it.
    """
    formulated = formulate(one)
    plan = heuristic(formulated, some_decisions(formulated, seed))
    names = {b.name for b in one.blocks}
    begun = [part.start_seconds + 0.02 for part in plan.parts]
    events = [
        e
        for e in plan.events
        if e.start_seconds > begun[e.part]
        and e.end_seconds > e.start_seconds + 0.02
        and not (e.name.split(" ", 1)[1] in names and e.resource != "compute")
    ]
    for event in random.Random(seed).sample(events, min(4, len(events))):
        early = dataclasses.replace(
            event, start_seconds=event.start_seconds - 0.01, end_seconds=event.end_seconds - 0.01
        )
        changed = tuple(early if e is event else e for e in plan.events)
        assert check(dataclasses.replace(plan, events=changed), one), event


def swapped(first: str, second: str, resource: str) -> Change:
    """Two events of a queue take each other's place."""

    def apply(plan: RangePlan) -> RangePlan:
        mine = {e.name: e for e in plan.events if e.resource == resource}
        a, b = mine[first], mine[second]
        times = {
            first: (b.start_seconds, b.end_seconds),
            second: (a.start_seconds, a.end_seconds),
        }
        events = [
            dataclasses.replace(e, start_seconds=times[e.name][0], end_seconds=times[e.name][1])
            if e.resource == resource and e.name in times
            else e
            for e in plan.events
        ]
        return dataclasses.replace(plan, events=tuple(events))

    return apply


def test_queues_out_of_order_parts_and_bandwidth_are_named() -> None:
    plan, one = streaming("device-ahead", micro_batches=2, optimizer="host", gradient="host")
    order = swapped("write update layers.0", "write update layers.1", "write:pcie")(plan)
    assert any(
        f.rule == "ORDER"
        and f.message == "write:pcie: write update layers.1 comes before write update layers.0"
        for f in check(order, one)
    )
    parts = dataclasses.replace(plan, parts=plan.parts[:1])
    assert [f.rule for f in check(parts, one)] == ["PARTS"]
    once = dataclasses.replace(plan, parts=(plan.parts[0], dataclasses.replace(plan.parts[1], times=2)))
    assert any(f.rule == "PARTS" and "[1, 2] times, not [1, 1]" in f.message for f in check(once, one))
    outside = dataclasses.replace(
        plan, parts=(dataclasses.replace(plan.parts[0], end_seconds=1.0), plan.parts[1])
    )
    assert any("lies outside of its part" in f.message for f in check(outside, one))
    machine = one.machine
    tight = tuple(
        dataclasses.replace(p, hops=tuple(dataclasses.replace(h, mixed_bytes_per_second=9.0) for h in p.hops))
        for p in machine.places
    )
    shared = dataclasses.replace(one, machine=dataclasses.replace(machine, places=tight))
    assert any(
        f.rule == "BANDWIDTH" and "move 10 B/s at once, 9 are" in f.message for f in check(plan, shared)
    )


@pytest.mark.parametrize(
    ("machine", "rule", "words"),
    [
        ({"device_capacity_bytes": 79}, "CAPACITY", "device: 80 bytes at"),
        ({"nvme": 5}, "CAPACITY", "nvme: 5 bytes at step"),
        ({"limit": 4}, "WRITE_LIMIT", "nvme: 5 bytes a step, 4 allowed"),
    ],
)
def test_limits(machine: dict[str, int], rule: str, words: str) -> None:
    old = THREE.machine
    host, nvme = old.places
    nvme = dataclasses.replace(
        nvme,
        capacity_bytes=machine.get("nvme", 6) - 1 if "nvme" in machine else nvme.capacity_bytes,
        write_limit_bytes=machine.get("limit", 50),
    )
    new = dataclasses.replace(
        old,
        places=(host, nvme),
        device_capacity_bytes=machine.get("device_capacity_bytes", old.device_capacity_bytes),
    )
    found = check(GOOD, dataclasses.replace(THREE, machine=new))
    assert any(fault.rule == rule and words in fault.message for fault in found), found
