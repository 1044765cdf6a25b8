"""Sessions that a checkpoint is taken of, and what equality of two of them means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memtrain.planner.actions import UpdateSchedule
from tests.offload.training import (
    make_model,
    open_engine,
    trainable,
    wrap,
)

SEQUENTIAL, AHEAD = UpdateSchedule.SEQUENTIAL, UpdateSchedule.AHEAD

UNITS = ("prologue", "block", "epilogue")


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.99))


@dataclass
class Run:
    """A session of three things, which is all that a checkpoint asks for."""

    model: nn.Module
    optimizer: Any

    def flush(self) -> None:
        self.optimizer.flush()

    def train(self, data: list[torch.Tensor]) -> None:
        for batch in data:
            for unit in UNITS:
                self.optimizer.ensure(unit)
            self.model(batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


@contextmanager
def open_run(
    plan: Any = None,
    dtype: torch.dtype = torch.float32,
    make: Any = adamw,
    seed_weights: bool = True,
    **config: Any,
) -> Iterator[Run]:
    model = make_model(dtype)
    if not seed_weights:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, plan, **config)
        yield Run(model, optimizer)
        optimizer.close()


def states(optimizer: Any) -> dict[tuple[str, str], torch.Tensor]:
    return {(name, key): tensor for name, key, tensor in optimizer.iter_state()}


def assert_same(one: Run, other: Run) -> None:
    one.flush()
    other.flush()
    for (name, p), q in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    ours, theirs = states(one.optimizer), states(other.optimizer)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[place], theirs[place]) for place in ours)
    assert one.optimizer.scalar_state() == other.optimizer.scalar_state()
