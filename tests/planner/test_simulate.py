"""Timelines worked out by hand: blocks of 10 ms forward and 20 ms backward; 10 MiB at 1 GiB/s is 9.77 ms."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from memtrain.planner.actions import Action, BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.decisions import Decisions, staging_for
from memtrain.planner.machine import Machine
from memtrain.planner.profile import ModelProfile
from memtrain.planner.simulate import Timeline, simulate
from memtrain.planner.units import MiB
from tests.planner.toys import make_block, make_machine, make_profile

TRANSFER = 10 / 1024


def run(
    profile: ModelProfile,
    actions: list[dict[str, Any]],
    machine: Machine | None = None,
    *,
    slots: int = 2,
    state: dict[str, Tier] | None = None,
    schedule: UpdateSchedule = UpdateSchedule.SEQUENTIAL,
    shard: int = 1 << 20,
) -> Timeline:
    blocks = tuple(BlockDecision(block=i, **a) for i, a in enumerate(actions))
    states = tuple(StateDecision(unit=u.name, **(state or {})) for u in profile.units)
    staging = staging_for(
        profile,
        blocks,
        states,
        saved_slots=slots,
        input_slots=slots,
        shard_elements=shard,
        on_cpu=(machine or make_machine()).on_cpu,
    )
    return simulate(
        profile,
        machine or make_machine(),
        Decisions(blocks=blocks, states=states, staging=staging, update_schedule=schedule),
    )


KEEP = {"action": Action.KEEP}
SWAP = {"action": Action.SWAP, "saved_tier": Tier.NVME}
RECOMPUTE = {"action": Action.RECOMPUTE}


def test_keep_all_is_the_sum_of_the_arithmetic() -> None:
    timeline = run(make_profile(3, micro_batches=2), [KEEP] * 3)
    assert timeline.step_seconds == pytest.approx(2 * 0.100)
    assert timeline.bytes_moved == 0


def test_recompute_adds_forward_and_stored_attention_saves_its_part() -> None:
    stored = {"action": Action.RECOMPUTE_EXCEPT_ATTENTION}
    assert run(make_profile(3), [RECOMPUTE, stored, KEEP]).step_seconds == pytest.approx(
        0.100 + 0.010 + 0.006
    )


def test_a_fast_link_hides_the_swap_and_the_last_slots_are_not_read() -> None:
    timeline = run(make_profile(3), [SWAP] * 3)
    assert timeline.step_seconds == pytest.approx(0.100)
    assert timeline.bytes_moved == (3 + 1) * 10 * MiB
    assert [e.name for e in timeline.events if e.resource == "read:nvme"] == ["read layers.0"]


def test_a_single_slot_cannot_overlap() -> None:
    # Forward of 1 and 2 wait for the write before them; so do backward of 1 and 0 for their reads.
    # The writes end 2 x (10 ms + transfer) + 10 ms after the prologue; the last write hides behind
    # the loss and the first backward.
    timeline = run(make_profile(3), [SWAP] * 3, slots=1)
    assert timeline.step_seconds == pytest.approx(0.100 + 4 * TRANSFER)


def test_back_pressure_of_two_slots_on_a_slow_link() -> None:
    # A write takes 100 ms. Prologue 1; forward 0 ends 11, 1 ends 21; forward 2 waits for write 0 (111) and
    # ends 121; loss 128; backward 2 ends 148. Write 1 ends 211, write 2 ends 311. Slot 0 (blocks 0 and 2)
    # is free at 311: read 0 ends 411; backward 0 ends 431; prologue 433.
    slow = make_machine(
        read_bytes_per_second=100 * MiB, write_bytes_per_second=100 * MiB, mixed_bytes_per_second=200 * MiB
    )
    assert run(make_profile(3), [SWAP] * 3, slow).step_seconds == pytest.approx(0.433)


TWO_TIERS = {
    "action": Action.RECOMPUTE_EXCEPT_ATTENTION,
    "saved_tier": Tier.HOST,
    "input_tier": Tier.NVME,
}
"""4 MiB of attention to the host and 1 MiB of input to NVMe: a slot each, the host's first."""


@pytest.mark.parametrize(
    ("slots", "waits", "fetched", "moved"),
    [
        # All slots are the first block's: the second waits for the longer of its writes, the first for the
        # longer of its reads, which begin when the second has left its slots.
        (2, 4 + 4, {"read:host": 1, "read:nvme": 1}, 2 * 5 + 5),
        # The second block's input takes the slot of the first one's attention, which alone is fetched.
        (3, 4 + 4, {"read:host": 1}, 2 * 5 + 4),
        (4, 0, {}, 2 * 5),
    ],
)
def test_a_block_that_uses_two_tiers_takes_two_slots(
    slots: int, waits: int, fetched: dict[str, int], moved: int
) -> None:
    profile = make_profile(block_profiles=tuple(make_block(i, attention_bytes=4 * MiB) for i in range(2)))
    machine = make_machine(Tier.HOST, Tier.NVME, device="cuda:0")
    timeline = run(profile, [TWO_TIERS] * 2, machine, slots=slots)
    # Twice 10 ms forward, 6 of them again without attention, and 20 backward; 10 around the blocks.
    assert timeline.step_seconds == pytest.approx(2 * 0.036 + 0.010 + waits / 1024)
    reads = Counter(event.resource for event in timeline.events if event.resource.startswith("read"))
    assert reads == fetched
    assert timeline.bytes_moved == moved * MiB


def test_a_ring_has_no_more_slots_than_are_taken() -> None:
    profile = make_profile(2)
    for kinds, slots, found in ((["two"], 1, 2), (["two"], 4, 2), (["two", "one"], 4, 3), (["one"], 4, 1)):
        one = {"action": Action.RECOMPUTE, "input_tier": Tier.NVME}
        given = [{"two": TWO_TIERS, "one": one}[kind] for kind in kinds] + [KEEP] * (2 - len(kinds))
        staging = staging_for(
            profile,
            tuple(BlockDecision(block=i, **fields) for i, fields in enumerate(given)),
            tuple(StateDecision(unit=u.name) for u in profile.units),
            saved_slots=slots,
            input_slots=slots,
            shard_elements=1 << 20,
            on_cpu=False,
        )
        assert staging.input_slots == found


def test_processor_time_of_transfers_is_added_on_a_cpu_only() -> None:
    costs = {"cpu_seconds_per_byte": 1e-9, "dram_copy_bytes_per_second": 1e9}
    # Out: 1e-9 s for the copy and 1e-9 for the transfer, for 3 blocks; in: 1e-9 for the one that is read.
    size = 10 * MiB
    expected = 0.100 + 3 * size * 2e-9 + 1 * size * 1e-9
    assert run(make_profile(3), [SWAP] * 3, make_machine(**costs)).step_seconds == pytest.approx(expected)
    cuda = make_machine(Tier.NVME, device="cuda:0", **costs)
    assert run(make_profile(3), [SWAP] * 3, cuda).step_seconds == pytest.approx(0.100)


@pytest.mark.parametrize(
    ("action", "copied"),
    [(KEEP, 10), (RECOMPUTE, 1), ({"action": Action.RECOMPUTE_EXCEPT_ATTENTION}, 2)],
)
def test_what_stays_is_copied_on_a_cpu_only(action: dict[str, Any], copied: int) -> None:
    again = {Action.KEEP: 0.0, Action.RECOMPUTE: 0.010, Action.RECOMPUTE_EXCEPT_ATTENTION: 0.006}
    once = 0.070 + 2 * again[action["action"]]
    profile = make_profile(2, trainable=True, micro_batches=2)
    costs = {"dram_copy_bytes_per_second": 1e9}
    # Two blocks in each of two micro-batches; 1 MiB of gradients each, copied in the first and added (half as
    # much again) in the second; 1 ms of update each.
    expected = 2 * once + (4 * copied + 2 * 1 + 2 * 1.5) * MiB * 1e-9 + 0.002
    assert run(profile, [action] * 2, make_machine(**costs)).step_seconds == pytest.approx(expected)
    cuda = make_machine(Tier.NVME, device="cuda:0", **costs)
    assert run(profile, [action] * 2, cuda).step_seconds == pytest.approx(2 * once + 0.002)


def test_both_directions_share_the_mixed_bandwidth() -> None:
    # One block, 6 MiB of state, one shard, sequential: read, step, write one after the other.
    profile = make_profile(1, trainable=True)
    machine = make_machine(mixed_bytes_per_second=1024 * MiB)
    one = run(profile, [KEEP], machine, state={"optimizer_tier": Tier.NVME})
    assert one.step_seconds == pytest.approx(0.040 + 6 / 1024 + 0.001 + 6 / 1024)
    # Two blocks: the second read overlaps nothing but the first step; it is over before the first write has
    # far to go. Read 0: 5.859 ms, step 0 1 ms while read 1 runs alone; then write 0 and read 1 share: the
    # 4.859 ms left of read 1 take twice that; step 1 in 1 ms; write 0 has 6/1024 - 4.859 - 1.0 ms left.
    two = run(make_profile(2, trainable=True), [KEEP] * 2, machine, state={"optimizer_tier": Tier.NVME})
    read = 6 / 1024
    expected = 0.070 + read + 0.001 + 2 * (read - 0.001) + 0.001 + read
    assert two.step_seconds == pytest.approx(expected)


def test_an_update_that_runs_ahead_hides_behind_forward() -> None:
    profile = make_profile(3, trainable=True)
    state = {"optimizer_tier": Tier.NVME}
    ahead = run(profile, [KEEP] * 3, state=state, schedule=UpdateSchedule.AHEAD)
    # Only the first read (but for the prologue's 1 ms that comes after the update of nothing) is exposed.
    assert ahead.step_seconds == pytest.approx(0.100 + 3 * 0.001 + (6 / 1024 - 0.001))
    assert ahead.bytes_moved == 3 * 2 * 6 * MiB


def test_gradients_on_a_tier_are_added_to_from_the_second_micro_batch() -> None:
    profile = make_profile(3, trainable=True, micro_batches=3)
    timeline = run(profile, [KEEP] * 3, state={"gradient_tier": Tier.NVME})
    # 1 MiB x 3 units x (3 writes + 2 reads to add + 1 read for the update).
    assert timeline.bytes_moved == 3 * 6 * MiB


def test_gradients_that_leave_are_gone_over_for_their_norm_and_largest_element() -> None:
    profile = make_profile(2, trainable=True, micro_batches=2)
    machine = make_machine(dram_copy_bytes_per_second=1e9)
    events = run(profile, [KEEP] * 2, machine, state={"gradient_tier": Tier.NVME}).events
    passes = [(e.end_seconds - e.start_seconds) * 1e9 / MiB for e in events if e.name == "gradient layers.0"]
    # Copy, norm, largest; from the second micro-batch on an addition instead of the copy.
    assert passes == pytest.approx([3.0, 3.5], rel=1e-3)


def test_latency_counts_per_transfer() -> None:
    profile = make_profile(block_profiles=(make_block(0),))
    machine = make_machine(latency_seconds=0.5)
    # One swapped block, one slot: written, never read; the step ends when the write does.
    assert run(profile, [SWAP], machine).step_seconds == pytest.approx(0.011 + 0.5 + TRANSFER)
