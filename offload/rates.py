"""Bytes per second of transfers that are kept under way: each direction alone, and both together."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from memtrain.offload.device import Device, Event
from memtrain.offload.slab import Ring
from memtrain.planner.units import MiB

TRANSFER_BYTES = 8 * MiB
TRANSFERS = 4  # in flight: 32 MiB a direction, 64 MiB with both, and as much again is never touched
_ROUNDS = 3  # of each pattern; the median counts


class Transfer(Protocol):
    """Bytes under way: a store's ticket, or a copy of the device."""

    @property
    def nbytes(self) -> int: ...

    def wait(self) -> None: ...


def copy_rates(device: Device, round_seconds: float) -> dict[str, float]:
    """Rates of copies between registered host memory and the device; ``read`` is towards the device."""
    ring = Ring(2 * TRANSFERS, TRANSFER_BYTES, device=device)
    try:
        slots = [ring.acquire().buffer for _ in range(2 * TRANSFERS)]
        for slot in slots:
            slot.zero_()  # or the first copy would take the page faults
        there = [device.empty(TRANSFER_BYTES).zero_() for _ in slots]
        pairs = list(zip(slots, there, strict=True))
        read = [partial(_copy, device.copy_in, slot, own) for slot, own in pairs[:TRANSFERS]]
        write = [partial(_copy, device.copy_out, own, slot) for slot, own in pairs[TRANSFERS:]]
        return median_rates(read, write, round_seconds)
    finally:
        ring.close()


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy as a transfer that can be waited for."""

    event: Event
    nbytes: int

    def wait(self) -> None:
        self.event.synchronize()


def _copy(
    start: Callable[[torch.Tensor, torch.Tensor], Event], source: torch.Tensor, target: torch.Tensor
) -> _Copy:
    return _Copy(start(source, target), source.numel())


def cpu_seconds() -> float:
    """Processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def median_rates(
    read: Sequence[Callable[[], Transfer]], write: Sequence[Callable[[], Transfer]], round_seconds: float
) -> dict[str, float]:
    """Bytes per second of each direction alone and of both together, rounds of the three in turn."""
    patterns = {
        "read": read,
        "write": write,
        "mixed": [f for pair in zip(read, write, strict=True) for f in pair],
    }
    rates: dict[str, list[float]] = {name: [] for name in patterns}
    for _ in range(_ROUNDS):
        for name, submit in patterns.items():
            rates[name].append(_rate(submit, round_seconds))
    return {name: statistics.median(values) for name, values in rates.items()}


def _rate(submit: Sequence[Callable[[], Transfer]], seconds: float) -> float:
    """Bytes per second with every transfer of ``submit`` under way all the time."""
    start = time.perf_counter()
    tickets = [again() for again in submit]
    moved, stopping = 0, False
    while not stopping:
        stopping = time.perf_counter() - start >= seconds
        for index, again in enumerate(submit):
            tickets[index].wait()
            moved += tickets[index].nbytes
            if not stopping:
                tickets[index] = again()
    return moved / (time.perf_counter() - start)
