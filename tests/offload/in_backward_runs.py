"""Models wrapped under a schedule that updates in backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from memtrain.planner.actions import Tier, UpdateSchedule
from memtrain.planner.plan import Plan
from tests.offload.optimizer_runs import OPTIMIZERS
from tests.offload.training import batches, make_plan, open_engine, trainable, wrap

IN_BACKWARD = UpdateSchedule.IN_BACKWARD


ADAMW = OPTIMIZERS["adamw"]


def plan_of(
    micro_batches: int = 1, gradients: Tier = Tier.DEVICE, state: Tier = Tier.HOST, **other: Any
) -> Plan:
    plan = make_plan(IN_BACKWARD, gradients, state, **other)
    return dataclasses.replace(plan, micro_batches=micro_batches)


@contextmanager
def wrapped(model: nn.Module, micro_batches: int = 1, make: Any = ADAMW, **plan: Any) -> Iterator[Any]:
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, plan_of(micro_batches, **plan))
        yield optimizer


def run_one(model: nn.Module, index: int = 0) -> None:
    model(batches(index + 1)[index]).backward()
