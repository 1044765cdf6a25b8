"""The checker's rules of queues (see ``check``): one thing at a time, in order, within a link's bandwidth."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planner.ranges.simulate import Event

ROUNDING_SECONDS = 1e-8
"""Times are written with nine digits."""

Faults = Iterator[tuple[str, str]]
"""Rules with what breaks them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """A copy that the decisions call for, and the event that was found for it."""

    event: Event
    kind: str
    """Such as ``write tensors`` or ``read update``."""
    block: int
    upward: bool
    """Whether copies of this kind go through the blocks from the first to the last."""
    size_bytes: int
    places: tuple[str, ...]
    """Which the bytes go to or come from."""


def queue_faults(plan: RangePlan, problem: Problem, transfers: Sequence[Transfer]) -> Faults:
    """Faults of parts, queues and links."""
    yield from _parts(plan)
    yield from _one_at_a_time(plan)
    yield from _in_order(transfers)
    yield from _bandwidth(problem, transfers)


def _parts(plan: RangePlan) -> Faults:
    """Parts follow each other, hold their events, and add up to the step."""
    for before, after in itertools.pairwise(plan.parts):
        if after.start_seconds < before.end_seconds - ROUNDING_SECONDS:
            yield "PARTS", f"{after.name} begins before {before.name} is over"
    for event in plan.events:
        part = plan.parts[event.part] if 0 <= event.part < len(plan.parts) else None
        early = part is None or event.start_seconds < part.start_seconds - ROUNDING_SECONDS
        if part is None or early or event.end_seconds > part.end_seconds + ROUNDING_SECONDS:
            yield "PARTS", f"{event.name} on {event.resource} lies outside of its part of the step"
    total = sum(part.times * (part.end_seconds - part.start_seconds) for part in plan.parts)
    count = sum(part.times for part in plan.parts)
    if abs(total - plan.step_seconds) > count * ROUNDING_SECONDS:
        yield "STEP_SECONDS", f"the parts add up to {total}, the step takes {plan.step_seconds}"


def _one_at_a_time(plan: RangePlan) -> Faults:
    by_resource: dict[str, list[Event]] = defaultdict(list)
    for event in plan.events:
        by_resource[event.resource].append(event)
    for resource, events in by_resource.items():
        events.sort(key=lambda e: (e.start_seconds, e.end_seconds))
        for before, after in itertools.pairwise(events):
            if after.start_seconds < before.end_seconds - ROUNDING_SECONDS:
                yield "OVERLAP", f"{resource}: {after.name} starts before {before.name} is over"


def _in_order(transfers: Sequence[Transfer]) -> Faults:
    """Copies of a kind go through the blocks in one direction."""
    by_queue: dict[tuple[int, str, str, bool], list[Transfer]] = defaultdict(list)
    for one in transfers:
        by_queue[one.event.part, one.event.resource, one.kind, one.upward].append(one)
    for (_, resource, _, upward), found in by_queue.items():
        found.sort(key=lambda one: one.block, reverse=not upward)
        for before, after in itertools.pairwise(found):
            if after.event.start_seconds < before.event.end_seconds - ROUNDING_SECONDS:
                yield "ORDER", f"{resource}: {after.event.name} comes before {before.event.name}"


def _bandwidth(problem: Problem, transfers: Sequence[Transfer]) -> Faults:
    """Where a link's directions slow each other, what both move at once: over one hop, and over several."""
    most: dict[str, dict[str, float]] = defaultdict(dict)
    for place in problem.machine.places:
        for hop in place.hops:
            mixed = hop.mixed_bytes_per_second
            most[hop.link][place.name] = math.inf if mixed is None else mixed
    by_queue: dict[str, list[Transfer]] = defaultdict(list)
    for one in transfers:
        by_queue[one.event.resource].append(one)
    for link, limits in most.items():
        for out, back in _overlapping(by_queue[f"write:{link}"], by_queue[f"read:{link}"]):
            rate, limit = _rate(out) + _rate(back), max(limits.values())
            if out.places == back.places and len(out.places) == 1:
                limit = limits[out.places[0]]
            if rate > limit * (1 + 1e-9):
                names = f"{out.event.name} and {back.event.name}"
                yield "BANDWIDTH", f"{link}: {names} move {rate:.6g} B/s at once, {limit:.6g} are possible"


def _overlapping(first: list[Transfer], second: list[Transfer]) -> Iterator[tuple[Transfer, Transfer]]:
    """Pairs that share time."""
    first.sort(key=lambda one: one.event.start_seconds)
    second.sort(key=lambda one: one.event.start_seconds)
    begin = 0
    for one in first:
        while begin < len(second) and second[begin].event.end_seconds <= one.event.start_seconds:
            begin += 1
        for other in second[begin:]:
            if other.event.start_seconds >= one.event.end_seconds - ROUNDING_SECONDS:
                break
            if other.event.end_seconds > one.event.start_seconds + ROUNDING_SECONDS:
                yield one, other


def _rate(one: Transfer) -> float:
    """Bytes per second, taken as even over the event; the least that rounded times leave open."""
    return one.size_bytes / (one.event.end_seconds - one.event.start_seconds + ROUNDING_SECONDS)
