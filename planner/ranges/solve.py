"""From a problem to a plan with a bound: rules first, then the solver, and what is returned was simulated.

The rules of ``baselines`` give the first decisions; ``search`` improves and bounds them in a process of its
own. ``step_seconds``, ``events`` and ``peaks`` never come from the solver.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from memtrain.planner.ranges.baselines import Baseline, baselines
from memtrain.planner.ranges.child import RESERVE_SECONDS, Child, search_in_child
from memtrain.planner.ranges.formulate import Formulated, formulate
from memtrain.planner.ranges.infeasible import relaxations, smallest
from memtrain.planner.ranges.model import Codec, Problem
from memtrain.planner.ranges.plan import RangePlan, make_plan
from memtrain.planner.ranges.search import Answer, search

RULES_SHARE = 0.3
"""Of the time, the most that the rules may take; with 80 blocks without state they take half a second."""
LARGE = 1000
"""Integers from where on the search begins beside the rules: with 3,000 (80 blocks with state) these take
1.8 s and the relaxation behind them 1.1; with a few hundred they take less than the start of a process."""
EXPLAIN_SECONDS = 20.0
"""For the relaxations of a problem in which nothing fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolveOptions:
    """How long to look, and for what."""

    gap: float = 1e-3
    """Stop when the step is proved to be within this part of the best."""
    seconds: float = 8.0
    """Wall clock for rules and solver together."""
    whole: bool = True
    """Whether to give what time is left to the whole program; without, the answer stands after the dive and
    the neighbourhood."""
    isolated: bool = True
    """Whether the solver runs in a process of its own, which the clock can kill."""
    offered: tuple[Codec, ...] = ()
    """Codecs to name as a remedy when nothing fits."""

    def __post_init__(self) -> None:
        if not 0 <= self.gap < 1:
            raise ValueError(f"gap must be at least 0 and below 1, got {self.gap}")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be finite and > 0, got {self.seconds}")


class Undecided(RuntimeError):
    """Neither a plan nor a proof that there is none."""


def solve(problem: Problem, options: SolveOptions | None = None) -> RangePlan:
    """The fastest plan found that fits, and a lower bound on what any plan can reach.

    A problem in which nothing fits is an answer, not an error: ``status`` is ``infeasible``, the plan is that
    of the smallest device memory, ``binding`` says what holds it back and ``relaxations`` what would help.

    Raises:
        ValueError: the problem contradicts itself (see ``formulate.formulate``).
        Undecided: time was up before a plan was found or ruled out.
        RuntimeError: the solver's process failed.
    """
    options = options or SolveOptions()
    began = time.monotonic()
    formulated = formulate(problem)
    with _early(formulated, options) as child:
        rules = baselines(formulated, deadline=began + RULES_SHARE * options.seconds)
        best = min(rules, key=lambda rule: rule.step_seconds)
        answer = _search(formulated, best, options, began, child)
    bound = max(answer.bound_seconds, problem.compute_seconds)
    provenance = {"phases": answer.phases, "seconds": round(time.monotonic() - began, 3)}
    if math.isinf(answer.step_seconds):
        if math.isinf(answer.bound_seconds):
            return _infeasible(formulated, options, provenance)
        raise Undecided(
            f"no plan was found and none was ruled out in {options.seconds} s; give the solver more time"
        )
    step = answer.step_seconds
    gap = max(0.0, (step - bound) / step) if step > 0 else 0.0
    proved = "optimal" if gap <= options.gap else "gap"
    found = best.name if answer.decisions == best.decisions else "HiGHS through PuLP"
    return make_plan(
        formulated,
        answer.decisions,
        status=proved if answer.bound_seconds > 0 or proved == "optimal" else "heuristic",
        lower_bound_seconds=round(min(bound, step), 9),
        gap=round(gap, 9),
        solver=found,
        provenance=provenance,
    )


def _early(formulated: Formulated, options: SolveOptions) -> AbstractContextManager[Child | None]:
    """The search, begun while the rules are tried, where these take long and are not worth waiting for."""
    if not options.isolated or len(formulated.form.integers) < LARGE or options.seconds <= RESERVE_SECONDS:
        return nullcontext()
    gap, seconds, whole = options.gap, options.seconds, options.whole
    return Child(formulated.problem, None, gap=gap, seconds=seconds, whole=whole)


def _search(
    formulated: Formulated, best: Baseline, options: SolveOptions, began: float, child: Child | None
) -> Answer:
    fallback = Answer(decisions=best.decisions, step_seconds=best.step_seconds)
    least = formulated.problem.compute_seconds
    start = best.decisions if math.isfinite(best.step_seconds) else None
    if best.step_seconds * (1 - options.gap) <= least:
        fallback.phases.append(f"{best.name}: within the gap of the arithmetic")
        return fallback
    if child is not None:
        return _better(child.result() or fallback, best)
    left = options.seconds - (time.monotonic() - began)
    if options.isolated:
        found = search_in_child(formulated.problem, start, gap=options.gap, seconds=left, whole=options.whole)
        return found or fallback
    return search(formulated, start, gap=options.gap, seconds=left, whole=options.whole)


def _better(answer: Answer, rule: Baseline) -> Answer:
    """The bound of a search that did not know the rule, with the better decisions of both."""
    if rule.step_seconds < answer.step_seconds:
        answer.decisions, answer.step_seconds = rule.decisions, rule.step_seconds
    return answer


def _infeasible(formulated: Formulated, options: SolveOptions, provenance: dict[str, object]) -> RangePlan:
    nearest = smallest(formulated)
    if nearest is None:
        raise Undecided("nothing fits, and what comes nearest was not found in time")
    found = tuple(relaxations(formulated.problem, options.offered, time.monotonic() + EXPLAIN_SECONDS))
    return make_plan(
        formulated,
        nearest.decisions,
        status="infeasible",
        lower_bound_seconds=0.0,
        gap=0.0,
        solver="none: nothing fits",
        relaxations=found,
        binding=nearest.binding,
        provenance=provenance,
    )
