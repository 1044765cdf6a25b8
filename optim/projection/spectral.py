"""Bases that follow the gradient: its leading singular vectors, exactly or by one warm power iteration.

At 2048 x 2048 and rank 256 the singular value decomposition costs seconds, the eigenvalues of the Gram matrix
half a second, and a power iteration that starts from the last basis 70 ms, nearly all of it in two products
and a QR decomposition; a subspace that moves slowly is followed as well. It is the default.

    basis = orthonormal(G (G^T basis))          the left one; the right one with G^T for G

The first iteration has no basis to start from: a Gaussian sketch and two iterations more (Halko, Martinsson,
Tropp 2011, algorithm 4.4).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from memtrain.optim.projection.base import Stored
from memtrain.optim.projection.matrix import LEFT, RIGHT, MatrixProjector
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
        gradient = gradient.float()
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
        _, vectors = torch.linalg.eigh(gradient @ gradient.mT)
        leading: Tensor = vectors[..., -self.rank :].flip(-1)
        return leading

    def _by_power_iteration(self, gradient: Tensor, last: Tensor, key: RandomKey) -> Tensor:
        cold = not bool(last.any())
        if cold:
            shape = (*self.batch, gradient.shape[-1], self.rank)
            basis = _orthonormal(gradient @ gaussian(key, shape, gradient.device))
        else:
            basis = last.float()
        for _ in range(_COLD_ITERATIONS if cold else 1):
            basis = _orthonormal(gradient @ _normalised(gradient.mT @ basis))
        return basis

    def open(self, stored: Stored, device: torch.device) -> Stored:
        """The stored basis."""
        return stored

    def size_bytes(self) -> int:
        """See :class:`Projector`."""
        return self.basis_bytes()

    def refresh_workspace(self, gradient_dtype: torch.dtype, *, first: bool = False) -> Workspace:
        """See :class:`Projector`; of the side that needs most."""
        m, n = self.dimensions[LEFT], self.dimensions[RIGHT]
        copy = 0 if gradient_dtype == torch.float32 else m * n
        dimensions = [self.dimensions[side] for side in self.sides]
        if self.kind == "svd":
            k = min(m, n)
            # U, the singular values, V^T.
            return self._workspace(copy + k * (m + n + 1), svd_library_bytes(m, n))
        if self.kind == "eigh":
            d = max(dimensions)
            # The Gram matrix, the vectors, the values.
            return self._workspace(copy + 2 * d * d + d, eigh_library_bytes(d))
        elements = max(self._power_elements(d, m + n - d, first) for d in dimensions)
        needed = self._workspace(copy + elements, qr_library_bytes(max(dimensions), self.rank))
        if not first:
            return needed
        copy_bytes = copy * math.prod(self.batch) * torch.float32.itemsize
        sketch = max(math.prod(self.batch) * (m + n - d) * self.rank for d in dimensions)
        return replace(needed, tensor_bytes=max(needed.tensor_bytes, copy_bytes + draw_bytes(sketch)))

    def _power_elements(self, d: int, other: int, first: bool) -> int:
        r = self.rank
        decomposing = 2 * d * r + r * r  # the argument, Q and R
        normalising = 2 * other * r + 2  # G^T basis before and after, its largest entry, twice
        multiplying = other * r + d * r
        # The basis to start from is a tensor of its own where it is not the stored one.
        basis = d * r if first or self.basis_dtype != torch.float32 else 0
        return basis + max(decomposing, normalising, multiplying)

    def _workspace(self, elements: int, library_bytes: int) -> Workspace:
        """Decompositions go through a stack one matrix at a time."""
        tensor_bytes = elements * math.prod(self.batch) * torch.float32.itemsize
        return Workspace(tensor_bytes=tensor_bytes, library_bytes=library_bytes)


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


def _normalised(columns: Tensor) -> Tensor:
    """Scaled to a largest entry of one, so that gradients of 1e-20 do not underflow when multiplied twice."""
    largest = columns.abs().amax(dim=(-2, -1), keepdim=True)
    return columns / largest.clamp_min(torch.finfo(columns.dtype).tiny)


def _orthonormal(columns: Tensor) -> Tensor:
    """Householder's Q: orthonormal also where columns are dependent or zero."""
    q: Tensor = torch.linalg.qr(columns).Q
    return q
