"""What every test runs under: one thread of arithmetic, no hub, no clock for hypothesis.

One thread keeps the tests quick beside each other on small machines; it has to be in the environment before
torch is imported, and reaches the processes that tests start.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MEMTRAIN_MALLOC_TUNED", "1")  # no test needs the process started twice
# Triton reads it when it is first imported, and torch or transformers may do that before any kernel's test.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Helpers with assertions, which are to hold under ``python -O`` too: named before any test imports them.
pytest.register_assert_rewrite(
    *(f"tests.offload.faults.{name}" for name in ("disks", "runs_on_disk")),
    *(f"tests.offload.{name}" for name in ("optimizer_runs", "snapshot_runs", "training", "tier_stores")),
)
settings.register_profile("memtrain", deadline=None, max_examples=50)
settings.load_profile("memtrain")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
