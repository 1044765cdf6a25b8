"""The page of a sweep: what a machine gives over the sizes that were planned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from memtrain.charts import Chart, Series
from memtrain.htmlpage import document, figure, paragraph, sections, table
from memtrain.planner.forecast import Forecast
from memtrain.planner.units import GiB
from memtrain.planning.answer import Point
from memtrain.planning.request import Axis, PlanRequest
from memtrain.planning.sweep_table import point_cells, sweep_heads
from memtrain.planning.terminal import setting


def sweep_html(request: PlanRequest, axis: Axis, points: Sequence[Point]) -> str:
    """One self-contained document."""
    pictures = [
        ("Tokens a second", _chart(points, "tokens/s on all GPUs", axis, lambda f: f.tokens_per_second)),
        ("Model FLOPs over peak", _chart(points, "MFU (%)", axis, lambda f: 100 * f.mfu)),
        (
            "Left on each GPU",
            _chart(points, "GiB", axis, lambda f: f.places[0].margin_bytes / GiB, even_short=True),
        ),
    ]
    rows = [list(point_cells(point)) for point in points]
    note = paragraph("Predicted from quoted rates; every point is a plan of its own, and nothing was run.")
    what = "sequences" if axis == "seq" else "micro-batches"
    swept = f"{what} from {_size(points[0], axis)} to {_size(points[-1], axis)}"
    listed = ("Points", table(list(sweep_heads()), rows))
    return document(
        f"{request.work.model}, {swept}, {setting(request)}", note + sections([listed, *pictures])
    )


def _size(point: Point, axis: Axis) -> int:
    return point.sequence if axis == "seq" else point.micro_batch


def _chart(
    points: Sequence[Point],
    label: str,
    axis: Axis,
    value: Callable[[Forecast], float],
    *,
    even_short: bool = False,
) -> str:
    """Over the logarithm of the size, for sweeps double; points that do not fit are left out."""
    shown = [
        (math.log2(_size(point, axis)), value(point.forecast))
        for point in points
        if point.forecast is not None and (point.forecast.fits or even_short)
    ]
    what = (
        "log2 of the tokens of a sequence (13: 8 k, 20: 1 M)" if axis == "seq" else "log2 of the micro-batch"
    )
    series = Series(name=label, x=[x for x, _ in shown], y=[y for _, y in shown])
    chart = Chart(x_label=what, y_label=label, series=(series,), from_zero=not even_short).svg()
    return figure(chart) if chart else ""
