"""Natural gradient before another rule (Natural GaLore, arXiv 2410.16029), through Woodbury's identity.

The last s low-dimensional gradients, the present one among them, are the columns of X; the empirical Fisher
matrix ``F = lambda I + X X^T`` is inverted in s dimensions:

    F^-1 g = (g - X (lambda I + X^T X)^-1 X^T g) / lambda

Departures. lambda is ``damping`` times t, the mean of the squared norms in X: an absolute lambda of 1e-3 does
nothing to gradients of norm 1e-3 and cancels catastrophically for those of norm 1e3. The natural gradient is
``t F^-1 g``, which has the size of g and its units, so that eps and lr mean what they mean elsewhere.

The history costs s times the bytes of one moment: ten times what Adam keeps, with s = 20. At a refresh it is
turned into the new basis or cleared, with the other moments; the published code leaves it in the old one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.optim.projection.base import Overlap
from memtrain.optim.rules.base import Moments, MomentSpec, Rule

_HISTORY = "history"


@dataclass(frozen=True, kw_only=True)
class Natural:
    """``inner`` sees the natural gradient instead of the gradient."""

    inner: Rule
    history: int = 20
    damping: float = 1e-3

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"history must be at least 1, got {self.history}")
        if not self.damping > 0:
            raise ValueError(f"damping must be > 0, got {self.damping}: 1e-3 is usual")

    def moments(self, shape: torch.Size) -> dict[str, MomentSpec]:
        """See :class:`Rule`."""
        kept = {_HISTORY: MomentSpec(torch.Size((self.history, *shape)), True)}
        return kept | self.inner.moments(shape)

    def direction(self, moments: Moments, gradient: Tensor, step: int) -> Tensor:
        """See :class:`Rule`."""
        history = moments[_HISTORY]
        history[(step - 1) % self.history] = gradient
        natural = self._natural(history[: min(step, self.history)], gradient)
        return self.inner.direction(moments, natural, step)

    def _natural(self, history: Tensor, gradient: Tensor) -> Tensor:
        """Matrix by matrix where the gradient is a stack."""
        batch = gradient.shape[:-2]
        columns = history.reshape(len(history), *batch, -1).movedim(0, -1)
        g = gradient.reshape(*batch, -1, 1)
        gram = columns.mT @ columns
        damping = self.damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        damping = damping.clamp_min(torch.finfo(gram.dtype).tiny)
        damped = gram + damping * torch.eye(len(history), dtype=gram.dtype, device=gram.device)
        # lu rather than Cholesky: with nearly equal gradients rounding may cost the last pivot its sign.
        solved = torch.linalg.solve(damped, columns.mT @ g)
        natural: Tensor = (g - columns @ solved) / self.damping
        return natural.reshape(gradient.shape)

    def rotate_(self, moments: Moments, overlap: Overlap, shape: torch.Size, step: int) -> None:
        """See :class:`Rule`."""
        moments[_HISTORY].copy_(overlap.apply(moments[_HISTORY]))
        self.inner.rotate_(moments, overlap, shape, step)
