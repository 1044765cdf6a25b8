"""Memory that a kernel takes for itself while it runs: on no tensor that a program sees, and on the bill.

A CPU without bf16 arithmetic sums a product in fp32 and rounds it at the end: three times the bytes of its
output are there meanwhile, 113 MB more for the gradient of SmolLM2-135M's head. torch's allocator reports
every request of a thread to the profiler; the legacy one costs 30 microseconds an operator and writes nothing
to the terminal. What a library asks of the system itself is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")
_NEEDED = (
    "ProfilerConfig",
    "ProfilerState",
    "_disable_profiler_legacy",
    "_enable_profiler_legacy",
    "_profiler_enabled",
)
"""Of ``torch.autograd``: no public name of torch's tells what a kernel asks for."""


def with_peak(call: Callable[[], _Result]) -> tuple[_Result, int]:
    """What ``call`` returns, and the most that it had of the CPU's memory at once, its results included,
    beyond what was there before; 0 where nobody can tell: under somebody's profiler, or another torch."""
    if hidden():
        return call(), 0
    profiler: Any = torch.autograd
    profiler._enable_profiler_legacy(_config())
    try:
        result = call()
    finally:
        records = profiler._disable_profiler_legacy()
    now_bytes = peak_bytes = 0
    for record in (record for thread in records for record in thread):
        if record.kind() == "memory_alloc":
            now_bytes += record.cpu_memory_usage()
            peak_bytes = max(peak_bytes, now_bytes)
    return result, peak_bytes


def hidden() -> str:
    """Why nothing can be seen in this thread now; empty where it can."""
    profiler: Any = torch.autograd
    if not all(hasattr(profiler, name) for name in _NEEDED):
        return f"torch {torch.__version__} has no legacy profiler"
    return "a profiler is running" if profiler._profiler_enabled() else ""


def _config() -> Any:
    """Memory, and nothing else."""
    known: Any = torch._C._profiler
    profiler: Any = torch.autograd
    return profiler.ProfilerConfig(
        profiler.ProfilerState.CPU, False, True, False, False, False, known._ExperimentalConfig()
    )
