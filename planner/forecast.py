"""What a job will need and take: the plan of one GPU, read as a user asks for it.

Everything here is a prediction from quoted or measured rates; ``sources`` says from which.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from memtrain.planner.actions import MicroBatchOrder
from memtrain.planner.compose import Fact
from memtrain.planner.job import Job
from memtrain.planner.lowering import problem_of
from memtrain.planner.lowering.problem import SLACK
from memtrain.planner.lowering.step_messages import step_message_seconds
from memtrain.planner.ranges.model import DEVICE, Problem, Role
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planner.ranges.profile_bytes import device_positions, place_sizes
from memtrain.planner.ranges.solve import SolveOptions, solve

PLENTY_BYTES = 1 << 60
"""Of device memory, for the step that nothing limits."""
UNLIMITED_GAP = 5e-3
"""The slowdown is told in percent; the last half of one would double the time of an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceUse:
    """One place at its peak."""

    name: str
    peak_bytes: int
    capacity_bytes: int

    @property
    def margin_bytes(self) -> int:
        """What is left; below 0, what is missing."""
        return self.capacity_bytes - self.peak_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class BillLine:
    """Bytes of one category in one place, when that place is fullest."""

    category: str
    """As ``ranges.profile_bytes.CATEGORIES``."""
    place: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """One job's prediction, of the pipeline stage that decides it."""

    job: Job
    problem: Problem
    plan: RangePlan
    step_seconds: float
    """Of the whole step: every micro-batch, the pipeline's idle time, messages once a step."""
    unlimited_seconds: float
    """The same with device memory without end."""
    places: tuple[PlaceUse, ...]
    """The device first."""
    bill: tuple[BillLine, ...]
    """What makes up the peaks, place by place."""

    @property
    def fits(self) -> bool:
        """Whether the plan stays inside every budget."""
        return self.plan.status != "infeasible"

    @property
    def slowdown(self) -> float:
        """Step over the step that nothing limits, at least 1."""
        return self.step_seconds / self.unlimited_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.job.tokens_per_step / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs (``Job.model_flops_per_step``) over what all GPUs' peaks could do in the step."""
        device = self.job.setup.accelerator
        peak = device.single_flops_per_second if self.job.single else device.half_flops_per_second
        return self.job.model_flops_per_step / (self.step_seconds * peak.value * self.job.degrees.gpus)

    @property
    def sources(self) -> tuple[Fact, ...]:
        """Every rate and size that the prediction rests on."""
        slack = Fact(name="allocator's slack", value=SLACK.value, unit="of the budget", source=SLACK.source)
        traced = (
            Fact(name=f"model: {name}", value=math.nan, unit="", source=source)
            for name, source in self.job.estimate.sources.items()
        )
        return (*self.job.setup.facts(), slack, *traced)


def make_forecast(job: Job, options: SolveOptions | None = None) -> Forecast:
    """Plan ``job`` and read the plan. Where its order of micro-batches is open, vertical order is planned too
    if the horizontal plan has weights off the device, and the faster one is the answer.

    Of a pipeline the first stage is planned, which holds the most micro-batches, and the last, which has
    the head and the loss; the answer is that of the one that does not fit, or else of the slower.

    Raises:
        ValueError: the job contradicts itself.
        Undecided: as ``ranges.solve``.
    """
    open_order = job.micro_batch_order is None
    if open_order:
        job = dataclasses.replace(job, micro_batch_order=MicroBatchOrder.HORIZONTAL)
    stages = sorted({0, job.degrees.pipeline - 1})
    stages_found = [_of_stage(dataclasses.replace(job, stage=stage), options) for stage in stages]
    found = max(stages_found, key=lambda forecast: (not forecast.fits, forecast.step_seconds))
    if not (open_order and job.may_be_vertical and found.fits and _streams_weights(found)):
        return found
    other = _of_stage(dataclasses.replace(job, micro_batch_order=MicroBatchOrder.VERTICAL), options)
    return other if other.fits and other.step_seconds < found.step_seconds else found


def _streams_weights(forecast: Forecast) -> bool:
    roles = {state.name: state.role for block in forecast.problem.blocks for state in block.states}
    return any(
        held.pieces and held.place != DEVICE and roles[held.state] is Role.PARAMETER
        for block in forecast.plan.blocks
        for held in block.held
    )


def _of_stage(job: Job, options: SolveOptions | None) -> Forecast:
    problem, options = problem_of(job), options or SolveOptions()
    plan = solve(problem, options)
    capacities = {DEVICE: problem.machine.device_capacity_bytes}
    capacities |= {place.name: place.capacity_bytes for place in problem.machine.places}
    peaks = {peak.place: peak.size_bytes for peak in plan.peaks}
    return Forecast(
        job=job,
        problem=problem,
        plan=plan,
        step_seconds=_whole_step(job, problem, plan.step_seconds),
        unlimited_seconds=_whole_step(job, problem, unlimited_step(problem, plan, options)),
        places=tuple(
            PlaceUse(name=name, peak_bytes=peaks.get(name, 0), capacity_bytes=capacity)
            for name, capacity in capacities.items()
        ),
        bill=_bill(plan, problem),
    )


def _bill(plan: RangePlan, problem: Problem) -> tuple[BillLine, ...]:
    """The device at its fullest position, every other place as it is set aside."""
    fullest = max(device_positions(plan, problem).values(), key=lambda sizes: sum(sizes.values()))
    by_place = {DEVICE: fullest}
    by_place |= {place.name: place_sizes(plan, problem, place.name) for place in problem.machine.places}
    return tuple(
        BillLine(category=category, place=place, size_bytes=size)
        for place, sizes in by_place.items()
        for category, size in sizes.items()
    )


def unlimited_step(problem: Problem, plan: RangePlan, options: SolveOptions) -> float:
    """Seconds of the same step on the same machine with device memory without end, to ``UNLIMITED_GAP``.

    Never more than ``plan`` takes, which fits there as well.
    """
    machine = dataclasses.replace(problem.machine, device_capacity_bytes=PLENTY_BYTES)
    free = dataclasses.replace(problem, machine=machine, codecs=())
    found = solve(free, dataclasses.replace(options, gap=max(options.gap, UNLIMITED_GAP)))
    fits = plan.status != "infeasible"
    return min(found.step_seconds, plan.step_seconds) if fits else found.step_seconds


def _whole_step(job: Job, problem: Problem, seconds: float) -> float:
    """What the program does not see: idle time of a pipeline, and messages once a step."""
    backward = [block.backward_seconds for block in problem.blocks]
    return seconds * (1 + job.bubble) + step_message_seconds(job, backward)
