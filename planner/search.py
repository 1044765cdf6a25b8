"""How far a machine reaches: the longest sequence or the largest micro-batch that a plan exists for.

Nothing is interpolated. A model is estimated anew at every size that is tried, for kernels round tokens and
masks grow with their square; after the first an estimate takes some tenths of a second. Whether a size fits
is asked of the bytes alone (``feasible``), not of a full solve, and more tokens never need fewer bytes: so
bisection is enough.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memtrain.planner.parallel import Degrees
from memtrain.planner.ranges import infeasible
from memtrain.planner.ranges.diffuse import fitting
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.highs import Solver
from memtrain.planner.ranges.model import DEVICE, Problem
from memtrain.planner.ranges.program import build

Fits = Callable[[int], bool]
RESOLUTION = 1 / 32
"""Of the answer: where bisection stops, if the unit is finer. One more try, of some ten, would halve it."""
RELAXATION_SECONDS = 10.0
"""For one relaxation without events; with 80 blocks and their state it takes some tenths."""
_SHORT = 1e-6
"""Of the device: HiGHS's tolerance, below which a shortage is none."""


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


def feasible(problem: Problem) -> bool:
    """Whether a plan that fits was found; when False, most often that there is none was proved.

    The relaxation of the bytes alone, with the most room left on the device: where even that is short,
    nothing fits. Where it is not, its counts are rounded at once, and only if these do not fit the program is
    solved.
    """
    formulated = formulate(problem)
    program = build(formulated, shortage_of=DEVICE)
    program.step.lowBound = -problem.machine.device_capacity_bytes / program.byte_scale
    solver = Solver(program)
    vertex = solver.relaxed(RELAXATION_SECONDS)
    short = _SHORT * problem.machine.device_capacity_bytes / program.byte_scale
    if not vertex.solved or vertex.objective > short:
        return False
    found = fitting(formulated, solver, vertex, time.monotonic() + RELAXATION_SECONDS)
    return found is not None or infeasible.fits(problem)


def sequence_unit(degrees: Degrees, least: int = 1) -> int:
    """Tokens of which a sequence must be a multiple under ``degrees``, and at least ``least``.

    A causal ring gives each context rank an early and a late piece; sequence parallelism cuts each of them.
    """
    rings = degrees.context > 1 and degrees.context_method == "ring"
    pieces = degrees.context * (2 if rings else 1)
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
    while high is not None and high - low > max(1, math.floor(low * RESOLUTION)):
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
