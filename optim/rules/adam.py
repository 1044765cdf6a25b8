"""Adam (Kingma and Ba 2015), and Adam-mini (arXiv 2406.16793), which keeps one second moment a row.

Rotation follows LDAdam (arXiv 2410.16103, section 3.2): the first moment is linear, and the second moment is
a variance, which transforms with the squares of C, and a squared mean, which transforms as the mean does:

    m' = C m,    v' = (1 - b2^t) |(C*C)(vhat - mhat^2) + (C mhat)^2|

with the hats of the last step. C being orthogonal on what both bases span, no energy is invented.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memtrain.optim.projection.base import Overlap
from memtrain.optim.rules.base import Moments, MomentSpec, check_eps, check_fraction


@dataclass(frozen=True, kw_only=True)
class Adam:
    """``mhat / (sqrt(vhat) + eps)``."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_on: Literal["corrected", "uncorrected"] = "corrected"
    """``uncorrected`` adds eps to sqrt(v) before the bias correction, as galore-torch 1.0 does."""

    def __post_init__(self) -> None:
        for index, beta in enumerate(self.betas):
            check_fraction(type(self).__name__, f"betas[{index}]", beta)
        check_eps(type(self).__name__, self.eps)

    def moments(self, shape: torch.Size) -> dict[str, MomentSpec]:
        """See :class:`Rule`."""
        return {"exp_avg": MomentSpec(shape, True), "exp_avg_sq": MomentSpec(self._variance(shape), False)}

    def _variance(self, shape: torch.Size) -> torch.Size:
        return shape

    def direction(self, moments: Moments, gradient: Tensor, step: int) -> Tensor:
        """See :class:`Rule`."""
        beta1, beta2 = self.betas
        mean, square = moments["exp_avg"], moments["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        self._add_square_(square, gradient)
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        root = square.sqrt()
        if self.eps_on == "uncorrected":
            return (mean / root.add_(self.eps)).mul_(correction2**0.5 / correction1)
        return (mean / correction1).div_(root.div_(correction2**0.5).add_(self.eps))

    def _add_square_(self, square: Tensor, gradient: Tensor) -> None:
        beta2 = self.betas[1]
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

    def rotate_(self, moments: Moments, overlap: Overlap, shape: torch.Size, step: int) -> None:
        """See :class:`Rule`."""
        if step == 0:
            return
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        mean = moments["exp_avg"] / correction1
        variance = moments["exp_avg_sq"] / correction2 - mean * mean
        moved = overlap.apply(mean)
        square = overlap.apply_squared(variance).addcmul_(moved, moved).abs_().mul_(correction2)
        moments["exp_avg"].copy_(moved.mul_(correction1))
        self._write_square_(moments["exp_avg_sq"], square)

    def _write_square_(self, square: Tensor, full: Tensor) -> None:
        square.copy_(full)


@dataclass(frozen=True, kw_only=True)
class AdamMini(Adam):
    """Adam with one second moment a row of the gradient, or one in all for a vector.

    Departure: the paper's blocks are heads for queries and keys and rows elsewhere; here rows everywhere,
    which is also what a row of a low-dimensional gradient, a basis direction, calls for.
    """

    def _variance(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], 1)) if len(shape) else shape

    def _add_square_(self, square: Tensor, gradient: Tensor) -> None:
        square.lerp_(self._row_mean(gradient * gradient), 1 - self.betas[1])

    def _write_square_(self, square: Tensor, full: Tensor) -> None:
        square.copy_(self._row_mean(full))

    @staticmethod
    def _row_mean(full: Tensor) -> Tensor:
        return full.mean(-1, keepdim=True) if full.dim() else full
