"""Saved tensors whose rows repeat because a weight's values do: a table of rows, and one list of places.

eDKM (Cho et al., arXiv 2309.00964): clustering a weight of n elements around k centroids makes an attention
map of n rows and k columns, and autograd saves several of them. Elements of equal value have equal rows, and
a weight in 16 bits has at most 65,536 values: so a map is a table of as many rows and a list of n places of
16 bits, which all maps share. The paper also spreads the list over machines; here it is as torch has it.

A row is compared with the one of its place before it is given up, bit for bit. A tensor whose rows are not
those that the weight's values say is left as it is, and counted; so backward is that of plain autograd.
Each tensor is coded once, however often and whichever way round it is saved.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from memtrain.optim.kernels.unique_values import MOST_VALUES, PATTERNS

_CHUNK_ELEMENTS = 1 << 20
"""Compared at a time, so that comparing takes no second map."""


@dataclass(slots=True)
class RowCounts:
    """What was saved inside so far."""

    coded: int = 0
    plain_bytes: int = 0
    """Of the tensors that were coded."""
    coded_bytes: int = 0
    """Of their tables."""
    left: int = 0
    """Tensors with a row for each element of the weight that were not coded: their rows differ."""
    left_bytes: int = 0


class UniqueRows(torch.autograd.graph.saved_tensors_hooks):
    """Around the arithmetic whose saved tensors have a row for each element of ``weight``.

        with UniqueRows(weight) as rows:
            soft = soft_palette(weight, centroids, ...)

    Attributes:
        counts: what was coded, and what was left.
        values: how many distinct values the weight has.
        places_bytes: of the list of places, which is there once.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(self._pack, _unpack)
        flat = weight.detach().reshape(-1)
        patterns = flat.view(PATTERNS[flat.element_size()])
        distinct, places = torch.unique(patterns, return_inverse=True)
        self.values = distinct.numel()
        self._rows = flat.numel()
        first = torch.full((self.values,), self._rows, dtype=torch.int64, device=flat.device)
        self._first = first.scatter_reduce(
            0, places, torch.arange(self._rows, device=flat.device), "amin", include_self=True
        )
        self._places = places.to(torch.int32)
        if self.values <= MOST_VALUES:
            self._places = self._places.to(torch.int16)  # as unsigned
        self.places_bytes = self._places.nbytes
        self.counts = RowCounts()
        self._known: dict[tuple[Any, ...], weakref.ref[_Rows]] = {}

    def __enter__(self) -> UniqueRows:  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        left = tensor.detach()  # a node that held its own output would hold itself for good
        turned = tensor.dim() == 2 and tensor.shape[0] != self._rows and tensor.shape[1] == self._rows
        upright = left.t() if turned else left
        if upright.dim() == 0 or upright.shape[0] != self._rows or 2 * self.values > self._rows:
            return left
        if upright.element_size() not in PATTERNS or (tensor.is_leaf and tensor.requires_grad):
            return left
        storage = upright.untyped_storage()
        view = (upright.dtype, upright.storage_offset(), upright.shape, upright.stride())
        key = (storage._cdata, upright._version, *view)
        reference = self._known.get(key)
        rows = None if reference is None else reference()
        if rows is None:
            rows = self._code(upright)
            if rows is None:
                return left
            self._known[key] = weakref.ref(rows)
        return _Saved(rows, turned)

    def _code(self, upright: Tensor) -> _Rows | None:
        table = upright[self._first]
        if not self._agrees(upright, table):
            self.counts.left += 1
            self.counts.left_bytes += upright.nbytes
            return None
        self.counts.coded += 1
        self.counts.plain_bytes += upright.nbytes
        self.counts.coded_bytes += table.nbytes
        return _Rows(table, self._places, StorageWeakRef(upright.untyped_storage()))  # type: ignore[no-untyped-call]

    def _agrees(self, upright: Tensor, table: Tensor) -> bool:
        pattern = PATTERNS[upright.element_size()]
        step = max(1, _CHUNK_ELEMENTS * self._rows // max(1, upright.numel()))
        for start in range(0, self._rows, step):
            part = upright[start : start + step].contiguous()
            rebuilt = table[_as_index(self._places[start : start + step])]
            if not torch.equal(part.view(pattern), rebuilt.view(pattern)):
                return False
        return True


class _Rows:
    """One coded tensor."""

    def __init__(self, table: Tensor, places: Tensor, storage: StorageWeakRef) -> None:
        self._table, self._places = table, places
        self.storage = storage
        """While it is referred to, no other storage is given its identity."""
        self._whole: weakref.ref[Tensor] | None = None

    def get(self) -> Tensor:
        whole = None if self._whole is None else self._whole()
        if whole is None:
            whole = self._table[_as_index(self._places)]
            self._whole = weakref.ref(whole)
        return whole


class _Saved:
    """What autograd holds instead of a tensor."""

    def __init__(self, rows: _Rows, turned: bool) -> None:
        self._rows, self._turned = rows, turned

    def get(self) -> Tensor:
        whole = self._rows.get()
        return whole.t() if self._turned else whole


def _unpack(saved: Tensor | _Saved) -> Tensor:
    return saved.get() if isinstance(saved, _Saved) else saved


def _as_index(places: Tensor) -> Tensor:
    wide = places.to(torch.int32)
    return wide & 0xFFFF if places.dtype == torch.int16 else wide
