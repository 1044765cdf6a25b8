"""Weights that live on tiers: bytes by hand; plan, bound and checker agree; what options do."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtrain.planner.actions import Action, Tier
from memtrain.planner.check import check
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.machine import Budget
from memtrain.planner.plan import Plan, WindowClass
from memtrain.planner.profile import ModelProfile
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from tests.planner.test_solve import brute_force
from tests.planner.toys import make_machine, make_profile
from tests.planner.weighty import (
    BUDGET,
    FROZEN,
    KEPT,
    PAGE,
    any_weights,
    bill,
    make_units,
    plan_for,
    rooted,
    weighty,
)


@pytest.mark.usefixtures("solver_here")
def test_bytes_by_hand() -> None:
    plan = plan_for(weighty(around=True, **FROZEN), {"block": KEPT, "state": {"weight_tier": "nvme"}})
    found = bill(plan)
    # 4 blocks of 8 MiB, 16 and 4 around them: only 2 MiB of buffers stay, and 64 bytes a block. One window
    # holds the table, and the others a block.
    assert found["weights", "device"] == 2 * MiB + 4 * 64
    small, large = plan.staging.weight_windows
    assert (small.slot_bytes, large) == (8 * MiB + PAGE, WindowClass(slots=1, slot_bytes=16 * MiB))
    assert found["weight windows", "device"] == small.slots * (8 * MiB + PAGE) + 16 * MiB
    assert found["weights", "nvme"] == 4 * (8 * MiB + PAGE) + 20 * MiB
    # The blocks alone: 22 MiB stay.
    force: dict[str, Any] = {"block": KEPT, "state": {"weight_tier": "nvme"}}
    force |= {f"state.{name}": {"weight_tier": "device"} for name in ("prologue", "epilogue")}
    found = bill(plan := plan_for(weighty(around=True, **FROZEN), force))
    assert found["weights", "device"] == 22 * MiB + 4 * 64
    (alike,) = plan.staging.weight_windows
    assert found["weight windows", "device"] == alike.slots * (8 * MiB + PAGE)
    assert plan.peak(Tier.DEVICE) == sum(size for (_, tier), size in found.items() if tier == "device")


@pytest.mark.usefixtures("solver_here")
def test_enough_memory_streams_nothing() -> None:
    plan = plan_for(weighty())
    assert {state.weight_tier for state in plan.states} == {Tier.DEVICE}
    assert plan.staging.weight_windows == ()
    assert (plan.status, plan.bytes_moved_per_step) == ("optimal", 0)
    fixed = weighty(units=tuple(rooted(unit) for unit in make_units(4)))
    same = replace(plan_for(fixed), profile_digest=plan.profile_digest)
    assert same.digest == plan.digest


@pytest.mark.usefixtures("solver_here")
def test_a_budget_that_weights_fill_becomes_one_that_works() -> None:
    # 100 MiB of libraries, 2 of buffers and 8 x 8 of weights are more than 150.
    profile = weighty(8, frozen=tuple(range(8)))
    budget = Budget(device=150 * MiB, nvme="/x:1GiB")
    stays = plan_for(profile, {"state": {"weight_tier": "device"}}, budget=budget)
    assert stays.status == "infeasible"
    # 100, 2, 64, and with everything on nvme a slot of 1 MiB and a page, and 14: less 150.
    assert stays.shortfall_bytes == ((Tier.DEVICE, 31 * MiB + PAGE),)
    assert stays.remedies[0] == "drop the forced choices"
    plan = plan_for(profile, budget=budget)
    assert plan.lower_bound_seconds > 0
    assert {state.weight_tier for state in plan.states} >= {Tier.NVME}
    assert plan.peak(Tier.DEVICE) <= 150 * MiB
    assert not [event for event in plan.timeline if event.name.startswith("write weights")]


@pytest.mark.usefixtures("solver_here")
def test_what_is_short_once_all_weights_are_away() -> None:
    # 102 MiB, two windows, and as above 1 MiB and a page of slot and 14 of backward: a byte less is too
    # little.
    profile = weighty(8, frozen=tuple(range(8)))
    need = 102 * MiB + 8 * 64 + 2 * (8 * MiB + PAGE) + MiB + PAGE + 14 * MiB
    enough = plan_for(profile, budget=Budget(device=need, nvme="/x:1GiB"))
    assert enough.peak(Tier.DEVICE) == need
    short = plan_for(profile, budget=Budget(device=need - 1, nvme="/x:1GiB"))
    assert short.shortfall_bytes == ((Tier.DEVICE, 1),)
    assert {state.weight_tier for state in short.states} == {Tier.NVME}
    room = 8 * (8 * MiB + PAGE) + 8 * (MiB + PAGE)  # the inputs are there, too
    full = plan_for(profile, budget=Budget(device=need, nvme=f"/x:{room}B"))
    assert full.peak(Tier.NVME) == room
    fuller = plan_for(profile, budget=Budget(device=need, nvme=f"/x:{room - PAGE}B"))
    assert fuller.status == "infeasible"


# -- the plan against every other one -------------------------------------------------------------------


SLOW = {"read_bytes_per_second": 500 * MiB, "write_bytes_per_second": 250 * MiB}


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize(
    ("blocks", "frozen", "micro_batches", "device", "link"),
    [
        (3, (0, 1, 2), 1, 145, {}),
        (3, (0, 1, 2), 2, 140, SLOW | {"mixed_bytes_per_second": 300 * MiB}),
        (3, (0, 2), 1, 165, SLOW | {"mixed_bytes_per_second": 400 * MiB, "cpu_seconds_per_byte": 2e-10}),
        (3, (), 2, 235, {"mixed_bytes_per_second": 1024 * MiB, "latency_seconds": 1e-3}),
    ],
)
def test_nothing_beats_a_plan_that_may_stream_weights(
    blocks: int, frozen: tuple[int, ...], micro_batches: int, device: int, link: dict[str, Any]
) -> None:
    profile = weighty(blocks, frozen=frozen, micro_batches=micro_batches)
    machine, budget = make_machine(**link), Budget(device=device * MiB, nvme="/x:1GiB")
    force = {"state": {"gradient_tier": "device", "optimizer_tier": "device"}}
    options = PlannerOptions(allow=frozenset({Action.KEEP, Action.RECOMPUTE}), force=force)
    best = brute_force(profile, machine, budget, options)
    plan = make_plan(profile, machine, budget, options=options)
    assert best < math.inf
    assert plan.step_seconds <= best * (1 + options.gap)
    assert 0 < plan.lower_bound_seconds <= best + 1e-9
    assert check(plan, profile, machine, budget) == ()


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize("trained", [False, True])
def test_more_memory_is_never_slower(trained: bool) -> None:
    profile = weighty(6, frozen=() if trained else tuple(range(6)), around=True)
    times = []
    for device in (150, 190, 260, 500):
        machine = make_machine(**SLOW, mixed_bytes_per_second=400 * MiB)
        plan = plan_for(profile, budget=Budget(device=device * MiB, nvme="/x:1GiB"), machine=machine)
        times.append(plan.step_seconds if plan.status != "infeasible" else math.inf)
    assert times[1] < math.inf
    assert all(b <= a * (1 + PlannerOptions().gap) for a, b in itertools.pairwise(times)), times


@pytest.mark.usefixtures("solver_here")
def test_no_rule_about_weights_lifts_the_bound_above_a_plan() -> None:
    """Every placement of weights and every number of windows, forced: the bound is below what it takes."""
    for schedule, slow, tied in (("sequential", True, False), ("ahead", True, True), ("ahead", False, False)):
        profile = weighty(3, around=True, tied=tied, micro_batches=2)
        link = SLOW | {"mixed_bytes_per_second": 300 * MiB, "cpu_seconds_per_byte": 5e-10} if slow else {}
        machine = make_machine(**link, dram_copy_bytes_per_second=1e10)
        for outside, *inside in itertools.product(("device", "nvme"), repeat=4):
            places = (outside, *inside, outside)
            force: dict[str, Any] = {"block": KEPT}
            for unit, place in zip(profile.units, places, strict=True):
                force[f"state.{unit.name}"] = {"weight_tier": place, "optimizer_tier": "device"}
                if unit.gradient_bytes:
                    force[f"state.{unit.name}"]["gradient_tier"] = "device"
            options = PlannerOptions(force=force, safety_margin=0.0, update_schedule=schedule)
            best = brute_force(profile, machine, BUDGET, options)
            plan = make_plan(profile, machine, BUDGET, options=options)
            assert check(plan, profile, machine, BUDGET) == ()
            assert plan.step_seconds <= best * 1.005
            assert plan.lower_bound_seconds <= best + 1e-9


@pytest.mark.usefixtures("solver_here")
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(any_weights(), st.integers(20 * MiB, 90 * MiB), st.sampled_from(["cpu", "cuda:0"]))
def test_never_over_budget_and_always_approved(profile: ModelProfile, device: int, kind: str) -> None:
    cuda = kind != "cpu"
    machine = make_machine(Tier.NVME, *([Tier.HOST] if cuda else []), device=kind)
    budget = Budget(device=device, nvme="/x:200MiB", **({"host": "200MiB"} if cuda else {}))
    plan = make_plan(profile, machine, budget)
    assert Plan.from_json(plan.to_json()) == plan
    assert ModelProfile.from_json(profile.to_json()) == profile
    if plan.status != "infeasible":
        assert check(plan, profile, machine, budget) == ()


# -- options -------------------------------------------------------------------------------------------


def test_weights_are_forced_by_unit() -> None:
    force = {"state": {"weight_tier": "nvme"}, "state.layers.1": {"weight_tier": "device"}}
    plan = plan_for(weighty(3), force)
    assert [state.weight_tier.value for state in plan.states] == ["nvme", "device", "nvme"]
    assert plan.staging.weight_windows == (WindowClass(slots=2, slot_bytes=8 * MiB + PAGE),)


def test_forcing_what_may_not_leave_is_refused() -> None:
    profile = make_profile(2)
    with pytest.raises(ValueError, match=r"unit layers.0: force=\{'weight_tier': 'nvme'\} leaves nothing"):
        plan_for(profile, {"state.layers.0": {"weight_tier": "nvme"}})
    with pytest.raises(ValueError, match="leaves nothing; tiers are \\['device'\\]"):
        plan_for(weighty(2), {"state": {"weight_tier": "nvme"}}, budget=Budget(device="1GiB"))
    with pytest.raises(ValueError, match="it may have gradient_tier, optimizer_tier, weight_tier"):
        PlannerOptions(force={"state": {"parameters": "nvme"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight_extent_bytes": 8 * MiB - PAGE},
            "movable_weight_bytes 8388544 is part of weight_extent_bytes",
        ),
        ({"movable_weight_bytes": 9 * MiB}, "is part of weight_bytes 8388608 and cannot be more"),
        ({"written_extent_bytes": 9 * MiB}, "is part of weight_extent_bytes 8392704 and cannot be more"),
        ({"movable_weight_bytes": 0}, "what does not leave has no extent"),
    ],
)
def test_a_unit_validates_its_extents(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_units(1)[0], **changes)


def test_a_profile_validates_what_may_leave() -> None:
    with pytest.raises(
        ValueError, match="weights of 33554176 bytes may leave the device, yet weight_bytes is 1"
    ):
        weighty(4, weight_bytes=1)
    with pytest.raises(ValueError, match=r"layers.0 borrows of \('head',\)"):
        weighty(1, units=(replace(make_units(1)[0], borrows=("head",)),))
