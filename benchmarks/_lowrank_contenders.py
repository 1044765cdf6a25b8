"""The projected optimizers of ``optimizers.py``, and what sets their floor.

A floor is the time of the products that a step cannot do without, measured in the same rounds on the same
shapes and dtypes, and of the bytes that it must move, at the bandwidth measured in the same rounds: the fp32
gradient read (twice where it is wanted again once R is known), the weight and the moments read and written. R
and N, the operands of products and the drawing of a basis from its seed are left out: a floor is the lower.
A second floor adds the drawing, at the rate of the same generator alone in the same rounds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _harness import BenchmarkError
from torch import Tensor, nn

from memtrain.optim.grid import GridOptimizer
from memtrain.optim.named import FRUGAL, Apollo, Fira, GaLore
from memtrain.optim.projection.draw import normal
from memtrain.optim.storage import RandomKey

GALORE, GALORE_TORCH, COLUMNS = "GaLore", "galore-torch 1.0", "FRUGAL columns"
BANDWIDTH, DRAW = "a += b", "draw of a sketch, bfloat16"
DENSITY = 0.25
LR, WEIGHT_DECAY, GRADIENT_SCALE = 1e-3, 0.01, 1e-4
NEVER = 1 << 30
_FLOAT_BYTES = 4
_ADD_BYTES = 3 * _FLOAT_BYTES


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Something that is timed beside the contenders."""

    name: str
    step: Callable[[int], object]
    """Of the number of the step, from 1."""


@dataclass(frozen=True, kw_only=True)
class Contender(Probe):
    """One optimizer with its own copy of everything."""

    tensors: Callable[[], Sequence[Tensor]]
    """Weight, gradient and states, once there has been a step."""
    formula_bytes: int
    moved_bytes: float | None = None
    """By a step, where we can count it."""
    products: tuple[str, ...] = ()
    """Names of probes, each as often as the step needs it."""
    draws: tuple[str, ...] = ()
    """Names of probes that draw what the step draws."""
    has_floor: bool = False


@dataclass(frozen=True)
class Shapes:
    """Of one matrix and its low-rank parts; the shorter dimension is projected."""

    rows: int
    columns: int
    rank: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def low_numel(self) -> int:
        return max(self.rows, self.columns) * self.rank

    @property
    def low(self) -> tuple[int, int]:
        return (self.rows, self.rank) if self.right else (self.rank, self.columns)

    @property
    def right(self) -> bool:
        return self.rows >= self.columns


def operands(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), (GRADIENT_SCALE * torch.randn(shape)).to(dtype)


def product_name(way: str, dtype: torch.dtype) -> str:
    return f"product {way}, {str(dtype).removeprefix('torch.')}"


def probes(shapes: Shapes) -> list[Probe]:
    """The products down and up by dtype, and the bandwidth."""
    found: list[Probe] = []
    m, n = shapes.rows, shapes.columns
    for dtype in (torch.float32, torch.bfloat16):
        full, basis = (torch.randn(size).to(dtype) for size in ((m, n), (min(m, n), shapes.rank)))
        low, made, low_made = torch.randn(shapes.low).to(dtype), torch.empty_like(full), None
        low_made = torch.empty_like(low)
        down = (full, basis) if shapes.right else (basis.mT, full)
        up = (low, basis.mT) if shapes.right else (basis, low)
        found += [
            Probe(name=product_name("down", dtype), step=_product(*down, low_made)),
            Probe(name=product_name("up", dtype), step=_product(*up, made)),
        ]
    a, b = torch.zeros(m, n), torch.ones(m, n)
    key, size = RandomKey(seed=0, parameter=0, step=0), (min(m, n), shapes.rank)
    draw = partial(normal, key, size, torch.device("cpu"), scale=shapes.rank**-0.5, dtype=torch.bfloat16)
    return [
        *found,
        Probe(name=BANDWIDTH, step=lambda step: a.add_(b)),
        Probe(name=DRAW, step=lambda step: draw()),
    ]


def _product(first: Tensor, second: Tensor, out: Tensor) -> Callable[[int], object]:
    return lambda step: torch.mm(first, second, out=out)


def floor_seconds(
    contender: Contender, shapes: Shapes, seconds: dict[str, list[float]], *, with_draws: bool = False
) -> list[float]:
    """Of each round."""
    rate = [_ADD_BYTES * shapes.numel / each for each in seconds[BANDWIDTH]]
    assert contender.moved_bytes is not None
    names = (*contender.products, *contender.draws) if with_draws else contender.products
    products = [seconds[name] for name in names]
    return [
        sum(each[index] for each in products) + contender.moved_bytes / rate[index]
        for index in range(len(rate))
    ]


def projected(shapes: Shapes) -> list[Contender]:
    """A step each, without a refresh; bf16 products, fp32 weights, gradients and moments."""
    bf16 = dict(rank=shapes.rank, basis_dtype="bf16")
    down, up = (product_name(way, torch.bfloat16) for way in ("down", "up"))
    once = dict(scale=0.25, update_proj_gap=NEVER)
    many = dict(update_gap=NEVER)
    share = dict(density=DENSITY, moments=DENSITY * shapes.numel)
    split = dict(dtype=torch.bfloat16, master="split24")
    return [
        galore_torch(shapes, gap=NEVER),
        _ours(GALORE, shapes, GaLore, (down, up), **bf16, **once),
        _ours("Fira", shapes, Fira, (down, up), reads=2, **bf16, **once),
        _ours("Apollo", shapes, Apollo, (down,), reads=2, draws=(DRAW,), **bf16, update_proj_gap=NEVER),
        _ours("FRUGAL svd", shapes, FRUGAL, (down, up, up), reads=2, projection="svd", **bf16, **many),
        _ours("FRUGAL power", shapes, FRUGAL, (down, up, up), reads=2, **bf16, **many),
        _ours(COLUMNS, shapes, FRUGAL, (), projection="columns", **share, **many),
        _ours("FRUGAL rows", shapes, FRUGAL, (), projection="rows", **share, **many),
        _ours("FRUGAL randk", shapes, FRUGAL, (), projection="randk", **share, **many),
        _ours(f"{COLUMNS}, split24", shapes, FRUGAL, (), projection="columns", **share, **split, **many),
    ]


def refreshing(shapes: Shapes) -> list[Contender]:
    """A refresh and a step each; the first, from a cold start, is not counted."""
    bf16 = dict(rank=shapes.rank, basis_dtype="bf16")
    return [
        galore_torch(shapes, gap=1),
        _ours(GALORE, shapes, GaLore, (), scale=0.25, update_proj_gap=1, **bf16),
        _ours("Fira", shapes, Fira, (), scale=0.25, update_proj_gap=1, **bf16),
        _ours("Apollo", shapes, Apollo, (), update_proj_gap=1, **bf16),
        _ours("FRUGAL svd", shapes, FRUGAL, (), projection="svd", update_gap=1, **bf16),
        _ours("FRUGAL power", shapes, FRUGAL, (), update_gap=1, **bf16),
    ]


def _ours(
    name: str,
    shapes: Shapes,
    make: Callable[..., GridOptimizer],
    products: tuple[str, ...],
    *,
    reads: int = 1,
    draws: tuple[str, ...] = (),
    moments: float | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Contender:
    """``moments``: elements of one moment, R's where there is none given."""
    weight, gradient = operands((shapes.rows, shapes.columns), dtype)
    # Read and written, with the int8 correction of a split master.
    weight_bytes = 2 * (dtype.itemsize + (settings.get("master") == "split24"))
    parameter = nn.Parameter(weight)
    parameter.grad = gradient
    optimizer = make([parameter], lr=LR, weight_decay=WEIGHT_DECAY, **settings)
    return Contender(
        name=name,
        step=lambda step: optimizer.step(),
        tensors=lambda: [parameter, gradient, *optimizer.state[parameter].values()],
        formula_bytes=2 * dtype.itemsize * shapes.numel + sum(optimizer.state_bytes().values()),
        # Gradient; weight there and back; two moments there and back.
        moved_bytes=(reads * dtype.itemsize + weight_bytes) * shapes.numel
        + 4 * _FLOAT_BYTES * (shapes.low_numel if moments is None else moments),
        products=products,
        draws=draws,
        has_floor=True,
    )


def galore_torch(shapes: Shapes, *, gap: int) -> Contender:
    """The package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from galore_torch import GaLoreAdamW
        except ImportError as error:
            raise BenchmarkError("galore-torch is missing: run this with .venv-optim/bin/python") from error
    weight, gradient = operands((shapes.rows, shapes.columns), torch.float32)
    parameter = nn.Parameter(weight)
    parameter.grad = gradient
    group = dict(params=[parameter], rank=shapes.rank, update_proj_gap=gap, scale=0.25, proj_type="std")
    optimizer = GaLoreAdamW([group], lr=LR, weight_decay=WEIGHT_DECAY, no_deprecation_warning=True)

    def tensors() -> list[Tensor]:
        state = optimizer.state[parameter]
        return [parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state["projector"].ortho_matrix]

    # Its basis is a view of all vectors that the SVD gave.
    basis_numel = min(shapes.rows, shapes.columns) ** 2
    return Contender(
        name=GALORE_TORCH,
        step=lambda step: optimizer.step(),
        tensors=tensors,
        formula_bytes=_FLOAT_BYTES * (2 * shapes.numel + 2 * shapes.low_numel + basis_numel),
    )
