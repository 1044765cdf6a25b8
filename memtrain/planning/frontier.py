"""The page of a sweep: what a machine gives over the sizes that were planned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from memtrain.charts import Chart, Series
from memtrain.htmlpage import document, figure, paragraph, sections, table
from memtrain.planner.forecast import Forecast
from memtrain.planner.units import GiB
from memtrain.planning.answer import Point
from memtrain.planning.request import PlanRequest
from memtrain.planning.terminal import point_cells, sweep_heads, title


def sweep_html(request: PlanRequest, points: Sequence[Point]) -> str:
    """One self-contained document."""
    by_batch = len({point.sequence for point in points}) == 1
    pictures = [
        ("Tokens a second", _chart(points, "tokens/s on all GPUs", by_batch, lambda f: f.tokens_per_second)),
        ("Model FLOPs over peak", _chart(points, "MFU (%)", by_batch, lambda f: 100 * f.mfu)),
        (
            "Left on each GPU",
            _chart(points, "GiB", by_batch, lambda f: f.places[0].margin_bytes / GiB, even_short=True),
        ),
    ]
    rows = [list(point_cells(point)) for point in points]
    note = paragraph("Predicted from quoted rates; every point is a plan of its own, and nothing was run.")
    return document(
        title(request), note + sections([("Points", table(list(sweep_heads()), rows)), *pictures])
    )


def _chart(
    points: Sequence[Point],
    label: str,
    by_batch: bool,
    value: Callable[[Forecast], float],
    *,
    even_short: bool = False,
) -> str:
    """Over the logarithm of the size, for sweeps double; points that do not fit are left out."""
    shown = [
        (math.log2(point.micro_batch if by_batch else point.sequence), value(point.forecast))
        for point in points
        if point.forecast is not None and (point.forecast.fits or even_short)
    ]
    what = "log2 of the micro-batch" if by_batch else "log2 of the tokens of a sequence (13: 8 k, 20: 1 M)"
    series = Series(name=label, x=[x for x, _ in shown], y=[y for _, y in shown])
    chart = Chart(x_label=what, y_label=label, series=(series,), from_zero=not even_short).svg()
    return figure(chart) if chart else ""
