"""What a step takes under given decisions: the queues replayed job by job, without a solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memtrain.planner.ranges.formulate import Formulated
from memtrain.planner.ranges.terms import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A job of the step: when it ran, and on what (``compute``, ``cpu``, ``write:pcie`` ...)."""

    name: str
    resource: str
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
    moved_bytes: int
    """Over all links, both directions."""
    events: tuple[Event, ...]
    peaks: tuple[Peak, ...]
    """One per place, the device first."""
    positions: tuple[tuple[str, str, int], ...]
    """(position, place, bytes), every one in the order of the step."""


def simulate(formulated: Formulated, decisions: Sequence[int]) -> Timeline:
    """The timeline and the bytes of one step in the steady state; capacities are not enforced."""
    form = formulated.form
    x = form.complete(decisions)
    starts, ends = replay(form.jobs, [job.seconds.value(x) for job in form.jobs])
    positions = tuple((p.name, p.place, int(p.expression.value(x))) for p in form.positions)
    peaks: dict[str, Peak] = {}
    for position, (name, place, size) in zip(form.positions, positions, strict=True):
        if place not in peaks or size > peaks[place].size_bytes:
            peaks[place] = Peak(
                place=place, size_bytes=size, position=name, capacity_bytes=position.capacity_bytes
            )
    return Timeline(
        step_seconds=max(ends, default=0.0),
        moved_bytes=int(form.moved_bytes.value(x)),
        events=tuple(
            Event(name=job.name, resource=job.resource, start_seconds=start, end_seconds=end)
            for job, start, end in zip(form.jobs, starts, ends, strict=True)
        ),
        peaks=tuple(peaks.values()),
        positions=positions,
    )


def step_seconds(formulated: Formulated, decisions: Sequence[int]) -> float:
    """The step alone, for searches that try many decisions."""
    form = formulated.form
    x = form.complete(decisions)
    _, ends = replay(form.jobs, [job.seconds.value(x) for job in form.jobs])
    return max(ends, default=0.0)


def replay(jobs: Sequence[Job], seconds: Sequence[float]) -> tuple[list[float], list[float]]:
    """Start and end of every job: a resource takes its jobs in order, each waits for what it needs.

    What a job waits for is listed before it, so that one pass settles everything.
    """
    free: dict[str, float] = {}
    starts, ends = [0.0] * len(jobs), [0.0] * len(jobs)
    for index, job in enumerate(jobs):
        start = free.get(job.resource, 0.0)
        for other in job.after:
            assert other < index, f"{job.name} waits for what is listed after it"
            start = max(start, ends[other])
        starts[index] = start
        ends[index] = free[job.resource] = start + seconds[index]
    return starts, ends
