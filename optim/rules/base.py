"""What an inner rule is: from a gradient, low-dimensional or whole, to a direction of the same shape.

A rule owns no tensors. Its moments come in and go out as fp32; how they are held between two steps is the
business of :mod:`memtrain.optim.storage`. A direction is corrected for bias and free of the learning rate:
the weight moves by ``-lr * direction``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memtrain.optim.projection.base import Overlap

Moments = dict[str, Tensor]


@dataclass(frozen=True)
class MomentSpec:
    """One moment that a rule wants kept."""

    shape: torch.Size
    signed: bool
    """False for squares, which a format may hold with one bit more."""


class Rule(Protocol):
    """An inner rule with its numbers filled in."""

    def moments(self, shape: torch.Size) -> dict[str, MomentSpec]:
        """What is kept for a gradient of this shape; all start at zero."""
        ...

    def direction(self, moments: Moments, gradient: Tensor, step: int) -> Tensor:
        """The direction for this step; ``moments`` are updated in place.

        Args:
            gradient: fp32; not changed, and the direction is a new tensor.
            step: updates since the moments were zero, this one included.
        """
        ...

    def rotate_(self, moments: Moments, overlap: Overlap, shape: torch.Size, step: int) -> None:
        """The moments as seen from a new basis, in place.

        Args:
            shape: of the gradients that the moments belong to.
            step: updates since the moments were zero.
        """
        ...


def check_fraction(rule: str, field: str, value: float) -> None:
    """Of a decay rate.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= value < 1:
        raise ValueError(f"{rule}: {field} must be in [0, 1), got {value}")


def check_eps(rule: str, eps: float) -> None:
    """Of what is added to a root.

    Raises:
        ValueError: it is negative.
    """
    if not eps >= 0:
        raise ValueError(f"{rule}: eps must be >= 0, got {eps}")
