"""SGD with momentum, and Lion (arXiv 2302.06675): one moment, which a change of basis simply rotates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.optim.projection.base import Overlap
from memtrain.optim.rules.base import Moments, MomentSpec, check_fraction


class _OneMoment:
    def moments(self, shape: torch.Size) -> dict[str, MomentSpec]:
        """See :class:`Rule`."""
        return {"momentum": MomentSpec(shape, True)}

    def rotate_(self, moments: Moments, overlap: Overlap, shape: torch.Size, step: int) -> None:
        """See :class:`Rule`."""
        moments["momentum"].copy_(overlap.apply(moments["momentum"]))


@dataclass(frozen=True, kw_only=True)
class Momentum(_OneMoment):
    """``buffer = momentum * buffer + gradient``, as torch.optim.SGD without dampening."""

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_fraction("Momentum", "momentum", self.momentum)

    def direction(self, moments: Moments, gradient: Tensor, step: int) -> Tensor:
        """See :class:`Rule`."""
        buffer = moments["momentum"].mul_(self.momentum).add_(gradient)
        return gradient.add(buffer, alpha=self.momentum) if self.nesterov else buffer.clone()


@dataclass(frozen=True, kw_only=True)
class Lion(_OneMoment):
    """The sign of an interpolation between momentum and gradient."""

    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        for index, beta in enumerate(self.betas):
            check_fraction("Lion", f"betas[{index}]", beta)

    def direction(self, moments: Moments, gradient: Tensor, step: int) -> Tensor:
        """See :class:`Rule`."""
        momentum = moments["momentum"]
        direction = momentum.lerp(gradient, 1 - self.betas[0]).sign_()
        momentum.lerp_(gradient, 1 - self.betas[1])
        return direction
