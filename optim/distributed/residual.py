"""Residuals of parameters that are sharded by rows: norms over a whole matrix are of all processes' rows.

Experts of a stack are whole where they are, and so are their norms.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from memtrain.optim.distributed.rows import Rows
from memtrain.optim.residual import Residual


@dataclass(frozen=True, kw_only=True)
class ShardedResidual(Residual):
    """A residual that sends one number for each norm of a matrix. Norms by channel need none: they are of
    whole rows, or of columns of an R that is whole in every process."""

    rows: Rows
    low_is_sharded: bool
    of_experts: bool

    @classmethod
    def of(cls, residual: Residual, rows: Rows, *, low_is_sharded: bool, of_experts: bool) -> ShardedResidual:
        """The same for these rows."""
        given = {field.name: getattr(residual, field.name) for field in fields(Residual)}
        return cls(**given, rows=rows, low_is_sharded=low_is_sharded, of_experts=of_experts)

    def norm_of_low(self, low: Tensor, axes: tuple[int, ...]) -> Tensor:
        """See :class:`Residual`."""
        norm = super().norm_of_low(low, axes)
        by_parts = self.low_is_sharded and self.granularity == "tensor" and not self.of_experts
        return self.rows.norm_of_all(norm) if by_parts else norm

    def norm_of_update(self, update: Tensor) -> Tensor:
        """See :class:`Residual`."""
        norm = super().norm_of_update(update)
        return norm if self.of_experts else self.rows.norm_of_all(norm)
