"""Units whose weights come in tiles: turns by hand; plans that are approved, and faults that are named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memtrain.planner.actions import MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.check import Rule, check
from memtrain.planner.machine import Budget
from memtrain.planner.plan import WindowClass
from memtrain.planner.profile import ModelProfile
from memtrain.planner.solve import PlannerOptions, make_plan
from memtrain.planner.units import MiB
from memtrain.planner.weight_windows import WantedWindows, step_turns, weight_windows
from tests.planner.toys import make_machine
from tests.planner.weighty import everybody, states_of, weighty

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
    assert windows(tied, 2)[0].slots == 3


def test_a_unit_has_no_larger_window_than_extent() -> None:
    with pytest.raises(ValueError, match="window_bytes 9437184 is part of weight_extent_bytes"):
        replace(weighty(1).units[0], window_bytes=9 * MiB)


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
    (windows,) = plan.staging.weight_windows
    small = replace(plan.staging, weight_windows=(replace(windows, slot_bytes=2 * MiB),))
    assert Rule.STAGING in {
        v.rule for v in check(replace(plan, staging=small), profile, machine, BUDGET)
    }  # the untiled blocks need 8
