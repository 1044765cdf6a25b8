"""What the arithmetic waits for, the longest waits first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memtrain.htmlpage import bullets, folded, paragraph
from memtrain.planner.ranges.plan import TIME_DIGITS, RangePlan
from memtrain.planner.ranges.schedule import COMPUTE
from memtrain.planner.ranges.simulate import Event, PartTime
from memtrain.planpage.words import resource_text, seconds_text, share_text

_LISTED = 8
_ROUNDING_SECONDS = 2 * 10**-TIME_DIGITS
"""Two times of a plan that are this close may be the same."""


def waits(plan: RangePlan) -> str:
    """HTML: the longest stretches in which the arithmetic stands still, and what it waits for."""
    found: list[tuple[float, str]] = []
    total = 0.0
    for number, part in enumerate(plan.parts):
        events = [event for event in plan.events if event.part == number]
        for seconds, text in _of_part(events, part):
            total += part.times * seconds
            often = f", {part.times} times" if part.times > 1 else ""
            found.append((seconds, f"{seconds_text(seconds)} {text}{often}"))
    if not found:
        return paragraph("The arithmetic never waits.")
    found.sort(key=lambda wait: -wait[0])
    summary = (
        f"The arithmetic waits {seconds_text(total)} in all, {share_text(total / plan.step_seconds)} of the "
        f"step: the longest of {len(found)} stretches"
    )
    return folded(summary, bullets([text for _, text in found[:_LISTED]]))


def _of_part(events: Sequence[Event], part: PartTime) -> Iterator[tuple[float, str]]:
    """Of one part: how long, and before what."""
    over = part.start_seconds
    for event in events:
        if event.resource == COMPUTE:
            if event.start_seconds > over + _ROUNDING_SECONDS:
                yield event.start_seconds - over, f"before {event.name}{_cause(event, events)}"
            over = max(over, event.end_seconds)
    if part.end_seconds > over + _ROUNDING_SECONDS:
        last = max(events, key=lambda e: e.end_seconds)
        yield part.end_seconds - over, f"at the end, for {last.name} ({resource_text(last.resource)})"


def _cause(waiting: Event, events: Sequence[Event]) -> str:
    causes = [
        f"{e.name} ({resource_text(e.resource)})"
        for e in events
        if e.resource != COMPUTE
        and abs(e.end_seconds - waiting.start_seconds) <= _ROUNDING_SECONDS
        and e.end_seconds > e.start_seconds
    ]
    return f", until {' and '.join(causes)} is over" if causes else ""
