"""Projectors of parameters that are sharded by rows. The gradient stays where it is; what travels is small.

Each process has rows ``G_k`` of the gradient ``[m, n]``. Where the projection shortens columns (``right``,
``columns``) R has the rows of G and is sharded as G is: nothing travels. Where it shortens rows (``left``,
``full``, ``rows``, ``block``, ``randk``) ``R = sum_k P_k^T G_k`` is summed over the processes, r x n numbers
in place of m x n, and R and its moments are whole in each: ``side="right"`` avoids the sum and the copies.

What a refresh sends:

    seeded     nothing: each process draws the basis and keeps its rows
    power      left: the sums ``G_k^T P_k`` (n x r) and a gather of ``G_k Y`` (m x r) for the QR decomposition
               right: the sum of ``G_k^T (G_k P)`` (n x r)
    eigh       right: the sum of the Gram matrices ``G_k^T G_k`` (n x n)
               left: every G_k in turn to all, for ``G_k G_j^T``, each process having one at a time beside
               its own; and a gather of the Gram matrix (m x m)
    svd        as eigh, with Gram matrices in fp64: singular vectors as exact as those of a decomposition in
               fp32, up to their signs, which are any there, too

Of a stack ``[E, m, n]`` each process has some experts whole: they are projected, and renewed, where they are.
``randk`` alone draws its entries from all of the stack, and sums R as it does that of a matrix.

What is made orthonormal, or decomposed, is so by each process from the same numbers; each keeps its own rows.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from memtrain.optim.distributed.pieces import FusedPower, FusedRandom, Pieces
from memtrain.optim.distributed.rows import Rows
from memtrain.optim.projection.base import ProjectionError, Projector, Stored
from memtrain.optim.projection.config import COORDINATE, RANDOM, Projection
from memtrain.optim.projection.coordinates import INDEX, CoordinateProjector
from memtrain.optim.projection.matrix import LEFT, RIGHT, MatrixProjector
from memtrain.optim.projection.orthonormal import orthonormal, orthonormal_elements, squares_well
from memtrain.optim.projection.random import LEFT_STREAM, RIGHT_STREAM, RandomProjector, gaussian
from memtrain.optim.projection.spectral import SpectralProjector
from memtrain.optim.projection.workspace import Workspace, eigh_library_bytes, qr_library_bytes
from memtrain.optim.storage import RandomKey

_COLD_ITERATIONS = 2


@runtime_checkable
class ShardedProjector(Projector, Protocol):
    """A projector of this process's rows; ``down`` gives this process's share of the sum R."""

    low_is_sharded: bool
    """Whether R has the rows of the parameter; otherwise it is whole in every process."""


def sharded_projector(
    projection: Projection, shape: torch.Size, rows: Rows, pieces: Pieces
) -> ShardedProjector:
    """The projector of the rows of a parameter ``[m, n]``, which may be fused of pieces, or of the experts
    of a stack.

    Raises:
        ProjectionError: the shape is none of these, or the pieces do not go with the projection.
    """
    if len(shape) not in (2, 3):
        raise ProjectionError(
            f"projection {projection.kind!r} is for matrices [m, n] or stacks [E, m, n], got shape "
            f"{tuple(shape)}: put the parameter into a group without projection"
        )
    if projection.kind in COORDINATE:
        if pieces.count > 1 and projection.kind in ("rows", "block"):
            raise ProjectionError(
                f"projection {projection.kind!r} with split={pieces.count} of a sharded parameter "
                f"{tuple(shape)}: use 'columns' or 'randk', or leave split out for this group"
            )
        # Columns, and entries of all pieces together, are chosen without regard to pieces.
        return ShardedCoordinates(projection, shape, rows)
    if pieces.count > 1:
        return (FusedRandom if projection.kind in RANDOM else FusedPower)(projection, shape, rows, pieces)
    if projection.kind in RANDOM:
        return ShardedRandom(projection, shape, rows)
    return (ShardedSpectral if len(shape) == 2 else SpectralExperts)(projection, shape, rows)


class _ShardedMatrix(MatrixProjector):
    """Rows of a left basis, all of a right one; of a stack the bases of this process's experts. Before a
    class of whole bases in the order of resolution."""

    def __init__(self, projection: Projection, shape: torch.Size, rows: Rows) -> None:
        super().__init__(projection, shape)
        self.rows = rows
        self.of_experts = len(shape) == 3
        self.shape = torch.Size((rows.count, *shape[1:]))
        if self.of_experts:
            self.batch = (rows.count,)
        else:
            self.dimensions = {LEFT: rows.count, RIGHT: shape[1]}
        self.low_is_sharded = self.of_experts or LEFT not in self.sides
        if self.low_is_sharded:
            self.low_shape = torch.Size((rows.count, *self.low_shape[1:]))

    def _over_rows(self, side: str, product: Tensor) -> Tensor:
        return self.rows.sum_(product) if self._cuts(side) else product

    def _cuts(self, side: str) -> bool:
        """Whether this process has a part of the vectors of a basis."""
        return side == LEFT and not self.of_experts


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
        return {
            side: each[self.rows.slice] if self.of_experts or self._cuts(side) else each
            for side, each in whole.items()
        }


class SpectralExperts(_ShardedMatrix, SpectralProjector):
    """Of a stack: nothing is sent but whether there are bases."""

    def _is_cold(self, last: Tensor) -> bool:
        return not bool(self.rows.largest_(last.any().float().reshape(1)))

    def _sketch(self, key: RandomKey, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return super()._sketch(key, (self.rows.total, *shape[1:]), device)[self.rows.slice]


class ShardedSpectral(_ShardedMatrix, SpectralProjector):
    """Of a matrix: see the module."""

    def refresh_(self, stored: Stored, gradient: Tensor | None, *, key: RandomKey) -> None:
        """See :class:`Projector`."""
        assert gradient is not None
        gradient = gradient.float()
        for side in self.sides:
            if self.kind == "power":
                draw = key.fold(LEFT_STREAM if side == LEFT else RIGHT_STREAM)
                basis = self._power_iteration(side, gradient, stored[side], draw)
            else:
                basis = self._leading_vectors(side, gradient.to(self._gram_dtype))
            stored[side].copy_(basis)

    @property
    def _gram_dtype(self) -> torch.dtype:
        return torch.float64 if self.kind == "svd" else torch.float32

    def _leading_vectors(self, side: str, gradient: Tensor) -> Tensor:
        largest = self.rows.largest_(_scale(gradient))
        if not bool(squares_well(largest)):
            gradient = gradient / largest
        left = side == LEFT
        gram = self._gram_of_rows(gradient) if left else self.rows.sum_(gradient.mT @ gradient)
        leading: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -self.rank :].flip(-1)
        return leading[self.rows.slice] if left else leading

    def _gram_of_rows(self, gradient: Tensor) -> Tensor:
        return self.rows.gather(torch.cat([gradient @ part.mT for part in self.rows.each(gradient)], dim=1))

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
        return orthonormal(self.rows.sum_(summand))

    def _orthonormal_rows(self, own: Tensor) -> Tensor:
        return orthonormal(self.rows.gather(own))[self.rows.slice]

    def refresh_workspace(self, gradient_dtype: torch.dtype, *, first: bool = False) -> Workspace:
        """See :class:`Projector`; a left basis, or its Gram matrix, is gathered, padded to equal shards, and
        decomposed whole."""
        if self.kind != "power":
            return self._gram_workspace(gradient_dtype)
        here = super().refresh_workspace(gradient_dtype, first=first)
        if LEFT not in self.sides:
            return here
        rows, r = self.rows, self.rank
        gathered = (1 + rows.world) * rows.chunk * r + orthonormal_elements(rows.total, r)
        return Workspace(
            tensor_bytes=here.tensor_bytes + gathered * torch.float32.itemsize,
            library_bytes=qr_library_bytes(rows.total, r),
        )

    def _gram_workspace(self, gradient_dtype: torch.dtype) -> Workspace:
        """The gradient widened, another process's beside it; the Gram matrix while it is gathered, and while
        it is decomposed."""
        rows, n, item = self.rows, self.dimensions[RIGHT], self._gram_dtype.itemsize
        d = rows.total if LEFT in self.sides else n
        gathering = (rows.count + (2 + rows.world) * rows.chunk) * d if LEFT in self.sides else 2 * n * n
        widened = 0 if gradient_dtype == self._gram_dtype else rows.count * n
        received = rows.chunk * n if LEFT in self.sides else 0
        return Workspace(
            tensor_bytes=(widened + max(received + gathering, 2 * d * d + d)) * item,
            library_bytes=eigh_library_bytes(d) * item // torch.float32.itemsize,
        )


class ShardedCoordinates(CoordinateProjector):
    """See the module; indices are of the whole parameter, or, but for ``randk``, of each expert."""

    def __init__(self, projection: Projection, shape: torch.Size, rows: Rows) -> None:
        super().__init__(projection, shape)
        self.low_is_sharded = self.kind == "columns" or (len(shape) == 3 and self.kind != "randk")
        self.shape = torch.Size((rows.count, *shape[1:]))
        if self.low_is_sharded:
            self.low_shape = torch.Size((rows.count, *self.low_shape[1:]))
        unit = shape[1:].numel() if self.kind == "randk" else 1
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
