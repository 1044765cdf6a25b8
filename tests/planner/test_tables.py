"""Tables by rows: bytes and seconds on the bill, in the timeline and in the checker's own arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from memtrain.planner.actions import Tier
from memtrain.planner.check import Rule, check
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.machine import Budget
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile, TableProfile
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from tests.planner.toys import make_machine, make_profile

BUDGET = Budget(device=400 * MiB, nvme="/tmp:200MiB")
MACHINE = make_machine()


def make_table(**changes: Any) -> TableProfile:
    """1000 rows of 1 KiB, four to a group; two of state. 100 tokens a micro-batch name 60 rows."""
    fields: dict[str, Any] = {
        "name": "embed.weight",
        "tier": Tier.NVME,
        "rows": 1000,
        "row_bytes": 1024,
        "weight_group_rows": 4,
        "weight_group_bytes": 4096,
        "state_group_rows": 2,
        "state_group_bytes": 4096,
        "lookups": 100,
        "used_rows": 60,
        "slot_bytes": 4 * MiB,
        "note_bytes": 400,
        "workspace_bytes": 200 * MiB,
        "update_seconds": 0.25,
    }
    return TableProfile(**(fields | changes))


def profile_with(*tables: TableProfile, micro_batches: int = 2) -> ModelProfile:
    return replace(make_profile(3, trainable=True), tables=tables, micro_batches=micro_batches)


def plan_for(profile: ModelProfile, budget: Budget = BUDGET, schedule: str = "sequential") -> Plan:
    return make_plan(profile, MACHINE, budget, options=PlannerOptions(update_schedule=schedule))


def lines(plan: Plan) -> dict[tuple[Tier, str], int]:
    return {(line.tier, line.category): line.size_bytes for line in plan.bill}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("schedule", ["sequential", "ahead", "in_backward"])
def test_bytes_and_seconds_worked_out_by_hand(schedule: str, micro_batches: int) -> None:
    profile, bare = (profile_with(*t, micro_batches=micro_batches) for t in ((make_table(),), ()))
    plan, without = plan_for(profile, schedule=schedule), plan_for(bare, schedule=schedule)
    assert check(plan, profile, MACHINE, BUDGET) == ()
    # 250 groups of weights and 500 of state.
    assert lines(plan)[Tier.NVME, "tables"] == 750 * 4096
    gradient = micro_batches * 100 * (1024 + 8)
    assert lines(plan)[Tier.DEVICE, "tables"] == 4 * MiB + 400 * 500 + gradient + 40 * 1024
    assert plan.step_seconds == pytest.approx(without.step_seconds + 0.25)
    event = next(e for e in plan.timeline if e.name == "update tables")
    assert event.end_seconds - event.start_seconds == pytest.approx(0.25)
    # Forwards read 60 groups each; the update reads 60 a micro-batch twice and writes them; state both ways.
    rows = 60 * micro_batches
    assert plan.bytes_moved_per_step - without.bytes_moved_per_step == 4096 * (rows + 3 * rows + 2 * rows)
    # Temporaries of the step are the most that the device holds for a moment.
    assert lines(plan)[Tier.DEVICE, "transients"] == 200 * MiB + micro_batches * 100 * (1024 + 32)
    assert not any(tier is not Tier.DEVICE and name == "tables" for tier, name in lines(without))


def test_a_tier_that_tables_fill_takes_nothing_else() -> None:
    profile = profile_with(make_table(rows=10_000))  # 2,500 and 5,000 groups: 29.3 MiB
    roomy = plan_for(profile, Budget(device=345 * MiB, nvme="/tmp:200MiB"))
    assert roomy.peak(Tier.NVME) > 7500 * 4096
    tight = Budget(device=400 * MiB, nvme=f"/tmp:{7500 * 4096}")
    plan = plan_for(profile, tight)
    assert (plan.status != "infeasible", plan.peak(Tier.NVME)) == (True, 7500 * 4096)
    less = plan_for(profile, Budget(device=400 * MiB, nvme=f"/tmp:{7499 * 4096}"))
    assert less.status == "infeasible"
    assert dict(less.shortfall_bytes)[Tier.NVME] == 4096


def billed(plan: Plan, tier: Tier, by: int) -> Plan:
    bill = tuple(
        replace(e, size_bytes=e.size_bytes + by) if (e.tier, e.category) == (tier, "tables") else e
        for e in plan.bill
    )
    return replace(plan, bill=bill, peaks=tuple((t, size + by * (t is tier)) for t, size in plan.peaks))


def shifted(plan: Plan, begin: float, end: float) -> Plan:
    events = (
        replace(e, start_seconds=e.start_seconds + begin, end_seconds=e.end_seconds + end)
        if e.name == "update tables"
        else e
        for e in plan.timeline
    )
    return replace(plan, timeline=tuple(events))


FAULTS: list[tuple[str, Rule, Callable[[Plan], Plan]]] = [
    ("a page less on the tier", Rule.TIER_PEAK, lambda p: billed(p, Tier.NVME, -4096)),
    ("a page less on the bill", Rule.BILL, lambda p: billed(p, Tier.NVME, -4096)),
    ("a byte less of the device", Rule.DEVICE_PEAK, lambda p: billed(p, Tier.DEVICE, -1)),
    ("a quicker step", Rule.DURATION, lambda p: shifted(p, 0.01, 0.0)),
    ("a step before backward is over", Rule.DEPENDENCY, lambda p: shifted(p, -0.05, -0.05)),
    (
        "no step",
        Rule.DEPENDENCY,
        lambda p: replace(p, timeline=tuple(e for e in p.timeline if e.name != "update tables")),
    ),
    (
        "a group less moved",
        Rule.BYTES_MOVED,
        lambda p: replace(p, bytes_moved_per_step=p.bytes_moved_per_step - 4096),
    ),
]


@pytest.mark.parametrize(("rule", "fault"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_planted_fault_is_named(rule: Rule, fault: Callable[[Plan], Plan]) -> None:
    profile = profile_with(make_table())
    plan = plan_for(profile)
    assert rule in {violation.rule for violation in check(fault(plan), profile, MACHINE, BUDGET)}


def test_a_tier_that_is_not_there_is_named() -> None:
    profile = profile_with(make_table(tier=Tier.CXL))
    found = check(plan_for(profile), profile, MACHINE, BUDGET)
    assert {violation.rule for violation in found} == {Rule.TIER_EXISTS}


def test_a_table_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="101 rows are used by 100 lookups"):
        make_table(used_rows=101)
    with pytest.raises(ValueError, match="is on the device"):
        make_table(tier=Tier.DEVICE)
    with pytest.raises(ValueError, match="state_group_rows must be > 0"):
        make_table(state_group_rows=0)
    profile = profile_with(make_table(), make_table(name="other"))
    assert ModelProfile.from_json(profile.to_json()) == profile
    assert profile.in_a_step(2.0).tables[0].update_seconds == 0.5
