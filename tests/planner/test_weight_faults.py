"""Weights that live on tiers: the checker names what is wrong with a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from memtrain.planner.actions import Tier
from memtrain.planner.check import Rule, check
from memtrain.planner.plan import Plan, WindowClass
from memtrain.planner.units import MiB
from tests.planner.toys import make_machine
from tests.planner.weighty import (
    BUDGET,
    EVERYTHING,
    FAULTY,
    PAGE,
    billed,
    from_the_beginning,
    into_its_use,
    make_edge,
    placed,
    plan_for,
    quicker,
    rooted,
    shifted,
    staged,
    weighty,
    windowed,
    without,
)

FAULTS: list[tuple[str, Rule, Callable[[Plan], Plan]]] = [
    ("a tier that is not there", Rule.TIER_EXISTS, lambda p: placed(p, "layers.0", Tier.CXL)),
    ("stays, yet its bytes are not there", Rule.DEVICE_PEAK, lambda p: placed(p, "layers.0", Tier.DEVICE)),
    ("stays, yet its extent is there", Rule.TIER_PEAK, lambda p: placed(p, "layers.0", Tier.DEVICE)),
    ("stays, yet it is read", Rule.BYTES_MOVED, lambda p: placed(p, "layers.0", Tier.DEVICE)),
    ("small large window", Rule.STAGING, lambda p: windowed(p, -1, slot_bytes=-PAGE)),
    ("blocks that fit the large window alone", Rule.STAGING, lambda p: windowed(p, 0, slot_bytes=-PAGE)),
    ("small window that is too large", Rule.STAGING, lambda p: windowed(p, 0, slot_bytes=PAGE)),
    ("unaligned window", Rule.STAGING, lambda p: windowed(p, 0, slot_bytes=1)),
    ("no window", Rule.STAGING, lambda p: windowed(p, 0, slots=-p.staging.weight_windows[0].slots)),
    ("no large window", Rule.STAGING, lambda p: windowed(p, -1, slots=-1)),
    ("two large windows for one table", Rule.STAGING, lambda p: windowed(p, -1, slots=1)),
    (
        "large windows first",
        Rule.STAGING,
        lambda p: staged(p, weight_windows=p.staging.weight_windows[::-1]),
    ),
    (
        "windows of a size that no unit needs",
        Rule.STAGING,
        lambda p: staged(
            p, weight_windows=(*p.staging.weight_windows, WindowClass(slots=1, slot_bytes=32 * MiB))
        ),
    ),
    ("a window more", Rule.DEVICE_PEAK, lambda p: windowed(p, 0, slots=1)),
    ("a window less", Rule.DEPENDENCY, lambda p: windowed(p, 0, slots=-1)),
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
    assert [each.slots for each in plan.staging.weight_windows[1:]] == [1]
    assert plan.staging.weight_windows[0].slots >= 2
    assert rule in {violation.rule for violation in check(fault(plan), FAULTY, make_machine(), BUDGET)}


def test_two_tables_in_their_one_window_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """There would be room for both, were windows counted without their sizes."""
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    profile = weighty(6, around=True, frozen=tuple(range(6)))
    units = (*profile.units[:-1], make_edge("epilogue", 12 * MiB))
    profile = replace(profile, units=units, weight_bytes=profile.weight_bytes + 8 * MiB)
    plan = plan_for(profile, EVERYTHING, update_schedule="ahead")
    assert [each.slots for each in plan.staging.weight_windows[1:]] == [1]
    early = from_the_beginning(plan, "read weights epilogue")
    found = {v.rule: v.detail for v in check(early, profile, make_machine(), BUDGET)}
    assert f"there are 1 windows of {16 * MiB} bytes" in found[Rule.WINDOWS]


def test_reads_that_an_update_ahead_spares_or_does_not_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    units = tuple(replace(u, overwritten=u.written_extent_bytes > 0) for u in FAULTY.units)
    anew = replace(FAULTY, units=units)
    machine = make_machine()
    for planned, real in ((FAULTY, anew), (anew, FAULTY)):
        plan = plan_for(planned, EVERYTHING, update_schedule="ahead")
        assert not check(plan, planned, machine, BUDGET)
        found = check(replace(plan, profile_digest=real.digest), real, machine, BUDGET)
        assert {Rule.DEPENDENCY, Rule.BYTES_MOVED} <= {violation.rule for violation in found}


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
