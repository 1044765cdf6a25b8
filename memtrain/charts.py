"""Line charts as SVG text, drawn by hand so that a report needs no plotting library and opens offline."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_COLOURS = ("#1f6feb", "#bf3989", "#1a7f37", "#9a6700")
_LIMIT_COLOURS = ("#cf222e", "#9a6700")
_LIMIT_NAME_WIDTH = 200
_MAX_POINTS = 1500
"""More than a chart has pixels to show; a bucket's largest value stands for it, so that peaks survive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The size of a picture and the margins around what it shows, in SVG units."""

    width: int = 860
    height: int = 280
    left: int = 62
    right: int = 12
    top: int = 24
    bottom: int = 40

    def svg(self, parts: Sequence[str], label: str) -> str:
        """The picture. Its text takes the colour of the page around it, so that it is read on light and dark.

        Args:
            parts: SVG elements.
            label: what it shows, for who cannot see it.
        """
        body = "\n".join(parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{html.escape(label)}" font-family="sans-serif" font-size="12" '
            f'fill="currentColor">\n{body}\n</svg>'
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """From values to a place within a frame."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    frame: Frame = Frame()

    def x(self, value: float) -> float:
        """From the left."""
        span = (self.x_high - self.x_low) or 1.0
        inner = self.frame.width - self.frame.left - self.frame.right
        return self.frame.left + (value - self.x_low) / span * inner

    def y(self, value: float) -> float:
        """From the top."""
        span = (self.y_high - self.y_low) or 1.0
        inner = self.frame.height - self.frame.top - self.frame.bottom
        return self.frame.height - self.frame.bottom - (value - self.y_low) / span * inner


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
    ticks: int = 8

    def svg(self) -> str:
        """The chart; an empty string when there is nothing to draw."""
        points = [(x, y) for series in self.series for x, y in zip(series.x, series.y, strict=True)]
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        if not finite:
            return ""
        xs = [x for x, _ in finite] + [edge for _, start, end in self.spans for edge in (start, end)]
        ys = [y for _, y in finite] + [y for _, y in self.limits]
        scale = Scale(
            x_low=min(xs), x_high=max(xs), y_low=0.0 if self.from_zero else min(ys), y_high=max(ys) * 1.04
        )
        parts = [
            *[_span(scale, name, start, end, index) for index, (name, start, end) in enumerate(self.spans)],
            *axes(scale, self.ticks, self.x_label, self.y_label),
            *[limit_line(scale, name, y, index) for index, (name, y) in enumerate(self.limits)],
            *[_line(scale, series, index) for index, series in enumerate(self.series)],
        ]
        return scale.frame.svg(parts, f"{self.y_label} over {self.x_label}")


def axes(scale: Scale, ticks: int, x_label: str, y_label: str) -> list[str]:
    """Both axes with about ``ticks`` round numbers each, and a line across for those of y."""
    frame, parts = scale.frame, []
    for y in round_ticks(scale.y_low, scale.y_high, ticks):
        height = scale.y(y)
        parts += [
            f'<line x1="{frame.left}" x2="{frame.width - frame.right}" y1="{height:.1f}" y2="{height:.1f}" '
            'stroke="currentColor" stroke-opacity="0.2" stroke-width="0.6"/>',
            f'<text x="{frame.left - 6}" y="{height + 4:.1f}" text-anchor="end">{y:.6g}</text>',
        ]
    parts += x_axis(scale, ticks, x_label)
    middle = (frame.top + frame.height - frame.bottom) / 2
    parts.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>"
    )
    return parts


def x_axis(scale: Scale, ticks: int, x_label: str) -> list[str]:
    """The axis below a picture."""
    frame = scale.frame
    below = frame.height - frame.bottom + 16
    parts = [
        f'<text x="{scale.x(x):.1f}" y="{below}" text-anchor="middle">{x:.6g}</text>'
        for x in round_ticks(scale.x_low, scale.x_high, ticks)
    ]
    centre = (frame.left + frame.width) / 2
    name = html.escape(x_label)
    return [*parts, f'<text x="{centre}" y="{frame.height - 6}" text-anchor="middle">{name}</text>']


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten, none outside ``[low, high]``."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _line(scale: Scale, series: Series, index: int) -> str:
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


def limit_line(scale: Scale, name: str, y: float, index: int) -> str:
    """A dashed line; its name stands above the chart, where the names of two close lines do not collide."""
    frame, height, colour = scale.frame, scale.y(y), _LIMIT_COLOURS[index % len(_LIMIT_COLOURS)]
    return (
        f'<line x1="{frame.left}" x2="{frame.width - frame.right}" y1="{height:.1f}" y2="{height:.1f}" '
        f'stroke="{colour}" stroke-dasharray="6 4"/>'
        f'<text x="{frame.left + 6 + index * _LIMIT_NAME_WIDTH}" y="{frame.top - 8}">'
        f'<tspan fill="{colour}">- -</tspan> {html.escape(name)}</text>'
    )


def _span(scale: Scale, name: str, start: float, end: float, index: int) -> str:
    opacity = 0.04 if index % 2 else 0.1
    frame, left, right = scale.frame, scale.x(start), scale.x(end)
    return (
        f'<rect x="{left:.1f}" y="{frame.top}" width="{max(0.0, right - left):.1f}" '
        f'height="{frame.height - frame.top - frame.bottom}" fill-opacity="{opacity}">'
        f"<title>{html.escape(name)}</title></rect>"
    )
