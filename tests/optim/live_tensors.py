"""How many bytes of tensors are alive at most, as torch's dispatcher sees them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts storages that appear inside the ``with`` block, each once, until they are freed.

    Args:
        known: tensors that existed before.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, int] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, sum(self._alive.values()))
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known or storage._cdata in self._alive:
            return
        self._alive[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._alive.pop, storage._cdata, None)
