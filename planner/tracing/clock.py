"""Seconds, where a device may still be working when a call has returned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_stopped_seconds = 0.0


def now(device: torch.device) -> float:
    """The clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - _stopped_seconds


@contextmanager
def stopped() -> Iterator[None]:
    """What happens inside takes no time by this clock."""
    global _stopped_seconds
    start = time.perf_counter()
    try:
        yield
    finally:
        _stopped_seconds += time.perf_counter() - start
