"""The answers that stand first: does it fit, how fast is it, how good is the plan, what would help."""

from __future__ import annotations

import html
import math

from memtrain.htmlpage import bullets, folded, paragraph, table
from memtrain.planner.ranges.model import DEVICE
from memtrain.planner.ranges.plan import TIME_DIGITS, Relaxation
from memtrain.planner.ranges.profile_bytes import CATEGORIES
from memtrain.planner.units import format_gib
from memtrain.planpage.content import PageInput
from memtrain.planpage.words import gap_text, gib_cell, quantity_text, seconds_text, share_text


def verdict(page: PageInput) -> str:
    """Whether it fits and by how much; and of a plan that does, what it costs and yields."""
    margins = {peak.place: peak.capacity_bytes - peak.size_bytes for peak in page.plan.peaks}
    if not page.fits:
        said = html.escape(f"Does not fit: {_short_text(margins)}")
        note = "Drawn below is a plan that needs the least device memory; it is not chosen for speed."
        return f'<p class="verdict short">{said}</p>\n{paragraph(note)}'
    left = margins[DEVICE]
    said = html.escape(f"Fits. {format_gib(left)} ({left:,} bytes) of device memory to spare.")
    tiles = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in _tiles(page)
    )
    return f'<p class="verdict fits">{said}</p>\n<div class="tiles">{tiles}</div>'


def _short_text(margins: dict[str, int]) -> str:
    short = [
        f"{place} is short by {format_gib(-margin)} ({-margin:,} bytes)"
        for place, margin in margins.items()
        if margin < 0
    ]
    return ("; ".join(short) or "No placement keeps every limit at once") + "."


def _tiles(page: PageInput) -> list[tuple[str, str]]:
    slower = share_text(page.step_seconds / page.unlimited_seconds - 1)
    unlimited = seconds_text(page.unlimited_seconds)
    return [
        ("step time", seconds_text(page.step_seconds)),
        (f"slower than with unlimited device memory ({unlimited})", slower),
        ("of all GPUs together", f"{page.tokens_per_second:,.0f} tokens/s"),
        ("MFU (model FLOPs over peak FLOPs)", share_text(page.mfu)),
        ("moved over links in a step", format_gib(page.plan.moved_bytes)),
    ]


def remedies(page: PageInput) -> str:
    """Every single change that would make it fit."""
    if page.fits:
        return ""
    found = [_remedy_text(one) for one in page.plan.relaxations]
    if not found:
        return paragraph("No single change was found that makes it fit.")
    return paragraph("Each of these alone is enough:") + bullets(found)


def _remedy_text(one: Relaxation) -> str:
    if one.missing_bytes:
        return f"{one.what}: {format_gib(one.missing_bytes)} more ({one.missing_bytes:,} bytes)"
    if one.what == "sequence":
        return f"a shorter sequence: {share_text(one.share)} of this one fits"
    return f"allow {one.what} (lossy)" if one.what.startswith("codec ") else one.what


def bill(page: PageInput) -> str:
    """Category by place, then what each place holds at most, its limit, and what is left."""
    peaks = {peak.place: peak for peak in page.plan.peaks}
    sizes: dict[str, dict[str, int]] = {}
    for line in sorted(page.bill, key=lambda line: CATEGORIES.index(line.category)):
        row = sizes.setdefault(line.category, {})
        row[line.place] = row.get(line.place, 0) + line.size_bytes
    rows = [[name, *[gib_cell(row.get(place, 0)) for place in peaks]] for name, row in sizes.items()]
    rows += [
        ["peak", *[gib_cell(peak.size_bytes) for peak in peaks.values()]],
        ["limit", *[gib_cell(peak.capacity_bytes) for peak in peaks.values()]],
        ["margin", *[f"{(p.capacity_bytes - p.size_bytes) / 2**30:+.3f}" for p in peaks.values()]],
    ]
    return f'<div class="bill">{table(["GiB", *peaks], rows)}</div>' + paragraph(
        "The device is shown at its fullest moment, other places as they are set aside for the whole step."
    )


def certificate(page: PageInput) -> str:
    """How far the plan can be from the best one, and what other rules reach."""
    plan = page.plan
    bound = f"Proved: no plan of this problem takes less than {seconds_text(plan.lower_bound_seconds)}"
    said = {
        "optimal": f"{bound}; this one is within {gap_text(plan.gap)} of the best.",
        "gap": f"{bound}; the best may be up to {gap_text(plan.gap)} faster than this one.",
        "heuristic": "Nothing is proved about how far this plan is from the best one.",
        "infeasible": "Proved: no plan of this problem stays within every limit.",
    }
    bounds = [
        ["step of the problem", seconds_text(plan.step_seconds)],
        ["lower bound", seconds_text(plan.lower_bound_seconds)],
        ["gap", gap_text(plan.gap)],
    ]
    facts = [
        ["status", plan.status],
        *(bounds if page.fits else []),
        ["solver", plan.solver],
        ["hash of the plan", plan.digest],
        ["hash of the problem", plan.problem_digest],
    ]
    return paragraph(said[plan.status]) + _beside(page) + table(["certificate", ""], facts)


def _beside(page: PageInput) -> str:
    """What the step has beside that of the problem, where it has anything."""
    more = page.step_seconds - page.plan.step_seconds
    if not page.fits or round(more, TIME_DIGITS) <= 0:
        return ""
    return paragraph(
        f"The problem is one stage's; the whole step takes {seconds_text(more)} more: idle time of a "
        "pipeline, and messages once a step."
    )


def ablation(page: PageInput) -> str:
    """What rules of other systems reach, beside this plan."""
    if not page.ablation:
        return ""
    step = page.step_seconds
    rows = [["this plan", seconds_text(step) if page.fits else "does not fit", "", ""]]
    for one in sorted(page.ablation, key=lambda row: row.step_seconds):
        if math.isfinite(one.step_seconds):
            slower = f"{(one.step_seconds / step - 1) * 100:+.2f} %" if page.fits else ""
            rows.append([one.name, seconds_text(one.step_seconds), slower, one.why_not])
        else:
            rows.append([one.name, "does not fit", "", one.why_not])
    note = paragraph("The same problem under other systems' rules, judged by the same simulator.")
    return note + table(["rule", "step time", "against this plan", ""], rows)


def sources(page: PageInput) -> str:
    """Where every number of the machine is from."""
    if not page.sources:
        return ""
    rows = [[fact.name, quantity_text(fact.value, fact.unit), fact.source] for fact in page.sources]
    listed = table(["number", "value", "source"], rows)
    return folded(f"{len(rows)} numbers and where they are from", f'<div class="words">{listed}</div>')
