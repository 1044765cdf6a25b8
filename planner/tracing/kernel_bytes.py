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


def with_peak(call: Callable[[], _Result]) -> tuple[_Result, int]:
    """What ``call`` returns, and the most that it had of the CPU's memory at once, its results included,
    beyond what was there before; 0 where nobody can tell: under somebody's profiler, or another torch."""
    profiler: Any = torch.autograd
    try:
        config = _config()
        if profiler._profiler_enabled():
            return call(), 0
        begin, end = profiler._enable_profiler_legacy, profiler._disable_profiler_legacy
    except AttributeError:
        return call(), 0
    begin(config)
    try:
        result = call()
    finally:
        records = end()
    now_bytes = peak_bytes = 0
    for record in (record for thread in records for record in thread):
        if record.kind() == "memory_alloc":
            now_bytes += record.cpu_memory_usage()
            peak_bytes = max(peak_bytes, now_bytes)
    return result, peak_bytes


def _config() -> Any:
    """Memory, and nothing else."""
    known: Any = torch._C._profiler
    profiler: Any = torch.autograd
    return profiler.ProfilerConfig(
        profiler.ProfilerState.CPU, False, True, False, False, False, known._ExperimentalConfig()
    )
