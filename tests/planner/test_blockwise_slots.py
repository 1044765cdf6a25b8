"""Slots of the update where state in blocks is cut with its parameters, at the shapes of Llama-2-7B."""

from __future__ import annotations

import dataclasses

from memtrain.planner.actions import Tier
from memtrain.planner.check import Rule, check
from memtrain.planner.decisions import PlannerOptions, state_extent_bytes, update_slot_bytes
from memtrain.planner.machine import Budget
from memtrain.planner.profile import ModelProfile, ParameterUpdate, UnitProfile
from memtrain.planner.solve import make_plan
from memtrain.planner.units import GiB, MiB, round_up
from tests.planner.toys import make_block, make_machine, make_profile

PAGE = 4096
TABLE = 32000 * 4096
BLOCK = (*(4 * (4096 * 4096,)), *(3 * (4096 * 11008,)))
AWAY = {"block": {"action": "keep"}, "state": {"gradient_tier": "nvme", "optimizer_tier": "nvme"}}
BUDGET = Budget(device="4GiB", nvme="/x:8GiB")


def kept(elements: int) -> tuple[int, ...]:
    """Codes and scales of both moments, 8 bits in blocks of 128."""
    return (elements, elements // 32, elements, elements // 32)


def unit(name: str, block: int | None, sizes: tuple[int, ...], whole: bool) -> UnitProfile:
    updates = tuple(
        ParameterUpdate(
            elements=size,
            record_bytes=sum(round_up(part, PAGE) for part in kept(size)),
            gradient_bytes=2 * size,
            workspace_bytes=0,
        )
        for size in sizes
    )
    return UnitProfile(
        name=name,
        block=block,
        weight_bytes=0,
        gradient_bytes=2 * sum(sizes),
        state_bytes=sum(sum(kept(size)) for size in sizes),
        parameters=tuple(f"{name}.{number}" for number in range(len(sizes))),
        updates=updates if whole else (),
    )


def profile(*, whole: bool) -> ModelProfile:
    """The table and one block."""
    return make_profile(
        block_profiles=(make_block(0),),
        units=(unit("prologue", None, (TABLE,), whole), unit("layers.0", 0, BLOCK, whole)),
        state_bytes_per_element=2.0625,
        state_tensors=4,
        largest_gradient_bytes=2 * TABLE,
        elementwise=not whole,
        largest_parameter_elements=TABLE,
    )


def test_slots_hold_a_shard_and_no_parameter() -> None:
    """A table's slot had 4.0625 bytes for each of 131 million elements; a shard's has as many for each of its
    own, and a page for each region of a piece, of which there is one for 64 Ki elements and one more."""
    assert update_slot_bytes(profile(whole=True), TABLE) == 4.0625 * TABLE == 532_480_000
    for elements in (1 << 18, 1 << 20, 1 << 22):
        pages = 6 * (elements // 65536 + 1)
        assert update_slot_bytes(profile(whole=False), elements) == 4.0625 * elements + pages * PAGE


def test_state_takes_the_same_room_but_for_pages() -> None:
    whole, cut = profile(whole=True), profile(whole=False)
    for one, other in zip(whole.units, cut.units, strict=True):
        pieces = len(one.parameters) + sum(u.elements for u in one.updates) // ((1 << 18) - 2048)
        exact = state_extent_bytes(whole, one)
        assert exact <= state_extent_bytes(cut, other) <= exact + 4 * PAGE * pieces


def test_a_plan_gives_the_room_of_whole_parameters_back() -> None:
    machine, options = make_machine(Tier.NVME), PlannerOptions(force=AWAY)
    plans = {
        whole: make_plan(profile(whole=whole), machine, BUDGET, options=options) for whole in (True, False)
    }
    rings = {whole: p.staging.update_slots * p.staging.update_slot_bytes for whole, p in plans.items()}
    assert rings[True] == 3 * 532_480_000
    assert rings[False] <= 6 * (4.0625 * (1 << 22) + 390 * PAGE) < 110 * MiB
    staging = {
        whole: sum(line.size_bytes for line in plan.bill if line.category == "staging")
        for whole, plan in plans.items()
    }
    assert staging[True] - staging[False] == rings[True] - rings[False]
    assert plans[True].peak(Tier.DEVICE) - plans[False].peak(Tier.DEVICE) >= rings[True] - rings[False]
    found, cut = plans[False], profile(whole=False)
    assert check(found, cut, machine, BUDGET) == ()
    smaller = dataclasses.replace(found.staging, update_slot_bytes=found.staging.update_slot_bytes - PAGE)
    faults = check(dataclasses.replace(found, staging=smaller), cut, machine, BUDGET)
    assert any(fault.rule is Rule.STAGING and "update ring" in fault.detail for fault in faults)


def test_a_budget_that_held_no_whole_parameter() -> None:
    machine, options = make_machine(Tier.NVME), PlannerOptions(force=AWAY)
    small = Budget(device=GiB, nvme="/x:8GiB")
    assert make_plan(profile(whole=True), machine, small, options=options).status == "infeasible"
    plan = make_plan(profile(whole=False), machine, small, options=options)
    assert check(plan, profile(whole=False), machine, small) == ()
    assert plan.status != "infeasible"
