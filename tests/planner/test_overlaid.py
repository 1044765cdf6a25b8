"""Gradients at addresses that activations have left: bytes by hand, the program's rows, planted faults."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.planner.actions import Action, BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.check import Rule, check
from memtrain.planner.choices import Choices, Request
from memtrain.planner.decisions import PlannerOptions, open_space, staging_for
from memtrain.planner.machine import Budget
from memtrain.planner.plan import Plan, Staging
from memtrain.planner.profile import ModelProfile, UnitProfile
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from tests.planner.toys import make_block, make_machine, make_profile

BUDGET = Budget(device="4GiB", nvme="/x:4GiB")
ON = PlannerOptions(overlay=True)
SEQUENTIAL, AHEAD = UpdateSchedule.SEQUENTIAL, UpdateSchedule.AHEAD
PAGES = 8 * 4096
"""Of a unit of 1 MiB of bf16 gradients: a page for each 64 Ki elements."""


def edges(gradient_bytes: int = MiB) -> tuple[UnitProfile, ...]:
    return tuple(
        UnitProfile(
            name=name,
            block=None,
            weight_bytes=MiB,
            gradient_bytes=gradient_bytes,
            state_bytes=6 * gradient_bytes,
            update_seconds=0.001,
        )
        for name in ("prologue", "epilogue")
    )


def with_edges(blocks: int = 3, gradient_bytes: int = MiB, **changes: Any) -> ModelProfile:
    profile = make_profile(blocks, trainable=True, **changes)
    first, last = edges(gradient_bytes)
    return replace(profile, units=(first, *profile.units, last))


def staging(profile: ModelProfile, *, schedule: UpdateSchedule = SEQUENTIAL, overlay: bool = True) -> Staging:
    return staging_for(
        profile,
        tuple(BlockDecision(block=i, action=Action.KEEP) for i in range(len(profile.blocks))),
        tuple(StateDecision(unit=unit.name) for unit in profile.units),
        saved_slots=2,
        input_slots=2,
        shard_elements=1 << 20,
        on_cpu=True,
        schedule=schedule,
        overlay=overlay,
    )


def test_the_last_block_s_backward_is_when_most_is_there() -> None:
    found = staging(with_edges(3))
    place, unit = found.kept_bytes[0], MiB + PAGES
    assert place > 10 * MiB
    # While block 2 runs backward: three places, gradients of the epilogue and of block 2. Two of five units
    # (prologue, blocks 0 and 1 are the other three) are never beside all places.
    assert found.overlaid_bytes == 3 * unit
    assert staging(with_edges(3), schedule=AHEAD).overlaid_bytes == 3 * unit
    assert staging(with_edges(3), overlay=False).overlaid_bytes == 0


def test_where_gradients_are_large_all_places_are_overlaid() -> None:
    profile = with_edges(3, gradient_bytes=80 * MiB)
    found = staging(profile)
    big = found.gradient_slab_bytes - 3 * (MiB + PAGES)
    # At the end all gradients: more than the places of three blocks and the epilogue's gradients.
    assert big > 160 * MiB
    assert found.overlaid_bytes == found.kept_slab_bytes


@pytest.mark.parametrize(
    "changes", [{"micro_batches": 2}, {"schedule": UpdateSchedule.IN_BACKWARD}], ids=["sums", "in backward"]
)
def test_nothing_is_overlaid_where_all_is_there_at_once(changes: dict[str, Any]) -> None:
    schedule = changes.pop("schedule", SEQUENTIAL)
    assert staging(with_edges(3, **changes), schedule=schedule).overlaid_bytes == 0


def plan_for(options: PlannerOptions = ON, profile: ModelProfile | None = None, **changes: Any) -> Plan:
    profile = profile or with_edges(4)
    return make_plan(profile, make_machine(**changes), BUDGET, options=options)


def test_the_bill_is_so_much_less_and_the_checker_agrees() -> None:
    profile = with_edges(4)
    plan, apart = plan_for(), plan_for(PlannerOptions())
    assert plan.status == "optimal"
    assert plan.staging.overlaid_bytes == 4 * (MiB + PAGES)
    lines = {line.category: line.size_bytes for line in plan.bill if line.tier is Tier.DEVICE}
    assert lines["gradients"] == plan.staging.gradient_slab_bytes - plan.staging.overlaid_bytes
    assert plan.peak(Tier.DEVICE) < apart.peak(Tier.DEVICE)
    assert check(plan, profile, make_machine(), BUDGET) == ()
    assert Plan.from_json(plan.to_json()) == plan


def test_on_a_gpu_there_are_no_slabs_to_overlay() -> None:
    plan = make_plan(
        with_edges(4), make_machine(Tier.HOST, device="cuda"), Budget(device="4GiB", host="4GiB"), options=ON
    )
    assert plan.staging.overlaid_bytes == 0


def staged(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, staging=replace(plan.staging, **changes))


FAULTS: dict[str, Callable[[Plan], Plan]] = {
    "a page too many": lambda p: staged(p, overlaid_bytes=p.staging.overlaid_bytes + 4096),
    "all of it": lambda p: staged(p, overlaid_bytes=p.staging.gradient_slab_bytes),
    "less than none": lambda p: staged(p, overlaid_bytes=-4096),
    "not in pages": lambda p: staged(p, overlaid_bytes=p.staging.overlaid_bytes - 1),
    "in backward": lambda p: replace(p, update_schedule=UpdateSchedule.IN_BACKWARD),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str) -> None:
    found = check(FAULTS[name](plan_for()), with_edges(4), make_machine(), BUDGET)
    assert Rule.STAGING in {violation.rule for violation in found}


def test_an_overlay_that_several_micro_batches_cannot_have_is_found() -> None:
    profile = with_edges(4, micro_batches=2)
    plan = plan_for(profile=profile)
    assert plan.staging.overlaid_bytes == 0
    found = check(staged(plan, overlaid_bytes=4096), profile, make_machine(), BUDGET)
    assert Rule.STAGING in {violation.rule for violation in found}


def test_an_overlay_that_is_not_on_the_bill_is_found() -> None:
    plan = plan_for()
    smaller = staged(plan, overlaid_bytes=plan.staging.overlaid_bytes - 4096)
    rules = {violation.rule for violation in check(smaller, with_edges(4), make_machine(), BUDGET)}
    assert {Rule.BILL, Rule.DEVICE_PEAK} <= rules


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_no_moment_of_a_step_has_more_than_the_slab(data: st.DataObject) -> None:
    """Played through: places and gradients are intervals, none of which overlap while they live."""
    count = data.draw(st.integers(1, 5))
    sizes = st.integers(0, 12)
    blocks = tuple(make_block(i, saved_bytes=(1 + data.draw(sizes)) * MiB) for i in range(count))
    profile = with_edges(gradient_bytes=data.draw(st.integers(0, 30)) * MiB, block_profiles=blocks)
    units = tuple(
        replace(unit, gradient_bytes=(size := data.draw(sizes) * MiB), state_bytes=6 * size)
        if unit.block is not None
        else unit
        for unit in profile.units
    )
    found = staging(replace(profile, units=units))
    length = found.kept_slab_bytes + found.gradient_slab_bytes - found.overlaid_bytes
    starts = list(itertools.accumulate(found.kept_bytes, initial=0))
    low, alive = length, starts[-1]
    tight = low == starts[-1]
    order = [units[-1], *units[-2:0:-1], units[0]]
    for unit in order:
        low -= unit.gradient_bytes and unit.gradient_bytes + -(-unit.gradient_bytes // 131072) * 4096
        assert low >= alive
        tight = tight or low == alive
        if unit.block is not None and found.kept_bytes:
            alive = starts[unit.block]
    assert low >= 0
    assert tight or low == 0  # and no byte more than it needs


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_the_program_s_rows_are_the_bill(schedule: UpdateSchedule) -> None:
    blocks = tuple(make_block(i, saved_bytes=(5 + 3 * i) * MiB) for i in range(4))
    profile = with_edges(gradient_bytes=4 * MiB, block_profiles=blocks)
    machine = make_machine()
    space = open_space(profile, machine, BUDGET, ON)
    request = Request(profile=profile, machine=machine, budget=BUDGET, options=ON, space=space)
    program = Choices(request, schedule)
    slab = next(v for v in program.problem.variables() if v.name == "overlaid_slab_bytes")
    wanted = [Action.KEEP, Action.SWAP, Action.KEEP, Action.RECOMPUTE]
    chosen = []
    for row, choices, action in zip(program.x, space.blocks, wanted, strict=True):
        best = next(i for i, c in enumerate(choices) if c.action is action and c.input_tier is Tier.DEVICE)
        chosen.append(choices[best])
        for index, variable in enumerate(row):
            program.add(variable == int(index == best))
    states = tuple(StateDecision(unit=unit.name) for unit in profile.units)
    for row, choices in zip(program.z, space.states, strict=True):
        for variable, choice in zip(row, choices, strict=True):
            program.add(variable == int(choice.gradient_tier is choice.optimizer_tier is Tier.DEVICE))
    program.problem.setObjective(slab * 1e-6)
    program.problem.solve(pulp.HiGHS(msg=False))
    found = staging_for(
        profile, tuple(chosen), states, saved_slots=2, input_slots=2, shard_elements=1 << 20, on_cpu=True,
        schedule=schedule, overlay=True,
    )  # fmt: skip
    length = found.kept_slab_bytes + found.gradient_slab_bytes - found.overlaid_bytes
    assert found.overlaid_bytes > 0
    assert pulp.value(slab) == pytest.approx(length, abs=64)
