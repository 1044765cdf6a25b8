"""Saved tensors that stay where they are: parameters, buffers, shared arguments, what is too small to move.

Autograd checks that a saved tensor was not changed in place, but not for tensors that pass through
saved-tensor hooks: there the hooks must, or a training step goes on with the wrong value in silence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from memtrain.offload.away import is_away
from memtrain.offload.errors import OffloadError, SavedTensorModifiedError


class FixedTensors:
    """Storages that no executor may move: parameters and buffers of the model.

    ``refresh`` is called at every forward pass of the model, since ``load_state_dict(assign=True)`` and
    friends replace storages; between two refreshes the model itself keeps the storages alive, so an
    address cannot have been reused.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._addresses: frozenset[int] = frozenset()
        self.refresh()

    def refresh(self) -> None:
        """Look at the model's parameters and buffers again."""
        tensors = [
            p
            for module in self._model.modules()
            for p in module._parameters.values()
            if p is not None and not is_away(p)
        ]
        tensors += [b for module in self._model.modules() for b in module._buffers.values() if b is not None]
        self._addresses = frozenset(t.untyped_storage().data_ptr() for t in tensors)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._addresses


@dataclass(slots=True)
class Unmoved:
    """A saved tensor by reference, with the version that was saved."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Unmoved:
        """Remember ``tensor`` as it is now."""
        # Detached (the version is shared): a node that saves its own result would otherwise hold itself
        # through us, a cycle that runs through C++ and that no collector sees.
        return cls(tensor.detach(), tensor._version)

    def get(self) -> torch.Tensor:
        """The tensor. Raises SavedTensorModifiedError when it has been changed in place since."""
        if self.tensor._version != self.version:
            raise SavedTensorModifiedError(
                f"a tensor of shape {tuple(self.tensor.shape)} that backward needs was changed in place "
                f"after forward had saved it (version {self.version}, now {self.tensor._version}); call "
                f"backward before the change, or avoid the in-place operation"
            )
        return self.tensor


@contextlib.contextmanager
def unchanged(name: str, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Raise OffloadError if block ``name`` changes one of ``tensors`` in place inside: its forward runs more
    than once, and would change it each time."""
    versions = [tensor._version for tensor in tensors]
    yield
    for tensor, version in zip(tensors, versions, strict=True):
        if tensor._version != version:
            raise OffloadError(
                f"{name}: its forward changes a tensor of shape {tuple(tensor.shape)} in place, an argument "
                "or a buffer such as BatchNorm's statistics, and would do so again in backward: keep or swap "
                "this block"
            )


def shared_storages(args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int]:
    """Storages of all tensor arguments but the first: masks and tables, which the other blocks get too."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors[1:])
