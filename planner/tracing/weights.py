"""Where the tracer finds a model's weights: in memory, or on a tier from which they are brought in turn."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn

from memtrain.planner.tracing.live_bytes import storage_id


class Weights(Protocol):
    """What the tracer asks about weights."""

    def present(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside, these are in memory, and nothing is read or written."""

    def key(self, tensor: Tensor) -> int:
        """What tells the weight, or else the storage, in which ``tensor`` lies from every other one that
        lives: of a weight the same whether or not it is in memory."""

    def size_bytes(self, tensor: Tensor) -> int:
        """Of that weight or storage."""

    def stays(self, parameter: nn.Parameter) -> bool:
        """Whether it is always in memory."""

    def memory_bytes(self) -> int:
        """What is resident, from now on, for bringing the others."""


class InMemory:
    """All of them, always."""

    def present(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def key(self, tensor: Tensor) -> int:
        """Of the storage."""
        return storage_id(tensor)

    def size_bytes(self, tensor: Tensor) -> int:
        """Of the storage."""
        return tensor.untyped_storage().nbytes()

    def stays(self, parameter: nn.Parameter) -> bool:
        """It does."""
        return True

    def memory_bytes(self) -> int:
        """Nothing."""
        return 0


def unique_bytes(tensors: Iterable[Tensor | None], weights: Weights | None = None) -> int:
    """Of the storages of ``tensors``, each counted once; None among them is passed over."""
    found = weights or InMemory()
    return sum({found.key(t): found.size_bytes(t) for t in tensors if t is not None}.values())
