"""From profile, machine and budget to a plan, with a bound that says how good it is.

Heuristics come first and always count (``baselines``); then PuLP models the choice and HiGHS solves it
(``program``), which gives a bound and often a better choice. Whatever is returned was simulated and billed
as a whole: ``step_seconds`` and ``peaks`` never come from the solver.
"""

from __future__ import annotations

import dataclasses
import time

from memtrain.planner import baselines
from memtrain.planner.actions import MicroBatchOrder, Tier
from memtrain.planner.bill import make_bill, tier_peaks
from memtrain.planner.block_parts import plan_error
from memtrain.planner.bounding import Bound, improve_and_bound
from memtrain.planner.decisions import Decisions, PlannerOptions, open_space
from memtrain.planner.homing import bring_home
from memtrain.planner.infeasible import infeasible_plan
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile
from memtrain.planner.simulate import simulate
from memtrain.planner.vertical import faster_order, refuse_pointless, search_vertical
from memtrain.planner.weight_coding import coding_spaces

__all__ = ["PlannerOptions", "make_plan"]


def make_plan(
    profile: ModelProfile,
    machine: Machine,
    budget: Budget,
    *,
    options: PlannerOptions | None = None,
) -> Plan:
    """The fastest plan found that fits, and a lower bound on what any plan can reach.

    A budget that cannot work is an answer, not an error: ``status`` is ``infeasible`` and the plan says what
    is short and what would help.

    Raises:
        ValueError: inputs that contradict each other (see ``decisions.open_space``).
    """
    in_a_step = profile.in_a_step(machine.arithmetic_slowdown)
    plan = _plan(in_a_step, machine, budget, options or PlannerOptions())
    return dataclasses.replace(plan, profile_digest=profile.digest)


def _plan(profile: ModelProfile, machine: Machine, budget: Budget, options: PlannerOptions) -> Plan:
    """The plan, from what each part takes in a step."""
    began = time.monotonic()
    spaces = list(coding_spaces(open_space(profile, machine, budget, options), machine, options))
    each = dataclasses.replace(options, time_limit_seconds=options.time_limit_seconds / len(spaces))
    searches = [
        baselines.Search(profile=profile, machine=machine, budget=budget, options=each, space=space)
        for space in spaces
    ]
    if options.micro_batch_order == "vertical":
        refuse_pointless(searches[0])
        for search in searches:
            search.order = MicroBatchOrder.VERTICAL
    if profile.prepare_peak_bytes > budget.device_bytes:  # which no choice can mend
        return infeasible_plan(searches[0], solve_seconds=time.monotonic() - began)
    found: list[tuple[baselines.Search, Bound]] = []
    for search in searches:
        found.append(_searched(search, time.monotonic()))
        if search.best is None:  # coding only takes more memory
            break
    search, bound = min(found, key=lambda pair: pair[0].thrifty_cost.priced_seconds)
    if search.best is None:
        return infeasible_plan(search, solve_seconds=time.monotonic() - began)
    bound = dataclasses.replace(bound, seconds=min(other.seconds for _, other in found))
    return _feasible_plan(search, _chosen(search, bound), bound, time.monotonic() - began)


def _searched(search: baselines.Search, began: float) -> tuple[baselines.Search, Bound]:
    """The search that has found the fastest plan, if there is one, and what is proved of its choices."""
    options = search.options
    if search.order is MicroBatchOrder.VERTICAL:
        return search, search_vertical(search, began + options.time_limit_seconds)
    bound = _search_horizontal(search, began)
    if search.best is None or options.micro_batch_order != "auto":
        return search, bound
    return faster_order(search, bound)


def _search_horizontal(search: baselines.Search, began: float) -> Bound:
    """Heuristics, then the program, until the time is up."""
    limit_seconds = search.options.time_limit_seconds
    # The solver gets at least 70 % of the time, however busy the machine is.
    search.deadline = began + 0.3 * limit_seconds
    baselines.uniform(search)
    baselines.greedy(search)
    search.deadline = began + limit_seconds
    bound = improve_and_bound(search, began + limit_seconds)
    bring_home(search)
    return bound


def _chosen(search: baselines.Search, bound: Bound) -> Decisions:
    """The plan to take: the fastest, where that alone is within the gap of what is proved."""
    assert search.best is not None
    assert search.thrifty is not None
    proved = bound.seconds / (1 - search.options.gap)
    if search.best_cost.step_seconds <= proved < search.thrifty_cost.step_seconds:
        return search.best
    return search.thrifty


def _feasible_plan(
    search: baselines.Search, decisions: Decisions, bound: Bound, solve_seconds: float
) -> Plan:
    profile, options = search.profile, search.options
    timeline = simulate(profile, search.machine, decisions)
    step = timeline.step_seconds
    lower = round(min(max(bound.seconds, 0.0), step), 9)
    gap = round((step - lower) / step, 9) if step > 0 else 0.0
    proved = "optimal" if gap <= options.gap else "gap"
    status = proved if bound.seconds > 0 else "heuristic"
    used = search.space.billed_tiers
    peaks = tier_peaks(profile, decisions, used, options.safety_margin)
    return Plan(
        status=status,
        blocks=decisions.blocks,
        states=decisions.states,
        staging=decisions.staging,
        update_schedule=decisions.update_schedule,
        micro_batches=profile.micro_batches,
        micro_batch_order=decisions.micro_batch_order,
        step_seconds=step,
        lower_bound_seconds=lower,
        gap=gap,
        solver=bound.solver,
        bill=make_bill(profile, decisions, used, options.safety_margin),
        peaks=tuple((t, size) for t, size in peaks.items() if size),
        capacities=tuple((t, search.budget.capacity(t)) for t in (Tier.DEVICE, *used)),
        bytes_moved_per_step=timeline.bytes_moved,
        timeline=timeline.events,
        exact_only=options.exact_only,
        error=round(plan_error(profile.blocks, decisions.blocks), 9),
        error_budget=options.error_budget and round(options.error_budget, 9),
        profile_digest=profile.digest,
        machine_digest=search.machine.digest,
        provenance={"solve_seconds": round(solve_seconds, 3)},
    )
