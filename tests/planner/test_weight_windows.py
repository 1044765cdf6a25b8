"""Weights that live on tiers: turns, bytes and seconds by hand; plan, bound and checker agree."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtrain.planner.actions import Action, BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.check import Rule, check
from memtrain.planner.decisions import Decisions, PlannerOptions, staging_for
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Event, Plan
from memtrain.planner.profile import ModelProfile, UnitProfile
from memtrain.planner.simulate import Timeline, simulate
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from memtrain.planner.weight_windows import step_turns
from tests.planner.test_solve import brute_force
from tests.planner.toys import make_machine, make_profile

PAGE = 4096


def make_units(
    blocks: int, *, frozen: tuple[int, ...] = (), around: bool = False, tied: bool = False
) -> tuple[UnitProfile, ...]:
    """Per block 8 MiB of weights, of which all but 64 bytes may leave, and a page more than that in an
    extent; trained ones with 1 ms of update. A prologue of 16 MiB and an epilogue of 4 where wanted, the
    latter with the former's table."""
    units = [
        UnitProfile(
            name=f"layers.{index}",
            block=index,
            weight_bytes=8 * MiB,
            gradient_bytes=0 if index in frozen else 8 * MiB,
            state_bytes=0 if index in frozen else 16 * MiB,
            update_seconds=0.0 if index in frozen else 0.001,
            parameters=(f"layers.{index}.a", f"layers.{index}.b"),
            movable_weight_bytes=8 * MiB - 64,
            weight_extent_bytes=8 * MiB + PAGE,
            written_extent_bytes=0 if index in frozen else 8 * MiB + PAGE,
        )
        for index in range(blocks)
    ]
    if around:
        head = make_edge("epilogue", 4 * MiB, ("prologue",) if tied else ())
        units = [make_edge("prologue", 16 * MiB), *units, head]
    return tuple(units)


def make_edge(name: str, size: int, borrows: tuple[str, ...] = ()) -> UnitProfile:
    """Frozen, outside the blocks."""
    return UnitProfile(
        name=name,
        block=None,
        weight_bytes=size,
        gradient_bytes=0,
        state_bytes=0,
        movable_weight_bytes=size,
        weight_extent_bytes=size,
        borrows=borrows,
    )


def weighty(blocks: int = 4, *, micro_batches: int = 1, **changes: Any) -> ModelProfile:
    """``make_profile`` with blocks whose weights may leave: 8 MiB each and 2 of buffers beside them."""
    kinds = {key: changes.pop(key) for key in ("frozen", "around", "tied") if key in changes}
    units = make_units(blocks, **kinds)
    fields: dict[str, Any] = {
        "units": units,
        "weight_bytes": sum(unit.weight_bytes for unit in units) + 2 * MiB,
        "state_bytes_per_element": 8.0,
        "gradient_bytes_per_element": 4.0,
        "micro_batches": micro_batches,
    }
    return make_profile(blocks, **(fields | changes))


def rooted(unit: UnitProfile) -> UnitProfile:
    """With weights that may not leave."""
    return replace(unit, movable_weight_bytes=0, weight_extent_bytes=0, written_extent_bytes=0)


def states_of(profile: ModelProfile, away: Callable[[UnitProfile], bool]) -> tuple[StateDecision, ...]:
    tiers = (Tier.NVME if away(unit) else Tier.DEVICE for unit in profile.units)
    return tuple(
        StateDecision(unit=unit.name, weight_tier=tier)
        for unit, tier in zip(profile.units, tiers, strict=True)
    )


def everybody(unit: UnitProfile) -> bool:
    return True


def in_blocks(unit: UnitProfile) -> bool:
    return unit.block is not None


def everybody_in(profile: ModelProfile, slots: int, schedule: UpdateSchedule) -> list[str]:
    """What each turn reads, by the last letter of the unit's name."""
    turns = step_turns(profile, states_of(profile, everybody), schedule, slots)
    return ["".join(profile.units[u].name[-1] for u in turn.reads) or "-" for turn in turns]


AHEAD, SEQUENTIAL = UpdateSchedule.AHEAD, UpdateSchedule.SEQUENTIAL


@pytest.mark.parametrize(
    ("slots", "schedule", "reads"),
    [
        # Prologue, four blocks, epilogue; the blocks backward, prologue; then the blocks' updates.
        (2, AHEAD, "- - - 2 3 - - - 1 0 -"),
        (3, AHEAD, "- - - - 3 - - - - 0 -"),
        (4, AHEAD, "- - - - - - - - - - -"),
        (2, SEQUENTIAL, "- 0 1 2 3 - - - 1 0 - - - 2 3"),
        (3, SEQUENTIAL, "- 0 1 2 3 - - - - 0 - - - - 3"),
    ],
)
def test_what_a_turn_finds_in_windows_is_not_read(slots: int, schedule: UpdateSchedule, reads: str) -> None:
    assert everybody_in(weighty(4), slots, schedule) == reads.split()


def test_a_further_micro_batch_finds_what_backward_has_left() -> None:
    profile = weighty(4, micro_batches=2)
    once = "- - - 2 3 - - - 1 0 -"
    assert everybody_in(profile, 2, AHEAD) == f"{once} {once}".split()


def test_frozen_units_are_not_fetched_for_their_update() -> None:
    # Blocks 0 and 2 are frozen: after backward 0 and 1 are there; 3 is read for its update, 1 is not.
    reads = everybody_in(weighty(4, frozen=(0, 2)), 2, SEQUENTIAL)
    assert reads[-4:] == ["-", "-", "-", "3"]


def test_a_tied_table_comes_again_for_the_head() -> None:
    profile = weighty(3, around=True, tied=True)
    # e and 0, 1, 2 for prologue (its name ends in e), blocks and head; the head's turn needs two.
    assert everybody_in(profile, 2, AHEAD) == "- - 1 2 ee 2 1 0 e".split()


def run(
    profile: ModelProfile,
    *,
    slots: int,
    machine: Machine | None = None,
    schedule: UpdateSchedule = SEQUENTIAL,
    away: Callable[[UnitProfile], bool] = everybody,
    action: Action = Action.KEEP,
) -> Timeline:
    blocks = tuple(BlockDecision(block=i, action=action) for i in range(len(profile.blocks)))
    states = states_of(profile, away)
    machine = machine or make_machine()
    staging = staging_for(
        profile,
        blocks,
        states,
        saved_slots=2,
        input_slots=2,
        shard_elements=1 << 20,
        on_cpu=machine.on_cpu,
        wanted_weight_slots=slots,
    )
    decisions = Decisions(blocks=blocks, states=states, staging=staging, update_schedule=schedule)
    return simulate(profile, machine, decisions)


FROZEN = {"frozen": (0, 1, 2, 3)}
ONE = (8 * MiB + PAGE) / (1024 * MiB)
"""Seconds of a block's weights: 8 MiB and a page at 1 GiB/s, 7.8 ms."""
ALONE = 0.130
"""Four blocks of 10 ms forward and 20 backward, 10 ms around them."""


def test_reads_hide_behind_the_block_before() -> None:
    # Read are 2 and 3 forward, 1 and 0 backward.
    two = run(weighty(**FROZEN), slots=2)
    assert two.step_seconds == pytest.approx(ALONE)
    assert two.bytes_moved == 4 * (8 * MiB + PAGE)
    three = run(weighty(**FROZEN), slots=3)
    assert three.step_seconds == pytest.approx(ALONE)
    assert three.bytes_moved == 2 * (8 * MiB + PAGE)
    assert [e.name for e in three.events if e.resource == "read:nvme"] == [
        "read weights layers.3",
        "read weights layers.0",
    ]
    assert not [e for e in three.events if e.resource == "write:nvme"]


def test_a_slow_tier_is_waited_for() -> None:
    slow = make_machine(read_bytes_per_second=64 * MiB, mixed_bytes_per_second=1088 * MiB)
    # 125 ms and 61 us a read, which begins two blocks before the one that needs it: of 10 ms, and of 20.
    found = run(weighty(**FROZEN), slots=3, machine=slow)
    assert found.step_seconds == pytest.approx(ALONE + 2 * 16 * ONE - 0.020 - 0.040)
    # Recompute needs weights as well: its 10 ms hide as much of the read of block 0, which begins with 2's.
    again = run(weighty(**FROZEN), slots=3, machine=slow, action=Action.RECOMPUTE)
    assert again.step_seconds == pytest.approx(ALONE + 4 * 0.010 + 2 * 16 * ONE - 0.020 - 0.060)
    # With two windows four reads begin one block before.
    found = run(weighty(**FROZEN), slots=2, machine=slow)
    assert found.step_seconds == pytest.approx(ALONE + 4 * 16 * ONE - 2 * 0.010 - 2 * 0.020)


def test_processor_time_of_weights_is_added_on_a_cpu_only() -> None:
    fast = {"read_bytes_per_second": 1e15, "write_bytes_per_second": 1e15, "mixed_bytes_per_second": 2e15}
    costs = fast | {"cpu_seconds_per_byte": 1e-9}
    size = 8 * MiB + PAGE
    found = run(weighty(**FROZEN), slots=3, machine=make_machine(**costs)).step_seconds
    assert found == pytest.approx(ALONE + 2 * size * 1e-9)
    cuda = make_machine(Tier.NVME, device="cuda:0", **costs)
    assert run(weighty(**FROZEN), slots=3, machine=cuda).step_seconds == pytest.approx(ALONE)
    # Updated, each is written once, and block 3 is read for that once more: forward reads all four.
    found = run(weighty(), slots=3, machine=make_machine(**costs)).step_seconds
    assert found == pytest.approx(ALONE + 4 * 0.001 + (6 + 4) * size * 1e-9)


def test_an_update_ahead_writes_once_and_reads_no_more_than_the_forward() -> None:
    found = run(weighty(), slots=3, schedule=AHEAD)
    counts = Counter(event.name for event in found.events if event.resource != "compute")
    assert counts == {f"write weights layers.{i}": 1 for i in range(4)} | {
        "read weights layers.3": 1,
        "read weights layers.0": 1,
    }
    # Block 3's window was block 0's, whose write was over long ago: 1 ms of update each, nothing waited for.
    assert found.step_seconds == pytest.approx(ALONE + 4 * 0.001)
    events = {event.name: event for event in found.events}
    assert events["write weights layers.0"].start_seconds == pytest.approx(0.002)
    assert events["read weights layers.3"].start_seconds == pytest.approx(0.001 + 0.011)


def test_a_window_is_given_away_when_its_weights_are_written() -> None:
    slow = make_machine(write_bytes_per_second=64 * MiB, mixed_bytes_per_second=1088 * MiB)
    found = run(weighty(), slots=3, schedule=AHEAD, machine=slow)
    # Block 0 is written from 2 ms on for 16 reads' time: only then block 3 is read into its place.
    events = {event.name: event for event in found.events}
    assert events["read weights layers.3"].start_seconds == pytest.approx(0.002 + 16 * ONE)


def test_sequential_updates_read_what_is_no_longer_there() -> None:
    found = run(weighty(), slots=3)
    counts = Counter(event.name for event in found.events if event.resource.startswith("read"))
    # Forward finds 1, 2, 3 in windows, but each is given up before its turn: all are read. Backward reads 0,
    # the updates 3.
    assert counts == {"read weights layers.0": 2, "read weights layers.3": 2} | {
        "read weights layers.1": 1,
        "read weights layers.2": 1,
    }
    assert found.bytes_moved == (6 + 4) * (8 * MiB + PAGE)


def test_masters_make_weights_anew_without_a_read() -> None:
    units = tuple(replace(unit, overwritten=True) for unit in make_units(4))
    found = run(weighty(units=units), slots=3)
    assert found.bytes_moved == (5 + 4) * (8 * MiB + PAGE)  # block 3 is not read for its update
    # It waits until the write of block 0 is over, whose window it takes.
    slow = make_machine(write_bytes_per_second=64 * MiB, mixed_bytes_per_second=1088 * MiB)
    events = {e.name: e for e in run(weighty(units=units), slots=3, machine=slow).events}
    assert events["update layers.3"].start_seconds == events["write weights layers.0"].end_seconds
    # Ahead of a forward they come like all others, for they are read before anybody updates them.
    ahead = run(weighty(units=units), slots=3, schedule=AHEAD)
    assert ahead.bytes_moved == run(weighty(), slots=3, schedule=AHEAD).bytes_moved


@pytest.mark.usefixtures("solver_here")
def test_a_plan_with_masters_is_approved() -> None:
    units = tuple(replace(unit, overwritten=True) for unit in make_units(5))
    for schedule in ("sequential", "ahead"):
        force = {"block": KEPT, "state": {"weight_tier": "nvme"}}
        plan = plan_for(weighty(5, units=units, micro_batches=2), force, update_schedule=schedule)
        assert 0 < plan.lower_bound_seconds <= plan.step_seconds


# -- bytes ---------------------------------------------------------------------------------------------


BUDGET = Budget(device="1GiB", nvme="/x:1GiB")
KEPT = {"action": "keep"}


def plan_for(
    profile: ModelProfile,
    force: dict[str, Any] | None = None,
    *,
    budget: Budget = BUDGET,
    machine: Machine | None = None,
    **options: Any,
) -> Plan:
    chosen = PlannerOptions(force=force or {}, **({"safety_margin": 0.0} | options))
    plan = make_plan(profile, machine or make_machine(), budget, options=chosen)
    if plan.status != "infeasible":
        assert check(plan, profile, machine or make_machine(), budget) == ()
    return plan


def bill(plan: Plan) -> dict[tuple[str, str], int]:
    return {(line.category, line.tier.value): line.size_bytes for line in plan.bill}


@pytest.mark.usefixtures("solver_here")
def test_bytes_by_hand() -> None:
    plan = plan_for(weighty(around=True, **FROZEN), {"block": KEPT, "state": {"weight_tier": "nvme"}})
    found = bill(plan)
    # 4 blocks of 8 MiB, 16 and 4 around them: only 2 MiB of buffers stay, and 64 bytes a block. A window
    # holds the table.
    assert found["weights", "device"] == 2 * MiB + 4 * 64
    assert plan.staging.weight_slot_bytes == 16 * MiB
    assert found["weight windows", "device"] == plan.staging.weight_slots * 16 * MiB
    assert found["weights", "nvme"] == 4 * (8 * MiB + PAGE) + 20 * MiB
    # The blocks alone: 22 MiB stay.
    force: dict[str, Any] = {"block": KEPT, "state": {"weight_tier": "nvme"}}
    force |= {f"state.{name}": {"weight_tier": "device"} for name in ("prologue", "epilogue")}
    found = bill(plan := plan_for(weighty(around=True, **FROZEN), force))
    assert found["weights", "device"] == 22 * MiB + 4 * 64
    assert found["weight windows", "device"] == plan.staging.weight_slots * (8 * MiB + PAGE)
    assert plan.peak(Tier.DEVICE) == sum(size for (_, tier), size in found.items() if tier == "device")


@pytest.mark.usefixtures("solver_here")
def test_enough_memory_streams_nothing() -> None:
    plan = plan_for(weighty())
    assert {state.weight_tier for state in plan.states} == {Tier.DEVICE}
    assert (plan.staging.weight_slots, plan.staging.weight_slot_bytes) == (0, 0)
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


@st.composite
def any_weights(draw: st.DrawFn) -> ModelProfile:
    count = draw(st.integers(1, 4))
    units = []
    for unit in make_units(count, around=draw(st.booleans()), tied=draw(st.booleans())):
        size = draw(st.integers(0, 6 * MiB))
        extent = draw(st.sampled_from([0, -(-size // PAGE) * PAGE]))
        written = draw(st.sampled_from([0, extent]))
        units.append(
            replace(
                unit,
                weight_bytes=size,
                movable_weight_bytes=size if extent else 0,
                weight_extent_bytes=extent,
                written_extent_bytes=written,
                update_seconds=0.001 if written or unit.gradient_bytes else 0.0,
            )
        )
    return make_profile(
        count,
        units=tuple(units),
        weight_bytes=sum(unit.weight_bytes for unit in units),
        baseline_bytes=0,
        micro_batches=draw(st.integers(1, 2)),
        state_bytes_per_element=8.0,
        gradient_bytes_per_element=4.0,
    )


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


# -- faults --------------------------------------------------------------------------------------------


FAULTY = weighty(6, around=True, tied=True, micro_batches=2, frozen=(1, 2))
EVERYTHING = {
    "block": KEPT,
    "block.3": {"action": "recompute"},
    "state": {"weight_tier": "nvme", "gradient_tier": "device", "optimizer_tier": "device"},
}


def shifted(plan: Plan, name: str, resource: str, by: float) -> Plan:
    """The first such event moved in time, its length kept."""
    events = list(plan.timeline)
    index = next(i for i, e in enumerate(events) if (e.name, e.resource) == (name, resource))
    old = events[index]
    moved = {"start_seconds": old.start_seconds + by, "end_seconds": old.end_seconds + by}
    events[index] = Event(name=name, resource=resource, **moved)
    return replace(plan, timeline=tuple(events))


def without(plan: Plan, name: str, which: int = 0) -> Plan:
    events = [e for e in plan.timeline if e.name == name]
    return replace(plan, timeline=tuple(e for e in plan.timeline if e is not events[which]))


def into_its_use(plan: Plan, unit: str) -> Plan:
    """The last read of a unit's weights is still going on when what comes next uses them."""
    read = max((e for e in plan.timeline if e.name == f"read weights {unit}"), key=lambda e: e.start_seconds)
    verbs = {f"forward {unit}", f"backward {unit}", f"update {unit}"}
    after = (e.start_seconds for e in plan.timeline if e.name in verbs)
    by = min(start for start in after if start >= read.end_seconds) - read.end_seconds + 0.001
    late = replace(read, start_seconds=read.start_seconds + by, end_seconds=read.end_seconds + by)
    return replace(plan, timeline=tuple(late if e is read else e for e in plan.timeline))


def from_the_beginning(plan: Plan, name: str) -> Plan:
    """The last such event begins with the step."""
    last = max((e for e in plan.timeline if e.name == name), key=lambda e: e.start_seconds)
    events = (replace(e, start_seconds=0.0) if e is last else e for e in plan.timeline)
    return replace(plan, timeline=tuple(events))


def quicker(plan: Plan, name: str) -> Plan:
    events = tuple(
        replace(e, end_seconds=(e.start_seconds + e.end_seconds) / 2) if e.name == name else e
        for e in plan.timeline
    )
    return replace(plan, timeline=events)


def placed(plan: Plan, unit: str, tier: Tier) -> Plan:
    states = (replace(s, weight_tier=tier) if s.unit == unit else s for s in plan.states)
    return replace(plan, states=tuple(states))


def staged(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, staging=replace(plan.staging, **changes))


def billed(plan: Plan, source: str, target: str) -> Plan:
    """Sums stay right, lines do not."""
    by = {source: -PAGE, target: PAGE}
    lines = (
        replace(x, size_bytes=x.size_bytes + by.get(x.category, 0) * (x.tier is Tier.DEVICE))
        for x in plan.bill
    )
    return replace(plan, bill=tuple(lines))


FAULTS: list[tuple[str, Rule, Callable[[Plan], Plan]]] = [
    ("a tier that is not there", Rule.TIER_EXISTS, lambda p: placed(p, "layers.0", Tier.CXL)),
    ("stays, yet its bytes are not there", Rule.DEVICE_PEAK, lambda p: placed(p, "layers.0", Tier.DEVICE)),
    ("stays, yet its extent is there", Rule.TIER_PEAK, lambda p: placed(p, "layers.0", Tier.DEVICE)),
    ("stays, yet it is read", Rule.BYTES_MOVED, lambda p: placed(p, "layers.0", Tier.DEVICE)),
    (
        "small window",
        Rule.STAGING,
        lambda p: staged(p, weight_slot_bytes=p.staging.weight_slot_bytes - PAGE),
    ),
    (
        "unaligned window",
        Rule.STAGING,
        lambda p: staged(p, weight_slot_bytes=p.staging.weight_slot_bytes + 1),
    ),
    ("one window", Rule.STAGING, lambda p: staged(p, weight_slots=1)),
    ("a window more", Rule.DEVICE_PEAK, lambda p: staged(p, weight_slots=p.staging.weight_slots + 1)),
    ("a window less", Rule.DEPENDENCY, lambda p: staged(p, weight_slots=p.staging.weight_slots - 1)),
    ("windows unbilled", Rule.BILL, lambda p: billed(p, "weight windows", "transients")),
    ("weights unbilled", Rule.BILL, lambda p: billed(p, "weights", "transients")),
    ("not read", Rule.DEPENDENCY, lambda p: without(p, "read weights layers.4")),
    ("not read again", Rule.DEPENDENCY, lambda p: without(p, "read weights layers.4", -1)),
    ("not written", Rule.DEPENDENCY, lambda p: without(p, "write weights layers.4")),
    (
        "read late",
        Rule.DEPENDENCY,
        lambda p: into_its_use(p, "layers.4"),
    ),
    (
        "read long before there is a window",
        Rule.WINDOWS,
        lambda p: from_the_beginning(p, "read weights layers.4"),
    ),
    (
        "written before it is updated",
        Rule.DEPENDENCY,
        lambda p: shifted(p, "write weights layers.4", "write:nvme", -0.02),
    ),
    ("fast read", Rule.DURATION, lambda p: quicker(p, "read weights layers.4")),
    ("fast write", Rule.DURATION, lambda p: quicker(p, "write weights layers.4")),
    ("bytes", Rule.BYTES_MOVED, lambda p: replace(p, bytes_moved_per_step=p.bytes_moved_per_step - PAGE)),
]


@pytest.mark.parametrize("schedule", ["sequential", "ahead"])
@pytest.mark.parametrize(("rule", "fault"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_planted_fault_is_named(
    monkeypatch: pytest.MonkeyPatch, schedule: str, rule: Rule, fault: Callable[[Plan], Plan]
) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    plan = plan_for(FAULTY, EVERYTHING, update_schedule=schedule)
    assert plan.staging.weight_slots >= 3
    assert rule in {violation.rule for violation in check(fault(plan), FAULTY, make_machine(), BUDGET)}


def test_weights_that_may_not_leave_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    plan = plan_for(FAULTY, EVERYTHING, update_schedule="sequential")
    units = tuple(rooted(u) if u.name == "layers.4" else u for u in FAULTY.units)
    fixed = replace(FAULTY, units=units)
    found = check(replace(plan, profile_digest=fixed.digest), fixed, make_machine(), BUDGET)
    assert [v.rule for v in found] == [Rule.MOVABLE]
    assert found[0].detail == "unit layers.4: its weights may not leave the device"


def test_frozen_weights_that_are_written_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    plan = plan_for(FAULTY, EVERYTHING, update_schedule="ahead")
    written = replace(
        next(e for e in plan.timeline if e.name == "write weights layers.4"), name="write weights layers.1"
    )
    last = plan.step_seconds
    written = replace(written, start_seconds=last, end_seconds=last + 0.01)
    worse = replace(plan, timeline=(*plan.timeline, written), step_seconds=last + 0.01)
    found = {v.detail for v in check(worse, FAULTY, make_machine(), BUDGET)}
    assert "weights of layers.1 are written 1 times in a step" in found


# -- options -------------------------------------------------------------------------------------------


def test_weights_are_forced_by_unit() -> None:
    force = {"state": {"weight_tier": "nvme"}, "state.layers.1": {"weight_tier": "device"}}
    plan = plan_for(weighty(3), force)
    assert [state.weight_tier.value for state in plan.states] == ["nvme", "device", "nvme"]
    assert plan.staging.weight_slots == 2


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
