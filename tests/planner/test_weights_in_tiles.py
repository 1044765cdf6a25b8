"""Units whose weights come in tiles: turns by hand; plans that are approved, and faults that are named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memtrain.planner.actions import MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.check import Rule, check
from memtrain.planner.machine import Budget
from memtrain.planner.plan import Plan, WindowClass
from memtrain.planner.profile import ModelProfile, UnitProfile
from memtrain.planner.solve import PlannerOptions, make_plan
from memtrain.planner.units import MiB
from memtrain.planner.weight_windows import WantedWindows, step_turns, wanted_of, weight_windows
from tests.planner.toys import make_machine
from tests.planner.weighty import everybody, states_of, weighty, windowed, without

AHEAD, SEQUENTIAL = UpdateSchedule.AHEAD, UpdateSchedule.SEQUENTIAL
PAGE = 4096
EVERYTHING = {"state": {"weight_tier": "nvme", "gradient_tier": "device", "optimizer_tier": "device"}}
BUDGET = Budget(device="1GiB", nvme="/x:1GiB")


def in_tiles(profile: ModelProfile, *names: str) -> ModelProfile:
    """The units in tiles of 2 MiB."""
    units = (replace(u, window_bytes=2 * MiB) if u.name in names else u for u in profile.units)
    return replace(profile, units=tuple(units))


def reads(
    profile: ModelProfile,
    slots: int,
    schedule: UpdateSchedule,
    order: MicroBatchOrder = MicroBatchOrder.HORIZONTAL,
    recomputed: tuple[int, ...] = (),
) -> str:
    states = states_of(profile, everybody)
    windows = weight_windows(profile, states, WantedWindows(slots, sized=False))
    assert sum(each.slots for each in windows) == slots
    turns = step_turns(profile, states, schedule, windows, order, recomputed)
    return " ".join("".join(profile.units[r.unit].name[-1] for r in turn.reads) or "-" for turn in turns)


def test_a_unit_in_tiles_is_read_at_every_use_and_leaves_nothing_of_others() -> None:
    # Prologue (nothing), blocks 0 to 3, epilogue; backward; updates. Without tiles 3 windows keep 1, 2, 3.
    assert reads(weighty(4), 3, SEQUENTIAL) == "- 0 1 2 3 - - - - 0 - - - - 3"
    tiled = in_tiles(weighty(4), "layers.2")
    assert reads(tiled, 3, SEQUENTIAL) == "- 0 1 2 3 - - 2 1 0 - - - 2 3"
    assert reads(tiled, 3, AHEAD) == "- - - 2 3 - - 2 1 0 -"


def test_two_passes_in_a_turn_are_two_reads() -> None:
    tiled = in_tiles(weighty(3, around=True), "layers.1", "epilogue")
    assert reads(tiled, 3, AHEAD, recomputed=(1,)) == "- - 1 2 ee 2 11 0 e"
    plain = reads(weighty(3, around=True), 3, AHEAD, recomputed=(1,))
    assert "11" not in plain
    assert "ee" not in plain


def test_every_micro_batch_of_vertical_order_goes_over_the_tiles() -> None:
    tiled = in_tiles(weighty(3, micro_batches=2), "layers.1")
    found = reads(tiled, 3, AHEAD, MicroBatchOrder.VERTICAL).split()
    assert found[4:6] == ["1", "1"]  # forward of both, behind two prologues and two of block 0


def test_windows_are_as_large_as_a_tile_and_one_more_than_units_in_use() -> None:
    def windows(profile: ModelProfile, slots: int) -> tuple[WindowClass, ...]:
        return weight_windows(profile, states_of(profile, everybody), WantedWindows(slots, sized=True))

    profile = in_tiles(weighty(3), "layers.0", "layers.1", "layers.2")
    assert windows(profile, 3) == (WindowClass(slots=3, slot_bytes=2 * MiB),)
    mixed = in_tiles(weighty(3), "layers.0")
    assert windows(mixed, 3) == (WindowClass(slots=3, slot_bytes=8 * MiB + PAGE),)
    tied = in_tiles(weighty(3, around=True, tied=True), "epilogue")
    # With the loss the head's rest, a tile of it, and the table.
    assert windows(tied, 2) == (
        WindowClass(slots=2, slot_bytes=8 * MiB + PAGE),
        WindowClass(slots=1, slot_bytes=16 * MiB),
    )
    assert weight_windows(tied, states_of(tied, everybody), WantedWindows(2, sized=False))[0].slots == 3


def test_a_unit_has_no_larger_window_than_extent() -> None:
    with pytest.raises(ValueError, match="window_bytes 9437184 is part of weight_extent_bytes"):
        replace(weighty(1).units[0], window_bytes=9 * MiB)


def with_tables(least: int, blocks: int = 4, **changes: int) -> ModelProfile:
    """A table of 24 MiB before the blocks and a head of 24 behind them, in tiles of at most 12 and at least
    ``least``; blocks have a window of 8 MiB and a page."""
    profile = weighty(blocks, around=True, **changes)
    size = {"weight_bytes": 24 * MiB, "movable_weight_bytes": 24 * MiB, "weight_extent_bytes": 24 * MiB}
    tiles = {"window_bytes": 12 * MiB, "least_window_bytes": least}
    units = tuple(u if u.block is not None else replace(u, **size, **tiles) for u in profile.units)
    return replace(profile, units=units, weight_bytes=sum(u.weight_bytes for u in units) + 2 * MiB)


EQUAL, UNEQUAL = 12 * MiB, 4 * MiB
"""Least tiles: as large as the others, or such as fit the windows of blocks."""


@pytest.mark.parametrize(("least", "fewest"), [(EQUAL, 1), (UNEQUAL, 2)])
def test_two_sizes_where_tables_are_in_tiles(least: int, fewest: int) -> None:
    """Two windows for tiles: the one in use and the next. Of the small ones as many as a turn has of what
    fits them: a tile and what comes beside it, where tiles do."""
    profile = with_tables(least)
    for slots, small in ((2, fewest), (3, fewest), (4, 2), (5, 3)):
        found = weight_windows(profile, states_of(profile, everybody), WantedWindows(slots, sized=True))
        assert found == (
            WindowClass(slots=small, slot_bytes=8 * MiB + PAGE),
            WindowClass(slots=2, slot_bytes=12 * MiB),
        )
        if small + 2 == slots:
            assert wanted_of(found) == WantedWindows(slots, sized=True)
    # One kind alone, and units in tiles that are next to each other, have windows of one size.
    tables = weight_windows(profile, states_of(profile, in_tables), WantedWindows(4, sized=True))
    assert tables == (WindowClass(slots=2, slot_bytes=12 * MiB),)
    blocks = in_tiles(weighty(4), *(f"layers.{index}" for index in range(4)))
    assert len(weight_windows(blocks, states_of(blocks, everybody), WantedWindows(4, sized=True))) == 1


def in_tables(unit: UnitProfile) -> bool:
    return unit.block is None


def test_tiles_leave_the_windows_of_blocks_alone_unless_they_fit_them() -> None:
    def reads_of(profile: ModelProfile, *, sized: bool) -> str:
        states = states_of(profile, everybody)
        windows = weight_windows(profile, states, WantedWindows(4, sized=sized))
        turns = step_turns(profile, states, AHEAD, windows)
        names = "p0123E"  # prologue, blocks, epilogue
        return " ".join("".join(names[r.unit] for r in turn.reads) or "-" for turn in turns)

    # Two windows of blocks: forward finds 0 and 1, backward 3 and 2. The loss goes over the head twice.
    assert reads_of(with_tables(EQUAL), sized=True) == "p - - 2 3 EE - - 1 0 p"
    # A tile that comes into them turns out what is there; so do all tiles in windows of one size.
    everything = "p 0 1 2 3 EE 3 2 1 0 p"
    assert reads_of(with_tables(UNEQUAL), sized=True) == everything
    assert reads_of(with_tables(EQUAL), sized=False) == everything


def test_what_a_tile_turns_out_is_written_before_it_comes() -> None:
    """Of both sizes: block 1, which an update behind its backward has changed, is in a small window that the
    prologue's small tile takes."""
    profile = with_tables(UNEQUAL, blocks=2)
    states = states_of(profile, everybody)
    windows = weight_windows(profile, states, WantedWindows(4, sized=True))
    *_, last = step_turns(profile, states, UpdateSchedule.IN_BACKWARD, windows)
    (read,) = last.reads
    assert [profile.units[unit].name for unit in (read.unit, *read.evicts)] == [
        "prologue",
        "layers.1",
        "prologue",
    ]


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize("least", [EQUAL, UNEQUAL])
@pytest.mark.parametrize("schedule", ["sequential", "ahead", "in_backward"])
@pytest.mark.parametrize("order", ["horizontal", "vertical"])
def test_plans_with_two_sizes_are_approved(schedule: str, order: str, least: int) -> None:
    if (schedule, order) == ("in_backward", "vertical"):
        pytest.skip("refused")
    profile = with_tables(least, blocks=3, micro_batches=2)
    machine = make_machine(Tier.NVME)
    force = {**EVERYTHING, "block": {"action": "recompute"}}
    options = PlannerOptions(force=force, update_schedule=schedule, micro_batch_order=order)
    plan = make_plan(profile, machine, BUDGET, options=options)
    assert plan.status != "infeasible"
    assert check(plan, profile, machine, BUDGET) == ()
    assert plan.lower_bound_seconds <= plan.step_seconds + 1e-9
    windows = plan.staging.weight_windows
    line = next(line for line in plan.bill if (line.category, line.tier) == ("weight windows", Tier.DEVICE))
    assert line.size_bytes == sum(each.slots * each.slot_bytes for each in windows)
    if least == EQUAL:
        assert [each.slot_bytes for each in windows] == [8 * MiB + PAGE, 12 * MiB]
        assert windows[1].slots == 2


@pytest.mark.usefixtures("solver_here")
def test_faults_of_two_sizes_are_named() -> None:
    profile, other = with_tables(EQUAL, blocks=3), with_tables(UNEQUAL, blocks=3)
    machine = make_machine(Tier.NVME)
    plan = make_plan(profile, machine, BUDGET, options=PlannerOptions(force=EVERYTHING))
    assert len(plan.staging.weight_windows) == 2

    def rules(wrong: Plan, of: ModelProfile = profile) -> set[Rule]:
        return {violation.rule for violation in check(wrong, of, machine, BUDGET)}

    # Tiles that come into the windows of blocks leave nothing there.
    assert Rule.DEPENDENCY in rules(replace(plan, profile_digest=other.digest), other)
    assert Rule.STAGING in rules(windowed(plan, 1, slots=-1))  # no window for the next tile
    assert Rule.STAGING in rules(windowed(plan, 1, slots=1))
    assert Rule.STAGING in rules(windowed(plan, 0, slot_bytes=PAGE))
    assert Rule.STAGING in rules(windowed(plan, 1, slot_bytes=-PAGE))
    assert Rule.DEPENDENCY in rules(without(plan, "read weights epilogue", 1))
    one = make_plan(other, machine, BUDGET, options=PlannerOptions(force=EVERYTHING))
    fewer = windowed(one, 0, slots=1 - one.staging.weight_windows[0].slots)
    assert Rule.STAGING in rules(replace(fewer, profile_digest=other.digest), other)


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize("schedule", ["sequential", "ahead", "in_backward"])
@pytest.mark.parametrize("order", ["horizontal", "vertical"])
@pytest.mark.parametrize(
    "names", [("layers.1",), ("prologue", "epilogue"), ("layers.0", "layers.1", "layers.2")]
)
def test_plans_are_approved(schedule: str, order: str, names: tuple[str, ...]) -> None:
    if (schedule, order) == ("in_backward", "vertical"):
        pytest.skip("refused")
    profile = in_tiles(weighty(3, around=True, micro_batches=2, frozen=(2,)), *names)
    for block in ("keep", "recompute"):
        force = {**EVERYTHING, "block": {"action": "keep"}, "block.1": {"action": block}}
        options = PlannerOptions(force=force, update_schedule=schedule, micro_batch_order=order)
        plan = make_plan(profile, make_machine(Tier.NVME), BUDGET, options=options)
        assert plan.status != "infeasible"
        assert check(plan, profile, make_machine(Tier.NVME), BUDGET) == ()
        assert plan.lower_bound_seconds <= plan.step_seconds + 1e-9


@pytest.mark.usefixtures("solver_here")
def test_faults_are_named() -> None:
    profile = in_tiles(weighty(3, around=True, micro_batches=2), "layers.1", "epilogue")
    machine = make_machine(Tier.NVME)
    options = PlannerOptions(force={**EVERYTHING, "block": {"action": "keep"}})
    plan = make_plan(profile, machine, BUDGET, options=options)
    # A plan for tiles does not hold for the whole layer, nor the other way round.
    whole = replace(profile, units=tuple(replace(u, window_bytes=0) for u in profile.units))
    mistaken = replace(plan, profile_digest=whole.digest)
    assert {Rule.DEPENDENCY, Rule.BYTES_MOVED} <= {v.rule for v in check(mistaken, whole, machine, BUDGET)}
    other = make_plan(whole, machine, BUDGET, options=options)
    mistaken = replace(other, profile_digest=profile.digest)
    assert {Rule.DEPENDENCY, Rule.BYTES_MOVED} <= {v.rule for v in check(mistaken, profile, machine, BUDGET)}
    for index, event in enumerate(plan.timeline):
        if event.name == "read weights epilogue":  # the pass of backward is one of its own
            fewer = (*plan.timeline[:index], *plan.timeline[index + 1 :])
            found = {v.rule for v in check(replace(plan, timeline=fewer), profile, machine, BUDGET)}
            assert Rule.DEPENDENCY in found
    windows, *others = plan.staging.weight_windows
    small = replace(plan.staging, weight_windows=(replace(windows, slot_bytes=4 * MiB), *others))
    assert Rule.STAGING in {
        v.rule for v in check(replace(plan, staging=small), profile, machine, BUDGET)
    }  # the untiled blocks need 8


def test_a_second_pass_over_tiles_that_an_update_made_anew_waits_for_a_window() -> None:
    """Masters make the first pass's weights; the second one, of backward, is the only read."""
    profile = in_tiles(weighty(1, around=True), "epilogue")
    made = {"gradient_bytes": 4 * MiB, "state_bytes": 12 * MiB, "written_extent_bytes": 4 * MiB}
    head = replace(profile.units[-1], **made, overwritten=True)
    profile = replace(profile, units=(*profile.units[:-1], head))
    states = states_of(profile, everybody)
    windows = weight_windows(profile, states, WantedWindows(2, sized=False))
    turns = step_turns(profile, states, AHEAD, windows)
    (read,) = turns[2].reads
    assert (profile.units[read.unit].name, read.begins_after) == ("epilogue", 0)
