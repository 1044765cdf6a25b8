"""Line charts as SVG text, drawn by hand so that a report needs no plotting library and opens offline."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

_WIDTH, _HEIGHT = 860, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 14, 40
_COLOURS = ("#1f6feb", "#bf3989", "#1a7f37", "#9a6700")
_MAX_POINTS = 1500
"""More than a chart has pixels to show; a bucket's largest value stands for it, so that peaks survive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Lines over a common x axis, horizontal limits, and named stretches of the x axis."""

    x_label: str
    y_label: str
    series: tuple[Series, ...]
    limits: tuple[tuple[str, float], ...] = ()
    """(name, y)."""
    spans: tuple[tuple[str, float, float], ...] = ()
    """(name, from, to)."""
    from_zero: bool = False
    ticks: int = field(default=5)

    def svg(self) -> str:
        """The chart; an empty string when there is nothing to draw."""
        points = [(x, y) for series in self.series for x, y in zip(series.x, series.y, strict=True)]
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        if not finite:
            return ""
        xs = [x for x, _ in finite] + [edge for _, start, end in self.spans for edge in (start, end)]
        ys = [y for _, y in finite] + [y for _, y in self.limits]
        scale = _Scale(
            x_low=min(xs), x_high=max(xs), y_low=0.0 if self.from_zero else min(ys), y_high=max(ys) * 1.04
        )
        parts = [
            *[_span(scale, name, start, end, index) for index, (name, start, end) in enumerate(self.spans)],
            *_axes(scale, self.ticks, self.x_label, self.y_label),
            *[_limit(scale, name, y) for name, y in self.limits],
            *[_line(scale, series, index) for index, series in enumerate(self.series)],
        ]
        body = "\n".join(parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'font-family="sans-serif" font-size="12">\n{body}\n</svg>'
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        span = (self.x_high - self.x_low) or 1.0
        return _LEFT + (value - self.x_low) / span * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        span = (self.y_high - self.y_low) or 1.0
        return _HEIGHT - _BOTTOM - (value - self.y_low) / span * (_HEIGHT - _TOP - _BOTTOM)


def _axes(scale: _Scale, ticks: int, x_label: str, y_label: str) -> list[str]:
    parts = []
    for step in range(ticks + 1):
        y = scale.y_low + (scale.y_high - scale.y_low) * step / ticks
        x = scale.x_low + (scale.x_high - scale.x_low) * step / ticks
        parts += [
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{scale.y(y):.1f}" y2="{scale.y(y):.1f}" '
            'stroke="#d0d7de" stroke-width="0.6"/>',
            f'<text x="{_LEFT - 6}" y="{scale.y(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>',
            f'<text x="{scale.x(x):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:.4g}</text>',
        ]
    centre, middle = (_LEFT + _WIDTH) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    x_label, y_label = html.escape(x_label), html.escape(y_label)
    parts += [
        f'<text x="{centre}" y="{_HEIGHT - 6}" text-anchor="middle">{x_label}</text>',
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{y_label}</text>',
    ]
    return parts


def _line(scale: _Scale, series: Series, index: int) -> str:
    colour = _COLOURS[index % len(_COLOURS)]
    points = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in _thin(series))
    return (
        f'<polyline fill="none" stroke="{colour}" stroke-width="1.4" points="{points}">'
        f"<title>{html.escape(series.name)}</title></polyline>"
    )


def _thin(series: Series) -> list[tuple[float, float]]:
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    bucket = -(-len(points) // _MAX_POINTS)
    if bucket <= 1:
        return points
    return [max(points[i : i + bucket], key=lambda point: point[1]) for i in range(0, len(points), bucket)]


def _limit(scale: _Scale, name: str, y: float) -> str:
    height = scale.y(y)
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="#cf222e" '
        'stroke-dasharray="6 4"/>'
        f'<text x="{_LEFT + 6}" y="{height - 4:.1f}" fill="#cf222e">{html.escape(name)}</text>'
    )


def _span(scale: _Scale, name: str, start: float, end: float, index: int) -> str:
    shade = "#f6f8fa" if index % 2 else "#eaeef2"
    left, right = scale.x(start), scale.x(end)
    return (
        f'<rect x="{left:.1f}" y="{_TOP}" width="{max(0.0, right - left):.1f}" '
        f'height="{_HEIGHT - _TOP - _BOTTOM}" fill="{shade}"><title>{html.escape(name)}</title></rect>'
    )
