"""Models whose weights may leave, with numbers that can be worked out by hand, and plans made wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from memtrain.planner.actions import Action, BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.check import check
from memtrain.planner.decisions import Decisions, PlannerOptions, staging_for
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Event, Plan
from memtrain.planner.profile import ModelProfile, UnitProfile
from memtrain.planner.simulate import Timeline, simulate
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from memtrain.planner.weight_windows import WantedWindows
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


def run(
    profile: ModelProfile,
    *,
    slots: int,
    sized: bool = False,
    machine: Machine | None = None,
    schedule: UpdateSchedule = UpdateSchedule.SEQUENTIAL,
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
        wanted_windows=WantedWindows(slots, sized),
    )
    decisions = Decisions(blocks=blocks, states=states, staging=staging, update_schedule=schedule)
    return simulate(profile, machine, decisions)


FROZEN = {"frozen": (0, 1, 2, 3)}
ONE = (8 * MiB + PAGE) / (1024 * MiB)
"""Seconds of a block's weights: 8 MiB and a page at 1 GiB/s, 7.8 ms."""
ALONE = 0.130
"""Four blocks of 10 ms forward and 20 backward, 10 ms around them."""


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


def windowed(plan: Plan, which: int, **by: int) -> Plan:
    """Windows of one size changed, by so many slots or bytes."""
    windows = list(plan.staging.weight_windows)
    old = windows[which]
    windows[which] = replace(old, **{name: getattr(old, name) + step for name, step in by.items()})
    return staged(plan, weight_windows=tuple(windows))


def billed(plan: Plan, source: str, target: str) -> Plan:
    """Sums stay right, lines do not."""
    by = {source: -PAGE, target: PAGE}
    lines = (
        replace(x, size_bytes=x.size_bytes + by.get(x.category, 0) * (x.tier is Tier.DEVICE))
        for x in plan.bill
    )
    return replace(plan, bill=tuple(lines))
