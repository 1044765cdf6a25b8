"""The update's slots at addresses that passes have left: by hand, the program's rows, planted faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.planner.actions import (
    Action,
    BlockDecision,
    MicroBatchOrder,
    StateDecision,
    Tier,
    UpdateSchedule,
)
from memtrain.planner.check import Rule, check
from memtrain.planner.check_staging import slab_faults
from memtrain.planner.choices import Choices, Request
from memtrain.planner.decisions import PlannerOptions, open_space, staging_for
from memtrain.planner.plan import Plan, Staging
from memtrain.planner.profile import ModelProfile
from memtrain.planner.solve import make_plan
from memtrain.planner.together import together
from memtrain.planner.units import MiB
from tests.planner.test_overlaid import BUDGET, PAGES, staged, with_edges
from tests.planner.test_together import decide
from tests.planner.toys import make_block, make_machine

SEQUENTIAL, AHEAD, IN_BACKWARD = UpdateSchedule.SEQUENTIAL, UpdateSchedule.AHEAD, UpdateSchedule.IN_BACKWARD
UNIT = MiB + PAGES
SHARD = 1 << 18


def staging(
    profile: ModelProfile,
    action: Action = Action.KEEP,
    *,
    schedule: UpdateSchedule = SEQUENTIAL,
    gradients: Tier = Tier.DEVICE,
    on_cpu: bool = True,
    held_passes: int = 1,
    shard: int = SHARD,
    overlay: bool = True,
) -> Staging:
    saved = Tier.NVME if action is Action.SWAP else Tier.DEVICE
    return staging_for(
        profile,
        tuple(BlockDecision(block=i, action=action, saved_tier=saved) for i in range(len(profile.blocks))),
        tuple(
            StateDecision(unit=u.name, gradient_tier=gradients, optimizer_tier=Tier.NVME)
            for u in profile.units
        ),
        saved_slots=2,
        input_slots=2,
        shard_elements=shard,
        on_cpu=on_cpu,
        schedule=schedule,
        held_passes=held_passes,
        overlay=overlay,
    )


def test_below_the_gradients_all_is_free() -> None:
    found = staging(with_edges(3))
    place = found.kept_bytes[0]
    # Gradients share three units' bytes with the places (test_overlaid); all five lie at the high end.
    assert found.overlaid_bytes == 3 * UNIT
    assert found.update_ring_bytes < 3 * place - 3 * UNIT
    assert found.update_overlaid_bytes == found.update_ring_bytes
    assert found.total_bytes == 0
    large = staging(with_edges(3), shard=1 << 22)
    assert large.update_overlaid_bytes == 3 * place - 3 * UNIT
    assert large.total_bytes == large.update_ring_bytes - (3 * place - 3 * UNIT)


def test_rings_of_the_passes_are_free_too() -> None:
    found = staging(with_edges(3, micro_batches=2), Action.SWAP, gradients=Tier.NVME, shard=1 << 22)
    rings = 2 * found.saved_slot_bytes + 4 * found.gradient_slot_bytes
    assert rings == found.pass_ring_bytes > 0
    assert found.kept_bytes == ()
    assert found.update_overlaid_bytes == rings
    assert found.total_bytes == found.update_ring_bytes


def test_vertical_order_has_places_of_every_micro_batch() -> None:
    profile = with_edges(3, micro_batches=2)
    one, two = (staging(profile, held_passes=passes, shard=1 << 22) for passes in (1, 2))
    assert one.update_overlaid_bytes == one.kept_slab_bytes
    assert two.update_overlaid_bytes == min(two.update_ring_bytes, 2 * two.kept_slab_bytes)


@pytest.mark.parametrize("schedule", [AHEAD, IN_BACKWARD])
def test_an_update_inside_of_passes_has_slots_of_its_own(schedule: UpdateSchedule) -> None:
    assert staging(with_edges(3), schedule=schedule).update_overlaid_bytes == 0


def test_neither_beside_a_gpu_nor_where_nobody_asks() -> None:
    assert staging(with_edges(3), on_cpu=False).update_overlaid_bytes == 0
    assert staging(with_edges(3), overlay=False).update_overlaid_bytes == 0


def options(**changes: object) -> PlannerOptions:
    force = {"block": {"action": "swap", "saved_tier": "nvme"}, "state": {"optimizer_tier": "nvme"}}
    wanted = {"force": force, "overlay": True, "update_schedule": "sequential", **changes}
    return PlannerOptions(**wanted)  # type: ignore[arg-type]


PROFILE = with_edges(4)


def plan_for(**changes: object) -> Plan:
    return make_plan(PROFILE, make_machine(), BUDGET, options=options(**changes))


def test_the_bill_is_so_much_less_and_the_checker_agrees() -> None:
    plan, apart = plan_for(), plan_for(overlay=False)
    assert check(plan, PROFILE, make_machine(), BUDGET) == ()
    assert Plan.from_json(plan.to_json()) == plan
    lines = {line.category: line.size_bytes for line in plan.bill if line.tier is Tier.DEVICE}
    s = plan.staging
    assert s.update_overlaid_bytes > 0
    assert lines["staging"] == s.pass_ring_bytes + s.update_ring_bytes - s.update_overlaid_bytes
    assert plan.peak(Tier.DEVICE) < apart.peak(Tier.DEVICE)


def test_the_update_waits_until_what_was_sent_away_is_written() -> None:
    plan = plan_for()
    written = max(e.end_seconds for e in plan.timeline if e.name.startswith("write layers"))
    first = min(e.start_seconds for e in plan.timeline if e.name.startswith("read update"))
    assert first >= written
    early = tuple(
        replace(e, start_seconds=e.start_seconds + 1, end_seconds=e.end_seconds + 1)
        if e.name.startswith("write layers")
        else e
        for e in plan.timeline
    )
    found = check(replace(plan, timeline=early), PROFILE, make_machine(), BUDGET)
    assert any("have left the memory" in violation.detail for violation in found)


FAULTS: dict[str, Callable[[Plan], Plan]] = {
    "a page too many": lambda p: staged(p, update_overlaid_bytes=p.staging.update_overlaid_bytes + 4096),
    "less than none": lambda p: staged(p, update_overlaid_bytes=-4096),
    "not in pages": lambda p: staged(p, update_overlaid_bytes=p.staging.update_overlaid_bytes - 1),
    "ahead": lambda p: replace(p, update_schedule=AHEAD),
    "in backward": lambda p: replace(p, update_schedule=IN_BACKWARD),
    "a smaller ring of the passes": lambda p: staged(p, saved_slots=1, update_slots=100),
    "a page too many beside gradients": lambda p: staged(p, overlaid_bytes=p.staging.overlaid_bytes + 4096),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str) -> None:
    plan = plan_for()
    assert plan.staging.update_overlaid_bytes > 0
    found = check(FAULTS[name](plan), PROFILE, make_machine(), BUDGET)
    assert Rule.STAGING in {violation.rule for violation in found}


def test_a_share_that_is_not_on_the_bill_is_found() -> None:
    plan = plan_for()
    smaller = staged(plan, update_overlaid_bytes=plan.staging.update_overlaid_bytes - 4096)
    rules = {violation.rule for violation in check(smaller, PROFILE, make_machine(), BUDGET)}
    assert {Rule.BILL, Rule.DEVICE_PEAK} <= rules


def test_a_share_on_a_gpu_is_found() -> None:
    found = slab_faults(plan_for(), PROFILE, make_machine(Tier.HOST, device="cuda"))
    assert any("in use while they run" in detail for _, detail in found)


def test_nothing_is_lost_where_the_update_binds() -> None:
    decisions = decide(with_edges(3), optimizer_tier=Tier.NVME)
    found = together(with_edges(3), decisions)
    # What is left: transients, which the update has none of, beside the larger of both in one slab.
    transients = found.held_bytes - (decisions.staging.update_ring_bytes + 5 * UNIT)
    assert found.load_bytes == decisions.staging.update_ring_bytes + 5 * UNIT
    assert transients == 12 * MiB


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_no_moment_of_a_step_has_more_than_the_slab(data: st.DataObject) -> None:
    """Played through: all that is there in a pass, and in an update; as long as the plan says, no longer."""
    count = data.draw(st.integers(1, 5))
    sizes = st.integers(0, 12)
    blocks = tuple(make_block(i, saved_bytes=(1 + data.draw(sizes)) * MiB) for i in range(count))
    profile = with_edges(gradient_bytes=data.draw(sizes) * MiB, block_profiles=blocks)
    micro_batches = data.draw(st.sampled_from([1, 2]))
    profile = replace(profile, micro_batches=micro_batches)
    action = data.draw(st.sampled_from([Action.KEEP, Action.SWAP]))
    found = staging(profile, action, shard=data.draw(st.sampled_from([1 << 18, 1 << 20, 1 << 22])))
    length = found.pass_ring_bytes + found.kept_slab_bytes + found.gradient_slab_bytes
    length += found.update_ring_bytes - found.overlaid_bytes - found.update_overlaid_bytes
    units = profile.units
    gradients = [u.gradient_bytes and u.gradient_bytes + -(-u.gradient_bytes // 131072) * 4096 for u in units]
    most = found.update_ring_bytes + sum(gradients)
    alive = found.pass_ring_bytes + found.kept_slab_bytes
    if micro_batches > 1:
        most = max(most, alive + sum(gradients))
    kept = dict(enumerate(found.kept_bytes))
    for unit, size in reversed(list(zip(units, gradients, strict=True))):
        alive += size
        most = max(most, alive)
        if unit.block is not None:
            alive -= kept.get(unit.block, 0)
    assert length == most


@pytest.mark.parametrize("overlaid", [True, False], ids=["one pass", "two"])
def test_the_program_s_rows_are_the_bill(overlaid: bool) -> None:
    blocks = tuple(make_block(i, saved_bytes=(5 + 3 * i) * MiB) for i in range(4))
    profile = with_edges(gradient_bytes=4 * MiB, block_profiles=blocks)
    profile = replace(profile, micro_batches=1 if overlaid else 2)
    machine, wanted = make_machine(), options(force={})
    space = open_space(profile, machine, BUDGET, wanted)
    request = Request(profile=profile, machine=machine, budget=BUDGET, options=wanted, space=space)
    program = Choices(request, SEQUENTIAL)
    slab = next(v for v in program.problem.variables() if v.name == "pass_and_update_bytes")
    actions = [Action.KEEP, Action.SWAP, Action.KEEP, Action.RECOMPUTE]
    chosen = []
    for row, choices, action in zip(program.x, space.blocks, actions, strict=True):
        best = next(i for i, c in enumerate(choices) if c.action is action and c.input_tier is Tier.DEVICE)
        chosen.append(choices[best])
        for index, variable in enumerate(row):
            program.add(variable == int(index == best))
    states = tuple(StateDecision(unit=unit.name, optimizer_tier=Tier.NVME) for unit in profile.units)
    for row, choices in zip(program.z, space.states, strict=True):
        for variable, choice in zip(row, choices, strict=True):
            is_it = (choice.gradient_tier, choice.optimizer_tier) == (Tier.DEVICE, Tier.NVME)
            program.add(variable == int(is_it))
    largest = max(size for size in program.shard if size)
    program.add(program.shard[largest] == 1)
    program.add(program.saved_ring[2] == 1)
    program.problem.setObjective(slab * 1e-6)
    program.problem.solve(pulp.HiGHS(msg=False))
    found = staging_for(
        profile, tuple(chosen), states, saved_slots=2, input_slots=2, shard_elements=largest, on_cpu=True,
        schedule=SEQUENTIAL, overlay=True,
    )  # fmt: skip
    # The staging has no more slots than blocks that are swapped, the program as many as were chosen.
    spare = 2 * found.saved_slot_bytes - found.saved_slots * found.saved_slot_bytes
    in_pass = found.pass_ring_bytes + spare + found.kept_slab_bytes
    in_pass += found.gradient_slab_bytes - found.overlaid_bytes
    assert found.update_overlaid_bytes > 0
    in_update = found.update_ring_bytes + found.gradient_slab_bytes
    assert pulp.value(slab) == pytest.approx(max(in_pass, in_update), abs=64)


def test_in_vertical_order_a_plan_shares_and_holds() -> None:
    profile = with_edges(4, micro_batches=2)
    profile = replace(
        profile,
        units=tuple(
            replace(unit, movable_weight_bytes=MiB, weight_extent_bytes=MiB) for unit in profile.units
        ),
    )
    wanted = options(
        force={"block": {"action": "keep"}, "state": {"optimizer_tier": "nvme", "weight_tier": "nvme"}},
        micro_batch_order="vertical",
    )
    plan = make_plan(profile, make_machine(), BUDGET, options=wanted)
    assert plan.micro_batch_order is MicroBatchOrder.VERTICAL
    assert plan.staging.update_overlaid_bytes == min(
        plan.staging.update_ring_bytes, 2 * plan.staging.kept_slab_bytes
    )
    assert check(plan, profile, make_machine(), BUDGET) == ()
