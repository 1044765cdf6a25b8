"""Memory over the step: the device position by position, every other place as it fills and empties."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from memtrain.charts import Frame, Scale, axes, limit_line
from memtrain.htmlpage import figure, paragraph
from memtrain.planner.ranges.model import DEVICE, Place
from memtrain.planner.ranges.profile_bytes import (
    SAVED,
    Sizes,
    device_moments,
    place_sizes,
    stays,
)
from memtrain.planner.units import GiB, format_gib
from memtrain.planpage.colours import CATEGORIES, legend
from memtrain.planpage.content import PageInput
from memtrain.planpage.parts import part_lines, parts_note, timeline_end
from memtrain.planpage.words import seconds_text

_DEVICE_FRAME = Frame(height=340)
_PLACE_FRAME = Frame(height=190)
_SHOWN_CAPACITY = 3.0
"""A limit more than so many times what is used is named, not drawn: the picture would be empty below it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """Bytes by category for a stretch of the step."""

    name: str
    start_seconds: float
    end_seconds: float
    sizes: Sizes

    @property
    def total_bytes(self) -> int:
        """Of all categories."""
        return sum(self.sizes.values())


def memory_over_the_step(page: PageInput) -> str:
    """HTML: a picture of each place, and a legend for all."""
    device = _device_levels(page)
    machine = page.problem.machine
    parts = [_picture(page, DEVICE, device, machine.device_capacity_bytes, _DEVICE_FRAME)]
    shown = {name for level in device for name in level.sizes}
    for place in machine.places:
        levels = _place_levels(page, place)
        if levels:
            parts.append(_picture(page, place.name, levels, place.capacity_bytes, _PLACE_FRAME))
            shown |= {name for level in levels for name in level.sizes}
        else:
            parts.append(paragraph(f"{place.name}: not used ({format_gib(place.capacity_bytes)} allowed)"))
    key = legend([(name, f'fill="{colour}"') for name, colour in CATEGORIES.items() if name in shown])
    return key + parts_note(page.plan) + "\n".join(parts)


def _device_levels(page: PageInput) -> list[Level]:
    return [
        Level(
            name=moment.position,
            start_seconds=moment.start_seconds,
            end_seconds=moment.end_seconds,
            sizes=moment.sizes,
        )
        for moment in device_moments(page.plan, page.problem)
    ]


def _place_levels(page: PageInput, place: Place) -> list[Level]:
    """What is set aside all step long, and saved tensors from their arrival until they are back."""
    aside = place_sizes(page.plan, page.problem, place.name)
    if not aside:
        return []
    changes = [(0.0, 0), (timeline_end(page.plan), 0)]
    for stay in stays(page.plan, page.problem, place.name):
        changes += [(stay.start_seconds, stay.size_bytes), (stay.end_seconds, -stay.size_bytes)]
    levels, saved = [], 0
    changes.sort()
    for (start, change), (end, _) in pairwise(changes):
        saved += change
        if end > start:
            sizes = {name: saved if name == SAVED else size for name, size in aside.items()}
            levels.append(Level(name=place.name, start_seconds=start, end_seconds=end, sizes=sizes))
    return levels


def _picture(page: PageInput, place: str, levels: Sequence[Level], capacity_bytes: int, frame: Frame) -> str:
    most = max(levels, key=lambda level: level.total_bytes)
    drawn = capacity_bytes <= _SHOWN_CAPACITY * most.total_bytes
    scale = Scale(
        x_low=0.0,
        x_high=levels[-1].end_seconds,
        y_low=0.0,
        y_high=max(most.total_bytes, capacity_bytes if drawn else 0) / GiB * 1.06,
        frame=frame,
    )
    limit = (
        [limit_line(scale, f"limit {format_gib(capacity_bytes)}", capacity_bytes / GiB, 0)] if drawn else []
    )
    parts = [
        *axes(scale, max(3, frame.height // 45), "seconds", f"{place} (GiB)"),
        *[_area(scale, levels, name) for name in CATEGORIES if any(name in level.sizes for level in levels)],
        *[_hover(scale, level) for level in levels],
        *limit,
        *part_lines(scale, page.plan),
    ]
    when = f" from {seconds_text(most.start_seconds)} on ({most.name})" if place == DEVICE else ""
    text = f"{place}: at most {format_gib(most.total_bytes)}{when}; limit {format_gib(capacity_bytes)}"
    return f"<h3>{html.escape(text)}</h3>{figure(frame.svg(parts, text))}"


def _area(scale: Scale, levels: Sequence[Level], name: str) -> str:
    """One category on top of those before it, in steps: there and back again."""
    below = list(CATEGORIES)[: list(CATEGORIES).index(name)]
    floors = [sum(level.sizes.get(other, 0) for other in below) for level in levels]
    tops = [floor + level.sizes.get(name, 0) for floor, level in zip(floors, levels, strict=True)]
    there = [
        f"V{scale.y(top / GiB):.1f}H{scale.x(level.end_seconds):.1f}"
        for top, level in zip(tops, levels, strict=True)
    ]
    back = [
        f"V{scale.y(floor / GiB):.1f}H{scale.x(level.start_seconds):.1f}"
        for floor, level in zip(reversed(floors), reversed(levels), strict=True)
    ]
    start = f"M{scale.x(levels[0].start_seconds):.1f} {scale.y(floors[0] / GiB):.1f}"
    return f'<path class="area" fill="{CATEGORIES[name]}" d="{start}{"".join(there)}{"".join(back)}Z"/>'


def _hover(scale: Scale, level: Level) -> str:
    """Nothing to see: a stretch that says its numbers when it is pointed at."""
    left, right = scale.x(level.start_seconds), scale.x(level.end_seconds)
    frame = scale.frame
    sizes = "\n".join(
        f"{name} {format_gib(size)}" for name, size in reversed(list(level.sizes.items())) if size
    )
    span = f"{seconds_text(level.start_seconds)} to {seconds_text(level.end_seconds)}"
    title = f"{level.name}, {span}: {format_gib(level.total_bytes)}\n{sizes}"
    return (
        f'<rect class="hover" x="{left:.1f}" y="{frame.top}" width="{right - left:.1f}" '
        f'height="{frame.height - frame.top - frame.bottom}"><title>{html.escape(title)}</title></rect>'
    )
