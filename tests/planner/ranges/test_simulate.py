"""Timelines and peaks worked out by hand."""

from __future__ import annotations

from memtrain.planner.ranges.choices import KEEP, RECOMPUTE, SLOT, Action, Kind
from memtrain.planner.ranges.formulate import Decisions, Formulated, formulate
from memtrain.planner.ranges.simulate import Peak, simulate
from tests.planner.ranges.small import hop, place, problem

HOST = Action(kind=Kind.SWAP, place="host")
NVME = Action(kind=Kind.SWAP, place="nvme")


def decide(formulated: Formulated, *blocks: dict[str, dict[Action, int]]) -> Decisions:
    """Counts by class; what is not named keeps all chunks."""
    counts = {}
    for index, chosen in enumerate(blocks):
        for tensor, variables in zip(
            formulated.problem.blocks[index].classes, formulated.choices.counts[index], strict=True
        ):
            for action, count in chosen.get(tensor.name, {KEEP: tensor.chunks}).items():
                counts[variables[action]] = count
    return formulated.decisions(counts)


def ends(formulated: Formulated, decisions: Decisions) -> dict[tuple[str, str], tuple[float, float]]:
    return {
        (e.name, e.resource): (e.start_seconds, e.end_seconds) for e in simulate(formulated, decisions).events
    }


def test_keep_all() -> None:
    formulated = formulate(problem(2, 200))
    timeline = simulate(formulated, decide(formulated, {}, {}))
    assert timeline.step_seconds == 24.0
    assert timeline.moved_bytes == 0
    assert timeline.peaks == (
        Peak(place="device", size_bytes=120, position="forward layers.1", capacity_bytes=200),
    )


def test_swap_waits_for_its_slot_and_is_read_ahead() -> None:
    """60 bytes of each of two blocks at 10 B/s, 6 s each way; forward 4 s, backward 8 s; one slot.

    Forward 0: 0-4, written 4-10; forward 1 needs the slot: 10-14, written 14-20; forward 2: 20-24.
    Backward 2 (from its slot): 24-32; block 1 read 32-38, backward 38-46; block 0 read 46-52, backward 52-60.
    """
    formulated = formulate(problem(3, 100, place("host", 1000)))
    all_out = {name: {HOST: 2} for name in "XAO"}
    decisions = decide(formulated, all_out, all_out, {name: {SLOT: 2} for name in "XAO"})
    found = ends(formulated, decisions)
    assert found["write layers.0", "write:host"] == (4.0, 10.0)
    assert found["forward layers.1", "compute"] == (10.0, 14.0)
    assert found["backward layers.2", "compute"] == (24.0, 32.0)
    assert found["read layers.1", "read:host"] == (32.0, 38.0)
    assert found["backward layers.0", "compute"] == (52.0, 60.0)
    timeline = simulate(formulated, decisions)
    assert timeline.moved_bytes == 4 * 60
    assert [(p.place, p.size_bytes) for p in timeline.peaks] == [("device", 60), ("host", 120)]


def test_store_and_forward_through_staging() -> None:
    """X of block 0 (10 bytes) to NVMe: 1 s over PCIe, then 5 s at 2 B/s; back 2 s at 5 B/s, then 1 s."""
    pcie = hop("pcie")
    formulated = formulate(
        problem(
            2, 500, place("host", 500, pcie), place("nvme", 500, pcie, hop("nvme", 2.0, 5.0)), staging="host"
        )
    )
    decisions = decide(formulated, {"X": {NVME: 2}}, {})
    found = ends(formulated, decisions)
    assert found["write layers.0", "write:pcie"] == (4.0, 5.0)
    assert found["write layers.0", "write:nvme"] == (5.0, 10.0)
    # Forward of block 1 waited for the slot until 5. The far read starts as soon as all is written, the near
    # one when backward of block 1 has left the slot: 9 + 8 s.
    assert found["read layers.0", "read:nvme"] == (10.0, 12.0)
    assert found["read layers.0", "read:pcie"] == (17.0, 18.0)
    assert found["backward layers.0", "compute"] == (18.0, 26.0)
    peaks = {p.place: p.size_bytes for p in simulate(formulated, decisions).peaks}
    # The host holds two slots of 10 bytes.
    assert peaks == {"device": 120, "host": 20, "nvme": 10}


def test_recompute_costs_its_prefix_and_its_buffer() -> None:
    """A's first chunk costs 1 s, its second 3 s; O 1 s a chunk; backward holds all that is recomputed."""
    formulated = formulate(problem(1, 100))
    first = simulate(formulated, decide(formulated, {"A": {RECOMPUTE: 1, KEEP: 1}}))
    both = simulate(formulated, decide(formulated, {"A": {RECOMPUTE: 2}, "O": {RECOMPUTE: 1, KEEP: 1}}))
    assert first.step_seconds == 13.0
    assert both.step_seconds == 17.0
    assert both.positions == (("forward layers.0", "device", 30), ("backward layers.0", "device", 60))
