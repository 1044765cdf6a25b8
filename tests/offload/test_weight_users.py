"""How many units are in memory at one time: what stands behind the blocks, with a tile beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.parameters import ParameterStreamer
from memtrain.optim.autograd.tiled_linear import Tile, TiledLinear
from memtrain.planner.actions import Tier
from tests.offload.streamed import open_engine

SIDE = 256
"""Its square are the fewest elements that are streamed."""


class Tailed(nn.Module):
    """A block, and behind it two layers whose weights the model's own code uses, and one in tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.front = TiledLinear(nn.Linear(SIDE, 2 * SIDE), out_tiles=2, in_tiles=1)
        self.block = nn.Linear(2 * SIDE, SIDE)
        self.tail = nn.Linear(SIDE, SIDE, bias=False)
        self.after = nn.Linear(SIDE, SIDE, bias=False)
        self.head = TiledLinear(nn.Linear(SIDE, 2 * SIDE), out_tiles=2, in_tiles=1)

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.block(self.front(rows).tanh()).tanh()
        rows = rows @ self.tail.weight.T + rows @ self.after.weight.T
        logits: Tensor = self.head(rows)
        return logits + (rows @ self.after.weight.T).sum(-1, keepdim=True)


def test_a_tile_behind_the_blocks_comes_beside_what_is_held_there() -> None:
    torch.manual_seed(0)
    plain = Tailed()
    model = copy.deepcopy(plain)
    tiles = [(name, module) for name, module in model.named_modules() if isinstance(module, Tile)]
    layers = {"block": model.block, "tail": model.tail, "after": model.after, **dict(tiles)}
    names = [name for name, _ in tiles if name.startswith("front")]
    names += ["block", "tail", "after", *(name for name, _ in tiles if name.startswith("head"))]
    units = [(name, [(f"{name}.weight", layers[name].weight)]) for name in names]
    rows = torch.randn(3, SIDE)
    with open_engine() as engine:

        def streaming(slots: int | None) -> ParameterStreamer:
            return ParameterStreamer(
                model,
                [("block", model.block)],
                units,
                tiers=dict.fromkeys(names, Tier.HOST),
                engine=engine,
                slots=slots,
                tiles=[tile for _, tile in tiles],
            )

        with pytest.raises(PlanMismatchError, match="must have at least 3 for this model, got 2"):
            streaming(2)
        streamer = streaming(None)
        assert [window.slots for window in streamer.windows] == [3]
        streamer.install()
        for one in (plain, model):
            one(rows).square().mean().backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
        assert streamer.statistics().peak_in_use == 3
        streamer.remove()
