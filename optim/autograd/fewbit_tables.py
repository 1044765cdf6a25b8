"""Best piecewise constant derivatives: the tables of few-bit activations.

An activation's backward needs ``f'(x)`` and nothing else of ``x``. Few-bit backward (Novikov et al., arXiv
2202.00441) keeps the number of the bin that ``x`` lies in, and uses one level per bin for ``f'``. Borders and
levels minimise

    error = sum over bins of the integral of  w(x) (f'(x) - level)^2

on cell borders of a grid; dynamic programming over (bins, cells) finds the minimum exactly. With w = 1 a
bin's best level is ``(f(b) - f(a)) / (b - a)``, and what it costs follows from prefix sums.

Departures: any number of bits, any ``(f, f')``, and a weight: from a histogram of the inputs that the model
really has, the table is best for them. Where ``f'`` is even, the bins are of ``|x|`` (``parity``) and the
sign's bit is spent on finer bins. The public ``fewbit`` tables are worse than these at 2 to 4 bits (3-bit
SELU .0995 against .0184).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Elementwise = Callable[[Tensor], Tensor]

RANGE = 10.0
"""Tables cover [-RANGE, RANGE] unless told: beyond, the derivatives of the usual activations are flat to
1e-4, and the outermost levels hold."""
CELLS = 2000
"""Grid cells on the whole range. The errors printed by the paper come out to three digits from 1,000 on."""
_UNSEEN = 1e-2
"""Weight, over the mean of the histogram, of inputs that it has not seen. With it SiLU's last of 3-bit
levels is 1.01 for inputs N(-.3, .4), with a tenth of it .83: later inputs that are larger would all be off
by as much. The mean square error on the inputs themselves is .0012 and .0010 (.0049 without a
histogram)."""
_GAUSS_POINTS = (-math.sqrt(0.6), 0.0, math.sqrt(0.6))
_GAUSS_WEIGHTS = (5 / 18, 8 / 18, 5 / 18)


@dataclass(frozen=True, kw_only=True)
class FewBitTable:
    """Bins of an activation's input and the derivative that stands for each.

    Attributes:
        bits: of a bin's number.
        borders: increasing, one fewer than levels; bin ``i`` is ``borders[i-1] <= x < borders[i]``.
        levels: the derivative in each bin, at most ``2**bits``.
        parity: the bins are of ``|x|``.
        error: the minimum that was found (see above).
    """

    bits: int
    borders: tuple[float, ...]
    levels: tuple[float, ...]
    parity: bool
    error: float

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}, not 1 to 8")
        if not 1 <= len(self.levels) <= 1 << self.bits:
            raise ValueError(f"{len(self.levels)} levels do not fit in {self.bits} bits")
        if len(self.borders) != len(self.levels) - 1:
            raise ValueError(f"{len(self.levels)} levels need {len(self.levels) - 1} borders")
        if any(a >= b for a, b in pairwise(self.borders)):
            raise ValueError("borders must increase")


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How often inputs fall into each of equal bins on ``[low, high]``."""

    low: float
    high: float
    counts: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.low < self.high or not math.isfinite(self.high - self.low):
            raise ValueError(f"a histogram needs a finite range, not [{self.low}, {self.high}]")
        if not self.counts or min(self.counts) < 0 or sum(self.counts) <= 0:
            raise ValueError("a histogram needs counts, none negative, not all zero")

    @classmethod
    def of(cls, values: Tensor, *, bins: int = 512) -> Histogram:
        """Of the finite ones among ``values``, over their own range.

        Raises:
            ValueError: none is finite, or all are equal: there is nothing to weigh.
        """
        values = values.detach().float().flatten()
        values = values[values.isfinite()]
        if values.numel() == 0 or float(values.min()) == float(values.max()):
            raise ValueError("a histogram needs finite values that are not all equal")
        low, high = float(values.min()), float(values.max())
        counts = torch.histc(values, bins=bins, min=low, max=high)
        return cls(low=low, high=high, counts=tuple(counts.tolist()))

    def density(self, points: Tensor) -> Tensor:
        """Relative frequency at ``points``, for the ``weight`` of a table."""
        counts = torch.tensor(self.counts, dtype=torch.float64)
        counts = counts / counts.mean()
        index = ((points - self.low) / (self.high - self.low) * len(self.counts)).floor().long()
        inside = (points >= self.low) & (points <= self.high)
        return torch.where(inside, counts[index.clamp(0, len(self.counts) - 1)], 0.0) + _UNSEEN


def optimal_table(
    function: Elementwise,
    derivative: Elementwise,
    bits: int,
    *,
    low: float = -RANGE,
    high: float = RANGE,
    cells: int = CELLS,
    parity: bool = False,
    weight: Elementwise | None = None,
) -> FewBitTable:
    """The table with the least error for ``derivative`` with ``2**bits`` bins.

    Args:
        function: the activation, fp64 in and out; its differences are the integrals of ``derivative``.
        derivative: ``f'``; jumps should lie on cell borders (0 does).
        bits: 1 to 8; time grows with ``2**bits * cells**2`` (8 bits: about two seconds on one core).
        low, high: the range; under ``parity`` it must be symmetric, and one half of the cells covers it.
        cells: grid cells on the whole range.
        parity: fold the range; ``derivative`` must be even, which is checked.
        weight: how much an error at ``x`` counts, constant within a cell; None: 1 everywhere.

    Raises:
        ValueError: a limit above is broken, or the weight is negative or zero everywhere.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}, not 1 to 8")
    if parity:
        _check_even(derivative, low, high)
        low, cells = 0.0, cells // 2
    if cells < 1 << bits:
        raise ValueError(f"{cells} cells cannot be cut into {1 << bits} bins: ask for more cells")
    grid = torch.arange(cells + 1, dtype=torch.float64) * ((high - low) / cells) + low  # 0 comes out as 0
    weights = _cell_weights(grid, weight, folded=parity)
    cuts, error = _best_cuts(_bin_costs(grid, function, derivative, weights), 1 << bits)
    bounds = [0, *cuts, cells]
    levels = [_level(grid, function, weights, a, b) for a, b in pairwise(bounds)]
    return FewBitTable(
        bits=bits,
        borders=tuple(float(grid[cut]) for cut in cuts),
        levels=tuple(levels),
        parity=parity,
        error=error,
    )


def _check_even(derivative: Elementwise, low: float, high: float) -> None:
    points = torch.linspace(high / 64, high, 64, dtype=torch.float64)
    if low != -high or not torch.allclose(derivative(points), derivative(-points), rtol=1e-9, atol=1e-12):
        raise ValueError(
            f"parity folds a range like [-{high}, {high}] with an even derivative; this is not one "
            f"(range [{low}, {high}])"
        )


def _cell_weights(grid: Tensor, weight: Elementwise | None, *, folded: bool) -> Tensor:
    middles = (grid[:-1] + grid[1:]) / 2
    if weight is None:
        return torch.full_like(middles, 2.0 if folded else 1.0)
    weights = weight(middles) + weight(-middles) if folded else weight(middles)
    if bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise ValueError("the weight of a table must not be negative, and positive somewhere in its range")
    return weights


def _bin_costs(grid: Tensor, function: Elementwise, derivative: Elementwise, weights: Tensor) -> Tensor:
    """``cost[a, b]`` of a bin over the cells ``a ... b-1``; infinite unless ``a < b``."""
    width = grid[1] - grid[0]
    middles = (grid[:-1] + grid[1:]) / 2
    squares = torch.zeros_like(middles)
    for point, share in zip(_GAUSS_POINTS, _GAUSS_WEIGHTS, strict=True):
        squares += share * derivative(middles + point * width / 2) ** 2
    values = function(grid)
    mass, slope = _sums(weights * width), _sums(weights * (values[1:] - values[:-1]))
    square = _sums(weights * width * squares)
    # The integral of w (f' - q)^2 at its best q; a bin without any weight costs nothing.
    cost = torch.where(mass > 0, square - slope**2 / mass.clamp_min(1e-300), 0.0).clamp_min_(0.0)
    return cost.masked_fill_(torch.ones_like(cost, dtype=torch.bool).tril_(), math.inf)


def _sums(values: Tensor) -> Tensor:
    """``sums[a, b]`` of ``values[a:b]``."""
    prefix = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return prefix[None, :] - prefix[:, None]


def _level(grid: Tensor, function: Elementwise, weights: Tensor, a: int, b: int) -> float:
    """The weighted mean of the derivative over the cells ``a ... b-1``; unweighted where no weight is."""
    values, inside = function(grid[a : b + 1]), weights[a:b]
    if not bool((inside > 0).any()):
        inside = torch.ones_like(inside)
    width = float(grid[1] - grid[0])
    return float((inside * (values[1:] - values[:-1])).sum() / (inside.sum() * width))


def _best_cuts(cost: Tensor, bins: int) -> tuple[list[int], float]:
    """Cells at which the cheapest ``bins`` bins begin (without the first), and what they cost together."""
    best = cost[0].clone()  # best[j]: cells 0 ... j-1 in the bins so far
    came_from = []
    for _ in range(bins - 1):
        best, start = (best[:, None] + cost).min(dim=0)
        came_from.append(start)
    cuts, end = [], len(best) - 1
    for start in reversed(came_from):
        end = int(start[end])
        cuts.append(end)
    return cuts[::-1], float(best[-1])
