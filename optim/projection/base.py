"""What a projector is: the way from a gradient to its low-dimensional part and back.

A projector is bound to the shape of one parameter, holds no tensors, and may be shared by all parameters of
that shape. What has to persist lies in a flat dict of plain tensors, ``stored``, which the optimizer keeps in
its state: a basis, or only the three words of the key from which the basis is made again.

Index letters: E experts (a batch of matrices), m rows and n columns of the parameter, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from memtrain.optim.projection.workspace import Workspace
from memtrain.optim.storage import RandomKey

Kind = Literal[
    "svd", "eigh", "power", "gaussian", "rademacher", "semi_orthogonal", "columns", "rows", "randk", "block"
]
Stored = dict[str, Tensor]


class ProjectionError(ValueError):
    """A projection that cannot be made for a parameter, or whose combination would be wrong."""


class Overlap(Protocol):
    """How coordinates in the old basis are seen from the new one: the linear map ``C = P_new^+ P_old``."""

    def apply(self, low: Tensor) -> Tensor:
        """``C low``, in the shape of the new low-dimensional gradient. Leading dimensions are a batch."""
        ...

    def apply_squared(self, low: Tensor) -> Tensor:
        """``(C * C) low``: what independent variances become."""
        ...


class Projector(Protocol):
    """Down to the low-dimensional gradient R, up again, and a new basis now and then.

    ``down`` and ``up`` take what ``open`` returned, so that a basis made from a seed is made once a step.
    Gradients may be of any floating dtype; R is fp32.
    """

    kind: Kind
    shape: torch.Size
    """Of the parameter: ``[m, n]`` or ``[E, m, n]``."""
    low_shape: torch.Size
    """Of R."""
    low_axis: int | None
    """The axis of R that the projection has shortened; its norms are those of rows or columns of the
    gradient. None where R has no such axis (two-sided, or single entries)."""
    orthonormal: bool
    """Whether ``up(down(G))`` is an orthogonal projection, and so orthogonal to ``G - up(down(G))``."""
    complete: bool
    """Whether R has as many entries as the gradient, so that nothing is left out."""
    needs_gradient: bool
    """Whether a refresh looks at the gradient; otherwise the basis follows from the key alone."""

    def empty(self, device: torch.device | str) -> Stored:
        """What persists, before the first refresh."""
        ...

    def refresh_(self, stored: Stored, gradient: Tensor | None, *, key: RandomKey) -> None:
        """Write a new basis into ``stored``. Where the gradient is needed it must be finite, and should not
        be zero: then the basis is any."""
        ...

    def open(self, stored: Stored, device: torch.device) -> Stored:
        """What ``down`` and ``up`` need: ``stored`` itself, or the basis made from its seed."""
        ...

    def down(self, opened: Stored, gradient: Tensor) -> Tensor:
        """R, fp32, of ``low_shape``."""
        ...

    def up(self, opened: Stored, low: Tensor) -> Tensor:
        """Back to ``shape``, fp32."""
        ...

    def overlap(self, old: Stored, new: Stored) -> Overlap:
        """From one opened basis to another."""
        ...

    def size_bytes(self) -> int:
        """Bytes of what persists."""
        ...

    def refresh_workspace(self, gradient_dtype: torch.dtype, *, first: bool = False) -> Workspace:
        """What a refresh takes for a while; ``first``: that before which there is no basis."""
        ...


@dataclass(frozen=True)
class MatrixOverlap:
    """``low -> left @ low @ right.T`` with either factor absent."""

    left: Tensor | None = None
    """``[..., r, r]``."""
    right: Tensor | None = None

    def apply(self, low: Tensor) -> Tensor:
        """See :class:`Overlap`."""
        return self._multiply(low, self.left, self.right)

    def apply_squared(self, low: Tensor) -> Tensor:
        """See :class:`Overlap`."""
        squares = (None if c is None else c * c for c in (self.left, self.right))
        return self._multiply(low, *squares)

    @staticmethod
    def _multiply(low: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        if left is not None:
            low = left @ low
        return low if right is None else low @ right.mT


@dataclass(frozen=True)
class CoordinateOverlap:
    """Coordinates that are in both selections keep their value, newcomers get zero."""

    source: Tensor
    """int64 ``[k]``: where each new coordinate was, undefined for newcomers."""
    stays: Tensor
    """bool ``[k]``."""
    axis: int

    def apply(self, low: Tensor) -> Tensor:
        """See :class:`Overlap`."""
        moved = low.index_select(self.axis, self.source)
        mask_shape = [1] * low.dim()
        mask_shape[self.axis] = -1
        return moved * self.stays.view(mask_shape)

    def apply_squared(self, low: Tensor) -> Tensor:
        """The entries of C are zero and one."""
        return self.apply(low)
