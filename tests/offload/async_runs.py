"""Sessions whose state is on a disk, folders compared byte for byte, and a disk that can be held up."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from memtrain.offload.async_snapshot import AsyncCheckpointer
from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.placed import PlacedFile
from memtrain.offload.tiers import NvmeStore
from memtrain.planner.actions import Tier
from tests.offload.snapshot_runs import Run, adamw
from tests.offload.training import make_model, make_plan, trainable, wrap

RECORD_BYTES = 2 * 49_152 * 4
"""Of the largest shard: 50,000 elements are 24 times 2048 and a rest; two fp32 tensors."""


def shared_memory_names() -> list[str]:
    """What has a name in shared memory, but for what torch and Python make there and remove at once: other
    tests may run beside this one."""
    return sorted(name for name in os.listdir("/dev/shm") if not name.startswith(("torch_", "sem.")))


@contextmanager
def nvme_run(
    directory: Path,
    schedule: Any,
    dtype: torch.dtype = torch.float32,
    tier: Tier = Tier.NVME,
    codecs: Any = None,
    make: Any = adamw,
    device: Any = None,
    **config: Any,
) -> Iterator[Run]:
    """A run whose optimizer state, and gradients, are in a swap file."""
    directory.mkdir(exist_ok=True)
    model = make_model(dtype)
    with Engine({Tier.NVME: NvmeStore(directory, 64 << 20)}, device or make_device("cpu"), codecs) as engine:
        plan = make_plan(schedule, gradient_tier=Tier.NVME, optimizer_tier=tier)
        optimizer = wrap(model, make(trainable(model)), engine, plan, **config)
        try:
            yield Run(model, optimizer)
        finally:
            optimizer.close()


def assert_same_folders(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


class Gate:
    """Holds the thread of a snapshot up before its nth write, until it is opened."""

    def __init__(self, monkeypatch: Any, after: int = 0) -> None:
        self.reached, self._opened, self._writes = threading.Event(), threading.Event(), 0
        real = PlacedFile.write

        def write(file: PlacedFile, data: Any, offset: int) -> None:
            self._writes += 1
            if self._writes > after:
                self.reached.set()
                assert self._opened.wait(60)
            real(file, data, offset)

        monkeypatch.setattr(PlacedFile, "write", write)

    def open(self) -> None:
        self._opened.set()

    def open_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self.open)
        timer.daemon = True
        timer.start()


__all__ = ["RECORD_BYTES", "AsyncCheckpointer", "Gate", "assert_same_folders", "nvme_run"]
