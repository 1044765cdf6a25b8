"""A small Llama in plain PyTorch, and sessions that stream its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import memtrain
from tests.memtrain.sessions import MACHINE

STEPS = 3


def batch(step: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens, "labels": tokens}


def optimizer_for(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """An ordinary loop with accumulation and clipping."""
    found = []
    for step in range(STEPS):
        for micro in range(2):
            loss = model(**batch(2 * step + micro)).loss
            (loss / 2).backward()
            found.append(loss.item())
        found.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return found


def plain(model: nn.Module) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    return loop(model, optimizer_for(model)), model.state_dict()


def prepare(
    model: nn.Module, folder: Path, force: dict[str, Any], schedule: str = "auto", **arguments: Any
) -> memtrain.Session:
    return memtrain.prepare(
        model,
        optimizer_for(model),
        batch(0),
        budget=memtrain.Budget(device="3GiB", nvme=f"{folder}:256MiB"),
        micro_batches=2,
        machine=MACHINE,
        chunked_loss=False,
        options=memtrain.PlannerOptions(force=force, update_schedule=schedule),
        **arguments,
    )
