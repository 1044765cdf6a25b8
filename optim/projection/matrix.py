"""Projection on a subspace of rows, of columns, or of both, given by matrices of basis vectors.

A basis is ``[..., d, r]`` with its vectors as columns, ``d`` being m for the left one and n for the right
one: ``R = left^T G right`` and ``up(R) = left R right^T``, either factor being absent unless the side is
``full``. Products run in the dtype of the basis; with bf16 the hardware accumulates in fp32 and rounds once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memtrain.optim.projection.base import MatrixOverlap, Overlap, Stored
from memtrain.optim.projection.config import BASIS_DTYPES, SPECTRAL, Projection

LEFT, RIGHT = "left", "right"


class MatrixProjector:
    """What spectral and random projectors share; where a basis comes from is theirs to say."""

    orthonormal = True

    def __init__(self, projection: Projection, shape: torch.Size) -> None:
        self.kind = projection.kind
        self.shape = shape
        self.sides = _sides(projection, shape)
        self.basis_dtype = BASIS_DTYPES[projection.basis_dtype]
        *batch, m, n = shape
        self.batch = tuple(batch)
        self.dimensions = {LEFT: m, RIGHT: n}
        dimension = min(self.dimensions[side] for side in self.sides)
        limit = min(m, n) if projection.kind in SPECTRAL else dimension
        self.rank = projection.size_of(dimension, limit=limit, shape=shape)
        rows = self.rank if LEFT in self.sides else m
        columns = self.rank if RIGHT in self.sides else n
        self.low_shape = torch.Size((*batch, rows, columns))
        self.complete = self.low_shape.numel() == shape.numel()
        self.low_axis = None if len(self.sides) == 2 else (-2 if LEFT in self.sides else -1)

    def basis_shape(self, side: str) -> tuple[int, ...]:
        """``[..., d, r]``."""
        return (*self.batch, self.dimensions[side], self.rank)

    def basis_bytes(self) -> int:
        """Of all sides, in the dtype of the basis."""
        return sum(math.prod(self.basis_shape(side)) for side in self.sides) * self.basis_dtype.itemsize

    def down(self, opened: Stored, gradient: Tensor) -> Tensor:
        """See :class:`Projector`."""
        low = gradient.to(self.basis_dtype)
        if LEFT in opened:
            low = opened[LEFT].mT @ low
        if RIGHT in opened:
            low = low @ opened[RIGHT]
        return low.float()

    def up(self, opened: Stored, low: Tensor) -> Tensor:
        """See :class:`Projector`."""
        full = low.to(self.basis_dtype)
        if LEFT in opened:
            full = opened[LEFT] @ full
        if RIGHT in opened:
            full = full @ opened[RIGHT].mT
        return full.float()

    def overlap(self, old: Stored, new: Stored) -> Overlap:
        """``P_new^T P_old``; for bases that are not orthonormal ``P_new^T`` times the pseudo-inverse.

        Without the pseudo-inverse a Gaussian overlap would multiply moments by about ``d / r``.
        """
        return MatrixOverlap(**{side: self._overlap_of(side, old[side], new[side]) for side in self.sides})

    def _overlap_of(self, side: str, old: Tensor, new: Tensor) -> Tensor:
        old, new = old.float(), new.float()
        overlap = self._over_rows(side, new.mT @ old)
        if self.orthonormal:
            return overlap
        # Not solve(): few random signs are often dependent, and then the Gram matrix is singular.
        gram = self._over_rows(side, old.mT @ old)
        least_squares: Tensor = overlap @ torch.linalg.pinv(gram, hermitian=True)
        return least_squares

    def _over_rows(self, side: str, product: Tensor) -> Tensor:
        """A product over the rows of a side's bases, of which this process may have some; here it has all."""
        return product


def _sides(projection: Projection, shape: torch.Size) -> tuple[str, ...]:
    if projection.side == "full":
        return (LEFT, RIGHT)
    if projection.side in (LEFT, RIGHT):
        return (projection.side,)
    m, n = shape[-2:]
    shorter, longer = (RIGHT, LEFT) if m >= n else (LEFT, RIGHT)
    return (shorter,) if projection.side == "std" else (longer,)
