"""No moment of a simulated step needs more than its predicted peak: slots are never handed on too early."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.plan import make_plan
from tests.planner.ranges.occupancy import Occupancy
from tests.planner.ranges.small import some_decisions, stateful_problems

FIELDS = {"status": "heuristic", "lower_bound_seconds": 0.0, "gap": 1.0, "solver": "by hand"}


MANY = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def compare(one: Problem, seed: int) -> None:
    formulated = formulate(one)
    plan = make_plan(formulated, some_decisions(formulated, seed), **FIELDS)
    assert check(plan, one) == []
    found = Occupancy(plan, one)
    peaks = {peak.place: peak.size_bytes for peak in plan.peaks}
    assert found.peak(found.device) <= peaks["device"]
    assert found.peak(found.staging) <= peaks["host"]


@MANY
@given(stateful_problems(), st.integers(0, 10**6))
def test_no_moment_needs_more_than_the_peak(one: Problem, seed: int) -> None:
    compare(one, seed)


@settings(MANY, max_examples=500)
@given(stateful_problems(uniform=True), st.integers(0, 10**6))
def test_no_slot_is_handed_on_too_early(one: Problem, seed: int) -> None:
    compare(one, seed)
