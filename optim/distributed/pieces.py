"""Projectors of fused matrices, q, k and v by rows, that are sharded by rows: pieces that processes cut.

A fused matrix ``[m, n]`` of P pieces is projected piece by piece, as the stack ``[P, m / P, n]`` would be. A
process has some rows, which may be the end of one piece, all of the next and the beginning of a third: its
segments. Left bases and an R with rows are kept row by row, ``[rows here, r]``; right bases, and an R whose
rows the projection has shortened, by pieces, ``[P, ...]``, whole in every process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.optim.distributed.rows import Rows
from memtrain.optim.projection.base import MatrixOverlap, Overlap, ProjectionError, Stored
from memtrain.optim.projection.config import Projection
from memtrain.optim.projection.matrix import LEFT, RIGHT, MatrixProjector
from memtrain.optim.projection.orthonormal import largest_entry, orthonormal, orthonormal_elements
from memtrain.optim.projection.random import LEFT_STREAM, RIGHT_STREAM, RandomProjector, gaussian
from memtrain.optim.projection.spectral import SpectralProjector
from memtrain.optim.projection.workspace import Workspace, draw_bytes, qr_library_bytes
from memtrain.optim.storage import RandomKey

_COLD_ITERATIONS = 2


@dataclass(frozen=True)
class Pieces:
    """Which rows of this process belong to which piece."""

    count: int
    height: int
    """Rows of a piece."""
    segments: tuple[tuple[int, slice], ...]
    """Piece, and its rows among those of this process."""

    @classmethod
    def of(cls, count: int, rows: Rows) -> Pieces:
        """Of ``count`` pieces of equal height."""
        height, end = rows.total // count, rows.start + rows.count
        borders = [
            (piece, max(piece * height, rows.start), min((piece + 1) * height, end)) for piece in range(count)
        ]
        segments = tuple(
            (piece, slice(first - rows.start, last - rows.start))
            for piece, first, last in borders
            if first < last
        )
        return cls(count, height, segments)

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """``a^T b`` of each piece, ``[P, ...]``, this process's share of the sum."""
        result = a.new_zeros((self.count, a.shape[1], b.shape[1]))
        for piece, here in self.segments:
            result[piece] = a[here].mT @ b[here]
        return result

    def times(self, own: Tensor, matrices: Tensor) -> Tensor:
        """Rows times the matrix of their piece."""
        result = own.new_empty((own.shape[0], matrices.shape[-1]))
        for piece, here in self.segments:
            torch.matmul(own[here], matrices[piece], out=result[here])
        return result

    def peaks(self, own: Tensor) -> Tensor:
        """The largest entry here of each piece, in absolute value, ``[P]``."""
        result = own.new_zeros(self.count)
        for piece, here in self.segments:
            result[piece] = torch.linalg.vector_norm(own[here], torch.inf)
        return result

    def keep_(self, new: Tensor, old: Tensor, which: list[bool]) -> None:
        """Write rows of the old into those of the new, of some pieces."""
        for piece, here in self.segments:
            if which[piece]:
                new[here] = old[here]


@dataclass(frozen=True)
class _OverlapOfRows:
    """``C`` of each piece, applied to rows."""

    pieces: Pieces
    right: Tensor

    def apply(self, low: Tensor) -> Tensor:
        """See :class:`Overlap`."""
        return self.pieces.times(low, self.right.mT)

    def apply_squared(self, low: Tensor) -> Tensor:
        """See :class:`Overlap`."""
        return self.pieces.times(low, (self.right * self.right).mT)


class _FusedMatrix(MatrixProjector):
    """Before a class of whole bases in the order of resolution."""

    def __init__(self, projection: Projection, shape: torch.Size, rows: Rows, pieces: Pieces) -> None:
        super().__init__(projection, torch.Size((pieces.count, pieces.height, shape[1])))
        self.rows, self.pieces = rows, pieces
        self.shape = torch.Size((rows.count, shape[1]))
        self.low_is_sharded = LEFT not in self.sides
        if self.low_is_sharded:
            self.low_shape = torch.Size((rows.count, self.rank))

    def basis_shape(self, side: str) -> tuple[int, ...]:
        """See :class:`MatrixProjector`."""
        return (self.rows.count, self.rank) if side == LEFT else super().basis_shape(side)

    def basis_bytes(self) -> int:
        """See :class:`MatrixProjector`."""
        elements = sum(torch.Size(self.basis_shape(side)).numel() for side in self.sides)
        return elements * self.basis_dtype.itemsize

    def down(self, opened: Stored, gradient: Tensor) -> Tensor:
        """See :class:`Projector`; this process's share of the sum, where R is whole."""
        low = gradient.to(self.basis_dtype)
        if RIGHT in opened:
            low = self.pieces.times(low, opened[RIGHT])
        if LEFT in opened:
            low = self.pieces.products(opened[LEFT], low)
        return low.float()

    def up(self, opened: Stored, low: Tensor) -> Tensor:
        """See :class:`Projector`."""
        full = low.to(self.basis_dtype)
        if LEFT not in opened:
            return self.pieces.times(full, opened[RIGHT].mT).float()
        if RIGHT in opened:
            full = full @ opened[RIGHT].mT
        return self.pieces.times(opened[LEFT], full).float()

    def overlap(self, old: Stored, new: Stored) -> Overlap:
        """See :class:`MatrixProjector`."""
        found = {
            side: self._overlap_of_side(side, old[side].float(), new[side].float()) for side in self.sides
        }
        return _OverlapOfRows(self.pieces, found[RIGHT]) if self.low_is_sharded else MatrixOverlap(**found)

    def _overlap_of_side(self, side: str, old: Tensor, new: Tensor) -> Tensor:
        def product(a: Tensor, b: Tensor) -> Tensor:
            return self.rows.sum_(self.pieces.products(a, b)) if side == LEFT else a.mT @ b

        if self.orthonormal:
            return product(new, old)
        least_squares: Tensor = product(new, old) @ torch.linalg.pinv(product(old, old), hermitian=True)
        return least_squares

    def _rows_of(self, stack: Tensor) -> Tensor:
        """This process's, of ``[P, rows of a piece, r]``."""
        return stack.flatten(0, 1)[self.rows.slice]


class FusedRandom(_FusedMatrix, RandomProjector):
    """The basis of the stack is drawn, and the rows of other processes dropped."""

    def __init__(self, projection: Projection, shape: torch.Size, rows: Rows, pieces: Pieces) -> None:
        super().__init__(projection, shape, rows, pieces)
        self._whole = RandomProjector(projection, torch.Size((pieces.count, pieces.height, shape[1])))

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
        return {side: self._rows_of(each) if side == LEFT else each for side, each in whole.items()}


class FusedPower(_FusedMatrix, SpectralProjector):
    """``power`` alone: sums over the processes, and for a left basis a gather of ``[m, r]``.

    Raises:
        ProjectionError: another spectral projection.
    """

    def __init__(self, projection: Projection, shape: torch.Size, rows: Rows, pieces: Pieces) -> None:
        super().__init__(projection, shape, rows, pieces)
        if self.kind != "power":
            raise ProjectionError(
                f"projection {self.kind!r} with split={pieces.count} of a sharded parameter {tuple(shape)}: "
                "use projection 'power', or leave split out for this group"
            )

    def refresh_(self, stored: Stored, gradient: Tensor | None, *, key: RandomKey) -> None:
        """See :class:`Projector`."""
        assert gradient is not None
        gradient = gradient.float()
        # Of pieces without a gradient the bases stay, if there are any.
        silent = (self.rows.largest_(self.pieces.peaks(gradient)) == 0).tolist()
        for side in self.sides:
            last = stored[side].float()
            cold = not bool(self.rows.largest_(last.any().float().reshape(1)))
            if cold:
                draw = key.fold(LEFT_STREAM if side == LEFT else RIGHT_STREAM)
                last = self._first(side, gradient, draw)
            basis = last
            for _ in range(_COLD_ITERATIONS if cold else 1):
                basis = self._iterated(side, gradient, basis)
            if not cold and side == LEFT:
                self.pieces.keep_(basis, last, silent)
            elif not cold:
                basis[torch.tensor(silent)] = last[torch.tensor(silent)]
            stored[side].copy_(basis)

    def _first(self, side: str, gradient: Tensor, key: RandomKey) -> Tensor:
        """From a Gaussian sketch."""
        other = self.dimensions[RIGHT if side == LEFT else LEFT]
        sketch = gaussian(key, (self.pieces.count, other, self.rank), gradient.device)
        if side == LEFT:
            return self._orthonormal_rows(self.pieces.times(gradient, sketch))
        return self._orthonormal(self.pieces.products(gradient, self._rows_of(sketch)))

    def _iterated(self, side: str, gradient: Tensor, basis: Tensor) -> Tensor:
        if side == LEFT:
            seen = self.rows.sum_(self.pieces.products(gradient, basis))
            return self._orthonormal_rows(self.pieces.times(gradient, _scaled(seen)))
        seen = self.pieces.times(gradient, basis)
        # So that gradients of 1e-20 do not underflow when multiplied twice.
        peaks = self.rows.largest_(self.pieces.peaks(seen)).clamp_min(torch.finfo(seen.dtype).tiny)
        for piece, here in self.pieces.segments:
            seen[here] /= peaks[piece]
        return self._orthonormal(self.pieces.products(gradient, seen))

    def _orthonormal(self, summand: Tensor) -> Tensor:
        return orthonormal(self.rows.sum_(summand))

    def _orthonormal_rows(self, own: Tensor) -> Tensor:
        whole = self.rows.gather(own).view(self.pieces.count, self.pieces.height, -1)
        return self._rows_of(orthonormal(whole))

    def refresh_workspace(self, gradient_dtype: torch.dtype, *, first: bool = False) -> Workspace:
        """See :class:`Projector`; of the side that needs most."""
        rows, r, n, count = self.rows, self.rank, self.dimensions[RIGHT], self.pieces.count
        left = LEFT in self.sides
        widened = 0 if gradient_dtype == torch.float32 else rows.count * n
        decomposing = count * orthonormal_elements(max(self.pieces.height if left else 0, n), r)
        gathered = (1 + rows.world) * rows.chunk * r if left else 0
        needed = widened + count * n * r + rows.count * r + gathered + decomposing
        drawing = draw_bytes(max(count * n, rows.total) * r) if first else 0
        return Workspace(
            tensor_bytes=max(needed * torch.float32.itemsize, drawing),
            library_bytes=count * qr_library_bytes(max(self.pieces.height if left else 0, n), r),
        )


def _scaled(columns: Tensor) -> Tensor:
    scaled: Tensor = columns / largest_entry(columns).clamp_min(torch.finfo(columns.dtype).tiny)
    return scaled
