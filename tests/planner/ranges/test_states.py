"""What others schedule by hand comes out of the program where it is best."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import Problem, Role, StateClass
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
    2.7 s from one, 1.3 s from both, and forward takes 2 s. The CPU moves 3 B/s there: a block's update takes
    48/24 + 8/24 + 8/3 = 5.0 s with its optimizer state in DRAM, and 7.3 s with 8 bytes of it in CXL and the
    parameters in DRAM.
    """
    where = ("host", "cxl0", "cxl1")
    classes = states(where, where, where, pieces=4, sizes=(8, 8, 24))
    blocks = tuple(
        block(i, forward_seconds=2.0, backward_seconds=4.0, classes=(), states=classes, pieces=4)
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
    assert counts["parameter", "cxl0"] + counts["parameter", "cxl1"] == 16
    # Equally fast plans stripe some blocks evenly and others not, which have time.
    assert min(counts["parameter", "cxl0"], counts["parameter", "cxl1"]) >= 4
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


def fuyou_problem(*ways: str) -> Problem:
    """Optimizer state on NVMe, parameters on the device, the CPU updates; 4 blocks."""
    classes = (
        StateClass(name="parameter", role=Role.PARAMETER, piece_bytes=2, places=("device",)),
        StateClass(name="gradient", role=Role.GRADIENT, piece_bytes=2, places=("host",)),
        StateClass(name="optimizer", role=Role.OPTIMIZER, piece_bytes=12, places=("nvme",)),
    )
    blocks = tuple(
        block(i, forward_seconds=4.0, backward_seconds=8.0, classes=(), states=classes, pieces=4)
        for i in range(4)
    )
    return problem(
        4,
        60,
        place("host", 1000, hop("pcie", 50.0), cpu_bytes_per_second=20.0),
        place("nvme", 1000, hop("pcie", 50.0), hop("nvme", 5.0)),
        blocks=blocks,
        staging="host",
        updates=tuple(update("cpu", when) for when in ways),
    )


def test_update_overlaps_backward_as_fuyou_does() -> None:
    """A block's state is 48 bytes: 9.6 s in and 9.6 s out at 5 B/s, more than a backward's 8 s."""
    with_backward = solved(fuyou_problem("backward"))
    # All but the last block's: what is left after backward of block 0 is its update and its way out.
    assert updates(with_backward) == {"cpu-in-backward": 16}
    compute = fuyou_problem("backward").compute_seconds
    # One after the other it would be 48 s and 4 times 9.6 + 9.6 + 2.8 s or more.
    assert with_backward.step_seconds < compute + 4 * (9.6 + 2.8 + 9.6)


def test_update_shared_between_backward_and_next_forward_as_greedysnake_does() -> None:
    """With both ways open part of each is best, and better than either alone."""
    both = solved(fuyou_problem("backward", "ahead"))
    counts = updates(both)
    assert counts["cpu-in-backward"] > 0
    assert counts["cpu-ahead"] > 0
    for way in ("backward", "ahead"):
        assert both.step_seconds < solved(fuyou_problem(way)).step_seconds - 0.5


def test_no_update_in_backward_where_it_is_not_allowed() -> None:
    plan = solved(fuyou_problem("ahead"))
    assert updates(plan) == {"cpu-ahead": 16}


def test_state_that_no_allowed_update_can_handle_is_named() -> None:
    """Optimizer state on the device alone, and an update on the CPU alone."""
    blocks = (block(0, states=states(), classes=()),)
    host = place("host", 100, cpu_bytes_per_second=1.0)
    one = problem(1, 100, host, blocks=blocks, staging="host", updates=(update("cpu", "ahead"),))
    with pytest.raises(ValueError, match=r"layers.0: none of the updates \['cpu-ahead'\] can be done"):
        formulate(one)
