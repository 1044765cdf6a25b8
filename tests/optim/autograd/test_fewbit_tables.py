"""T12: optimal tables against brute force and the published errors; packing of every width and size."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from memtrain.optim.autograd.bitpack import pack, packed_bytes, unpack
from memtrain.optim.autograd.fewbit import ACTIVATIONS, derivative_of
from memtrain.optim.autograd.fewbit_tables import FewBitTable, Histogram, optimal_table

# reference: sum of the integrals of (f' - level)^2 on [-10, 10] for 1, 2, 3, 4 bits; parity where f' is even
PUBLISHED = {
    "gelu": (0.1410, 0.0406, 0.0119, 0.00314),
    "silu": (0.2150, 0.0479, 0.0170, 0.00447),
    "mish": (0.1688, 0.0400, 0.0136, 0.00360),
    "softplus": (0.2903, 0.0541, 0.0121, 0.00290),
    "selu": (0.2553, 0.1010, 0.0184, 0.00391),
    "elu": (0.1622, 0.0251, 0.0052, 0.00119),
    "sigmoid": (0.0181, 0.0038, 0.0009, 0.0002),
    "tanh": (0.1584, 0.0319, 0.0073, 0.0017),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_errors_are_the_published_optima(name: str) -> None:
    for bits, expected in enumerate(PUBLISHED[name], start=1):
        table = ACTIVATIONS[name].table(bits)
        digit = 10.0 ** (math.floor(math.log10(expected)) - 2)  # three digits, as far as they are printed
        assert table.error == pytest.approx(expected, abs=max(digit, 5e-5))
        assert len(table.levels) == 2**bits


@pytest.mark.parametrize(
    ("name", "borders", "levels"),
    [
        ("gelu", (2.40, 0.71, 0.33, 0.0), (-0.0026, -0.0887, 0.1244, 0.3707)),
        ("silu", (4.48, 1.14, 0.51, 0.0), (-0.0090, -0.0677, 0.1348, 0.3752)),
    ],
)
def test_three_bit_tables_are_the_published_ones(
    name: str, borders: tuple[float, ...], levels: tuple[float, ...]
) -> None:
    table = ACTIVATIONS[name].table(3)
    expected = [-b for b in borders] + [b for b in borders[2::-1]]
    assert table.borders == pytest.approx(expected, abs=0.0051)
    # f'(x) + f'(-x) = 1 for both
    assert table.levels == pytest.approx([*levels, *(1 - level for level in reversed(levels))], abs=1e-4)


def direct_error(
    derivative: Callable[[Tensor], Tensor],
    table: FewBitTable,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """The error by a fine Riemann sum, from borders and levels alone."""
    points = torch.linspace(-10, 10, 400_001, dtype=torch.float64)
    points = (points[1:] + points[:-1]) / 2
    bins = torch.bucketize(
        points.abs() if table.parity else points, torch.tensor(table.borders).double(), right=True
    )
    squares = (derivative(points) - torch.tensor(table.levels).double()[bins]) ** 2
    weights = 1.0 if weight is None else weight(points)
    return float((squares * weights).sum() * (20 / len(points)))


@pytest.mark.parametrize("name", ["gelu", "selu", "tanh"])
def test_the_error_is_that_of_borders_and_levels(name: str) -> None:
    activation = ACTIVATIONS[name]
    table = activation.table(3)
    assert direct_error(activation.derivative, table) == pytest.approx(table.error, rel=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("bits", [1, 2])
def test_dynamic_program_equals_brute_force_on_40_cells(bits: int, parity: bool, weighted: bool) -> None:
    function = torch.tanh if parity else F.gelu
    derivative = derivative_of(function)
    cells = 80 if parity else 40  # folded, 40 of them remain

    def weight(x: Tensor) -> Tensor:
        return torch.exp(-((x - 1.5) ** 2) / 8)

    width = 0.25 if parity else 0.5

    @functools.cache
    def error_of_bin(a: float, b: float) -> float:
        """At the bin's best level, by sums over its cells: knows nothing of prefix sums."""
        starts = a + width * torch.arange(round((b - a) / width), dtype=torch.float64)
        middles = starts + width / 2
        w = torch.full_like(middles, 2.0 if parity else 1.0)
        if weighted:
            w = weight(middles) + weight(-middles) if parity else weight(middles)
        nodes = ((-math.sqrt(0.6), 5 / 18), (0.0, 8 / 18), (math.sqrt(0.6), 5 / 18))
        square = sum(share * derivative(middles + node * width / 2) ** 2 for node, share in nodes)
        slope = function(starts + width) - function(starts)
        level = (w * slope).sum() / (w.sum() * width)
        return float((w * (square * width - 2 * level * slope + level**2 * width)).sum())

    def error_of(borders: tuple[float, ...]) -> float:
        edges = (0.0 if parity else -10.0, *borders, 10.0)
        return sum(error_of_bin(a, b) for a, b in itertools.pairwise(edges))

    table = optimal_table(
        function, derivative, bits, cells=cells, parity=parity, weight=weight if weighted else None
    )
    grid = [(i * 0.25 if parity else -10 + i * 0.5) for i in range(1, 40)]
    best = min(itertools.combinations(grid, 2**bits - 1), key=error_of)
    assert table.borders == pytest.approx(best)
    assert table.error == pytest.approx(error_of(best), rel=1e-9)


def test_a_histogram_makes_the_table_better_for_its_inputs() -> None:
    inputs = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 0.4 - 0.3
    silu = ACTIVATIONS["silu"]
    histogram = Histogram.of(inputs)
    exact = silu.derivative(inputs.double())

    def mean_square(table: FewBitTable) -> float:
        bins = torch.bucketize(inputs, torch.tensor(table.borders), right=True)
        return float(((torch.tensor(table.levels)[bins] - exact) ** 2).mean())

    plain, fitted = silu.table(3), silu.table(3, inputs=histogram)
    assert mean_square(fitted) < 0.25 * mean_square(plain)
    # Inputs that the histogram has not seen still get nearly their derivative.
    assert fitted.levels[-1] == pytest.approx(1.0, abs=0.1)
    assert abs(fitted.levels[0]) < 0.1


def test_a_table_covers_a_wider_histogram() -> None:
    relu2 = ACTIVATIONS["relu2"]
    with pytest.raises(ValueError, match="grows without bound"):
        relu2.table(4)
    table = relu2.table(4, inputs=Histogram(low=-40.0, high=40.0, counts=(1.0,) * 80))
    assert table.borders[-1] > 20
    # f' = 2x on [0, 40]: 15 bins of 2.67, whose middles have the levels
    assert table.levels[-1] == pytest.approx(2 * (40 - 40 / 15 / 2), rel=0.02)
    assert table.levels[0] == pytest.approx(0.0, abs=0.1)


def test_eight_bits_on_few_cells() -> None:
    table = optimal_table(F.silu, derivative_of(F.silu), 8, cells=512)
    assert len(table.levels) == 256
    assert table.error < 0.00447 / 50  # of 4 bits, on four times the cells


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "1 to 8"),
        ({"bits": 9}, "1 to 8"),
        ({"bits": 3, "cells": 6}, "6 cells cannot be cut into 8 bins"),
        ({"bits": 2, "parity": True}, "even derivative"),
        ({"bits": 2, "weight": torch.zeros_like}, "positive somewhere"),
        ({"bits": 2, "weight": lambda x: -torch.ones_like(x)}, "must not be negative"),
    ],
)
def test_refuses_wrong_questions(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimal_table(F.gelu, derivative_of(F.gelu), **options)  # type: ignore[arg-type]


def test_tables_and_histograms_validate_themselves() -> None:
    good = {"bits": 1, "borders": (0.0,), "levels": (0.0, 1.0), "parity": False, "error": 0.0}
    for change in ({"borders": ()}, {"levels": (0.0, 0.5, 1.0)}, {"bits": 9}):
        with pytest.raises(ValueError, match=r"levels|bits"):
            FewBitTable(**{**good, **change})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="increase"):
        FewBitTable(bits=2, borders=(1.0, 0.0), levels=(0.0, 1.0, 2.0), parity=False, error=0.0)
    with pytest.raises(ValueError, match="not all equal"):
        Histogram.of(torch.full((5,), math.nan))
    with pytest.raises(ValueError, match="finite range"):
        Histogram(low=1.0, high=0.0, counts=(1.0,))
    with pytest.raises(ValueError, match="counts"):
        Histogram(low=0.0, high=1.0, counts=(0.0,))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(bits=st.integers(1, 8), numel=st.integers(0, 130), seed=st.integers(0, 99))
def test_codes_are_packed_and_come_back(bits: int, numel: int, seed: int) -> None:
    codes = torch.randint(
        1 << bits, (numel,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.nbytes == packed_bytes(numel, bits)
    assert torch.equal(unpack(packed, bits, numel), codes)


@pytest.mark.parametrize("remainder", range(8))
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bytes_for_all_sizes_mod_8(bits: int, remainder: int) -> None:
    numel = 800 + remainder
    fields = [width for width in (8, 4, 2, 1) if bits & width]
    assert packed_bytes(numel, bits) == sum(math.ceil(numel * width / 8) for width in fields)
    assert packed_bytes(numel, bits) - numel * bits / 8 < len(fields)


def test_every_bit_of_a_full_byte_is_used() -> None:
    packed = pack(torch.full((8,), 7, dtype=torch.uint8), 3)
    assert packed.tolist() == [255, 255, 255]
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(torch.zeros(3, dtype=torch.uint8), 0)
