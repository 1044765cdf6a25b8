"""When a parameter's basis is renewed, and what becomes of its moments.

``keep`` leaves the moments as they are, in coordinates that no longer mean the same (GaLore); ``reset``
starts them again, with their bias correction (FRUGAL); ``rotate`` carries them over into the new basis
(LDAdam's rule, :mod:`memtrain.optim.rules.adam`).

The schedule is a step number per parameter at which its next refresh is due: a parameter that had no gradient
then, or one that was not finite, catches up at the next step at which it has. With ``spread`` the parameters
of a group take turns, 1/gap of them a step, instead of all refreshing at once. A gap that is changed later
counts from the next refresh on, which keeps its date.

``lazy`` is Q-GaLore's (arXiv 2407.08296, section 3.2): when the leading basis vector has hardly moved over
the last five refreshes, the gap doubles. Departure: |cosine|, because the sign of a singular vector is
arbitrary and its flips would read as change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from memtrain.optim.projection.base import Stored

MomentPolicy = Literal["keep", "reset", "rotate"]

DUE, GROWTH, COSINES = "due", "growth", "cosines"
LAZY_QUEUE = 5
LAZY_THRESHOLD = 0.4
LAZY_GROWTH = 2
_NONE_YET = -1.0
_INT_BYTES = torch.int64.itemsize


@dataclass(frozen=True, kw_only=True)
class RefreshPolicy:
    """Schedule and the fate of the moments.

    Raises:
        ValueError: a field is out of range.
    """

    moments: MomentPolicy = "rotate"
    gap: int = 200
    """Steps from one refresh to the next."""
    spread: bool = False
    lazy: bool = False

    def __post_init__(self) -> None:
        if self.moments not in get_args(MomentPolicy):
            raise ValueError(f"refresh must be keep, reset or rotate, got {self.moments!r}")
        if self.gap < 1:
            raise ValueError(
                f"update_gap must be at least 1, got {self.gap}: a very large one never refreshes"
            )

    def empty(self) -> Stored:
        """On the CPU, where Python reads it; due at once."""
        stored = {DUE: torch.zeros((), dtype=torch.int64, device="cpu")}
        if self.lazy:
            stored[GROWTH] = torch.ones((), dtype=torch.int64, device="cpu")
            stored[COSINES] = torch.full((LAZY_QUEUE,), _NONE_YET, dtype=torch.float32, device="cpu")
        return stored

    def size_bytes(self) -> int:
        """Of :meth:`empty`."""
        return _INT_BYTES + (_INT_BYTES + LAZY_QUEUE * torch.float32.itemsize if self.lazy else 0)

    def is_due(self, stored: Stored, step: int) -> bool:
        """Whether the step, counted from zero, is to refresh."""
        return step >= int(stored[DUE])

    def now_(self, stored: Stored, step: int) -> None:
        """Make a refresh due at ``step``, whatever the schedule says."""
        stored[DUE].fill_(step)

    def done_(self, stored: Stored, step: int, *, offset: int, cosine: float | None) -> None:
        """Write when the next refresh is due.

        Args:
            offset: steps by which this parameter comes later in each period, below the gap.
            cosine: between the leading vectors of old and new basis; None at the first refresh, and where
                the policy is not lazy.
        """
        gap = self.gap
        if self.lazy:
            if cosine is not None:
                stored[COSINES].copy_(stored[COSINES].roll(-1))
                stored[COSINES][-1] = cosine
            if bool((stored[COSINES] >= 0).all()) and float(stored[COSINES].mean()) >= LAZY_THRESHOLD:
                stored[GROWTH].mul_(LAZY_GROWTH)
            gap *= int(stored[GROWTH])
        stored[DUE].fill_(step + gap - (step - offset) % gap)


def leading_cosines(old: Tensor, new: Tensor) -> Tensor:
    """|cosine| between the first columns of two bases ``[..., d, r]``, of each matrix of a stack."""
    a, b = old[..., 0].float(), new[..., 0].float()
    return torch.cosine_similarity(a, b, dim=-1).abs()


def leading_cosine(old: Tensor, new: Tensor) -> float:
    """The mean of :func:`leading_cosines`."""
    return float(leading_cosines(old, new).mean())
