"""Projection on coordinates: columns, rows, a block of neighbouring rows, or single entries.

The cheapest orthonormal projections: down is a gather, up a scatter, and only a key is stored. ``columns``,
``rows`` and ``randk`` take one of every 1/density neighbours by a hash (``strata.py``; FRUGAL, arXiv
2411.07837, draws freely and keeps two int64 indices for each entry of randk: twice the bytes of two fp32
moments). ``block`` goes round: the next k
rows at every refresh, so that ``1/density`` refreshes cover the parameter.

Departure: FRUGAL's ``block`` switches whole tensors on and off, which makes the bytes of a parameter change
with time. Here each parameter has an active block of its own, and its bytes are constant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memtrain.optim.projection.base import CoordinateOverlap, Overlap, Stored
from memtrain.optim.projection.config import Projection
from memtrain.optim.projection.random import CHOICE_STREAM, KEY_WORDS, SEED, read_key, write_key_
from memtrain.optim.projection.strata import stratified_indices
from memtrain.optim.projection.workspace import Workspace
from memtrain.optim.storage import RandomKey

START, INDEX = "start", "index"
_NEVER = -1


class CoordinateProjector:
    """``columns``, ``rows``, ``block`` or ``randk``; experts of a stack share columns and rows."""

    orthonormal = True
    needs_gradient = False

    def __init__(self, projection: Projection, shape: torch.Size) -> None:
        self.kind = projection.kind
        self.shape = shape
        self.axis = {"columns": -1, "rows": -2, "block": -2, "randk": -1}[self.kind]
        self.size = math.prod(shape) if self.kind == "randk" else shape[self.axis]
        self.active = projection.size_of(self.size, limit=self.size, shape=shape)
        low = [self.size] if self.kind == "randk" else list(shape)
        low[self.axis] = self.active
        self.low_shape = torch.Size(low)
        self.complete = self.active == self.size
        self.low_axis = None if self.kind == "randk" else self.axis

    def empty(self, device: torch.device | str) -> Stored:
        """On the CPU: what persists is read by Python."""
        if self.kind == "block":
            return {START: torch.full((), _NEVER, dtype=torch.int64, device="cpu")}
        return {SEED: torch.zeros(KEY_WORDS, dtype=torch.int64, device="cpu")}

    def refresh_(self, stored: Stored, gradient: Tensor | None, *, key: RandomKey) -> None:
        """See :class:`Projector`."""
        if self.kind != "block":
            write_key_(stored[SEED], key)
            return
        last = int(stored[START])
        end = last + self.active
        # The last block may overlap the one before, so that all have the same size.
        start = 0 if last == _NEVER or end >= self.size else min(end, self.size - self.active)
        stored[START].fill_(start)

    def open(self, stored: Stored, device: torch.device) -> Stored:
        """The indices."""
        if self.kind == "block":
            start = int(stored[START])
            return {INDEX: torch.arange(start, start + self.active, device=device)}
        return {INDEX: stratified_indices(self.choice_key(stored), self.active, self.size, device)}

    def choice_key(self, stored: Stored) -> RandomKey:
        """From which columns, rows or entries are chosen."""
        return read_key(stored[SEED]).fold(CHOICE_STREAM)

    def down(self, opened: Stored, gradient: Tensor) -> Tensor:
        """See :class:`Projector`."""
        return self._laid_out(gradient).index_select(self.axis, opened[INDEX]).float()

    def up(self, opened: Stored, low: Tensor) -> Tensor:
        """See :class:`Projector`."""
        full = torch.zeros(self.shape, dtype=torch.float32, device=low.device)
        return self.write_(full, opened, low.float())

    def write_(self, full: Tensor, opened: Stored, low: Tensor) -> Tensor:
        """Put ``low`` in the place of what was chosen of ``full``, contiguous and of its dtype."""
        self._laid_out(full).index_copy_(self.axis, opened[INDEX], low)
        return full

    def _laid_out(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1) if self.kind == "randk" else tensor

    def overlap(self, old: Stored, new: Stored) -> Overlap:
        """Which coordinates stay."""
        ordered, position = old[INDEX].sort()
        place = torch.searchsorted(ordered, new[INDEX]).clamp_max(self.active - 1)
        return CoordinateOverlap(position[place], ordered[place] == new[INDEX], self.axis)

    def size_bytes(self) -> int:
        """See :class:`Projector`."""
        return (1 if self.kind == "block" else KEY_WORDS) * torch.int64.itemsize

    def refresh_workspace(self, gradient_dtype: torch.dtype, *, first: bool = False) -> Workspace:
        """A key."""
        return Workspace(tensor_bytes=0 if self.kind == "block" else KEY_WORDS * torch.int64.itemsize)
