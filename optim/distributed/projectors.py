"""Projectors of parameters that are sharded by rows. The gradient stays where it is; what travels is small.

Each process has rows ``G_k`` of the gradient ``[m, n]``. Where the projection shortens columns (``right``,
``columns``) R has the rows of G and is sharded as G is: nothing travels. Where it shortens rows (``left``,
``full``, ``rows``, ``block``, ``randk``) ``R = sum_k P_k^T G_k`` is summed over the processes, r x n numbers
in place of m x n, and R and its moments are whole in each: ``side="right"`` avoids the sum and the copies.

What a refresh costs:

    seeded     nothing: each process draws the basis and keeps its rows
    power      left: the sums ``G_k^T P_k`` (n x r) and a gather of ``G_k Y`` (m x r) for the QR decomposition
               right: the sum of ``G_k^T (G_k P)`` (n x r)
    eigh       right: the sum of the Gram matrices ``G_k^T G_k`` (n x n); left would need rows of G times rows
               of another process, and is refused
    svd        refused: it is eigh's basis at best, and needs the whole gradient

The QR decomposition is computed by each process from the same numbers; each keeps its own rows.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from memtrain.optim.distributed.rows import Rows
from memtrain.optim.projection.base import ProjectionError, Projector, Stored
from memtrain.optim.projection.config import COORDINATE, RANDOM, Projection
from memtrain.optim.projection.coordinates import INDEX, CoordinateProjector
from memtrain.optim.projection.matrix import LEFT, RIGHT, MatrixProjector
from memtrain.optim.projection.orthonormal import squares_well
from memtrain.optim.projection.random import LEFT_STREAM, RIGHT_STREAM, RandomProjector, gaussian
from memtrain.optim.projection.spectral import SpectralProjector
from memtrain.optim.projection.workspace import Workspace, qr_library_bytes
from memtrain.optim.storage import RandomKey

_COLD_ITERATIONS = 2


@runtime_checkable
class ShardedProjector(Projector, Protocol):
    """A projector of this process's rows; ``down`` gives this process's share of the sum R."""

    low_is_sharded: bool
    """Whether R has the rows of the parameter; otherwise it is whole in every process."""


def sharded_projector(projection: Projection, shape: torch.Size, rows: Rows) -> ShardedProjector:
    """The projector of the rows of a parameter ``[m, n]``.

    Raises:
        ProjectionError: the kind needs more than sums over the processes.
    """
    if len(shape) != 2:
        raise ProjectionError(
            f"projection {projection.kind!r} of a sharded parameter is for matrices [m, n], got shape "
            f"{tuple(shape)}: put it into a group without projection"
        )
    if projection.kind in COORDINATE:
        return ShardedCoordinates(projection, shape, rows)
    if projection.kind in RANDOM:
        return ShardedRandom(projection, shape, rows)
    return ShardedSpectral(projection, shape, rows)


class _ShardedMatrix(MatrixProjector):
    """Rows of a left basis, all of a right one. Before a class of whole bases in the order of resolution."""

    def __init__(self, projection: Projection, shape: torch.Size, rows: Rows) -> None:
        super().__init__(projection, shape)
        self.rows = rows
        self.low_is_sharded = LEFT not in self.sides
        self.shape = torch.Size((rows.count, shape[1]))
        self.dimensions = {LEFT: rows.count, RIGHT: shape[1]}
        if self.low_is_sharded:
            self.low_shape = torch.Size((rows.count, self.low_shape[1]))

    def _over_rows(self, side: str, product: Tensor) -> Tensor:
        return self.rows.sum_(product) if side == LEFT else product


class ShardedRandom(_ShardedMatrix, RandomProjector):
    """See the module; the whole basis is drawn, and the rows of other processes dropped."""

    def __init__(self, projection: Projection, shape: torch.Size, rows: Rows) -> None:
        super().__init__(projection, shape, rows)
        self._whole = RandomProjector(projection, shape)

    def refresh_(self, stored: Stored, gradient: Tensor | None, *, key: RandomKey) -> None:
        """See :class:`Projector`."""
        if not self.orthonormal:
            super().refresh_(stored, gradient, key=key)
            return
        whole = self._whole.empty(next(iter(stored.values())).device)
        self._whole.refresh_(whole, None, key=key)
        for side, basis in self._own(whole).items():
            stored[side].copy_(basis)

    def open(self, stored: Stored, device: torch.device) -> Stored:
        """See :class:`Projector`."""
        return stored if self.orthonormal else self._own(self._whole.open(stored, device))

    def _own(self, whole: Stored) -> Stored:
        return {side: each[self.rows.slice] if side == LEFT else each for side, each in whole.items()}


class ShardedSpectral(_ShardedMatrix, SpectralProjector):
    """See the module."""

    def __init__(self, projection: Projection, shape: torch.Size, rows: Rows) -> None:
        super().__init__(projection, shape, rows)
        if self.kind == "svd" or (self.kind == "eigh" and LEFT in self.sides):
            remedy = "'power'" if LEFT in self.sides else "'eigh' or 'power'"
            raise ProjectionError(
                f"projection {self.kind!r}, {' and '.join(self.sides)} side, needs the whole gradient of a "
                f"parameter {tuple(shape)}, which is sharded by rows: use projection {remedy}"
            )

    def refresh_(self, stored: Stored, gradient: Tensor | None, *, key: RandomKey) -> None:
        """See :class:`Projector`."""
        assert gradient is not None
        gradient = gradient.float()
        for side in self.sides:
            if self.kind == "eigh":
                basis = self._leading_eigenvectors(gradient)
            else:
                draw = key.fold(LEFT_STREAM if side == LEFT else RIGHT_STREAM)
                basis = self._power_iteration(side, gradient, stored[side], draw)
            stored[side].copy_(basis)

    def _leading_eigenvectors(self, gradient: Tensor) -> Tensor:
        largest = self.rows.largest_(_scale(gradient))
        if not bool(squares_well(largest)):
            gradient = gradient / largest
        _, vectors = torch.linalg.eigh(self.rows.sum_(gradient.mT @ gradient))
        leading: Tensor = vectors[..., -self.rank :].flip(-1)
        return leading

    def _power_iteration(self, side: str, gradient: Tensor, last: Tensor, key: RandomKey) -> Tensor:
        left = side == LEFT
        basis = last.float()
        cold = not bool(self.rows.largest_(basis.any().float().reshape(1)))
        if cold:
            sketch = gaussian(key, (self.shape[1] if left else self.rows.total, self.rank), gradient.device)
            basis = (
                self._orthonormal_rows(gradient @ sketch)
                if left
                else (self._orthonormal(gradient.mT @ sketch[self.rows.slice]))
            )
        for _ in range(_COLD_ITERATIONS if cold else 1):
            if left:
                seen = self.rows.sum_(gradient.mT @ basis)
                basis = self._orthonormal_rows(gradient @ (seen / _scale(seen)))
            else:
                seen = gradient @ basis
                basis = self._orthonormal(gradient.mT @ (seen / self.rows.largest_(_scale(seen))))
        return basis

    def _orthonormal(self, summand: Tensor) -> Tensor:
        q: Tensor = torch.linalg.qr(self.rows.sum_(summand)).Q
        return q

    def _orthonormal_rows(self, own: Tensor) -> Tensor:
        q: Tensor = torch.linalg.qr(self.rows.gather(own)).Q
        return q[self.rows.slice]

    def refresh_workspace(self, gradient_dtype: torch.dtype, *, first: bool = False) -> Workspace:
        """See :class:`Projector`; a left basis is gathered, padded to equal shards, and decomposed whole."""
        here = super().refresh_workspace(gradient_dtype, first=first)
        if LEFT not in self.sides:
            return here
        rows, r = self.rows, self.rank
        gathered = ((1 + rows.world) * rows.chunk + rows.total) * r + r * r
        return Workspace(
            tensor_bytes=here.tensor_bytes + gathered * torch.float32.itemsize,
            library_bytes=qr_library_bytes(rows.total, r),
        )


class ShardedCoordinates(CoordinateProjector):
    """See the module; indices are of the whole parameter."""

    def __init__(self, projection: Projection, shape: torch.Size, rows: Rows) -> None:
        super().__init__(projection, shape)
        self.low_is_sharded = self.kind == "columns"
        self.shape = torch.Size((rows.count, shape[1]))
        if self.low_is_sharded:
            self.low_shape = torch.Size((rows.count, self.low_shape[1]))
        unit = shape[1] if self.kind == "randk" else 1
        self._first, self._end = rows.start * unit, (rows.start + rows.count) * unit

    def down(self, opened: Stored, gradient: Tensor) -> Tensor:
        """See :class:`Projector`; zeros for entries that other processes have."""
        if self.low_is_sharded:
            return super().down(opened, gradient)
        here, index = self._here(opened)
        low = torch.zeros(self.low_shape, dtype=torch.float32, device=gradient.device)
        low[here] = self._laid_out(gradient)[index].float()
        return low

    def write_(self, full: Tensor, opened: Stored, low: Tensor) -> Tensor:
        """See :class:`CoordinateProjector`; the entries that this process has."""
        if self.low_is_sharded:
            return super().write_(full, opened, low)
        here, index = self._here(opened)
        self._laid_out(full)[index] = low[here]
        return full

    def _here(self, opened: Stored) -> tuple[Tensor, Tensor]:
        """Which of the chosen entries this process has, and where it has them."""
        index = opened[INDEX]
        here = (index >= self._first) & (index < self._end)
        return here, index[here] - self._first


def _scale(columns: Tensor) -> Tensor:
    """The largest entry: products of gradients of 1e-20 are not to underflow. Also of no rows."""
    if not columns.numel():
        return columns.new_full((1, 1), torch.finfo(columns.dtype).tiny)
    return columns.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(columns.dtype).tiny)
