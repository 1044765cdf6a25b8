"""What Python's objects of a real session take grows with depth as the bill says, and by no more."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import torch
from torch import nn

import memtrain
from memtrain.planner.actions import Tier
from tests.memtrain.sessions import MACHINE

WIDTH = 320  # 320 * 320 = 102,400 elements: enough to leave memory
EVERYTHING_AWAY = {
    "block": {"action": "swap", "saved_tier": "nvme"},
    "state": {"gradient_tier": "nvme", "optimizer_tier": "nvme", "weight_tier": "nvme"},
}


class Block(nn.Module):
    """Three parameters that leave and one that stays, as a block of a Llama has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.norm(hidden)
        for layer in self.layers:
            inner = torch.tanh(layer(inner))
        return hidden + inner


def objects_and_bill(folder: Path, blocks: int) -> tuple[int, int]:
    """Bytes that Python holds after two steps of a session and did not before, and the line of the bill."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(blocks)))
    optimizer = torch.optim.AdamW(model.parameters())
    sample = torch.randn(2, WIDTH)
    folder.mkdir()
    gc.collect()
    tracemalloc.start(1)
    try:
        session = memtrain.prepare(
            model,
            optimizer,
            sample,
            budget=memtrain.Budget(device="3GiB", nvme=f"{folder}:1GiB"),
            machine=MACHINE,
            options=memtrain.PlannerOptions(force=EVERYTHING_AWAY),
        )
        with session:
            for _ in range(2):
                model(sample).sum().backward()
                session.optimizer.step()
                session.optimizer.zero_grad()
            gc.collect()
            held, _ = tracemalloc.get_traced_memory()
            lines = {line.category: line.size_bytes for line in session.plan.bill if line.tier is Tier.DEVICE}
    finally:
        tracemalloc.stop()
    return held, lines["bookkeeping"]


def test_objects_grow_by_no_more_than_the_bill_says(tmp_path: Path) -> None:
    """Nor by much less: a quarter of it at least, for the line is of memory that others could use."""
    objects_and_bill(tmp_path / "first", 2)  # what is imported on the way
    few, many = (objects_and_bill(tmp_path / str(blocks), blocks) for blocks in (2, 10))
    grown, billed = (high - low for high, low in zip(many, few, strict=True))
    assert billed / 4 < grown <= billed
