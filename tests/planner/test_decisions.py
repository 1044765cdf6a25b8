"""What a choice implies, and what is proved of gradients' seconds, worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from memtrain.planner.actions import Action, BlockDecision, Tier, UpdateSchedule
from memtrain.planner.baselines import Search
from memtrain.planner.bill import make_bill
from memtrain.planner.block_parts import activation_extents
from memtrain.planner.bounding import compute_seconds
from memtrain.planner.check import Rule, check
from memtrain.planner.choices import Request
from memtrain.planner.decisions import (
    Decisions,
    PlannerOptions,
    gradient_extent_bytes,
    gradient_passes,
    open_space,
    state_extent_bytes,
    update_slot_bytes,
    update_workspace_bytes,
    whole_shards,
)
from memtrain.planner.machine import Budget
from memtrain.planner.profile import ModelProfile, ParameterUpdate, UnitProfile
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


def whole_profile() -> ModelProfile:
    """A block whose two matrices are projected, and a table that is not: 3 and 8 MiB in a slot."""
    projected = ParameterUpdate(
        elements=1 << 19, record_bytes=MiB, gradient_bytes=MiB, workspace_bytes=MiB, refresh_bytes=3 * MiB
    )
    table = ParameterUpdate(elements=1 << 20, record_bytes=8 * MiB, gradient_bytes=2 * MiB, workspace_bytes=0)
    fields = {"weight_bytes": 2 * MiB, "gradient_bytes": 2 * MiB, "update_seconds": 0.001}
    return make_profile(
        1,
        units=(
            UnitProfile(name="prologue", block=None, state_bytes=8 * MiB, updates=(table,), **fields),
            UnitProfile(
                name="layers.0", block=0, state_bytes=2 * MiB, updates=(projected, projected), **fields
            ),
        ),
        elementwise=False,
        largest_parameter_elements=1 << 20,
        state_bytes_per_element=8.0,
        update_workspace_bytes_per_element=100.0,
    )


def test_parameters_that_are_updated_whole_have_their_own_bytes() -> None:
    profile = whole_profile()
    table, block = profile.units
    # As many in a run as have the shard's elements; one at least.
    assert whole_shards(block, 1 << 20) == [4 * MiB]
    assert whole_shards(block, (1 << 20) - 1) == [2 * MiB, 2 * MiB]
    assert whole_shards(table, 1 << 19) == [10 * MiB]
    assert update_slot_bytes(profile, 1 << 20) == 10 * MiB
    assert [state_extent_bytes(profile, unit) for unit in (table, block)] == [8 * MiB, 2 * MiB]
    # One basis is renewed at a time; whether the slots stream makes no difference.
    for streamed in (False, True):
        assert update_workspace_bytes(profile, block, streamed=streamed) == 5 * MiB
        assert update_workspace_bytes(profile, table, streamed=streamed) == 0


@pytest.mark.parametrize("away", ["nvme", "device"])
def test_a_plan_for_whole_parameters_is_billed_by_them(away: str) -> None:
    profile, machine = whole_profile(), make_machine()
    moved = {"gradient_tier": away, "optimizer_tier": away}
    options = PlannerOptions(force={"block": {"action": "keep"}, "state": moved})
    plan = make_plan(profile, machine, BUDGET, options=options)
    assert check(plan, profile, machine, BUDGET) == ()
    staging = plan.staging
    ring = (3, 10 * MiB) if away == "nvme" else (0, 0)
    assert (staging.update_slots, staging.update_slot_bytes) == ring
    lines = {(line.category, line.tier): line.size_bytes for line in plan.bill}
    assert lines.get(("optimizer state", Tier.NVME), 0) == (10 * MiB if away == "nvme" else 0)
    if away == "nvme":
        smaller = dataclasses.replace(staging, update_slot_bytes=10 * MiB - 4096)
        faults = check(dataclasses.replace(plan, staging=smaller), profile, machine, BUDGET)
        assert any(f.rule is Rule.STAGING and "needs 3 of 10485760" in f.detail for f in faults)


def test_temporaries_of_a_whole_update_are_a_position_of_the_bill() -> None:
    """100 MiB of temporaries are more than the block's 10 + 4: they are the transients at the peak."""
    profile = whole_profile()
    table, block = profile.units
    large = dataclasses.replace(block.updates[0], workspace_bytes=100 * MiB)
    profile = dataclasses.replace(profile, units=(table, dataclasses.replace(block, updates=(large,))))
    plan = make_plan(profile, make_machine(), BUDGET, options=forced("nvme"))
    decisions = Decisions.of(plan, on_cpu=True)
    lines = {line.category: line.size_bytes for line in make_bill(profile, decisions, (), 0.0)}
    assert lines["transients"] == 103 * MiB
    assert check(plan, profile, make_machine(), BUDGET) == ()


def test_weights_are_offered_the_tiers_that_are_named() -> None:
    machine = dataclasses.replace(
        MACHINE, links=(*MACHINE.links, dataclasses.replace(MACHINE.links[0], tier=Tier.CXL))
    )
    budget = dataclasses.replace(BUDGET, cxl="0:1GiB")
    movable = dataclasses.replace(PROFILE.units[0], movable_weight_bytes=MiB, weight_extent_bytes=MiB)
    profile = dataclasses.replace(PROFILE, units=(movable, *PROFILE.units[1:]))
    everywhere = open_space(profile, machine, budget, PlannerOptions())
    assert set(everywhere.weights[0]) == {Tier.DEVICE, Tier.CXL, Tier.NVME}
    named = open_space(profile, machine, budget, PlannerOptions(weight_tiers=(Tier.NVME,)))
    assert named.weights[0] == (Tier.DEVICE, Tier.NVME)
    assert named.states == everywhere.states  # gradients and state go where they like
    forced = PlannerOptions(weight_tiers=(Tier.NVME,), force={"state": {"weight_tier": "cxl"}})
    with pytest.raises(
        ValueError, match=r"weight_tier': 'cxl'} leaves nothing; tiers are \['device', 'nvme'\]"
    ):
        open_space(profile, machine, budget, forced)
