"""How far a machine reaches: the longest sequence or the largest micro-batch that a plan exists for.

Nothing is interpolated. A model is estimated anew at every size that is tried, for kernels round tokens and
masks grow with their square; after the first an estimate takes some tenths of a second. Whether a size fits is
asked of the program itself (a plan with no shortage on the device was found), not of a full solve, and more
tokens never need fewer bytes: so bisection is enough. A size for which no plan was found in the program's
seconds counts as one that does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memtrain.planner.parallel import Degrees

Fits = Callable[[int], bool]
RESOLUTION = 1 / 32
"""Of the answer: where bisection stops, if the unit is finer. One more try, of some ten, would halve it."""
MOST_TRIED = 24
"""Sizes looked at, at most: with doubling from 1 and five halvings, a quarter of a million units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """What fits and what does not."""

    largest: int
    """That fits; 0 where not even one unit does."""
    smallest_too_large: int | None
    """None: everything up to ``most`` fits."""
    unit: int
    """Sizes are its multiples."""
    tried: tuple[tuple[int, bool], ...]
    """In the order of the search."""


def sequence_unit(degrees: Degrees, least: int = 1) -> int:
    """Tokens of which a sequence must be a multiple under ``degrees``, and at least ``least``.

    A causal ring gives each context rank an early and a late piece; sequence parallelism cuts each of them.
    """
    pieces = (
        2 * degrees.context if degrees.context > 1 and degrees.context_method == "ring" else degrees.context
    )
    cut = pieces * degrees.sequence_cut
    return math.ceil(least / cut) * cut


def furthest(fits: Fits, *, unit: int, start: int, most: int) -> Reach:
    """The largest multiple of ``unit`` up to ``most`` that ``fits``, to ``RESOLUTION`` of itself.

    Args:
        fits: whether a size can be planned; monotone.
        unit: of the sizes.
        start: where to begin, rounded down to a multiple, at least one unit.
        most: nothing above it is tried; at least one unit.
    """
    tried: list[tuple[int, bool]] = []

    def ask(units: int) -> bool:
        answer = fits(units * unit)
        tried.append((units * unit, answer))
        return answer

    top = most // unit
    if top < 1:
        raise ValueError(f"the largest size {most} is below the unit {unit}: nothing can be tried")
    low, high = _bracket(ask, min(max(1, start // unit), top), top)
    while high is not None and high - low > max(1, math.floor(low * RESOLUTION)) and len(tried) < MOST_TRIED:
        middle = (low + high) // 2
        if ask(middle):
            low = middle
        else:
            high = middle
    return Reach(
        largest=low * unit,
        smallest_too_large=None if high is None else high * unit,
        unit=unit,
        tried=tuple(tried),
    )


def _bracket(ask: Fits, start: int, top: int) -> tuple[int, int | None]:
    """A size in units that fits (0: none) and one that does not (None: ``top`` fits)."""
    if ask(start):
        low = start
        for units in _doubled(start, top):
            if not ask(units):
                return low, units
            low = units
        return low, None
    high = start
    while high > 1:
        if ask(high // 2):
            return high // 2, high
        high //= 2
    return 0, high


def _doubled(start: int, top: int) -> Iterator[int]:
    """Twice ``start``, and so on; ``top`` last."""
    while start < top:
        start = min(2 * start, top)
        yield start
