"""Count what a kernel's code moves: every load and store of Triton's interpreter, by tensor.

    with count_traffic(x=x, weight=weight, y=y) as traffic:
        launch(...)
    traffic.moved_bytes(cached=["weight"])

Masked-out lanes move nothing. Bytes are counted as often as the code asks for them, except those of
``cached`` tensors: small operands that all blocks share and that stay in the L2 cache count once, however
often they are read. Tensors that a launch allocates itself are found under ``other``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor

OTHER = "other"


class Traffic:
    """Addresses read and written, per tensor."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._ranges = {n: (t.data_ptr(), t.data_ptr() + t.nbytes) for n, t in tensors.items()}
        self._reads: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in (*tensors, OTHER)}
        self._item_bytes: dict[str, int] = {}
        self._written_bytes = dict.fromkeys(self._reads, 0)
        self._read_bytes = dict.fromkeys(self._reads, 0)

    def note(self, pointers: Any, mask: Any, *, written: bool) -> None:
        """One load or store of the interpreter: ``pointers`` and ``mask`` are its tensor handles."""
        asked = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[asked].astype(np.int64).ravel()
        if not addresses.size:
            return
        name = next((n for n, (a, b) in self._ranges.items() if a <= addresses[0] < b), OTHER)
        item_bytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if written:
            self._written_bytes[name] += item_bytes * addresses.size
        else:
            self._read_bytes[name] += item_bytes * addresses.size
            self._item_bytes[name] = item_bytes
            self._reads[name].append(addresses)

    def read_bytes(self, name: str, *, once: bool = False) -> int:
        """Bytes read of one tensor; ``once``: however often."""
        if once and self._reads[name]:
            return self._item_bytes[name] * np.unique(np.concatenate(self._reads[name])).size
        return self._read_bytes[name]

    def written_bytes(self, name: str) -> int:
        """Bytes written to one tensor, as often as they are."""
        return self._written_bytes[name]

    def moved_bytes(self, cached: Sequence[str] = ()) -> int:
        """Everything read and written."""
        return sum(self.read_bytes(n, once=n in cached) + self.written_bytes(n) for n in self._reads)


@contextmanager
def count_traffic(**tensors: Tensor) -> Iterator[Traffic]:
    """Count while the block runs. The process must run Triton's interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    traffic = Traffic(tensors)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic = InterpreterBuilder.create_atomic_rmw

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.note(pointers, mask, written=False)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.note(pointers, mask, written=True)
        return store(self, pointers, value, mask, *rest)

    def counted_atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.note(pointers, mask, written=False)
        traffic.note(pointers, mask, written=True)
        return atomic(self, operation, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        patch.setattr(InterpreterBuilder, "create_atomic_rmw", counted_atomic)
        yield traffic
