"""Adafactor (arXiv 1804.04235) without first moment: second moments as row and column means.

    row, column <- b2 * old + (1 - b2) * means of (g^2 + eps),    b2 = 1 - t^beta2_decay
    u = g / sqrt(row column^T / mean(row)),    u / max(1, RMS(u) / clip_threshold)

The learning rate is the group's: the paper's relative step size and scaling by RMS(W) are left to schedulers.
A stack of matrices is factored and clipped matrix by matrix; a vector keeps its whole second moment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.optim.projection.base import Overlap
from memtrain.optim.rules.base import Moments, MomentSpec, check_eps


@dataclass(frozen=True, kw_only=True)
class Adafactor:
    """A direction whose root mean square is at most ``clip_threshold``."""

    eps: float = 1e-30
    beta2_decay: float = -0.8
    clip_threshold: float = 1.0

    def __post_init__(self) -> None:
        check_eps("Adafactor", self.eps)
        if not self.beta2_decay < 0:
            raise ValueError(f"Adafactor: beta2_decay must be < 0, got {self.beta2_decay}: -0.8 is usual")
        if not self.clip_threshold > 0:
            raise ValueError(f"Adafactor: clip_threshold must be > 0, got {self.clip_threshold}")

    def moments(self, shape: torch.Size) -> dict[str, MomentSpec]:
        """See :class:`Rule`."""
        if len(shape) < 2:
            return {"exp_avg_sq": MomentSpec(shape, False)}
        return {
            "row": MomentSpec(shape[:-1], False),
            "column": MomentSpec(shape[:-2] + shape[-1:], False),
        }

    def direction(self, moments: Moments, gradient: Tensor, step: int) -> Tensor:
        """See :class:`Rule`."""
        weight = step**self.beta2_decay
        square = (gradient * gradient).add_(self.eps)
        if gradient.dim() < 2:
            update = gradient * moments["exp_avg_sq"].lerp_(square, weight).rsqrt()
            axes = None
        else:
            row = moments["row"].lerp_(square.mean(-1), weight)
            column = moments["column"].lerp_(square.mean(-2), weight)
            relative = row / row.mean(-1, keepdim=True)
            update = gradient * relative.rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
            axes = (-2, -1)
        rms = update.square().mean(axes, keepdim=axes is not None).sqrt_()
        return update.div_((rms / self.clip_threshold).clamp_min_(1))

    def rotate_(self, moments: Moments, overlap: Overlap, shape: torch.Size, step: int) -> None:
        """The factored second moment, written out, turned by the squares of C and factored again."""
        if len(shape) < 2:
            moments["exp_avg_sq"].copy_(overlap.apply_squared(moments["exp_avg_sq"]))
            return
        row, column = moments["row"], moments["column"]
        scale = row.mean(-1, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
        square = overlap.apply_squared((row / scale).unsqueeze(-1) * column.unsqueeze(-2))
        row.copy_(square.mean(-1))
        column.copy_(square.mean(-2))
