"""Colours that mean the same in every picture of a page, and the legends that say what.

One palette for light and dark: each colour has a contrast of at least 3 with either background and of at
least 4.5 with the white text that stands on it (WCAG 2.2, 1.4.3 and 1.4.11). Places beside the device share
the blues and violets, in their order; what is compressed is hatched.
"""

from __future__ import annotations

import colorsys
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from memtrain.planner.ranges import profile_bytes
from memtrain.planner.ranges.model import Problem

GREY, BLUE, VIOLET, MAGENTA = "#6e7781", "#0072b2", "#845cd0", "#bf3989"
OLIVE, GREEN, VERMILION, OCHRE, SKY = "#667a00", "#00855f", "#c8471b", "#9a6700", "#1f7aa3"

CATEGORIES: Mapping[str, str] = {
    profile_bytes.RESERVED: GREY,
    profile_bytes.WEIGHTS: BLUE,
    profile_bytes.OPTIMIZER: VIOLET,
    profile_bytes.SLOTS: OLIVE,
    profile_bytes.GRADIENTS: MAGENTA,
    profile_bytes.SAVED: GREEN,
    profile_bytes.RESTORED: VERMILION,
    profile_bytes.TRANSIENT: OCHRE,
}
_HUES = (200 / 360, 300 / 360)
"""From the first place to the last."""
_LUMINANCES = (0.165, 0.125)
"""In turn, so that neighbours differ in more than hue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ink:
    """How an action looks."""

    css_class: str
    colour: str
    hatched: bool


def action_inks(problem: Problem, labels: Iterable[str]) -> dict[str, Ink]:
    """By label, in the order in which ranges are laid out along the tokens."""
    places = [place.name for place in problem.machine.places]
    order = ("recompute", "compress", "compress-swap", "swap", "slot", "keep")

    def rank(label: str) -> tuple[int, int, str]:
        kind, *rest = label.split(":")
        return order.index(kind), -places.index(rest[-1]) if kind.endswith("swap") else 0, label

    inks = {}
    for number, label in enumerate(sorted(set(labels), key=rank)):
        kind, *rest = label.split(":")
        if kind.endswith("swap"):
            colour = place_colour(places.index(rest[-1]), len(places))
        else:
            colour = {"recompute": VERMILION, "slot": OLIVE}.get(kind, GREEN)
        inks[label] = Ink(css_class=f"a{number}", colour=colour, hatched=kind.startswith("compress"))
    return inks


def place_colour(index: int, count: int) -> str:
    """From blue to violet."""
    hue = _HUES[0] + (_HUES[1] - _HUES[0]) * index / max(1, count - 1)
    wanted = _LUMINANCES[index % len(_LUMINANCES)]
    low, high = 0.0, 1.0
    for _ in range(20):
        lightness = (low + high) / 2
        low, high = (lightness, high) if luminance(_hex(hue, lightness)) < wanted else (low, lightness)
    return _hex(hue, low)


def _hex(hue: float, lightness: float) -> str:
    parts = colorsys.hls_to_rgb(hue, lightness, 0.6)
    return "#" + "".join(f"{round(part * 255):02x}" for part in parts)


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb``, 0 to 1, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def ink_style(inks: Iterable[Ink]) -> str:
    """CSS of the classes."""
    return "".join(
        f".{ink.css_class}{{fill:{f'url(#{ink.css_class}h)' if ink.hatched else ink.colour}}}\n"
        for ink in inks
    )


def hatches(inks: Iterable[Ink]) -> str:
    """The patterns that ``ink_style`` names, for the page's beginning; empty where nothing is hatched."""
    patterns = [
        f'<pattern id="{ink.css_class}h" width="6" height="6" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate(45)"><rect width="6" height="6" fill="{ink.colour}"/>'
        '<rect width="1.5" height="6" fill="#fff"/></pattern>'
        for ink in inks
        if ink.hatched
    ]
    if not patterns:
        return ""
    return f'<svg class="defs" aria-hidden="true"><defs>{"".join(patterns)}</defs></svg>\n'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Names with a sample each: (text, attributes of the sample's rectangle)."""
    items = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true"><rect width="14" height="14" {look}/></svg>'
        f"{html.escape(text)}</li>"
        for text, look in entries
    )
    return f'<ul class="legend">{items}</ul>'
