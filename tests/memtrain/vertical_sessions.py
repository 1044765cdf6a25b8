"""A small Llama with several micro-batches a step, in plain PyTorch and in sessions in vertical order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import memtrain
from memtrain.recipe import Recipe
from tests.memtrain.sessions import MACHINE
from tests.memtrain.streamed_sessions import batch, optimizer_for
from tests.memtrain.tiny_runs import recipe_for

STEPS, COUNT = 2, 3


def data(step: int, count: int = COUNT) -> list[dict[str, torch.Tensor]]:
    return [batch(COUNT * step + micro) for micro in range(count)]


def plain(model: nn.Module) -> tuple[list[float], dict[str, torch.Tensor]]:
    """An ordinary loop with accumulation and clipping."""
    optimizer, found = optimizer_for(model), []
    for step in range(STEPS):
        for each in data(step):
            loss = model(**each).loss
            (loss / COUNT).backward()
            found.append(loss.item())
        found.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return found, model.state_dict()


def accumulated(session: memtrain.Session) -> list[float]:
    """The same with ``accumulate``."""
    found = []
    for step in range(STEPS):
        found += [loss.item() for loss in session.accumulate(data(step))]
        found.append(float(session.optimizer.clip_grad_norm_(0.5)))
        session.optimizer.step()
        session.optimizer.zero_grad()
    return found


def prepare(
    model: nn.Module,
    folder: Path,
    order: str = "vertical",
    *,
    schedule: str = "auto",
    force: dict[str, Any] | None = None,
    **arguments: Any,
) -> memtrain.Session:
    away = {"block": {"action": "keep"}, "state": {"weight_tier": "nvme"}}
    return memtrain.prepare(
        model,
        optimizer_for(model),
        batch(0),
        budget=memtrain.Budget(device="3GiB", nvme=f"{folder}:256MiB"),
        machine=MACHINE,
        options=memtrain.PlannerOptions(
            force=away if force is None else force, update_schedule=schedule, micro_batch_order=order
        ),
        **({"micro_batches": COUNT, "chunked_loss": False} | arguments),
    )


def recipe(folder: Path, order: str, **planner: Any) -> Recipe:
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": 256,
                "hidden_size": 256,
                "intermediate_size": 272,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            }
        },
        "budget": {"nvme": "256MiB"},
        "planner": {"micro_batch_order": order, **planner},
        "training": {"steps": 2, "accumulation": 3},
    }
    return recipe_for(folder / order, **sections)
