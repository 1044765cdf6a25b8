"""A small model with what is awkward, plain PyTorch around it, and sessions of it on a made-up machine."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import nn

import memtrain
from memtrain.planner import resident
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Link, Machine

WIDTH = 272  # 272 * 272 = 73,984 elements: enough to leave memory
MACHINE = Machine(
    name="test",
    device="cpu",
    cores=2,
    dram_copy_bytes_per_second=5e9,
    links=(
        Link(
            tier=Tier.NVME,
            read_bytes_per_second=2e9,
            write_bytes_per_second=2e9,
            mixed_bytes_per_second=2e9,
        ),
    ),
)
EVERYTHING_AWAY = {
    "block": {"action": "swap", "saved_tier": "nvme"},
    "state": {"gradient_tier": "nvme", "optimizer_tier": "nvme"},
}


def budget_beyond_now(room_bytes: int, directory: Path) -> memtrain.Budget:
    """So much more than this process has in use. What other tests have freed may go at any time."""
    gc.collect()
    resident.trim()
    return memtrain.Budget(device=resident.rss_bytes() + room_bytes, nvme=f"{directory}:2GiB")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.one = nn.Linear(WIDTH, WIDTH)
        self.two = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.dropout(self.two(torch.tanh(self.one(self.norm(hidden)))), 0.1, self.training)


class Net(nn.Module):
    """A tied table, blocks, and a head that is used as a weight only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 300, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = nn.functional.linear(hidden, self.head.weight) + hidden @ self.table.weight.t()
        return torch.logsumexp(logits, -1).mean()


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 300, (4, 8), generator=torch.Generator().manual_seed(step))


def large(step: int) -> torch.Tensor:
    """Tokens of which a block saves more bytes than its weights have."""
    return torch.randint(0, 300, (8, 64), generator=torch.Generator().manual_seed(step))


def build() -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[Any]:
    """An ordinary loop, which knows nothing of memtrain."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    found: list[Any] = []
    for step in range(steps):
        for micro in range(2):
            loss = model(tokens(2 * step + micro))
            (loss / 2).backward()
            found.append(loss.item())
        found.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return found


def prepare(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, **arguments: Any
) -> memtrain.Session:
    options = arguments.pop("options", memtrain.PlannerOptions(force=EVERYTHING_AWAY))
    budget = arguments.pop("budget", memtrain.Budget(device="3GiB", nvme=f"{folder}:1GiB"))
    return memtrain.prepare(
        model,
        optimizer,
        (tokens(0),),
        budget=budget,
        micro_batches=2,
        options=options,
        machine=MACHINE,
        **arguments,
    )
