"""Beside a GPU rings lie in host memory and the device holds mirrors: bill, solver and checker agree."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from memtrain.planner.actions import Action, Tier, UpdateSchedule
from memtrain.planner.check import Rule, check
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Plan
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from tests.planner.toys import make_machine, make_profile

pytestmark = pytest.mark.usefixtures("solver_here")

GPU = make_machine(Tier.HOST, Tier.NVME, device="cuda:0")
PAGE = 4096


def plan_for(
    force: dict[str, Any],
    *,
    budget: Budget | None = None,
    machine: Machine = GPU,
    schedule: str = "auto",
    **profile: Any,
) -> Plan:
    options = PlannerOptions(force=force, safety_margin=0.0, update_schedule=schedule, time_limit_seconds=5.0)
    budget = budget or Budget(device="1GiB", host="1GiB", nvme="/x:1GiB")
    made = make_profile(3, **profile)
    plan = make_plan(made, machine, budget, options=options)
    assert plan.status == "infeasible" or check(plan, made, machine, budget) == ()
    return plan


def bill(plan: Plan) -> dict[tuple[str, str], int]:
    return {(line.category, line.tier.value): line.size_bytes for line in plan.bill}


def test_swapped_blocks_by_hand() -> None:
    plan = plan_for({"block": {"action": "swap", "saved_tier": "nvme"}})
    slot = 10 * MiB + PAGE  # 64 tensors of a cache line each: one page
    count = plan.staging.saved_slots
    assert plan.staging.saved_slot_bytes == slot
    assert bill(plan) == {
        ("libraries", "device"): 100 * MiB,
        ("weights", "device"): 20 * MiB,
        ("staging", "device"): 2 * slot,
        ("transients", "device"): 12 * MiB,  # 10 saved and 2 of workspace while a block runs forward
        ("staging", "host"): count * slot,
        ("activations", "nvme"): 3 * slot,
    }


def test_swapping_to_the_host_fills_it_with_extents_and_rings() -> None:
    plan = plan_for({"block": {"action": "swap", "saved_tier": "host"}})
    slot = 10 * MiB + PAGE
    assert plan.peak(Tier.HOST) == 3 * slot + plan.staging.saved_slots * slot


def test_updates_and_gradients_by_hand() -> None:
    away = {"block": {"action": "keep"}, "state": {"gradient_tier": "nvme", "optimizer_tier": "host"}}
    plan = plan_for(away, trainable=True, largest_gradient_bytes=MiB // 2)
    staging = plan.staging
    assert (staging.gradient_slots, staging.gradient_slot_bytes, staging.update_slots) == (4, MiB, 6)
    found = bill(plan)
    assert found["staging", "device"] == 2 * staging.update_slot_bytes + 4 * MiB + MiB // 2
    assert found["staging", "host"] == 6 * staging.update_slot_bytes + 4 * MiB
    # A unit has 512 Ki elements: 8 parameters of 64 Ki. The smallest shard ends twice within them: 10 pieces,
    # each with 3 tensors of state. Of each of those, and of each gradient, all of a page but a byte may be
    # lost: 30 and 8 bytes less than as many pages.
    assert found["optimizer state", "host"] == 3 * (6 * MiB + 29 * PAGE)
    assert found["gradients", "nvme"] == 3 * (MiB + 7 * PAGE)


def test_a_plan_that_moves_nothing_has_no_rings_and_no_mirrors() -> None:
    plan = plan_for({"block": {"action": "keep"}})
    assert plan.staging.total_bytes == 0
    assert not any(category == "staging" for category, _ in bill(plan))
    assert plan.peak(Tier.HOST) == 0


def test_rings_need_host_memory_even_where_nothing_is_sent_there() -> None:
    force = {"block": {"action": "swap", "saved_tier": "nvme"}}
    plan = plan_for(force, budget=Budget(device="1GiB", nvme="/x:1GiB"), machine=GPU)
    assert plan.status == "infeasible"
    assert dict(plan.shortfall_bytes) == {Tier.HOST: 10 * MiB + PAGE}  # one slot, the least there can be
    assert any("host" in remedy for remedy in plan.remedies)


def test_the_host_budget_covers_rings_to_the_byte() -> None:
    force = {"block": {"action": "swap", "saved_tier": "nvme"}}
    for slots in (1, 2, 3):
        least = slots * (10 * MiB + PAGE)
        plan = plan_for(force, budget=Budget(device="1GiB", host=least, nvme="/x:1GiB"))
        assert plan.staging.saved_slots <= slots
        assert plan.status != "infeasible"
    short = plan_for(force, budget=Budget(device="1GiB", host=10 * MiB, nvme="/x:1GiB"))
    assert dict(short.shortfall_bytes) == {Tier.HOST: PAGE}


@pytest.mark.parametrize("schedule", ["sequential", "ahead"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "block",
    [
        {"action": "swap", "saved_tier": "host"},
        {"action": "recompute", "input_tier": "nvme"},
        {"action": "recompute", "input_tier": "device"},
        {"action": "recompute_except_attention", "saved_tier": "host", "input_tier": "nvme"},
    ],
)
def test_solver_bill_and_checker_agree(schedule: str, micro_batches: int, block: dict[str, str]) -> None:
    """``plan_for`` runs the checker, and the answer must not be worse than the heuristics' alone."""
    plan = plan_for(
        {"block": block, "state": {"gradient_tier": "host", "optimizer_tier": "nvme"}},
        schedule=schedule,
        trainable=True,
        micro_batches=micro_batches,
    )
    assert plan.status in ("optimal", "gap")
    assert plan.lower_bound_seconds <= plan.step_seconds
    assert plan.update_schedule is UpdateSchedule(schedule)


def test_a_bill_that_forgets_mirrors_or_rings_is_named() -> None:
    profile, budget = make_profile(3), Budget(device="1GiB", host="1GiB", nvme="/x:1GiB")
    options = PlannerOptions(allow=frozenset({Action.SWAP}))
    plan = make_plan(profile, GPU, budget, options=options)
    assert check(plan, profile, GPU, budget) == ()
    for tier in (Tier.DEVICE, Tier.HOST):
        lines = tuple(line for line in plan.bill if (line.category, line.tier) != ("staging", tier))
        gone = sum(line.size_bytes for line in plan.bill) - sum(line.size_bytes for line in lines)
        peaks = tuple((t, size - gone * (t is tier)) for t, size in plan.peaks)
        broken = dataclasses.replace(plan, bill=lines, peaks=peaks)
        found = {violation.rule for violation in check(broken, profile, GPU, budget)}
        assert Rule.BILL in found
        assert (Rule.DEVICE_PEAK if tier is Tier.DEVICE else Rule.TIER_PEAK) in found
