"""A small training run whose gradients and optimizer state lie on a disk, and the run that never failed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.io import IOBackend
from memtrain.offload.tiers import NvmeStore, Store
from memtrain.planner.actions import UpdateSchedule
from memtrain.planner.plan import Staging
from tests.offload.snapshot_runs import AHEAD, Run, adamw
from tests.offload.training import STAGING, make_model, make_plan, plain_run, trainable, wrap

CAPACITY = 8 << 20
"""Bytes; gradients take 1.3 MiB, states 2.6 MiB."""


@contextmanager
def open_run_on(
    store: Store, *, schedule: UpdateSchedule = AHEAD, staging: Staging = STAGING, make: Any = adamw
) -> Iterator[Run]:
    """A session over a store of any tier; the store is closed with it."""
    model = make_model()
    with Engine({store.tier: store}, make_device("cpu")) as engine:
        plan = make_plan(schedule, store.tier, store.tier, staging)
        optimizer = wrap(model, make(trainable(model)), engine, plan, elementwise=True)
        try:
            yield Run(model, optimizer)
        finally:
            optimizer.close()


@contextmanager
def open_run_in(directory: Path, *, backend: IOBackend | None = None, **options: Any) -> Iterator[Run]:
    """The same in a swap directory."""
    with open_run_on(NvmeStore(directory, CAPACITY, backend=backend), **options) as run:
        yield run


def disk_of(run: Run) -> NvmeStore:
    """Where the run's state is."""
    store = next(iter(run.optimizer.gradients.homes.values())).store
    assert isinstance(store, NvmeStore)
    return store


@functools.cache
def expected(steps: int) -> dict[str, torch.Tensor]:
    """Weights after so many steps of plain PyTorch."""
    model, _, _ = plain_run(adamw, steps=steps)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_trained(run: Run, steps: int) -> None:
    """The run's weights are those of plain PyTorch, bit for bit."""
    run.flush()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, expected(steps)[name]), name
