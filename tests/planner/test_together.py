"""What one address space for slabs, staging and transients would save, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from memtrain.planner.actions import (
    Action,
    BlockDecision,
    MicroBatchOrder,
    StateDecision,
    Tier,
    UpdateSchedule,
)
from memtrain.planner.decisions import Decisions, staging_for
from memtrain.planner.profile import ModelProfile
from memtrain.planner.together import together
from memtrain.planner.units import MiB
from tests.planner.test_overlaid import PAGES, with_edges
from tests.planner.toys import make_block

SEQUENTIAL, AHEAD, IN_BACKWARD = UpdateSchedule.SEQUENTIAL, UpdateSchedule.AHEAD, UpdateSchedule.IN_BACKWARD
UNIT = MiB + PAGES


def decide(
    profile: ModelProfile, *, schedule: UpdateSchedule = SEQUENTIAL, overlay: bool = True, **state: Tier
) -> Decisions:
    blocks = tuple(BlockDecision(block=i, action=Action.KEEP) for i in range(len(profile.blocks)))
    states = tuple(StateDecision(unit=unit.name, **state) for unit in profile.units)
    staging = staging_for(
        profile,
        blocks,
        states,
        saved_slots=2,
        input_slots=2,
        shard_elements=1 << 20,
        on_cpu=True,
        schedule=schedule,
        overlay=overlay,
    )
    return Decisions(blocks=blocks, states=states, staging=staging, update_schedule=schedule)


def test_apart_gradients_that_are_not_there_yet_are_lost() -> None:
    profile = with_edges(3)
    apart, overlaid = (together(profile, decide(profile, overlay=on)) for on in (False, True))
    place = decide(profile).staging.kept_bytes[0]
    # Forward of block 2: three places, and 12 MiB beside; in backward 4 MiB and two units' gradients.
    assert apart.position == overlaid.position == "forward layers.2"
    assert apart.load_bytes == overlaid.load_bytes == 3 * place + 12 * MiB
    assert apart.held_bytes == 3 * place + 5 * UNIT + 12 * MiB
    assert overlaid.held_bytes == 3 * place + 2 * UNIT + 12 * MiB


def test_where_backward_binds_the_overlaid_slab_loses_nothing() -> None:
    blocks = tuple(make_block(i, backward_transient_bytes=30 * MiB) for i in range(3))
    profile = with_edges(block_profiles=blocks)
    found = together(profile, decide(profile))
    assert found.position == "backward layers.2"
    assert found.over == 0.0
    apart = together(profile, decide(profile, overlay=False))
    assert apart.held_bytes - apart.load_bytes == 3 * UNIT


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_a_ring_of_updates_is_idle_in_a_pass_only_if_they_come_behind_it(schedule: UpdateSchedule) -> None:
    profile = with_edges(3)
    decisions = decide(profile, schedule=schedule, optimizer_tier=Tier.NVME)
    ring = decisions.staging.update_slots * decisions.staging.update_slot_bytes
    place = decisions.staging.kept_bytes[0]
    found = together(profile, decisions)
    assert ring > 3 * place  # so the update is the fullest moment where the ring is its own
    if schedule is SEQUENTIAL:
        assert found.position.startswith("update")
        assert found.load_bytes == ring + 5 * UNIT
    else:  # block 2's own gradients and the epilogue's are still there
        assert found.position == "forward layers.2"
        assert found.load_bytes == ring + 3 * place + 12 * MiB + 2 * UNIT
        assert found.over == 0.0


def test_with_several_micro_batches_nothing_of_gradients_is_lost() -> None:
    profile = with_edges(3, micro_batches=2)
    assert together(profile, decide(profile)).over == 0.0


def test_in_backward_one_unit_is_there_at_a_time() -> None:
    blocks = tuple(make_block(i, backward_transient_bytes=30 * MiB) for i in range(3))
    profile = with_edges(block_profiles=blocks)
    assert together(profile, decide(profile, schedule=IN_BACKWARD)).over == 0.0


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD, IN_BACKWARD])
@pytest.mark.parametrize("changes", [{}, {"micro_batches": 2}])
def test_never_less_than_is_in_use(schedule: UpdateSchedule, changes: dict[str, Any]) -> None:
    profile = with_edges(4, **changes)
    for overlay in (False, True):
        for tier in (Tier.DEVICE, Tier.NVME):
            decisions = decide(
                profile, schedule=schedule, overlay=overlay, gradient_tier=tier, optimizer_tier=tier
            )
            assert together(profile, decisions).over >= 0.0


def test_vertical_order_holds_every_micro_batch() -> None:
    profile = with_edges(3, micro_batches=2)
    decisions = replace(decide(profile, overlay=False), micro_batch_order=MicroBatchOrder.VERTICAL)
    assert together(profile, decisions).load_bytes > together(profile, decide(profile)).load_bytes
