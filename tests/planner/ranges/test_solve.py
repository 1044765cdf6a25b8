"""The whole way: rules, solver, plan, and the answer when nothing fits."""

from __future__ import annotations

import dataclasses
import json
import math

import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from memtrain.planner.ranges import solve as solve_module
from memtrain.planner.ranges.baselines import RULES, baselines
from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.child import Child
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import Problem, TensorClass
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planner.ranges.search import Answer
from memtrain.planner.ranges.simulate import step_seconds
from memtrain.planner.ranges.solve import SolveOptions, solve
from tests.planner.ranges.small import best_of_all, block, hop, place, problem, problems

HERE = SolveOptions(gap=1e-4, seconds=20.0, isolated=False)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problems(most_blocks=2))
def test_plans_pass_the_checker_and_beat_every_rule(one: Problem) -> None:
    plan = solve(one, HERE)
    rows = baselines(formulate(one))
    best = min(row.step_seconds for row in rows)
    if plan.status == "infeasible":
        assert math.isinf(best)
        return
    assert check(plan, one) == []
    assert plan.lower_bound_seconds <= plan.step_seconds <= best + 1e-9
    assert plan.status == "optimal"


def chain(*sizes: tuple[int, int, float]) -> tuple[object, ...]:
    """Blocks of (input bytes, other bytes, recompute seconds), one chunk each."""
    return tuple(
        block(
            i,
            classes=(
                TensorClass(name="X", chunk_bytes=x),
                TensorClass(name="O", chunk_bytes=o, recompute_seconds=(again,), needs=("X",)),
            ),
        )
        for i, (x, o, again) in enumerate(sizes)
    )


@pytest.mark.parametrize("device", [29, 34, 40, 47, 60, 90, 200])
def test_rotor_is_the_oracle_of_chains(device: int) -> None:
    """Keep or recompute alone, memory steps of one byte: the dynamic program is exact."""
    blocks = chain((2, 11, 3.0), (3, 17, 4.0), (2, 5, 1.0), (1, 23, 9.0), (4, 13, 2.0))
    one = problem(5, device, blocks=blocks)
    rotor = next(row for row in baselines(formulate(one)) if row.name == "rotor")
    plan = solve(one, dataclasses.replace(HERE, gap=1e-6))
    if math.isinf(rotor.step_seconds):
        assert plan.status == "infeasible"
    else:
        assert plan.step_seconds == pytest.approx(rotor.step_seconds, abs=1e-4)
        assert rotor.step_seconds == pytest.approx(best_of_all(formulate(one)))


def test_rules_by_hand() -> None:
    """Three blocks of 60 bytes (A 4 s, O 2 s to recompute), 12 s each, in 200 bytes: everything fits."""
    rows = {row.name: row.step_seconds for row in baselines(formulate(problem(3, 200, place("host", 500))))}
    assert list(rows) == list(RULES)
    assert rows["keep all"] == 36.0
    assert rows["recompute all"] == 36.0 + 3 * 6.0
    # sqrt(3) rounded up is 2: the second of three blocks keeps all.
    assert rows["sqrt(n) (Chen et al.)"] == 36.0 + 2 * 6.0
    assert rows["selective (Megatron-LM)"] == 36.0 + 3 * 4.0
    assert rows["greedy (Capuchin)"] == rows["rotor"] == 36.0


def test_rules_that_do_not_fit_say_so() -> None:
    rows = {row.name: row.step_seconds for row in baselines(formulate(problem(3, 100)))}
    assert math.isinf(rows["keep all"])
    assert math.isinf(rows["uniform alpha (MEMO)"])
    # Kept inputs of three blocks and one block's other 50 bytes: 80 in the last backward, 3 times 6 s.
    assert rows["recompute all"] == 54.0
    # A block may keep some of its O (40 bytes, 2 s) as well, chunk by chunk.
    assert rows["greedy (Capuchin)"] < 54.0


def test_an_isolated_solve_is_canonical() -> None:
    """Two processes, the same bytes but for the time they took."""
    one = problem(3, 70, place("host", 60, hop("pcie", 3.0)))
    options = SolveOptions(gap=1e-4, seconds=20.0)
    first, second = solve(one, options), solve(one, options)
    assert first == second
    assert first.digest == second.digest
    document = json.loads(first.to_json())
    assert document["hash"] == first.digest
    assert document["plan"]["status"] == "optimal"
    assert set(document["provenance"]) == {"phases", "seconds"}
    assert RangePlan.from_json(first.to_json()) == first
    here = solve(one, dataclasses.replace(options, isolated=False))
    assert here.step_seconds == pytest.approx(first.step_seconds, rel=1e-4)


def test_a_document_that_is_no_plan_is_refused_by_name() -> None:
    text = solve(problem(1, 100), HERE).to_json()
    with pytest.raises(ValueError, match="it was edited or damaged"):
        RangePlan.from_json(text.replace('"status":"optimal"', '"status":"gap"'))
    with pytest.raises(ValueError, match="plan version 7, this memtrain reads 2"):
        RangePlan.from_json(text.replace('"version":2', '"version":7'))
    with pytest.raises(ValueError, match="not a plan: KeyError"):
        RangePlan.from_json("{}")
    with pytest.raises(ValueError, match="not a plan: TypeError"):
        RangePlan.from_json(text.replace('"solver":', '"solved_by":'))
    with pytest.raises(ValueError, match="not a plan: JSONDecodeError"):
        RangePlan.from_json("no")


def test_ranges_are_contiguous_and_begin_with_what_is_recomputed() -> None:
    one = problem(3, 70, place("host", 60, hop("pcie", 3.0)))
    for decided in solve(one, HERE).blocks:
        for tensor in ("X", "A", "O"):
            parts = [r for r in decided.ranges if r.tensor == tensor]
            assert [p.start for p in parts] == [0, *(p.stop for p in parts[:-1])]
            assert parts[-1].stop == 2
            assert all(p.action != "recompute" for p in parts[1:])


def test_a_plan_that_the_solver_holds_impossible_has_no_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tolerances are not whole bytes: what fits by their count is a plan, and nothing is proved."""
    one = problem(3, 100)
    monkeypatch.setattr(
        "memtrain.planner.ranges.solve.search",
        lambda formulated, start, **_: Answer(
            bound_seconds=math.inf, decisions=start, step_seconds=step_seconds(formulated, start)
        ),
    )
    plan = solve(one, HERE)
    assert (plan.status, plan.lower_bound_seconds) == ("heuristic", 36.0)
    assert check(plan, one) == []


def test_options_are_validated() -> None:
    with pytest.raises(ValueError, match="gap must be at least 0 and below 1, got 1"):
        SolveOptions(gap=1.0)
    with pytest.raises(ValueError, match="seconds must be finite"):
        SolveOptions(seconds=math.inf)


def test_a_large_problem_is_searched_beside_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that is started early ends with the same plan, and none is left behind."""
    one = problem(3, 100, place("host", 1000))
    later = solve(one, SolveOptions(seconds=8.0))
    monkeypatch.setattr(solve_module, "LARGE", 0)
    early = solve(one, SolveOptions(seconds=8.0))
    assert early.step_seconds == later.step_seconds
    assert early.status == "optimal"
    roomy = dataclasses.replace(one, machine=dataclasses.replace(one.machine, device_capacity_bytes=1000))
    assert solve(roomy, SolveOptions(seconds=8.0)).solver == "keep all"
    assert not [p for p in psutil.Process().children() if "ranges.child" in _command(p)]


def _command(process: psutil.Process) -> str:
    """Of a child that lives: one that has ended, and waits to be asked how, has none."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def test_a_process_that_fails_says_why() -> None:
    with (
        Child(None, None, gap=0.0, seconds=20.0, whole=False) as child,  # type: ignore[arg-type]
        pytest.raises(RuntimeError, match=r"(?s)the solver's process failed: .*AttributeError"),
    ):
        child.result()
