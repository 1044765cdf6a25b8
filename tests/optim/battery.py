"""The optimizers that every common test runs: all named ones, and a sample of the grid.

A new optimizer joins here, and has then to pass ``test_common.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memtrain.optim.grid import GridOptimizer
from memtrain.optim.named import (
    FRUGAL,
    AdamW,
    AdamW8bit,
    Apollo,
    ApolloMini,
    Fira,
    GaLore,
    NaturalGaLore,
)

GAP = 5


@dataclass(frozen=True)
class Entry:
    """One optimizer under test."""

    name: str
    make: Callable[..., GridOptimizer]
    lr: float
    """With which it solves the small problems."""
    settings: dict[str, Any]

    def __call__(self, params: Iterable[Any], **changes: Any) -> GridOptimizer:
        return self.make(params, **{"lr": self.lr, **self.settings, **changes})


def _grid(name: str, lr: float = 0.02, **settings: Any) -> Entry:
    if "projection" in settings:
        settings = {"update_gap": GAP, **settings}
    return Entry(name, GridOptimizer, lr, settings)


_LOW = dict(rank=4, update_proj_gap=GAP)

BATTERY = [
    Entry("AdamW", AdamW, 0.02, dict(weight_decay=0.0)),
    Entry("AdamW-reference", AdamW, 0.02, dict(weight_decay=0.0, path="reference")),
    Entry("AdamW-bf16-states", AdamW, 0.02, dict(weight_decay=0.0, state_dtype="bf16")),
    Entry("AdamW8bit", AdamW8bit, 0.02, dict(weight_decay=0.0)),
    Entry("AdamW-4-bit", AdamW, 0.02, dict(weight_decay=0.0, state_dtype="int4")),
    Entry("GaLore", GaLore, 0.08, _LOW),
    Entry("GaLore-1.0", GaLore, 0.08, dict(compat="galore-1.0", **_LOW)),
    Entry("GaLore-8bit", GaLore, 0.08, dict(state_dtype="int8", **_LOW)),
    Entry("GaLore-full", GaLore, 0.08, dict(proj_type="full", **_LOW)),
    Entry("GaLore-bf16-basis", GaLore, 0.08, dict(basis_dtype="bf16", **_LOW)),
    Entry("GaLore-lazy-spread", GaLore, 0.08, dict(lazy=True, spread=True, **_LOW)),
    Entry("NaturalGaLore", NaturalGaLore, 0.08, dict(history=4, **_LOW)),
    Entry("NaturalGaLore-reset", NaturalGaLore, 0.08, dict(history=4, refresh="reset", **_LOW)),
    Entry("FRUGAL", FRUGAL, 0.02, dict(update_gap=GAP, weight_decay=0.0)),
    Entry("FRUGAL-columns", FRUGAL, 0.02, dict(projection="columns", update_gap=GAP, weight_decay=0.0)),
    Entry("FRUGAL-randk", FRUGAL, 0.02, dict(projection="randk", update_gap=GAP, weight_decay=0.0)),
    Entry("FRUGAL-block", FRUGAL, 0.02, dict(projection="block", update_gap=GAP, weight_decay=0.0)),
    Entry("FRUGAL-8bit", FRUGAL, 0.02, dict(update_gap=GAP, weight_decay=0.0, state_dtype="int8")),
    Entry("Fira", Fira, 0.05, _LOW),
    Entry("Apollo", Apollo, 0.05, _LOW),
    Entry("Apollo-svd", Apollo, 0.05, dict(proj="svd", **_LOW)),
    Entry("ApolloMini", ApolloMini, 0.05, dict(scale=1.0, update_proj_gap=GAP)),
    _grid("adafactor", rule="adafactor"),
    _grid("adafactor-eigh", rule="adafactor", projection="eigh", rank=4),
    _grid("adam_mini", rule="adam_mini"),
    _grid("adam_mini-power-sign", rule="adam_mini", projection="power", rank=4, residual="sign"),
    _grid("lion", 0.005, rule="lion"),
    _grid("lion-svd-reset", 0.01, rule="lion", projection="svd", rank=4, refresh="reset"),
    _grid("momentum", 0.1, rule="momentum"),
    _grid("momentum-power-sgd", 0.1, rule="momentum", projection="power", rank=4, residual="sgd"),
    _grid("momentum-semi_orthogonal-keep", 1.0, rule="momentum", projection="semi_orthogonal", rank=4,
          refresh="keep"),
    _grid("adam-gaussian-rotate", 0.05, projection="gaussian", rank=4, refresh="rotate"),
    _grid("adam-rademacher-scale-tensor", 0.05, projection="rademacher", rank=4, residual="scale_only",
          granularity="tensor", refresh="keep"),
    _grid("adam-rows-scaled", projection="rows", density=0.5, residual="scaled"),
    _grid("adam-randk-rotate-int4", projection="randk", density=0.5, refresh="rotate", state_dtype="int4",
          residual="sign"),
]  # fmt: skip


def small_model() -> nn.Module:
    """Matrices, a stack of experts, vectors and a scalar; large enough for quantised states."""
    return _Small()


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / shape[-1] ** 0.5)

        self.first = draw(80, 64)
        self.bias = nn.Parameter(torch.zeros(80))
        self.experts = draw(2, 24, 80)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(x @ self.first.T + self.bias)
        return self.scale * (hidden @ self.experts.mT).mean(0)


def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets that another such network would give."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 64, generator=generator)
    return x, torch.tanh(x @ torch.randn(64, 24, generator=generator) / 8)


def small_loss(model: nn.Module, rows: slice = slice(None)) -> torch.Tensor:
    """Summed over rows, over 48 of them: parts of a batch add up to the whole."""
    x, y = small_batch()
    dtype = next(model.parameters()).dtype
    return (model(x[rows].to(dtype)).float() - y[rows]).square().sum() / (48 * 24)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Losses before each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = small_loss(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
