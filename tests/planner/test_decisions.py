"""What a choice implies, and what is proved of gradients' seconds, worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from memtrain.planner.actions import Action, BlockDecision, Tier, UpdateSchedule
from memtrain.planner.baselines import Search
from memtrain.planner.block_parts import activation_extents
from memtrain.planner.bounding import compute_seconds
from memtrain.planner.choices import Request
from memtrain.planner.decisions import (
    Decisions,
    PlannerOptions,
    gradient_extent_bytes,
    gradient_passes,
    open_space,
    state_extent_bytes,
)
from memtrain.planner.machine import Budget
from memtrain.planner.profile import UnitProfile
from memtrain.planner.program import solve_program
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from tests.planner.toys import make_block, make_machine, make_profile

# One block of 10 MiB saved and 1 MiB of gradients, 1e-9 s a byte copied, 1 ms of update, three micro-batches.
PROFILE = make_profile(1, trainable=True, micro_batches=3)
MACHINE = make_machine(dram_copy_bytes_per_second=1e9)
BUDGET = Budget(device="1GiB", nvme="/x:1GiB")
KEPT = 3 * (0.040 + 10 * MiB * 1e-9) + 0.001


def forced(tier: str) -> PlannerOptions:
    return PlannerOptions(
        force={"block": {"action": "keep"}, "state": {"gradient_tier": tier, "optimizer_tier": "device"}}
    )


@pytest.mark.parametrize(
    ("saved", "entry", "extents"),
    [
        (Tier.NVME, Tier.HOST, {Tier.NVME: MiB + 4096, Tier.HOST: 2 * 4096}),
        (Tier.NVME, Tier.NVME, {Tier.NVME: MiB + 2 * 4096}),  # one extent: 1 MiB, 4196 and 2 x 64 bytes
        (Tier.DEVICE, Tier.NVME, {Tier.NVME: 2 * 4096}),
    ],
)
def test_what_a_block_sends_to_one_tier_is_one_extent(
    saved: Tier, entry: Tier, extents: dict[Tier, int]
) -> None:
    decision = BlockDecision(
        block=0, action=Action.RECOMPUTE_EXCEPT_ATTENTION, saved_tier=saved, input_tier=entry
    )
    assert dict(activation_extents(make_block(input_bytes=4196), decision)) == extents


def test_swapped_tensors_start_on_cache_lines() -> None:
    decision = BlockDecision(block=0, action=Action.SWAP, saved_tier=Tier.NVME)
    block = make_block(saved_bytes=MiB, saved_tensors=65)
    assert activation_extents(block, decision) == ((Tier.NVME, MiB + 2 * 4096),)


def test_extents_of_state_and_gradients_by_hand() -> None:
    unit = UnitProfile(
        name="u",
        block=0,
        weight_bytes=0,
        gradient_bytes=3 * 4096 + 2,
        state_bytes=9 * 4096,
        parameters=("a",),
    )
    two = dataclasses.replace(unit, parameters=("a", "b"))
    # 12290 bytes: one parameter takes 4 pages, two at most 5 (4097 and 8193 bytes: 2 + 3).
    assert gradient_extent_bytes(PROFILE, unit) == 4 * 4096
    assert gradient_extent_bytes(PROFILE, two) == 5 * 4096
    # Three tensors of state lose less than three pages together; two of them less than two.
    assert state_extent_bytes(PROFILE, unit) == (9 + 2) * 4096
    assert state_extent_bytes(dataclasses.replace(PROFILE, state_tensors=2), unit) == (9 + 1) * 4096


@pytest.mark.parametrize(
    ("stays", "first", "passes"), [(True, True, 1), (True, False, 1.5), (False, True, 3), (False, False, 3.5)]
)
def test_gradients_are_gone_over(stays: bool, first: bool, passes: float) -> None:
    assert gradient_passes(stays=stays, first=first) == passes


@pytest.mark.parametrize(("tier", "passes"), [("device", 1 + 2 * 1.5), ("nvme", 3 + 2 * 3.5)])
def test_the_arithmetic_alone_counts_every_pass(tier: str, passes: float) -> None:
    options = forced(tier)
    space = open_space(PROFILE, MACHINE, BUDGET, options)
    search = Search(profile=PROFILE, machine=MACHINE, budget=BUDGET, options=options, space=space)
    assert compute_seconds(search) == pytest.approx(KEPT + passes * MiB * 1e-9, rel=1e-9)


def test_the_arithmetic_takes_the_cheaper_place() -> None:
    options = PlannerOptions(allow=frozenset({Action.KEEP}))
    space = open_space(PROFILE, MACHINE, BUDGET, options)
    search = Search(profile=PROFILE, machine=MACHINE, budget=BUDGET, options=options, space=space)
    assert compute_seconds(search) == pytest.approx(KEPT + (1 + 2 * 1.5) * MiB * 1e-9, rel=1e-9)


@pytest.mark.parametrize(("tier", "passes"), [("device", 1 + 2 * 1.5), ("nvme", 3 + 2 * 3.5)])
def test_the_program_counts_every_pass(tier: str, passes: float) -> None:
    options = forced(tier)
    space = open_space(PROFILE, MACHINE, BUDGET, options)
    request = Request(profile=PROFILE, machine=MACHINE, budget=BUDGET, options=options, space=space)
    bound = solve_program(request, UpdateSchedule.SEQUENTIAL, 10.0).bound_seconds
    # Gradients that left are read for the update in 0.98 ms (1 MiB at 1 GiB/s); the program lets that hide
    # behind the update's millisecond.
    assert bound == pytest.approx(KEPT + passes * MiB * 1e-9, rel=1e-5)


@pytest.mark.parametrize(("device", "tier"), [("cpu", Tier.DEVICE), ("cuda:0", Tier.HOST)])
def test_a_plan_gives_its_choice_back(device: str, tier: Tier) -> None:
    machine = make_machine(Tier.NVME, device=device)
    space = open_space(PROFILE, machine, BUDGET, forced("device"))
    plan = make_plan(PROFILE, machine, BUDGET, options=forced("device"))
    again = Decisions.of(plan, on_cpu=machine.on_cpu)
    assert (again.blocks, again.states, again.staging) == (plan.blocks, plan.states, plan.staging)
    assert again.update_schedule is plan.update_schedule
    assert again.staging_tier is tier is space.staging_tier
