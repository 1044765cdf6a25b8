"""The timeline of a plan shows each part of its step once; here is what is said and drawn about that."""

from __future__ import annotations

from memtrain.charts import Scale
from memtrain.htmlpage import paragraph
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planpage.words import seconds_text


def timeline_end(plan: RangePlan) -> float:
    """Seconds that pictures reach to: of all parts once."""
    return plan.parts[-1].end_seconds


def parts_note(plan: RangePlan) -> str:
    """HTML: which parts are drawn and how often each takes place; empty where the step is drawn as it is."""
    if len(plan.parts) == 1 and plan.parts[0].times == 1:
        return ""
    said = [
        f"{part.name} ({seconds_text(part.start_seconds)} to {seconds_text(part.end_seconds)}"
        f"{f', takes place {part.times} times' if part.times > 1 else ''})"
        for part in plan.parts
    ]
    return paragraph(f"Micro-batches that are alike are drawn once: {'; '.join(said)}.")


def part_lines(scale: Scale, plan: RangePlan) -> list[str]:
    """A line wherever a part begins, but for the first."""
    frame = scale.frame
    return [
        f'<line x1="{scale.x(part.start_seconds):.1f}" x2="{scale.x(part.start_seconds):.1f}" '
        f'y1="{frame.top}" y2="{frame.height - frame.bottom}" stroke="currentColor" stroke-width="1.5" '
        'stroke-dasharray="2 3"/>'
        for part in plan.parts[1:]
        if scale.x_low < part.start_seconds < scale.x_high
    ]
