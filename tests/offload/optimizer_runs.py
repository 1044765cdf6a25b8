"""An ordinary training loop around a streamed optimizer, and what equality with plain PyTorch means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memtrain.offload.optimizer import OffloadedOptimizer
from memtrain.planner.actions import UpdateSchedule
from tests.offload.training import (
    Lion,
    batches,
)

SEQUENTIAL, AHEAD = UpdateSchedule.SEQUENTIAL, UpdateSchedule.AHEAD

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "lion": lambda p: Lion(p, lr=1e-2, decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def train(
    model: nn.Module,
    optimizer: OffloadedOptimizer,
    steps: int = 5,
    accumulate: int = 1,
    clip: Callable[[], Any] = lambda: None,
    scheduler: Any = None,
    zero: Callable[[], Any] | None = None,
    order: tuple[str, ...] = ("prologue", "block", "epilogue"),
) -> list[torch.Tensor]:
    """An ordinary loop, with the calls that pre-forward hooks make."""
    data, norms = iter(batches(steps * accumulate)), []
    for _ in range(steps):
        for _ in range(accumulate):
            for unit in order:
                optimizer.ensure(unit)
            (model(next(data)) / accumulate).backward()
        norms.append(clip())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        (zero or optimizer.zero_grad)()
    optimizer.flush()
    return norms


def assert_equal_models(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def assert_equal_state(optimizer: OffloadedOptimizer, model: nn.Module, plain: Any) -> None:
    """Every state tensor equals plain PyTorch's, and none is missing."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    reference = dict(zip(names, [p for g in plain.param_groups for p in g["params"]], strict=True))
    seen = 0
    for name, key, tensor in optimizer.iter_state():
        expected = reference[name] if key == "master_weight" else plain.state[reference[name]][key]
        assert torch.equal(tensor, expected), (name, key)
        seen += key != "master_weight"
    for name, scalars in optimizer.scalar_state().items():
        for key, value in scalars.items():
            assert value == plain.state[reference[name]][key]
            seen += 1
    assert seen == sum(len(state) for state in plain.state.values())
