"""What others schedule by hand comes out of the program where it is best."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import ALL_UPDATES, Problem, Role, StateClass, Update
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planner.ranges.solve import SolveOptions, solve
from tests.planner.ranges.small import block, hop, place, problem, states, update

EXACT = SolveOptions(gap=1e-5, seconds=20.0, isolated=False)


def solved(one: Problem) -> RangePlan:
    plan = solve(one, EXACT)
    assert check(plan, one) == []
    return plan


def held(plan: RangePlan) -> Counter[tuple[str, str]]:
    """Pieces by class and place."""
    counts: Counter[tuple[str, str]] = Counter()
    for one in plan.blocks:
        for entry in one.held:
            counts[entry.state, entry.place] += entry.pieces
    return counts


def updates(plan: RangePlan) -> Counter[str]:
    counts: Counter[str] = Counter()
    for one in plan.blocks:
        counts.update(dict(one.updates))
    return counts


def cxl_problem() -> Problem:
    """Four blocks of 8 bytes of parameters and 24 of optimizer state; the device has room for slots only.

    DRAM, where the CPU's optimizer moves 24 B/s, holds the optimizer's 96 bytes, two gradient slots' 16 bytes
    beside it, and no more. Two CXL devices of 100 bytes take parameters at 3 B/s each: a block's 8 bytes need
    2.7 s from one, 1.3 s from both, as long as its forward takes. The CPU moves 3 B/s there: a block's update
    takes 48/24 + 8/24 + 8/3 = 5.0 s with its optimizer state in DRAM, and 7.3 s with 8 bytes of it in CXL and
    the parameters in DRAM.
    """
    where = ("host", "cxl0", "cxl1")
    classes = states(where, where, where, pieces=4, sizes=(8, 8, 24))
    blocks = tuple(
        block(i, forward_seconds=4 / 3, backward_seconds=4.0, classes=(), states=classes, pieces=4)
        for i in range(4)
    )
    return problem(
        4,
        32,
        place("host", 112, hop("pcie", 100.0), cpu_bytes_per_second=24.0),
        place("cxl0", 100, hop("cxl0", 3.0), cpu_bytes_per_second=3.0),
        place("cxl1", 100, hop("cxl1", 3.0), cpu_bytes_per_second=3.0),
        blocks=blocks,
        slots=2,
        staging="host",
        updates=(update("cpu", "backward"),),
    )


def test_latency_critical_state_in_dram_transfer_only_data_striped_over_cxl() -> None:
    """The rule of arXiv 2507.03305, as the best answer of the program."""
    plan = solved(cxl_problem())
    counts = held(plan)
    assert counts["optimizer", "host"] == 16
    for one in plan.blocks:
        where = {entry.place: entry.pieces for entry in one.held if entry.state == "parameter"}
        assert where == {"cxl0": 2, "cxl1": 2}
    # The first fetch, 16/3 s of forward, 16 of backward, of block 0 the gradient's way and the CPU's backlog.
    assert plan.step_seconds == pytest.approx(4 / 3 + 16 / 3 + 4 + 8 / 100 + 4 * 5.0)
    one_device = dataclasses.replace(
        cxl_problem(),
        machine=dataclasses.replace(cxl_problem().machine, places=cxl_problem().machine.places[:2]),
        blocks=tuple(
            dataclasses.replace(
                b, states=tuple(dataclasses.replace(s, places=("host", "cxl0")) for s in b.states)
            )
            for b in cxl_problem().blocks
        ),
    )
    assert solved(one_device).step_seconds > plan.step_seconds + 1.0


def fuyou_problem(*ways: Update, nvme: float = 5.0) -> Problem:
    """Optimizer state on NVMe, parameters on the device, too small to stream that state through; 4 blocks."""
    classes = (
        StateClass(name="parameter", role=Role.PARAMETER, piece_bytes=2, places=("device",)),
        StateClass(name="gradient", role=Role.GRADIENT, piece_bytes=2, places=("host",)),
        StateClass(name="optimizer", role=Role.OPTIMIZER, piece_bytes=12, places=("nvme",)),
    )
    blocks = tuple(
        block(
            i,
            forward_seconds=4.0,
            backward_seconds=8.0,
            classes=(),
            states=classes,
            pieces=4,
            device_update_seconds=0.1,
        )
        for i in range(4)
    )
    return problem(
        4,
        60,
        place("host", 1000, hop("pcie", 50.0), cpu_bytes_per_second=20.0),
        place("nvme", 1000, hop("pcie", 50.0), hop("nvme", nvme)),
        blocks=blocks,
        staging="host",
        updates=ways,
    )


BACKWARD, AHEAD = update("cpu", "backward"), update("cpu", "ahead")


def test_update_overlaps_backward_as_fuyou_does() -> None:
    """Fuyou (arXiv 2403.06504): the CPU updates a block from NVMe while earlier blocks go backward.

    A block's state is 48 bytes, 2 s in and 2 s out at 24 B/s, and 5.6 s of the CPU: it hides behind a
    backward of 8 s, not behind a forward of 4 s. With all ways open every block is updated in backward. What
    is not hidden: 4 times 0.16 s for new parameters into the one slot, and of block 0 the gradient's way,
    0.16 s, the update and its way out.
    """
    plan = solved(fuyou_problem(*ALL_UPDATES, nvme=24.0))
    assert updates(plan) == {"cpu-in-backward": 16}
    assert plan.step_seconds == pytest.approx(48.0 + 4 * 0.16 + 0.16 + 5.6 + 2.0)
    assert solved(fuyou_problem(AHEAD, nvme=24.0)).step_seconds > plan.step_seconds + 4.0


def test_update_in_backward_by_hand() -> None:
    """At 5 B/s NVMe is the bottleneck: 9.6 s in, 9.6 s out, two staging slots.

    Blocks 3 and 2 are read before backward begins. Block 3 is updated at 24.8, written 30.4 to 40; block 1 is
    read into its slot until 49.6, updated and written, 55.2 to 64.8; then block 0, as long behind: 74.4.
    """
    plan = solved(fuyou_problem(BACKWARD))
    assert updates(plan) == {"cpu-in-backward": 16}
    assert plan.step_seconds == pytest.approx(74.4)


def test_update_shared_between_backward_and_next_forward_as_greedysnake_does() -> None:
    """GreedySnake (arXiv 2512.17570) delays a part of every update to the next forward, to use both.

    With both ways open part of each is best here too, and better than either alone. (Its vertical order of
    micro-batches is one micro-batch of more sequences in this model.)
    """
    both = solved(fuyou_problem(BACKWARD, AHEAD))
    counts = updates(both)
    assert counts["cpu-in-backward"] > 0
    assert counts["cpu-ahead"] > 0
    for way in (BACKWARD, AHEAD):
        assert both.step_seconds < solved(fuyou_problem(way)).step_seconds - 9.0


def test_no_update_in_backward_where_it_is_not_allowed() -> None:
    plan = solved(fuyou_problem(AHEAD))
    assert updates(plan) == {"cpu-ahead": 16}


def test_state_that_no_allowed_update_can_handle_is_named() -> None:
    """Optimizer state on the device alone, and an update on the CPU alone."""
    blocks = (block(0, states=states(), classes=()),)
    host = place("host", 100, cpu_bytes_per_second=1.0)
    one = problem(1, 100, host, blocks=blocks, staging="host", updates=(update("cpu", "ahead"),))
    with pytest.raises(ValueError, match=r"layers.0: none of the updates \['cpu-ahead'\] can be done"):
        formulate(one)
