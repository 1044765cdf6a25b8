from __future__ import annotations

import itertools
import math
import time

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from memtrain.planner.ranges.diffuse import diffused, fitting, rounded_to
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.highs import Solver
from memtrain.planner.ranges.program import build
from memtrain.planner.ranges.search import search
from memtrain.planner.ranges.simulate import step_seconds
from tests.planner.ranges.small import INT8, place, problem, with_state_anywhere


def test_counts_add_up_and_are_the_nearest() -> None:
    assert rounded_to([1.4, 2.6], 4) == [1, 3]
    assert rounded_to([-0.3, 4.1], 4) == [0, 4]
    assert rounded_to([1.9, 1.9, 1.9], 5) == [2, 2, 1]


def test_errors_are_carried_from_block_to_block() -> None:
    """Of every class 2/3 of a chunk leave in each block: after three blocks two whole chunks have left."""
    one = problem(6, 1000, place("host", 1000))
    formulated = formulate(one)
    values = [0.0] * len(formulated.form.variables)
    for chosen in itertools.chain.from_iterable(formulated.choices.counts):
        by_label = {action.label: variable for action, variable in chosen.items()}
        leaves = by_label.get("swap:host", by_label.get("slot"))
        assert leaves is not None
        values[leaves], values[by_label["keep"]] = 2 / 3, 4 / 3
    decided = dict(zip(formulated.form.integers, diffused(formulated, values), strict=True))
    left = [
        sum(decided[v] for action, v in chosen.items() if action.label == "swap:host")
        for chosen in (block[0] for block in formulated.choices.counts)
    ]
    # The last block lies in the slot that is never taken over: there the action is another one.
    assert list(itertools.accumulate(left))[:5] == [1, 1, 2, 3, 3]


@seed(5)
@settings(max_examples=40, deadline=None)
@given(shares=st.lists(st.floats(0, 1), min_size=12, max_size=12), chunks=st.integers(1, 4))
def test_sums_over_blocks_stay_within_a_unit_a_count(shares: list[float], chunks: int) -> None:
    wanted = [(share * chunks, chunks - share * chunks) for share in shares]
    error = [0.0, 0.0]
    totals, exact = [0, 0], [0.0, 0.0]
    for pair in wanted:
        counts = rounded_to([w + e for w, e in zip(pair, error, strict=True)], chunks)
        assert sum(counts) == chunks
        assert min(counts) >= 0
        error = [e + w - n for e, w, n in zip(error, pair, counts, strict=True)]
        totals = [t + n for t, n in zip(totals, counts, strict=True)]
        exact = [x + w for x, w in zip(exact, pair, strict=True)]
        assert all(abs(t - x) <= 1 + 1e-6 for t, x in zip(totals, exact, strict=True))


def test_groups_of_state_add_up() -> None:
    one = with_state_anywhere()
    formulated = formulate(one)
    vertex = Solver(build(formulated)).relaxed(5.0)
    decisions = diffused(formulated, vertex.values)
    rows = {row.name: row for row in formulated.form.rows if row.equal}
    x = formulated.form.complete(decisions)
    assert rows
    assert all(row.expression.value(x) == row.limit for row in rows.values())


def test_a_search_without_time_for_a_dive_has_a_plan() -> None:
    """Six blocks of 60 bytes on 150: what the relaxation's rounding finds fits."""
    one = problem(6, 150, place("host", 1000))
    formulated = formulate(one)
    answer = search(formulated, None, gap=0.0, seconds=5.0, whole=False)
    assert any(phase.startswith("diffusion") for phase in answer.phases)
    assert math.isfinite(answer.step_seconds)
    assert not formulated.excess(answer.decisions)
    assert answer.step_seconds == pytest.approx(step_seconds(formulated, answer.decisions))


@pytest.mark.parametrize(("device", "budget"), [(110, 0.2), (120, 0.15), (130, 0.2), (110, 0.15)])
def test_a_rounding_over_the_error_budget_gets_less_of_it(device: int, budget: float) -> None:
    formulated = formulate(problem(6, device, place("host", 1000), codecs=(INT8,), error_budget=budget))
    solver = Solver(build(formulated))
    vertex = solver.relaxed(5.0)
    assert "error budget" in formulated.excess(diffused(formulated, vertex.values))
    found = fitting(formulated, solver, vertex, time.monotonic() + 5.0)
    assert found is not None
    assert not formulated.excess(found)


def test_limits_that_were_lowered_are_given_back() -> None:
    one = problem(3, 100, place("host", 1000))
    solver = Solver(build(formulate(one)))
    before = solver.relaxed(5.0)
    for name in solver.program.limits:
        solver.tighten(name, 1000)
    assert not solver.relaxed(5.0).solved
    solver.loosen()
    assert solver.relaxed(5.0).objective == pytest.approx(before.objective)
