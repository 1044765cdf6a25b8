"""Weights that live on tiers: turns and seconds by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from memtrain.planner.actions import Action, Tier, UpdateSchedule
from memtrain.planner.plan import WindowClass
from memtrain.planner.profile import ModelProfile
from memtrain.planner.units import MiB
from memtrain.planner.weight_windows import (
    WantedWindows,
    ordinary_bytes,
    step_turns,
    weight_windows,
)
from tests.planner.toys import make_machine
from tests.planner.weighty import (
    ALONE,
    FROZEN,
    KEPT,
    ONE,
    PAGE,
    everybody,
    in_blocks,
    make_edge,
    make_units,
    plan_for,
    rooted,
    run,
    states_of,
    weighty,
)


def everybody_in(
    profile: ModelProfile, slots: int, schedule: UpdateSchedule, *, sized: bool = False
) -> list[str]:
    """What each turn reads, by the last letter of the unit's name."""
    states = states_of(profile, everybody)
    windows = weight_windows(profile, states, WantedWindows(slots, sized))
    turns = step_turns(profile, states, schedule, windows)
    return ["".join(profile.units[read.unit].name[-1] for read in turn.reads) or "-" for turn in turns]


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


@pytest.mark.parametrize(
    ("small", "schedule", "tied", "reads"),
    [
        # Prologue and epilogue end in e. Tied, the table is in its window all the time.
        (1, AHEAD, True, "- - 1 2 3 - - 2 1 0 -"),
        (2, AHEAD, True, "- - - 2 3 - - - 1 0 -"),
        (3, AHEAD, True, "- - - - 3 - - - - 0 -"),
        # Two tables: each is read where the other was used before. Blocks are as above.
        (2, AHEAD, False, "- - - 2 3 e - - 1 0 e"),
        # Trained blocks come once more for their updates; tables are frozen.
        (2, SEQUENTIAL, False, "- 0 1 2 3 e - - 1 0 e - - - 2 3 -"),
    ],
)
def test_tables_have_a_window_of_their_own(
    small: int, schedule: UpdateSchedule, tied: bool, reads: str
) -> None:
    profile = weighty(4, around=True)
    units = list(profile.units)
    units[-1] = rooted(make_edge("epilogue", 0, ("prologue",))) if tied else make_edge("epilogue", 12 * MiB)
    profile = replace(profile, units=tuple(units), weight_bytes=70 * MiB)
    assert ordinary_bytes(profile) == 8 * MiB + PAGE
    states = states_of(profile, everybody)
    windows = weight_windows(profile, states, WantedWindows(small + 1, sized=True))
    assert windows == (
        WindowClass(slots=small, slot_bytes=8 * MiB + PAGE),
        WindowClass(slots=1, slot_bytes=16 * MiB),
    )
    assert everybody_in(profile, small + 1, schedule, sized=True) == reads.split()


def test_a_table_comes_in_the_order_of_its_use() -> None:
    """Its window is free from the first block on, and it is read behind what is used before it."""
    profile = weighty(4, around=True)
    units = (*profile.units[:-1], make_edge("epilogue", 12 * MiB))
    profile = replace(profile, units=units, weight_bytes=70 * MiB)
    states = states_of(profile, everybody)
    windows = weight_windows(profile, states, WantedWindows(3, sized=True))
    turns = step_turns(profile, states, AHEAD, windows)
    # Turns: prologue, blocks 0 to 3, epilogue, blocks 3 to 0, prologue.
    begins = {
        (index, read.unit): read.begins_after for index, turn in enumerate(turns) for read in turn.reads
    }
    assert begins == {(3, 3): 1, (4, 4): 2, (5, 5): 2, (8, 2): 6, (9, 1): 7, (10, 0): 7}
    # What gives way to a table is a table, and to a block a block.
    assert [turn.evicts for turn in turns if turn.evicts] == [(1,), (2,), (0,), (4,), (3,), (5,)]


def sized_units(*sizes: int, outside: tuple[int, int] = (0, 0)) -> ModelProfile:
    """Blocks of so many pages each, and a prologue and an epilogue."""
    before = make_edge("prologue", outside[0] * PAGE)
    behind = make_edge("epilogue", outside[1] * PAGE)
    blocks = []
    for unit, count in zip(make_units(len(sizes)), sizes, strict=True):
        size = count * PAGE
        own = {"weight_bytes": size, "movable_weight_bytes": size, "weight_extent_bytes": size}
        blocks.append(replace(unit, written_extent_bytes=0, **own))
    return weighty(len(sizes), units=(before, *blocks, behind))


@pytest.mark.parametrize(
    ("sizes", "outside", "ordinary"),
    [
        ((3, 3, 3), (0, 0), 3),
        ((3, 3, 3), (9, 7), 3),
        ((3, 3, 3), (2, 7), 3),  # a smaller table goes through the blocks' windows
        ((3,), (9, 9), 3),
        ((3, 5, 3, 5), (9, 0), 3),  # every other block is large, and the table is two blocks away from one
        ((5, 3, 5, 3), (9, 0), 5),  # the table comes right before a large block
        ((3, 5, 5, 3), (0, 0), 5),
        ((4, 5, 6, 5), (0, 0), 5),
        ((4, 5, 6, 7), (0, 0), 6),
    ],
)
def test_what_is_ordinary(sizes: tuple[int, ...], outside: tuple[int, int], ordinary: int) -> None:
    assert ordinary_bytes(sized_units(*sizes, outside=outside)) == ordinary * PAGE


def test_one_size_where_nothing_else_is_away() -> None:
    profile = weighty(4, around=True)
    for away, size in ((in_blocks, 8 * MiB + PAGE), (lambda u: u.name == "prologue", 16 * MiB)):
        states = states_of(profile, away)
        sized = weight_windows(profile, states, WantedWindows(3, sized=True))
        assert sized == weight_windows(profile, states, WantedWindows(3, sized=False))
        assert [each.slot_bytes for each in sized] == [size]


def test_a_table_that_stays_in_its_window_is_not_waited_for() -> None:
    """Tied, with one large window: the blocks alone are read."""
    found = run(weighty(around=True, tied=True, **FROZEN), slots=3, sized=True)
    names = {event.name for event in found.events if event.resource == "read:nvme"}
    assert "read weights prologue" not in names
    alike = run(weighty(around=True, tied=True, **FROZEN), slots=3)
    assert "read weights prologue" in {event.name for event in alike.events}
    assert found.step_seconds <= alike.step_seconds


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


def test_masters_make_weights_anew_ahead_of_the_first_forward_only() -> None:
    units = tuple(replace(unit, overwritten=True) for unit in make_units(4))
    found = run(weighty(units=units), slots=3, schedule=AHEAD)
    reads = Counter(event.name for event in found.events if event.resource == "read:nvme")
    # Forward finds 0 to 2 in windows, as backward has left them, gives 0 up for 3; backward reads it again.
    assert reads == {"read weights layers.0": 1}
    assert run(weighty(), slots=3, schedule=AHEAD).bytes_moved - found.bytes_moved == 8 * MiB + PAGE
    twice = run(weighty(units=units, micro_batches=2), slots=3, schedule=AHEAD)
    plain = run(weighty(micro_batches=2), slots=3, schedule=AHEAD)
    assert plain.bytes_moved - twice.bytes_moved == 8 * MiB + PAGE
    # It waits until the write of block 0 is over, whose window it takes.
    slow = make_machine(write_bytes_per_second=64 * MiB, mixed_bytes_per_second=1088 * MiB)
    events = {e.name: e for e in run(weighty(units=units), slots=3, machine=slow, schedule=AHEAD).events}
    assert events["update layers.3"].start_seconds == events["write weights layers.0"].end_seconds


@pytest.mark.usefixtures("solver_here")
def test_a_plan_with_masters_is_approved() -> None:
    units = tuple(replace(unit, overwritten=True) for unit in make_units(5))
    for schedule in ("sequential", "ahead"):
        force = {"block": KEPT, "state": {"weight_tier": "nvme"}}
        plan = plan_for(weighty(5, units=units, micro_batches=2), force, update_schedule=schedule)
        assert 0 < plan.lower_bound_seconds <= plan.step_seconds
