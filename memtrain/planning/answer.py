"""From a request to an answer: the forecast, and what was asked about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from memtrain.planner.explain import Explanation, explain
from memtrain.planner.forecast import Forecast, make_forecast
from memtrain.planner.lowering import problem_of
from memtrain.planner.ranges.baselines import baselines
from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.solve import SolveOptions, Undecided
from memtrain.planner.search import Reach, feasible, furthest, sequence_unit
from memtrain.planning.jobs import Jobs
from memtrain.planning.request import MOST_BATCH, MOST_TOKENS, Axis, PlanError, PlanRequest, Sweep
from memtrain.planning.targets import Context, Target, targets
from memtrain.planning.usage import Usage, usage_of

_FINEST_SEQUENCE = 128
"""Tokens: nobody needs an answer finer than this."""
_ABLATION_SECONDS = 20.0
"""For all rules together; with 80 blocks and their state they take some seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AblationRow:
    """What another rule would have given, through the same simulator."""

    name: str
    step_seconds: float | None
    """None where the rule finds nothing that fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A plan, and all that is said about it."""

    request: PlanRequest
    fields: Mapping[str, Any]
    """Of the model's configuration."""
    forecast: Forecast
    usage: Usage
    targets: tuple[Target, ...]
    refused: tuple[str, ...]
    """Why some tools got no file."""
    notes: tuple[str, ...]
    seconds: float
    """That the answer took."""
    ablation: tuple[AblationRow, ...] = ()
    explanation: Explanation | None = None
    reach: Reach | None = None
    axis: Axis | None = None
    """Of ``reach``."""

    @property
    def exit_code(self) -> int:
        """0 fits, 2 nothing fits, 3 it fits and nothing is proved of it."""
        return exit_code(self.forecast)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One value of a sweep."""

    sequence: int
    micro_batch: int
    forecast: Forecast | None
    """None where the job cannot be cut into its degrees, or nothing was decided in time."""
    usage: Usage | None
    problem: str = ""
    """Why there is no forecast."""


def exit_code(forecast: Forecast) -> int:
    """As ``Answer.exit_code``."""
    if not forecast.fits:
        return 2
    return 3 if forecast.plan.status == "heuristic" else 0


def answer(
    jobs: Jobs, *, with_ablation: bool = False, block: str | None = None, what_fits: Axis | None = None
) -> Answer:
    """Plan the request, or the largest size of it that fits.

    Args:
        jobs: of the request.
        with_ablation: every baseline through the same simulator.
        block: to explain.
        what_fits: look for the longest sequence or the largest micro-batch first, and plan that.

    Raises:
        PlanError: the request contradicts itself, or nothing was decided in time.
    """
    began = time.monotonic()
    work = jobs.request.work
    sequence, micro_batch = work.sequence, work.micro_batch
    reach = None
    if what_fits is not None:
        reach = reach_of(jobs, what_fits)
        if reach.largest and what_fits == "seq":
            sequence = reach.largest
        elif reach.largest:
            micro_batch = reach.largest
    forecast = _forecast(jobs, sequence, micro_batch)
    usage = usage_of(forecast.plan, forecast.problem)
    request = jobs.at(sequence, micro_batch)
    context = Context(request=request, forecast=forecast, usage=usage, fields=jobs.fields)
    found, refused = targets(context) if forecast.fits else ((), ())
    return Answer(
        request=request,
        fields=jobs.fields,
        forecast=forecast,
        usage=usage,
        targets=found,
        refused=refused,
        notes=notes(request, jobs.fields, forecast),
        ablation=ablation(forecast) if with_ablation else (),
        explanation=_explanation(forecast, block) if block is not None else None,
        reach=reach,
        axis=what_fits,
        seconds=time.monotonic() - began,
    )


def _forecast(jobs: Jobs, sequence: int, micro_batch: int) -> Forecast:
    job = jobs.job(sequence, micro_batch)
    search = jobs.request.search
    try:
        forecast = make_forecast(
            job, SolveOptions(seconds=search.seconds, gap=search.gap, offered=jobs.offered())
        )
    except ValueError as error:
        raise PlanError(str(error)) from error
    except Undecided as error:
        raise PlanError(f"{error} (--seconds, now {search.seconds:g})") from error
    faults = check(forecast.plan, forecast.problem)
    if faults:
        said = "; ".join(f"{fault.rule}: {fault.message}" for fault in faults[:3])
        raise PlanError(
            f"the plan breaks its own rules, which is a fault of memtrain's, please report it: {said}"
        )
    return forecast


def _explanation(forecast: Forecast, block: str) -> Explanation:
    try:
        return explain(forecast.problem, forecast.plan, block)
    except ValueError as error:
        raise PlanError(f"--explain: {error}") from error


def ablation(forecast: Forecast) -> tuple[AblationRow, ...]:
    """Every rule of ``planner.ranges.baselines`` on the forecast's problem, and the plan itself first."""
    rows = [AblationRow(name="this plan", step_seconds=forecast.step_seconds if forecast.fits else None)]
    stretch = 1 + forecast.job.bubble
    for rule in baselines(formulate(forecast.problem), deadline=time.monotonic() + _ABLATION_SECONDS):
        whole = forecast.step_seconds + (rule.step_seconds - forecast.plan.step_seconds) * stretch
        rows.append(AblationRow(name=rule.name, step_seconds=whole if math.isfinite(whole) else None))
    return tuple(rows)


def reach_of(jobs: Jobs, axis: Axis) -> Reach:
    """The longest sequence or the largest micro-batch for which a plan exists."""
    work = jobs.request.work

    def fits(sequence: int, micro_batch: int) -> bool:
        try:
            return feasible(problem_of(jobs.job(sequence, micro_batch)))
        except ValueError as error:
            raise PlanError(str(error)) from error

    if axis == "batch":
        jobs.check(work.sequence)
        return furthest(
            lambda size: fits(work.sequence, size), unit=1, start=work.micro_batch, most=MOST_BATCH
        )
    unit = sequence_unit(jobs.request.degrees, _FINEST_SEQUENCE)
    return furthest(
        lambda size: fits(size, work.micro_batch), unit=unit, start=work.sequence, most=MOST_TOKENS
    )


def sweep_of(jobs: Jobs, sweep: Sweep, tell: Callable[[Point], None]) -> tuple[Point, ...]:
    """A forecast for each value of ``sweep``; ``tell`` hears of each as it is made."""
    points = []
    for value in sweep.values:
        work = jobs.request.work
        sequence = value if sweep.axis == "seq" else work.sequence
        micro_batch = value if sweep.axis == "batch" else work.micro_batch
        try:
            forecast = _forecast(jobs, sequence, micro_batch)
            usage = usage_of(forecast.plan, forecast.problem) if forecast.fits else None
            point = Point(sequence=sequence, micro_batch=micro_batch, forecast=forecast, usage=usage)
        except PlanError as error:
            point = Point(
                sequence=sequence, micro_batch=micro_batch, forecast=None, usage=None, problem=str(error)
            )
        points.append(point)
        tell(point)
    return tuple(points)


def notes(request: PlanRequest, fields: Mapping[str, Any], forecast: Forecast) -> tuple[str, ...]:
    """What a reader should know before believing the numbers."""
    found = ["a prediction from quoted rates; --sources says where each is from"]
    if request.hardware.machine is not None:
        found = [
            f"a prediction; links measured in {request.hardware.machine}, other rates quoted (--sources)"
        ]
    most = fields.get("max_position_embeddings") or fields.get("n_positions")
    if isinstance(most, int) and request.work.sequence > most:
        found.append(
            f"{request.work.sequence} tokens are beyond the {most} positions of the configuration: extend "
            "them first"
        )
    if forecast.job.codecs and forecast.fits:
        found.append(
            "lossy codecs are planned for each kind of tensor; a run of memtrain's own has them as forms of "
            "whole blocks (planner.allow_lossy), whose gradients' error it measures"
        )
    return (*found, *forecast.job.estimate.assumptions)
