"""What a step takes under given decisions: the queues replayed job by job, without a solver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memtrain.planner.ranges.formulate import Formulated
from memtrain.planner.ranges.terms import Formulation


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A job of the step: when it ran, and on what (``compute``, ``cpu``, ``write:pcie`` ...)."""

    name: str
    resource: str
    start_seconds: float
    end_seconds: float
    part: int = 0
    """Of the step, by number (see ``PartTime``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartTime:
    """A part of the step, shown once in the timeline: it begins with empty queues and takes place ``times``
    times."""

    name: str
    """``step``; with several micro-batches which of them, and whether their forward or backward."""
    times: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The most that lies in a place, and at which position of the step first."""

    place: str
    size_bytes: int
    position: str
    capacity_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """The predicted step."""

    step_seconds: float
    """Of all parts, each as often as it takes place."""
    moved_bytes: int
    """Over all links, both directions."""
    events: tuple[Event, ...]
    parts: tuple[PartTime, ...]
    peaks: tuple[Peak, ...]
    """One per place, the device first."""
    positions: tuple[tuple[str, str, int], ...]
    """(position, place, bytes), every one in the order of the step."""


def simulate(formulated: Formulated, decisions: Sequence[int]) -> Timeline:
    """The timeline and the bytes of one step in the steady state; capacities are not enforced."""
    form = formulated.form
    x = form.complete(decisions)
    events, parts = replay(form, x)
    positions = tuple((p.name, p.place, int(p.expression.value(x))) for p in form.positions)
    peaks: dict[str, Peak] = {}
    for position, (name, place, size) in zip(form.positions, positions, strict=True):
        if place not in peaks or size > peaks[place].size_bytes:
            peaks[place] = Peak(
                place=place, size_bytes=size, position=name, capacity_bytes=position.capacity_bytes
            )
    return Timeline(
        step_seconds=_step(parts),
        moved_bytes=int(form.moved_bytes.value(x)),
        events=tuple(events),
        parts=tuple(parts),
        peaks=tuple(peaks.values()),
        positions=positions,
    )


def step_seconds(formulated: Formulated, decisions: Sequence[int]) -> float:
    """The step alone, for searches that try many decisions."""
    form = formulated.form
    x = form.complete(decisions)
    _, _, parts = _ends(form, x)
    return _step(parts)


def replay(form: Formulation, x: Sequence[float]) -> tuple[list[Event], list[PartTime]]:
    """Every job with its start and end, under the numbers ``x`` of all variables."""
    starts, ends, parts = _ends(form, x)
    events = [
        Event(
            name=form.jobs[index].name,
            resource=form.jobs[index].resource,
            start_seconds=starts[index],
            end_seconds=ends[index],
            part=number,
        )
        for number, (_, numbers) in enumerate(form.part_jobs())
        for index in numbers
    ]
    return events, parts


def _ends(form: Formulation, x: Sequence[float]) -> tuple[list[float], list[float], list[PartTime]]:
    """Start and end of every job: a resource takes its jobs in order, each waits for what it needs.

    What a job waits for is listed before it, so that one pass settles everything.
    """
    starts, ends = [0.0] * len(form.jobs), [0.0] * len(form.jobs)
    parts: list[PartTime] = []
    clock = 0.0
    for part, numbers in form.part_jobs():
        free: dict[str, float] = {}
        for index in numbers:
            job = form.jobs[index]
            start = free.get(job.resource, clock)
            for other in job.after:
                assert other < index, f"{job.name} waits for what is listed after it"
                start = max(start, ends[other])
            starts[index] = start
            ends[index] = free[job.resource] = start + job.seconds.value(x)
        end = max(free.values(), default=clock)
        parts.append(PartTime(name=part.name, times=part.times, start_seconds=clock, end_seconds=end))
        clock = end
    return starts, ends, parts


def _step(parts: Sequence[PartTime]) -> float:
    return math.fsum(part.times * (part.end_seconds - part.start_seconds) for part in parts)
