"""A sweep as rows of text: a line for each size that was planned."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from memtrain.planner.ranges.model import DEVICE, Role
from memtrain.planner.units import format_gib
from memtrain.planning.answer import Point
from memtrain.planning.terminal import SOME, new_table
from memtrain.planning.usage import Usage
from memtrain.planpage.words import seconds_text, share_text

_ROLES = {Role.PARAMETER: "weights", Role.GRADIENT: "gradients", Role.OPTIMIZER: "optimizer"}


def show_sweep(points: Sequence[Point], out: Console) -> None:
    """One line a point."""
    first, *others, last = sweep_heads()
    table = new_table(first, *others)
    table.add_column(last, justify="left", no_wrap=True)
    for point in points:
        table.add_row(*point_cells(point))
    out.print(table)


def sweep_heads() -> tuple[str, ...]:
    """Of the columns of ``point_cells``."""
    return (
        "tokens",
        "micro-batch",
        "fits",
        "step",
        "tokens/s",
        "MFU",
        "slowdown",
        "left on the GPU",
        "off the device, not kept",
    )


def point_cells(point: Point) -> tuple[str, ...]:
    """A point as a row of text."""
    size, forecast = (str(point.sequence), str(point.micro_batch)), point.forecast
    if forecast is None:
        return (*size, "-", "", "", "", "", "", point.problem)
    margin = format_gib(forecast.places[0].margin_bytes, 2)
    if not forecast.fits or point.usage is None:
        return (*size, "no", "", "", "", "", margin, "")
    return (
        *size,
        "yes",
        seconds_text(forecast.step_seconds),
        f"{forecast.tokens_per_second:,.0f}",
        share_text(forecast.mfu),
        share_text(forecast.slowdown - 1),
        margin,
        usage_text(point.usage),
    )


def usage_text(usage: Usage) -> str:
    """``optimizer 62 % host; saved 40 % recompute, 20 % swap``."""
    parts = []
    for role, shares in usage.state.items():
        away = [f"{s:.0%} {place}" for place, s in shares.items() if place != DEVICE and s >= SOME]
        if away:
            parts.append(f"{_ROLES[role]} {', '.join(away)}")
    acted = [f"{s:.0%} {kind}" for kind, s in usage.actions.items() if kind != "keep" and s >= SOME]
    if acted:
        parts.append(f"saved tensors {', '.join(acted)}")
    return "; ".join(parts) or "nothing"
