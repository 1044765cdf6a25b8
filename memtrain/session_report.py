"""What a session measures of itself, and says: prediction beside measurement."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping

from memtrain.coding import coding_text
from memtrain.offload.device import Device
from memtrain.offload.engine import Engine
from memtrain.offload.parameters import ParameterStreamer
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Budget
from memtrain.planner.plan import Plan, describe_windows
from memtrain.planner.units import format_gib

_WARM_UP_STEPS = 1  # the first step creates state and touches memory for the first time


class SessionMeter:
    """The device's bytes and the times of steps, from when it is made.

    Args:
        device: its peak so far is taken down, and counts anew from here.
        began_peak_bytes: the device's peak before ``prepare``.
        libraries_bytes: context and libraries on a GPU, of which its allocator knows nothing.
    """

    def __init__(self, device: Device, began_peak_bytes: int, libraries_bytes: int) -> None:
        self._device = device
        self._libraries_bytes = libraries_bytes
        self._prepared_peak_bytes = max(began_peak_bytes, device.peak_bytes())
        self._step_ends: list[float] = []
        device.reset_peak()

    def note_step(self) -> None:
        """A step has ended."""
        self._step_ends.append(time.perf_counter())

    def peak_bytes(self) -> int:
        """The device's, since this meter was made or the device's ``reset_peak`` was called."""
        return self._device.peak_bytes() + self._libraries_bytes

    def used_bytes(self) -> int:
        """What the job occupies of the device now."""
        return self._device.used_bytes() + self._libraries_bytes

    def measure(self, plan: Plan, budget: Budget) -> dict[str, float]:
        """``Session.measure``."""
        peak = self.peak_bytes()
        process = max(peak, self._prepared_peak_bytes + self._libraries_bytes)
        ends = self._step_ends[_WARM_UP_STEPS:]
        seconds = [b - a for a, b in itertools.pairwise(ends)]
        return {
            "predicted_peak_bytes": plan.peak(Tier.DEVICE),
            "peak_bytes": peak,
            "process_peak_bytes": process,
            "budget_bytes": budget.device_bytes,
            "predicted_step_seconds": plan.step_seconds,
            "step_seconds": statistics.median(seconds) if seconds else float("nan"),
            "steps": len(self._step_ends),
        }


def comparison_lines(found: Mapping[str, float]) -> list[str]:
    """Of what ``Session.measure`` has found."""
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        ("peak", found["predicted_peak_bytes"], found["peak_bytes"], lambda v: format_gib(int(v))),
        ("step", found["predicted_step_seconds"], found["step_seconds"], lambda v: f"{v:.3f} s"),
    ]
    lines = [f"{'':6}{'predicted':>14}{'measured':>14}{'error':>9}"]
    for name, predicted, measured, show in rows:
        if measured != measured:
            lines.append(f"{name:6}{show(predicted):>14}{'not yet':>14}")
            continue
        error = (predicted - measured) / measured
        lines.append(f"{name:6}{show(predicted):>14}{show(measured):>14}{error:>+9.1%}")
    lines.append(f"budget {format_gib(int(found['budget_bytes']))}, steps {int(found['steps'])}")
    return lines


def weight_lines(weights: ParameterStreamer | None) -> list[str]:
    """What streaming weights has done so far; none where all stay on the device."""
    if weights is None:
        return []
    found = weights.statistics()
    return [
        f"weights of {len(weights.streamed)} units streamed through {describe_windows(weights.windows)}: "
        f"{found.reads} reads, {found.waits} of them waited for; "
        f"read {format_gib(found.bytes_read)}, wrote {format_gib(found.bytes_written)}"
    ]


def tier_lines(engine: Engine) -> list[str]:
    """What was read from and written to each tier."""
    return [
        f"{tier.value}: read {format_gib(statistics_.bytes_read)}, "
        f"wrote {format_gib(statistics_.bytes_written)}"
        for tier, statistics_ in engine.statistics().items()
    ]


def coding_lines(engine: Engine) -> list[str]:
    """What coding has done so far, a line for each tier and kind; none without a codec."""
    states = [coding_text(tier, "optimizer state", name, done) for tier, name, done in engine.state_coding()]
    return states + [coding_text(tier, "weights", name, done) for tier, name, done in engine.weight_coding()]
