"""The search alone, without rules to start from."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import HealthCheck, given, settings

from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.search import Answer, search
from tests.planner.ranges.small import (
    best_of_all,
    block,
    hop,
    place,
    problem,
    problems,
    states,
    tensors,
)


def long_chain(count: int = 24) -> Problem:
    """Blocks of 4 chunks, more than the dive leaves open; the host is slow and holds a third."""
    blocks = tuple(
        block(
            i,
            classes=tensors(4, x=3, a=2 + i % 3, o=17, again=(0.5, 1.0, 1.5, 2.0)),
            forward_seconds=4.0 + 0.1 * (i % 5),
        )
        for i in range(count)
    )
    return problem(
        count,
        400,
        place("host", 700, hop("pcie", 11.0, 13.0)),
        place("cxl", 300, hop("cxl", 5.0)),
        blocks=blocks,
        slots=2,
    )


def test_the_dive_alone_comes_close() -> None:
    formulated = formulate(long_chain())
    answer = search(formulated, None, gap=0.001, seconds=20.0, whole=False)
    assert formulated.excess(answer.decisions) == {}
    assert answer.bound_seconds <= answer.step_seconds <= 1.02 * answer.bound_seconds
    assert [phase.partition(":")[0] for phase in answer.phases][:3] == ["relaxation", "diffusion", "dive"]


def test_the_dive_places_state_too() -> None:
    """Fourteen blocks with optimizer state in DRAM or on NVMe; the closing program sees the last eight."""
    held = states(("device",), ("device", "host"), ("host", "nvme"), pieces=4, sizes=(4, 4, 24))
    blocks = tuple(
        block(i, states=held, pieces=4, classes=tensors(4, x=2, a=2, o=5, again=(1.0,) * 4))
        for i in range(14)
    )
    one = problem(
        14,
        250,
        place("host", 250, hop("pcie", 20.0), cpu_bytes_per_second=20.0),
        place("nvme", 900, hop("pcie", 20.0), hop("nvme", 9.0)),
        blocks=blocks,
        slots=2,
        staging="host",
    )
    formulated = formulate(one)
    answer = search(formulated, None, gap=0.03, seconds=20.0, whole=False)
    assert formulated.excess(answer.decisions) == {}
    assert answer.step_seconds <= 1.05 * answer.bound_seconds
    assert answer.step_seconds > one.compute_seconds


def test_every_phase_reports_and_none_gets_worse() -> None:
    reached: list[float] = []

    def report(answer: Answer) -> None:
        reached.append(answer.step_seconds)

    answer = search(formulate(long_chain(14)), None, gap=1e-4, seconds=3.0, report=report)
    assert reached == sorted(reached, reverse=True)
    assert len(reached) == len(answer.phases)
    assert reached[-1] == answer.step_seconds


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problems(most_blocks=2))
def test_search_finds_the_best_of_small_problems(one: Problem) -> None:
    formulated = formulate(one)
    answer = search(formulated, None, gap=1e-6, seconds=20.0)
    best = best_of_all(formulated)
    if math.isinf(best):
        assert math.isinf(answer.step_seconds)
        assert math.isinf(answer.bound_seconds)
    else:
        assert answer.step_seconds == pytest.approx(best, rel=1e-5)
        assert answer.bound_seconds <= best * (1 + 1e-9)


def test_a_byte_too_much_is_seen_where_the_solver_cannot() -> None:
    """Two blocks of 10**12 bytes in a byte less than both: for HiGHS they fit, in whole bytes not."""
    each = 10**12
    blocks = tuple(block(i, classes=tensors(1, x=0, a=0, o=each)) for i in range(2))
    one = problem(2, 2 * each - 1, blocks=blocks)
    formulated = formulate(one)
    answer = search(formulated, None, gap=1e-6, seconds=20.0)
    # Backward of the block that recomputes comes when the other is gone, or not yet made: 24 s and one more.
    assert formulated.excess(answer.decisions) == {}
    assert answer.step_seconds == 25.0
    roomy = dataclasses.replace(one, machine=dataclasses.replace(one.machine, device_capacity_bytes=2 * each))
    assert search(formulate(roomy), None, gap=1e-6, seconds=20.0).step_seconds == 24.0
