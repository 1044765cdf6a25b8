"""The planned allocator behind torch's allocators for GPUs.

    arena = DeviceAllocator()
    torch.cuda.memory.change_current_allocator(arena.pluggable())   # before anything is on the GPU
    for batch in batches:
        with arena.step():
            ...

``change_current_allocator`` puts it in the place of torch's caching allocator: every tensor of a planned step
has the address that was planned, and what is made outside of steps has memory of its own (``cudaMalloc``,
which is slow and waits for the GPU). Behind ``torch.cuda.MemPool(arena.pluggable().allocator())`` torch's
caching allocator stands in front, and asks for whole segments: then the plan is of those.

A plan is for one stream of one device. What other streams ask for has memory of its own, and a block that
another stream has used (``Tensor.record_stream``) keeps its place until the next step begins, which waits for
the GPU then.

No GPU has run this: its C++ is tested with functions that stand in for cudaMalloc and cudaFree.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch

from memtrain.arena import library
from memtrain.arena.allocator import ArenaError, ArenaSettings, PlannedAllocator

ALIGNMENT_BYTES = 512
"""Of every address: what cudaMalloc and torch's caching allocator give."""


class DeviceAllocator(PlannedAllocator):
    """As ``PlannedAllocator``, of one GPU's memory; one step at a time in a process.

    Args:
        settings: as there; every request is planned unless ``smallest_bytes`` says otherwise.
        take, give: addresses of functions with the signatures of cudaMalloc and cudaFree; None: those of the
            CUDA runtime that torch has loaded.
        synchronise: waits until the GPU has done what it was given.

    Raises:
        ArenaError: no CUDA runtime is loaded.
    """

    _ALIGNMENT_BYTES = ALIGNMENT_BYTES

    def __init__(
        self,
        settings: ArenaSettings | None = None,
        *,
        take: int | None = None,
        give: int | None = None,
        synchronise: Callable[[], object] = torch.cuda.synchronize,
    ) -> None:
        self._synchronise = synchronise
        if take is None or give is None:
            runtime = _runtime()
            take = ctypes.cast(runtime.cudaMalloc, ctypes.c_void_p).value
            give = ctypes.cast(runtime.cudaFree, ctypes.c_void_p).value
        super().__init__(settings or ArenaSettings(smallest_bytes=1))
        if self._library is not None:
            self._library.memtrain_device_use(take, give)

    def _load(self) -> ctypes.CDLL:
        return library.load_device()

    def begin(self, key: Hashable = None) -> None:
        """As ``PlannedAllocator.begin``; waits for the GPU where other streams have used what was freed."""
        if self._library is not None and self._library.memtrain_device_lingering():
            self._synchronise()
            self._library.memtrain_device_settle()
        super().begin(key)

    def pluggable(self) -> Any:
        """For ``torch.cuda.memory.change_current_allocator``, or its ``allocator()`` for ``MemPool``.

        Raises:
            ArenaError: there is no compiler.
        """
        if self._library is None:
            raise ArenaError("the planned allocator was not compiled: install g++ or set CXX")
        made = torch.cuda.memory.CUDAPluggableAllocator(
            self._library._name, "memtrain_device_alloc", "memtrain_device_free"
        )
        hook = ctypes.cast(self._library.memtrain_device_record_stream, ctypes.c_void_p).value
        made.allocator().set_record_stream_fn(hook)  # type: ignore[no-untyped-call]
        return made


def _runtime(maps: Path = Path("/proc/self/maps")) -> ctypes.CDLL:
    """The CUDA runtime of this process: another copy would know nothing of torch's context."""
    for line in maps.read_text().splitlines():
        path = line.split()[-1]
        if Path(path).name.startswith("libcudart"):
            return ctypes.CDLL(path)
    raise ArenaError("no CUDA runtime (libcudart) is loaded: this allocator is for torch built with CUDA")
