"""What a profile says of weights that may live on a tier, worked out by hand from a small model's shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtrain.planner.profile import UnitProfile
from memtrain.planner.trace import profile_model

PAGE = 4096
WIDTH = 272
MATRIX = WIDTH * WIDTH * 4  # 295,936 bytes: 72.25 pages
TABLE = 300 * WIDTH * 4  # 326,400 bytes: 79.7 pages


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.one = nn.Linear(WIDTH, WIDTH, bias=False)
        self.two = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.two(self.one(self.norm(hidden)).relu())


class Net(nn.Module):
    """Its head is its table, used as a weight, as a module of its own, or not at all."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head = head
        self.table = nn.Embedding(300, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.layers[2].one.weight = self.layers[0].one.weight  # type: ignore[union-attr,assignment]
        self.norm = nn.LayerNorm(WIDTH)
        if head == "module":
            self.out = nn.Linear(WIDTH, 300, bias=False)
            self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.norm(hidden)
        if self.head == "module":
            hidden = self.out(hidden)
        elif self.head == "weight":
            hidden = hidden @ self.table.weight.t()
        return hidden.float().sum()


def units_of(head: str, **arguments: Any) -> dict[str, UnitProfile]:
    torch.manual_seed(0)
    dtype = arguments.pop("dtype", torch.float32)
    model = Net(head).to(dtype)
    model.layers[1].two.weight.requires_grad_(False)  # type: ignore[union-attr]
    profile = profile_model(
        model,
        torch.zeros(1, 4, dtype=torch.int64),
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        elementwise=True,
        **arguments,
    )
    return {unit.name: unit for unit in profile.units}


@pytest.mark.parametrize(("head", "borrows"), [("module", True), ("weight", True), ("none", False)])
def test_bytes_and_ties_by_hand(head: str, borrows: bool) -> None:
    units = units_of(head)
    norm = 2 * WIDTH * 4
    found = {
        name: (u.weight_bytes, u.movable_weight_bytes, u.weight_extent_bytes, u.written_extent_bytes)
        for name, u in units.items()
    }
    assert found == {
        "prologue": (TABLE, TABLE, 80 * PAGE, 80 * PAGE),
        "layers.0": (norm + 2 * MATRIX, 2 * MATRIX, 2 * 73 * PAGE, 2 * 73 * PAGE),
        "layers.1": (norm + 2 * MATRIX, 2 * MATRIX, 2 * 73 * PAGE, 73 * PAGE),
        "layers.2": (norm + MATRIX, MATRIX, 73 * PAGE, 73 * PAGE),
        "epilogue": (norm, 0, 0, 0),
    }
    assert {name: u.borrows for name, u in units.items() if u.borrows} == {"layers.2": ("layers.0",)} | (
        {"epilogue": ("prologue",)} if borrows else {}
    )
    assert not any(unit.overwritten for unit in units.values())


def test_masters_make_weights_of_low_precision_anew() -> None:
    units = units_of("none", dtype=torch.bfloat16, master_weights=True)
    # Half of layers.1 is frozen and must be read.
    assert {name for name, unit in units.items() if unit.overwritten} == {"prologue", "layers.0", "layers.2"}
