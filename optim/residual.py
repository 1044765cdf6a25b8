"""What happens to ``G - up(down(G))``, the part of the gradient that the projection leaves out.

    none        U = scale * up(N)                                         GaLore     arXiv 2403.03507
    sign        U = scale * up(N) + residual_scale * sign(G - up(R))      FRUGAL     arXiv 2411.07837
    sgd         U = scale * up(N) + residual_scale * (G - up(R))          FRUGAL
    scaled      U = scale * up(N) + residual_scale * limit(s * (G - up(R)))   Fira   arXiv 2410.01623
    scale_only  U = limit(sqrt(scale) * s * G)                            APOLLO     arXiv 2412.05270

N is the rule's direction for ``R = down(G)``; ``s = |N| / |R|`` by channel (along the axis that the
projection shortened) or for the whole matrix (APOLLO-Mini). ``limit`` is Fira's norm-growth limiter: the norm
of what it passes grows at most ``limiter``-fold from one step to the next.

Departures. Published code adds 1e-8 to |R|, which is no small number beside gradients of that size: here a
channel of zero norm gets s = 0 and all others are divided exactly. N is corrected for bias before its norm is
taken, so that the limiter sees what is applied. Fira's published code takes ``G - scale * up(R)``, by which
a part of the gradient is counted twice; here the residual is what the name says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from memtrain.optim.projection.base import ProjectionError, Projector, Stored
from memtrain.optim.projection.coordinates import CoordinateProjector

ResidualKind = Literal["none", "sign", "sgd", "scaled", "scale_only"]
Granularity = Literal["channel", "tensor"]
NORM = "norm"


@dataclass(frozen=True, kw_only=True)
class Residual:
    """How direction and residual become one update.

    Raises:
        ValueError: a field is out of range.
    """

    kind: ResidualKind = "none"
    scale: float = 1.0
    """Of the projected update."""
    residual_scale: float = 1.0
    """Of the residual's part."""
    granularity: Granularity = "channel"
    limiter: float | None = 1.01
    """Largest growth of the norm from step to step; None: no limit."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ResidualKind):
            raise ValueError(
                f"residual must be one of {', '.join(get_args(ResidualKind))}, got {self.kind!r}"
            )
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity must be channel or tensor, got {self.granularity!r}")
        if self.limiter is not None and not self.limiter > 1:
            raise ValueError(f"limiter must be > 1 or None, got {self.limiter}: 1.01 is usual")
        for field, value in (("scale", self.scale), ("residual_scale", self.residual_scale)):
            if not value >= 0:
                raise ValueError(f"{field} must be >= 0, got {value}")

    @property
    def _limits(self) -> bool:
        return self.limiter is not None and self.kind in ("scaled", "scale_only")

    def check(self, projector: Projector) -> None:
        """Refuse combinations that would be wrong.

        Raises:
            ProjectionError: named projector and residual do not go together.
        """
        if self.kind in ("sign", "sgd", "scaled") and not projector.orthonormal:
            raise ProjectionError(
                f"residual {self.kind!r} needs an orthonormal projection, {projector.kind!r} is none: its "
                "residual would not be orthogonal to what is projected. Use 'semi_orthogonal', a spectral or "
                "a coordinate projection, or residual 'none' or 'scale_only'"
            )
        by_channel = self.kind in ("scaled", "scale_only") and self.granularity == "channel"
        if by_channel and projector.low_axis is None:
            raise ProjectionError(
                f"residual {self.kind!r} by channel needs a projection of one side: {projector.kind!r} for "
                f"shape {tuple(projector.shape)} keeps no channels apart. Use granularity='tensor'"
            )

    def empty(self, projector: Projector, device: torch.device | str) -> Stored:
        """The last norm of each matrix, fp32, where there is a limiter; zero: no step yet."""
        if not self._limits:
            return {}
        return {NORM: torch.zeros(projector.shape[:-2], dtype=torch.float32, device=device)}

    def size_bytes(self, projector: Projector) -> int:
        """Of :meth:`empty`."""
        return projector.shape[:-2].numel() * torch.float32.itemsize if self._limits else 0

    def combine(
        self,
        gradient: Tensor | None,
        low: Tensor,
        direction: Tensor,
        projector: Projector,
        opened: Stored,
        memory: Stored,
    ) -> Tensor:
        """The update U, fp32, in the shape of the parameter; the weight moves by ``-lr * U``.

        Args:
            gradient: of the parameter, any dtype; may be None for kind ``none``, which does not look at it.
            low: R.
            direction: N, which may be overwritten.
            memory: what :meth:`empty` gave; updated in place.
        """
        # Where nothing is left out, the rest is rounding, and its signs would be steps of full size.
        if self.kind == "none" or (self.kind == "sign" and projector.complete):
            return projector.up(opened, direction.mul_(self.scale))
        assert gradient is not None
        if self.kind == "scale_only":
            whole = self.scaling(low, direction, projector).mul_(self.scale**0.5)
            return self._limit_(gradient * whole, memory)
        if self.kind == "sign" and isinstance(projector, CoordinateProjector):
            # What is projected has no residual: no way back up is needed to tell the two apart.
            update = torch.sign(gradient.contiguous()).float().mul_(self.residual_scale)
            return projector.write_(update, opened, direction.mul_(self.scale))
        scaling = self.scaling(low, direction, projector) if self.kind == "scaled" else None
        rest = projector.up(opened, low)
        torch.sub(gradient, rest, out=rest)
        if self.kind == "sign":
            rest.sign_()
        elif scaling is not None:
            rest = self._limit_(rest.mul_(scaling), memory)
        # Whole tensors are what costs here: the scale is applied to the small direction.
        return projector.up(opened, direction.mul_(self.scale)).add_(rest, alpha=self.residual_scale)

    def norm_of_low(self, low: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Over axes of R, which are kept."""
        norm: Tensor = torch.linalg.vector_norm(low, dim=axes, keepdim=True)
        return norm

    def norm_of_update(self, update: Tensor) -> Tensor:
        """Of each matrix."""
        norm: Tensor = torch.linalg.vector_norm(update, dim=(-2, -1))
        return norm

    def scaling(self, low: Tensor, direction: Tensor, projector: Projector) -> Tensor:
        """|N| / |R|, broadcast to the parameter's shape."""
        if self.granularity == "channel":
            axes: tuple[int, ...] = (projector.low_axis or 0,)
        elif low.dim() == 1:
            axes = (0,)
        else:
            axes = (-2, -1)
        norm = self.norm_of_low(low, axes)
        ratio = self.norm_of_low(direction, axes) / norm
        return torch.where(norm > 0, ratio, 0)

    def _limit_(self, update: Tensor, memory: Stored) -> Tensor:
        if not self._limits:
            return update
        factor = self.limit_(self.norm_of_update(update), memory)
        return update.mul_(factor[..., None, None])

    def limit_(self, norm: Tensor, memory: Stored) -> Tensor:
        """By what something of this norm is to be multiplied; ``memory`` is updated."""
        if self.limiter is None:
            return torch.ones_like(norm)
        last = memory[NORM]
        growth = torch.where(last > 0, norm / last, 0)
        factor = self.limiter / growth.clamp_min(self.limiter)
        last.copy_(norm * factor)
        return factor
