"""Bytes that a run of operators has alive: every storage from its birth to its death, and their peak."""

from __future__ import annotations

import time
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memtrain.planner.tracing.kernel_bytes import with_peak


def storage_id(tensor: Tensor) -> int:
    """What tells the storage of ``tensor`` from every other one that lives."""
    return int(tensor.untyped_storage()._cdata)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested containers; of a sparse one its indices and values, which have the storages."""
    found: list[Tensor] = []
    for leaf in torch.utils._pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            sparse = leaf.layout is torch.sparse_coo
            found += [leaf._indices(), leaf._values()] if sparse else [leaf]
    return found


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages born while the mode was on and still alive, and their peak, on a CPU with what
    kernels take for themselves.

    Also the outputs of attention kernels and the seconds spent in them. Of two, one inside the other, the
    inner alone sees what kernels take for themselves.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self.attention: dict[int, int] = {}
        self.attention_seconds = 0.0
        self._born: dict[weakref.ref[Any], int] = {}

    def forget(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` no longer: it stands for one that lies elsewhere."""
        self.now_bytes -= self._born.pop(weakref.ref(tensor.untyped_storage()))

    def restart_peak(self) -> None:
        """Count the peak from what is alive now."""
        self.peak_bytes = self.now_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {storage_id(t) for t in tensors_in((args, kwargs))}
        before_bytes, seconds = self.now_bytes, 0.0

        def call() -> Any:
            nonlocal seconds
            started = time.perf_counter()
            out = func(*args, **kwargs)
            seconds = time.perf_counter() - started
            return out

        out, inside_bytes = with_peak(call)
        name = func._schema.name
        fresh = {storage_id(t): t for t in tensors_in(out) if storage_id(t) not in known}
        if name == "aten::set_":  # a view of a storage that was there before
            fresh = {}
        for tensor in fresh.values():
            storage = tensor.untyped_storage()
            self._born[weakref.ref(storage, self._died)] = storage.nbytes()
            self.now_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.now_bytes, before_bytes + inside_bytes)
        if "attention" in name and "backward" not in name:
            self.attention_seconds += seconds
            self.attention.update((key, t.untyped_storage().nbytes()) for key, t in fresh.items())
        return out

    def _died(self, ref: weakref.ref[Any]) -> None:
        self.now_bytes -= self._born.pop(ref)
