"""The queues of the step as Gantt charts: who does what when, and what the arithmetic waits for."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memtrain.charts import Frame, Scale, x_axis
from memtrain.htmlpage import figure, paragraph, table
from memtrain.planner.ranges.plan import BlockPlan, RangePlan
from memtrain.planner.ranges.schedule import COMPUTE, CPU
from memtrain.planpage.colours import BLUE, GREEN, GREY, MAGENTA, OCHRE, SKY, VERMILION, VIOLET, legend
from memtrain.planpage.content import PageInput
from memtrain.planpage.parts import part_lines, parts_note, timeline_end
from memtrain.planpage.waits import waits
from memtrain.planpage.words import resource_text, seconds_text, share_text

KINDS = {
    "forward": SKY,
    "backward": VERMILION,
    "update": OCHRE,
    "saved tensors": GREEN,
    "weights": BLUE,
    "gradients": MAGENTA,
    "optimizer's traffic": VIOLET,
    "other": GREY,
}
"""What a job does, with its colour."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 92, 12, 6, 40
_ROW, _BAR = 30, 22
_WIDTH = 860
_PIXEL_SHARE = 1 / 750
"""Of the picture, one pixel: shorter jobs of a kind that follow each other are drawn as one."""
_LETTER = 6.4
"""Width of a letter at 11 px, upwards of what a sans-serif font takes on average."""
_ZOOMED_BLOCKS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A job, or several of one kind that follow each other."""

    resource: str
    kind: str
    start_seconds: float
    end_seconds: float
    first: str
    last: str
    block: str
    busy_seconds: float
    """Less than the bar is long where it stands for several jobs with gaps between them."""
    times: int = 1
    """That it takes place in a step."""


def queues_of_the_step(page: PageInput) -> str:
    """HTML: the whole step, one block in the steady state, and how busy each queue is."""
    bars = list(_bars(page))
    if not bars:
        return paragraph("Nothing takes any time in this step.")
    rows = _resources(page, bars)
    end = timeline_end(page.plan)
    seen = {bar.kind for bar in bars}
    parts = [
        paragraph("Every queue does one job at a time. Writes leave the device, reads come towards it."),
        legend([(name, f'fill="{colour}"') for name, colour in KINDS.items() if name in seen]),
        parts_note(page.plan),
        _gantt(page.plan, rows, _merged(bars, end * _PIXEL_SHARE), 0.0, end, "The whole step"),
        *_zooms(page, rows, bars),
        _busy_table(page.plan, rows, bars),
        waits(page.plan),
    ]
    return "\n".join(parts)


def _bars(page: PageInput) -> Iterator[Bar]:
    """One per event that takes time."""
    kinds = _kinds(page.plan.blocks)
    for event in page.plan.events:
        if event.end_seconds > event.start_seconds:
            kind, block = kinds.get(event.name, ("other", ""))
            if kind == "update" and event.resource not in (COMPUTE, CPU):
                kind = "optimizer's traffic"
            yield Bar(
                resource=event.resource,
                kind=kind,
                start_seconds=event.start_seconds,
                end_seconds=event.end_seconds,
                first=event.name,
                last=event.name,
                block=block,
                busy_seconds=event.end_seconds - event.start_seconds,
                times=page.plan.parts[event.part].times,
            )


def _kinds(blocks: Sequence[BlockPlan]) -> dict[str, tuple[str, str]]:
    """Kind and block of a job by its name, as ``ranges.schedule`` gives names."""
    found = {}
    for block in blocks:
        name = block.name
        # What returns for backward are saved tensors and weights that lie elsewhere, in one job.
        sends = any("swap" in part.action for part in block.ranges)
        returning = "saved tensors" if sends else "weights"
        for job, kind in (
            (f"forward {name}", "forward"),
            (f"backward {name}", "backward"),
            (f"update {name}", "update"),
            (f"read update {name}", "update"),
            (f"write update {name}", "update"),
            (f"write update {name} by cpu", "update"),
            (f"write {name}", "saved tensors"),
            (f"read {name}", returning),
            (f"read parameters {name}", "weights"),
            (f"write gradient {name}", "gradients"),
            (f"read gradient {name}", "gradients"),
            (f"write gradient {name} by cpu", "gradients"),
            (f"read gradient {name} by cpu", "gradients"),
            (f"add gradient {name}", "gradients"),
        ):
            found[job] = kind, name
    return found


def _resources(page: PageInput, bars: Sequence[Bar]) -> list[str]:
    """Those that do anything, compute first, then link by link."""
    links = [f"{way}:{link}" for link in page.problem.machine.links for way in ("write", "read")]
    used = {bar.resource for bar in bars}
    return [name for name in (COMPUTE, CPU, *links) if name in used]


def _merged(bars: Sequence[Bar], least_seconds: float) -> list[Bar]:
    """Bars that would be shorter than ``least_seconds``, joined with their neighbours of the same kind."""
    last: dict[str, Bar] = {}
    found = []
    for bar in bars:
        before = last.get(bar.resource)
        joined = (
            before is not None
            and (before.kind, before.times) == (bar.kind, bar.times)
            and bar.start_seconds - before.end_seconds < least_seconds
            and min(bar.busy_seconds, before.end_seconds - before.start_seconds) < least_seconds
        )
        if joined:
            assert before is not None
            bar = Bar(
                resource=bar.resource,
                kind=bar.kind,
                start_seconds=before.start_seconds,
                end_seconds=bar.end_seconds,
                first=before.first,
                last=bar.last,
                block="",
                busy_seconds=before.busy_seconds + bar.busy_seconds,
                times=bar.times,
            )
        elif before is not None:
            found.append(before)
        last[bar.resource] = bar
    return [*found, *last.values()]


def _zooms(page: PageInput, rows: Sequence[str], bars: Sequence[Bar]) -> Iterator[str]:
    """A few blocks in the middle, where every queue has found its rhythm, forward and backward."""
    names = [block.name for block in page.plan.blocks]
    if len(names) <= 2 * _ZOOMED_BLOCKS:
        return
    middle = len(names) // 2
    chosen = names[middle - 1 : middle - 1 + _ZOOMED_BLOCKS]
    for way in ("forward", "backward"):
        passes = [bar for bar in bars if bar.resource == COMPUTE and bar.kind == way and bar.block in chosen]
        if passes:
            # Of several micro-batches the last shows what most of the step is like.
            low = min(bar.start_seconds for bar in passes[-_ZOOMED_BLOCKS:])
            high = max(bar.end_seconds for bar in passes[-_ZOOMED_BLOCKS:])
            title = f"Steady state: {way} of {', '.join(chosen)}"
            yield _gantt(page.plan, rows, bars, low, high, title, named=True)


def _gantt(
    plan: RangePlan,
    rows: Sequence[str],
    bars: Sequence[Bar],
    low: float,
    high: float,
    title: str,
    *,
    named: bool = False,
) -> str:
    """One row per resource from ``low`` to ``high`` seconds; ``named`` writes blocks into their bars."""
    frame = Frame(
        width=_WIDTH,
        height=_TOP + _ROW * len(rows) + _BOTTOM,
        left=_LEFT,
        right=_RIGHT,
        top=_TOP,
        bottom=_BOTTOM,
    )
    scale = Scale(x_low=low, x_high=high, y_low=0.0, y_high=1.0, frame=frame)
    parts = [*x_axis(scale, 8, "seconds")]
    for number, resource in enumerate(rows):
        top = _TOP + number * _ROW
        text = html.escape(resource_text(resource))
        parts += [
            f'<rect x="{_LEFT}" y="{top + 4}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_BAR}" '
            'fill-opacity="0.06"/>',
            f'<text x="{_LEFT - 8}" y="{top + 19}" text-anchor="end">{text}</text>',
        ]
        for kind, colour in KINDS.items():
            drawn = [
                _bar(scale, bar, top + 4, named)
                for bar in bars
                if bar.resource == resource
                and bar.kind == kind
                and bar.end_seconds > low
                and bar.start_seconds < high
            ]
            if drawn:
                parts.append(f'<g fill="{colour}">{"".join(drawn)}</g>')
    parts += part_lines(scale, plan)
    heading = f"<h3>{html.escape(title)}</h3>"
    return heading + figure(frame.svg(parts, f"{title}: {len(rows)} queues over time"))


def _bar(scale: Scale, bar: Bar, top: float, named: bool) -> str:
    left = scale.x(max(bar.start_seconds, scale.x_low))
    right = scale.x(min(bar.end_seconds, scale.x_high))
    # Close up nothing is lost; over the whole step slivers would cover what stands beside them.
    least = 0.3 if named else 0.0
    what = bar.first if bar.first == bar.last else f"{bar.first} to {bar.last}"
    span = f"{seconds_text(bar.start_seconds)} to {seconds_text(bar.end_seconds)}"
    title = html.escape(f"{what}: {span}, busy {seconds_text(bar.busy_seconds)}")
    drawn = (
        f'<rect class="bar" x="{left:.2f}" y="{top}" width="{max(least, right - left):.2f}" height="{_BAR}">'
        f"<title>{title}</title></rect>"
    )
    if named and bar.block and len(bar.block) * _LETTER < right - left:
        drawn += (
            f'<text class="on" x="{(left + right) / 2:.1f}" y="{top + 15}" text-anchor="middle">'
            f"{html.escape(bar.block)}</text>"
        )
    return drawn


def _busy_table(plan: RangePlan, rows: Sequence[str], bars: Sequence[Bar]) -> str:
    cells = []
    for resource in rows:
        busy = sum(bar.times * bar.busy_seconds for bar in bars if bar.resource == resource)
        cells.append([resource_text(resource), seconds_text(busy), share_text(busy / plan.step_seconds)])
    return table(["queue", "busy", "share of the step"], cells)
