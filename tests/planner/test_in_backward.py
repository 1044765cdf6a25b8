"""Plans whose units are updated during backward: bytes and seconds by hand, the bound, and planted faults."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from memtrain.planner.actions import BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.bill import device_positions
from memtrain.planner.check import Rule, check
from memtrain.planner.choices import Request
from memtrain.planner.decisions import Decisions, PlannerOptions, open_space, staging_for
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Event, Plan
from memtrain.planner.profile import ModelProfile
from memtrain.planner.program import solve_program
from memtrain.planner.simulate import simulate
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from tests.planner.test_simulate import KEEP, run
from tests.planner.toys import make_machine, make_profile
from tests.planner.weighty import weighty

IN_BACKWARD, SEQUENTIAL = UpdateSchedule.IN_BACKWARD, UpdateSchedule.SEQUENTIAL
BUDGET = Budget(device="1GiB", nvme="/x:1GiB")
READ = 6 / 1024
"""Seconds of a block's state, 6 MiB at 1 GiB/s: less than its backward's 20 ms."""


# -- seconds -------------------------------------------------------------------------------------------


def test_reads_and_writes_hide_behind_backward() -> None:
    profile = make_profile(3, trainable=True)
    state = {"optimizer_tier": Tier.NVME}
    timeline = run(profile, [KEEP] * 3, state=state, schedule=IN_BACKWARD)
    # 100 ms of passes, an update of 1 ms in each block's backward; what is left behind the prologue's 2 ms
    # is the write of block 0.
    assert timeline.step_seconds == pytest.approx(0.100 + 3 * 0.001 - 0.002 + READ)
    assert timeline.bytes_moved == 3 * 2 * 6 * MiB
    reads = [e for e in timeline.events if e.name.startswith("read update")]
    assert [e.name for e in reads] == [f"read update layers.{n}" for n in (2, 1, 0)]
    loss = next(e for e in timeline.events if e.name == "loss epilogue")
    assert reads[0].start_seconds == pytest.approx(loss.end_seconds)
    assert reads[2].end_seconds == pytest.approx(loss.end_seconds + 3 * READ)
    sequential = run(profile, [KEEP] * 3, state=state)
    assert timeline.step_seconds < sequential.step_seconds


def test_the_update_comes_in_the_last_micro_batch() -> None:
    profile = make_profile(2, trainable=True, micro_batches=3)
    events = run(profile, [KEEP] * 2, state={"optimizer_tier": Tier.NVME}, schedule=IN_BACKWARD).events
    last = max(e.start_seconds for e in events if e.name == "forward prologue")
    for event in events:
        if "update" in event.name:
            assert event.start_seconds > last
    assert [e.name for e in events if e.name.startswith("update")] == ["update layers.1", "update layers.0"]


def test_gradients_of_a_tier_are_read_when_they_are_written() -> None:
    profile = make_profile(2, trainable=True, micro_batches=2)
    state = {"optimizer_tier": Tier.NVME, "gradient_tier": Tier.NVME}
    events = run(profile, [KEEP] * 2, state=state, schedule=IN_BACKWARD).events
    for unit in ("layers.0", "layers.1"):
        written = max(e.end_seconds for e in events if e.name == f"write gradient {unit}")
        assert min(e.start_seconds for e in events if e.name == f"read update {unit}") >= written - 1e-9


def test_a_ring_of_one_slot_reads_one_shard_after_the_other() -> None:
    profile = make_profile(3, trainable=True)
    states = tuple(StateDecision(unit=u.name, optimizer_tier=Tier.NVME) for u in profile.units)
    blocks = tuple(BlockDecision(block=i, **KEEP) for i in range(3))
    staging = staging_for(
        profile, blocks, states, saved_slots=2, input_slots=2, shard_elements=1 << 20, on_cpu=True,
        schedule=IN_BACKWARD,
    )  # fmt: skip
    staging = replace(staging, update_slots=1)
    decisions = Decisions(blocks=blocks, states=states, staging=staging, update_schedule=IN_BACKWARD)
    events = simulate(profile, make_machine(), decisions).events
    moves = [e for e in events if e.name.startswith(("read update", "write update"))]
    for before, after in itertools.pairwise(moves):
        assert after.start_seconds >= before.end_seconds - 1e-9


# -- bytes ---------------------------------------------------------------------------------------------


def decisions_for(profile: ModelProfile, *, on_cpu: bool, schedule: UpdateSchedule) -> Decisions:
    blocks = tuple(BlockDecision(block=i, **KEEP) for i in range(len(profile.blocks)))
    states = tuple(StateDecision(unit=u.name, optimizer_tier=Tier.NVME) for u in profile.units)
    staging = staging_for(
        profile, blocks, states, saved_slots=2, input_slots=2, shard_elements=1 << 20, on_cpu=on_cpu,
        schedule=schedule,
    )  # fmt: skip
    return Decisions(blocks=blocks, states=states, staging=staging, update_schedule=schedule)


def test_gradients_of_one_unit_at_a_time() -> None:
    profile = make_profile(3, trainable=True)
    one = decisions_for(profile, on_cpu=True, schedule=IN_BACKWARD).staging.gradient_slab_bytes
    every = decisions_for(profile, on_cpu=True, schedule=SEQUENTIAL).staging.gradient_slab_bytes
    assert one == MiB + 8 * 4096  # 1 MiB of gradients, and a page per 64 Ki elements
    assert every == 3 * one
    several = replace(profile, micro_batches=2)
    assert decisions_for(several, on_cpu=True, schedule=IN_BACKWARD).staging.gradient_slab_bytes == every


@pytest.mark.parametrize(("micro_batches", "most"), [(1, MiB), (2, 3 * MiB)])
def test_on_a_gpu_a_units_gradients_go_with_its_update(micro_batches: int, most: int) -> None:
    profile = make_profile(3, trainable=True, micro_batches=micro_batches)
    positions = device_positions(profile, decisions_for(profile, on_cpu=False, schedule=IN_BACKWARD))
    found = {p.name: p.gradient_bytes for p in positions}
    assert max(found.values()) == most
    assert found["forward layers.1"] == (0 if micro_batches == 1 else most)
    for name in ("backward layers.0", "backward layers.2", "update layers.1"):
        assert found[name] == most
    assert found["backward prologue"] == (0 if micro_batches == 1 else most)
    # Block 0's tensors are there while block 1 is updated.
    kept = {p.name: p.kept_bytes for p in positions}
    assert kept["update layers.1"] == kept["forward layers.1"] > 0 == kept["update layers.0"]


# -- search --------------------------------------------------------------------------------------------


def plan_for(profile: ModelProfile, machine: Machine | None = None, **options: Any) -> Plan:
    budget = options.pop("budget", BUDGET)
    options = {"update_schedule": "in_backward", "time_limit_seconds": 5.0, **options}
    return make_plan(profile, machine or make_machine(), budget, options=PlannerOptions(**options))


@pytest.mark.usefixtures("solver_here")
def test_it_is_offered_only_where_nothing_looks_at_gradients() -> None:
    force = {"state": {"optimizer_tier": "nvme", "gradient_tier": "device"}}
    profile, machine = make_profile(3, trainable=True), make_machine()
    asked = open_space(profile, machine, BUDGET, PlannerOptions(force=force, gradients_untouched=True))
    assert IN_BACKWARD in asked.schedules
    unasked = open_space(profile, machine, BUDGET, PlannerOptions(force=force))
    assert unasked.schedules == (SEQUENTIAL, UpdateSchedule.AHEAD)
    with pytest.raises(ValueError, match="sequential, ahead or in_backward, got 'later'"):
        PlannerOptions(update_schedule="later")


@pytest.mark.usefixtures("solver_here")
def test_a_budget_that_only_it_fits() -> None:
    """Everything on the device but for gradients, of which there is room for one unit's."""
    profile = make_profile(6, trainable=True)
    force = {
        "state": {"optimizer_tier": "device", "gradient_tier": "device"},
        "block": {"action": "recompute"},
    }
    ample = {s: plan_for(profile, force=force, update_schedule=s) for s in ("sequential", "in_backward")}
    peaks = {s: plan.peak(Tier.DEVICE) for s, plan in ample.items()}
    assert peaks["in_backward"] < peaks["sequential"]
    tight = Budget(device=str(peaks["in_backward"]), nvme="/x:1GiB")
    plan = plan_for(profile, force=force, update_schedule="auto", gradients_untouched=True, budget=tight)
    assert plan.update_schedule is IN_BACKWARD
    assert check(plan, profile, make_machine(), tight) == ()
    assert plan_for(profile, force=force, update_schedule="auto", budget=tight).status == "infeasible"


@pytest.mark.parametrize("seed", range(12))
def test_no_plan_beats_the_bound_and_the_checker_agrees(seed: int) -> None:
    draw = random.Random(seed)
    profile = make_profile(draw.randint(1, 4), trainable=True, micro_batches=draw.randint(1, 3))
    if seed % 3 == 0:
        profile = weighty(draw.randint(2, 5), micro_batches=draw.randint(1, 2))
    device = draw.choice(["cpu", "cuda:0"])
    tiers = (Tier.NVME,) if device == "cpu" else (Tier.HOST, Tier.NVME)
    machine = make_machine(*tiers, device=device, read_bytes_per_second=draw.choice([64, 1024]) * MiB)
    budget = BUDGET if device == "cpu" else Budget(device="1GiB", host="1GiB", nvme="/x:1GiB")
    state: dict[str, Any] = {"optimizer_tier": draw.choice(["nvme", "device"])}
    state["gradient_tier"] = draw.choice(["nvme", "device"])
    if seed % 3 == 0:
        state = {"weight_tier": "nvme"}
    options = PlannerOptions(
        force={"state": state, "block": {"action": draw.choice(["swap", "keep", "recompute"])}},
        update_schedule="in_backward", safety_margin=0.0,
    )  # fmt: skip
    space = open_space(profile, machine, budget, options)
    request = Request(profile=profile, machine=machine, budget=budget, options=options, space=space)
    bound = solve_program(request, IN_BACKWARD, 10.0).bound_seconds
    plan = make_plan(profile, machine, budget, options=replace_limit(options))
    assert plan.status != "infeasible"
    assert bound <= plan.step_seconds * (1 + 1e-6)
    assert check(plan, profile, machine, budget) == ()


def replace_limit(options: PlannerOptions) -> PlannerOptions:
    return replace(options, time_limit_seconds=0.5)


# -- faults --------------------------------------------------------------------------------------------

FAULTY = make_profile(4, trainable=True, micro_batches=1)
FORCE = {"block": {"action": "keep"}, "state": {"optimizer_tier": "nvme", "gradient_tier": "device"}}


def moved(plan: Plan, name: str, by: float) -> Plan:
    events = [
        Event(
            name=e.name,
            resource=e.resource,
            start_seconds=e.start_seconds + by,
            end_seconds=e.end_seconds + by,
        )
        if e.name == name
        else e
        for e in plan.timeline
    ]
    return replace(plan, timeline=tuple(events))


def staged(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, staging=replace(plan.staging, **changes))


FAULTS: list[tuple[str, Rule, Callable[[Plan], Plan]]] = [
    ("before its backward", Rule.DEPENDENCY, lambda p: moved(p, "update layers.2", -0.015)),
    ("before its reads", Rule.DEPENDENCY, lambda p: moved(p, "read update layers.2", 0.05)),
    ("reads before the pass", Rule.DEPENDENCY, lambda p: moved(p, "read update layers.3", -0.02)),
    ("write before its step", Rule.DEPENDENCY, lambda p: moved(p, "write update layers.3", -0.01)),
    ("said to be sequential", Rule.DEPENDENCY, lambda p: replace(p, update_schedule=SEQUENTIAL)),
    ("no room for sums", Rule.STAGING, lambda p: staged(p, gradient_slab_bytes=MiB)),
    ("no update", Rule.DURATION, lambda p: replace(
        p, timeline=tuple(e for e in p.timeline if e.name != "update layers.1"))),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "fault"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_planted_fault_is_named(
    monkeypatch: pytest.MonkeyPatch, rule: Rule, fault: Callable[[Plan], Plan]
) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    plan = plan_for(FAULTY, force=FORCE)
    assert check(plan, FAULTY, make_machine(), BUDGET) == ()
    assert rule in {violation.rule for violation in check(fault(plan), FAULTY, make_machine(), BUDGET)}


def test_a_slab_of_one_unit_is_too_small_for_several_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    profile = replace(FAULTY, micro_batches=2)
    plan = plan_for(profile, force=FORCE)
    one = plan_for(FAULTY, force=FORCE).staging.gradient_slab_bytes
    found = check(staged(plan, gradient_slab_bytes=one), profile, make_machine(), BUDGET)
    assert Rule.STAGING in {violation.rule for violation in found}


def test_a_plan_reads_back_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    plan = plan_for(FAULTY, force=FORCE)
    assert Plan.from_json(plan.to_json()).update_schedule is IN_BACKWARD
