"""Where the tokens lie in a tensor and in its storage, and how stored and recomputed rows become one again.

Index letters: a row of the batch has ``T`` tokens, of which the first ``r`` are computed again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from memtrain.offload.unmoved import Unmoved

Unpack = Callable[[Any], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowAxis:
    """The dimension of a tensor in which its tokens lie, alone or folded with another one."""

    dim: int
    leading: bool = False
    """Of a dimension with more entries than tokens: whether those of one token lie together ([T, B] folded)
    or those of one row of the batch do ([B, T] folded)."""

    def rows(self, tensor: torch.Tensor, tokens: int, start: int, stop: int) -> torch.Tensor:
        """The view of tokens ``start`` to ``stop`` of a tensor with ``tokens`` of them."""
        size = tensor.shape[self.dim]
        if size == tokens:
            return tensor.narrow(self.dim, start, stop - start)
        folds = (tokens, size // tokens) if self.leading else (size // tokens, tokens)
        split = tensor.view(*tensor.shape[: self.dim], *folds, *tensor.shape[self.dim + 1 :])
        return split.narrow(self.dim + (not self.leading), start, stop - start)

    def fits(self, shape: torch.Size, tokens: int) -> bool:
        """Whether a tensor of this shape can have ``tokens`` tokens here."""
        return self.dim < len(shape) and shape[self.dim] > 0 and shape[self.dim] % tokens == 0

    def resized(self, shape: torch.Size, tokens: int, new_tokens: int) -> torch.Size:
        """``shape`` with another number of tokens."""
        sizes = list(shape)
        sizes[self.dim] = sizes[self.dim] // tokens * new_tokens
        return torch.Size(sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageRows:
    """A storage as ``outer`` x ``T`` x ``row_bytes``: every token's bytes lie together ``outer`` times."""

    tokens: int
    row_bytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor, axis: RowAxis, tokens: int) -> StorageRows | None:
        """How the storage of ``tensor`` is cut; None where its tokens do not lie in one regular pattern."""
        folded = tensor.shape[axis.dim] // tokens
        step = tensor.stride(axis.dim) * (folded if axis.leading else 1)
        period = step * tokens
        size = tensor.element_size()
        if step == 0 or tensor.untyped_storage().nbytes() % (period * size):
            return None
        others = [
            (n, s)
            for dim, (n, s) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
            if dim != axis.dim
        ]
        others.append((folded, tensor.stride(axis.dim) * (1 if axis.leading else tokens)))
        within = int(tensor.storage_offset()) % period
        for count, stride in others:
            if count > 1 and stride % period:
                within += (count - 1) * stride
        return cls(tokens=tokens, row_bytes=step * size) if within < step else None

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """[outer, T, row_bytes] of all bytes of a storage, 1-D uint8."""
        return flat.view(-1, self.tokens, self.row_bytes)


class CutStorage:
    """One saved storage: rows ``r`` to ``T`` are stored, the others are computed again.

    It is put together when backward first asks for a tensor in it. All its tensors are views of one storage
    then, as they were, and what was recomputed of them is given up: no row is there twice for long.
    """

    def __init__(self, rows: StorageRows, first: int, storage_bytes: int, rest: Any) -> None:
        self._rows = rows
        self._first = first
        self._storage_bytes = storage_bytes
        self._rest = rest
        self._tensors: list[weakref.ref[SavedRows]] = []

    def tensor(self, tensor: torch.Tensor, axis: RowAxis) -> SavedRows:
        """What stands for a tensor of this storage. It is owned by whoever asked: autograd, in the end."""
        saved = SavedRows(self, tensor, axis)
        self._tensors.append(weakref.ref(saved))
        return saved

    def join(self, unpack: Unpack) -> None:
        """Complete every tensor whose first rows have been computed again."""
        rest = unpack(self._rest)
        flat = torch.empty(self._storage_bytes, dtype=torch.uint8, device=rest.device)
        whole = self._rows.view(flat)
        stored = whole[:, self._first :]
        stored.copy_(rest.view(stored.shape))
        for saved in (reference() for reference in self._tensors):
            if saved is not None and saved.first_rows is not None:
                saved.complete(flat, self._rows.tokens, self._first)


class SavedRows:
    """A saved tensor in a cut storage."""

    __slots__ = (
        "__weakref__",
        "_axis",
        "_dtype",
        "_offset",
        "_shape",
        "_storage",
        "_stride",
        "_whole",
        "first_rows",
    )

    def __init__(self, storage: CutStorage, tensor: torch.Tensor, axis: RowAxis) -> None:
        self._storage = storage
        self._axis = axis
        self._dtype = tensor.dtype
        self._shape, self._stride = tensor.shape, tensor.stride()
        self._offset = int(tensor.storage_offset())
        self._whole: torch.Tensor | None = None
        self.first_rows: Unmoved | None = None
        """As the second forward saved them, until they are joined with the rest."""

    @property
    def is_there(self) -> bool:
        """Whether ``take`` needs no second forward before it."""
        return self._whole is not None or self.first_rows is not None

    def complete(self, flat: torch.Tensor, tokens: int, first: int) -> None:
        """Become a view of ``flat``, the bytes of the whole storage, and copy the first rows into it."""
        assert self.first_rows is not None
        whole = torch.as_strided(flat.view(self._dtype), self._shape, self._stride, self._offset)
        computed, self.first_rows = self.first_rows.get(), None
        target = self._axis.rows(_without_repeats(whole), tokens, 0, first)
        target.copy_(self._axis.rows(_without_repeats(computed, whole.stride()), first, 0, first))
        self._whole = whole

    def take(self, unpack: Unpack) -> torch.Tensor:
        """The whole tensor. It is given up here: a graph that is walked twice must not hold it in between."""
        if self._whole is None:
            self._storage.join(unpack)
        whole, self._whole = self._whole, None
        assert whole is not None
        return whole


def _without_repeats(tensor: torch.Tensor, strides: Sequence[int] | None = None) -> torch.Tensor:
    """One entry of every dimension that was expanded (stride 0 among ``strides``, by default its own): what
    lies in one place cannot be written twice."""
    for dim, stride in enumerate(tensor.stride() if strides is None else strides):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


def all_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The storage of ``tensor``, 1-D uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def empty_in_order(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A dense tensor of ``shape`` whose dimensions lie in memory in the order of those of ``like``."""
    order = memory_order(like)
    strides, step = [0] * len(order), 1
    for dim in reversed(order):
        strides[dim], step = step, step * shape[dim]
    return torch.empty_strided(tuple(shape), strides, dtype=like.dtype, device=like.device)


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Dimensions from the slowest to the fastest."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))


def token_count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens in a row of the batch: dimension -2 of the first tensor among the arguments, 0 without one."""
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor):
            return leaf.shape[-2] if leaf.dim() > 1 else 0
    return 0
