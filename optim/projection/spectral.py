"""Bases that follow the gradient: its leading singular vectors, exactly or by one warm power iteration.

At 2048 x 2048 and rank 256 the singular value decomposition costs seconds, the eigenvalues of the Gram matrix
half a second, and a power iteration that starts from the last basis two products with the gradient and an
orthogonalisation (:mod:`memtrain.optim.projection.orthonormal`); a subspace that moves slowly is followed as
well. It is the default. Its products run in the dtype of the basis, as those of the steps do: with bf16 the
hardware accumulates in fp32. The columns are made orthonormal in fp32.

    basis = orthonormal(G (G^T basis))          the left one; the right one with G^T for G

The first iteration has no basis to start from: a Gaussian sketch and two iterations more (Halko, Martinsson,
Tropp 2011, algorithm 4.4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memtrain.optim.projection.base import Stored
from memtrain.optim.projection.matrix import LEFT, RIGHT, MatrixProjector
from memtrain.optim.projection.orthonormal import (
    largest_entry,
    orthonormal,
    orthonormal_elements,
    squares_well,
)
from memtrain.optim.projection.random import LEFT_STREAM, RIGHT_STREAM, gaussian
from memtrain.optim.projection.workspace import (
    Workspace,
    draw_bytes,
    eigh_library_bytes,
    qr_library_bytes,
    svd_library_bytes,
)
from memtrain.optim.storage import RandomKey

_COLD_ITERATIONS = 2
_FLOAT_BYTES = 4


class SpectralProjector(MatrixProjector):
    """``svd``, ``eigh`` or ``power``; the basis is stored."""

    needs_gradient = True

    def empty(self, device: torch.device | str) -> Stored:
        """A zero basis."""
        return {
            side: torch.zeros(self.basis_shape(side), dtype=self.basis_dtype, device=device)
            for side in self.sides
        }

    def refresh_(self, stored: Stored, gradient: Tensor | None, *, key: RandomKey) -> None:
        """See :class:`Projector`."""
        if gradient is None:
            raise ValueError(f"projection {self.kind!r} needs the gradient to refresh")
        stays = {side: _silent_experts(stored[side], gradient) if self.batch else [] for side in self.sides}
        gradient = gradient.to(self._work_dtype)
        if self.kind == "svd":
            # One decomposition serves both sides.
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            vectors = {LEFT: u[..., : self.rank], RIGHT: vh[..., : self.rank, :].mT}
            for side in self.sides:
                _replace_(stored[side], vectors[side], stays[side])
            return
        for side in self.sides:
            oriented = gradient if side == LEFT else gradient.mT
            find = self._by_eigenvectors if self.kind == "eigh" else self._by_power_iteration
            draw = key.fold(LEFT_STREAM if side == LEFT else RIGHT_STREAM)
            _replace_(stored[side], find(oriented, stored[side], draw), stays[side])

    def _by_eigenvectors(self, gradient: Tensor, last: Tensor, key: RandomKey) -> Tensor:
        gradient = _squarable(gradient)
        _, vectors = torch.linalg.eigh(gradient @ gradient.mT)
        leading: Tensor = vectors[..., -self.rank :].flip(-1)
        return leading

    def _by_power_iteration(self, gradient: Tensor, last: Tensor, key: RandomKey) -> Tensor:
        cold = self._is_cold(last)
        if cold:
            shape = (*self.batch, gradient.shape[-1], self.rank)
            sketch = self._sketch(key, shape, gradient.device).to(gradient.dtype)
            basis = orthonormal((gradient @ sketch).float())
            del sketch
        else:
            basis = last
        for _ in range(_COLD_ITERATIONS if cold else 1):
            basis = basis.to(gradient.dtype)
            basis = orthonormal((gradient @ _normalised_(gradient.mT @ basis)).float())
        return basis

    def _is_cold(self, last: Tensor) -> bool:
        return not bool(last.any())

    def _sketch(self, key: RandomKey, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return gaussian(key, shape, device)

    @property
    def _work_dtype(self) -> torch.dtype:
        """Decompositions are fp32."""
        return self.basis_dtype if self.kind == "power" else torch.float32

    def open(self, stored: Stored, device: torch.device) -> Stored:
        """The stored basis."""
        return stored

    def size_bytes(self) -> int:
        """See :class:`Projector`."""
        return self.basis_bytes()

    def refresh_workspace(self, gradient_dtype: torch.dtype, *, first: bool = False) -> Workspace:
        """See :class:`Projector`; of the side that needs most."""
        m, n, batch = self.dimensions[LEFT], self.dimensions[RIGHT], math.prod(self.batch)
        copy_bytes = 0 if gradient_dtype == self._work_dtype else m * n * self._work_dtype.itemsize * batch
        dimensions = [self.dimensions[side] for side in self.sides]
        library_bytes = 0
        if self.kind == "svd":
            # U, the singular values, V^T.
            needed = min(m, n) * (m + n + 1) * _FLOAT_BYTES
            library_bytes = svd_library_bytes(m, n)
        elif self.kind == "eigh":
            d = max(dimensions)
            # The Gram matrix, the vectors, the values.
            needed = (2 * d * d + d) * _FLOAT_BYTES
            library_bytes = eigh_library_bytes(d)
        else:
            needed = max(self._power_bytes(d, m + n - d, first) for d in dimensions)
            # Of Householder's QR, where the columns are dependent.
            library_bytes = qr_library_bytes(max(dimensions), self.rank)
        drawing = draw_bytes(batch * (m + n - min(dimensions)) * self.rank)
        peak = max(needed * batch, drawing) if first and self.kind == "power" else needed * batch
        return Workspace(tensor_bytes=copy_bytes + peak, library_bytes=library_bytes)

    def _power_bytes(self, d: int, other: int, first: bool) -> int:
        """Of one matrix."""
        r, item = self.rank, self.basis_dtype.itemsize
        decomposing = orthonormal_elements(d, r) * _FLOAT_BYTES
        multiplying = (other + d) * r * item
        widening = d * r * (item + _FLOAT_BYTES) if item != _FLOAT_BYTES else 0
        # A warm iteration starts from the stored basis, the others from a tensor of their own; the first
        # of them from the random one.
        basis = max(d, other) * r * item if first else 0
        return basis + max(decomposing, multiplying, widening)


def _silent_experts(basis: Tensor, gradient: Tensor) -> list[bool]:
    """Which experts of a stack had no tokens, and so a gradient of zeros, but have a basis: it stays."""
    silent = (gradient.amax((-2, -1)) == 0) & (gradient.amin((-2, -1)) == 0)
    known: Tensor = basis.abs().amax((-2, -1)) > 0
    return (silent & known).tolist()


def _replace_(basis: Tensor, new: Tensor, stays: list[bool]) -> None:
    """Matrix by matrix, so that nothing is allocated while the decomposition's results are alive."""
    if basis.dim() == 2:
        basis.copy_(new)
    for expert, stay in enumerate(stays):
        if not stay:
            basis[expert].copy_(new[expert])


def _squarable(gradient: Tensor) -> Tensor:
    """The gradient, or a scaled copy where its Gram matrix would overflow or underflow."""
    largest = largest_entry(gradient)
    if bool(((largest == 0) | squares_well(largest)).all()):
        return gradient
    return gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)


def _normalised_(columns: Tensor) -> Tensor:
    """Scaled to a largest entry of one, so that gradients of 1e-20 do not underflow when multiplied twice."""
    return columns.div_(largest_entry(columns).clamp_min_(torch.finfo(columns.dtype).tiny))
