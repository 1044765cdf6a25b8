"""How many bytes autograd keeps between forward and backward: every storage once."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class SavedBytes:
    """Counts what is saved for backward inside ``with``; a storage counts once, and with its whole size.

    Tensors are only looked at, and kept alive until the counter dies, so that no address is used twice.

    Args:
        without: tensors whose storages do not count, as a rule a model's parameters and buffers.
    """

    def __init__(self, without: Iterable[Tensor] = ()) -> None:
        self._fixed = {tensor.untyped_storage().data_ptr() for tensor in without}
        self._storages: dict[int, tuple[int, Tensor]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._look, lambda tensor: tensor)

    def _look(self, tensor: Tensor) -> Tensor:
        seen = tensor.detach()  # a node that held its own output would hold itself, and us, for good
        storage = seen.untyped_storage()
        if storage.data_ptr() not in self._fixed:
            self._storages.setdefault(storage.data_ptr(), (storage.nbytes(), seen))
        return seen

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        arguments: Any = (kind, error, trace)
        self._hooks.__exit__(*arguments)

    @property
    def total_bytes(self) -> int:
        """Of all storages seen."""
        return sum(size for size, _ in self._storages.values())
