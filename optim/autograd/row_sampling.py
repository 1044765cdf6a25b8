"""Which rows of an input are kept for its weight's gradient, and with what factors (for ``wtacrs.py``)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FLOOR = 0.01
"""Least gradient norm that is believed, over the mean: a row whose last gradient was 0 (padding, a masked
label) may matter now, and what has probability 0 would be missing from the expectation."""


class Sample(NamedTuple):
    """Which rows, int64 ``[k]``, and the factor of each row's term, fp32 ``[k]``."""

    rows: Tensor
    factors: Tensor


def draw_rows(probabilities: Tensor, count: int, *, winners: bool = True) -> Sample:
    """``count`` rows such that the weighted sum of their terms has the expectation of the whole sum.

    Computed on the device of ``probabilities`` without waiting for it.

    Args:
        probabilities: fp32 ``[tokens]``, summing to 1; rows with 0 are never drawn.
        count: fewer than tokens, at least 1.
        winners: False: draw all (plain column-row sampling, Drineas et al. 2006).
    """
    ordered, order = probabilities.sort(descending=True)
    kept = ordered.double().cumsum(0)
    slots = torch.arange(count, device=probabilities.device)
    before = torch.cat([kept.new_zeros(1), kept[: count - 1]])  # P_C for c = 0 ... count - 1
    certain = ((kept[-1] - before).clamp_min(0) / (count - slots)).argmin() if winners else slots[0]
    rest = (kept[-1] - before[certain]).clamp_min(0)
    is_drawn = slots >= certain
    # Draws come from the ordered rows behind the winners, by the inverse of their distribution function.
    points = before[certain] + rest * torch.rand(count, device=kept.device, dtype=kept.dtype)
    drawn = torch.searchsorted(kept, points, right=True).clamp_max(len(kept) - 1)
    drawn = torch.maximum(drawn, certain)
    drawn_factors = rest / ((count - certain) * ordered[drawn].double().clamp_min(1e-300))
    rows = order[torch.where(is_drawn, drawn, slots)]
    return Sample(rows, torch.where(is_drawn, drawn_factors, 1.0).float())


class GradientNorms:
    """Norms of gradient rows, from the last time that each sample was seen.

    Args:
        samples: of the data set.
        tokens: of a sample.
        device: of the layer.
    """

    def __init__(self, samples: int, tokens: int, device: torch.device | str = "cpu") -> None:
        self.norms = torch.full((samples, tokens), -1.0, dtype=torch.bfloat16, device=device)

    def of(self, ids: Tensor) -> Tensor:
        """fp32 ``[len(ids) * tokens]``: norms; the mean of the known ones where none is known; at least
        ``_FLOOR`` of the mean. 1 where nothing is known."""
        norms = self.norms[ids].float().view(-1)
        known = norms >= 0
        mean = torch.where(known, norms, 0.0).sum() / known.sum().clamp_min(1)
        mean = torch.where(mean > 0, mean, 1.0)
        return torch.where(known, norms, mean).maximum(_FLOOR * mean)

    def store(self, ids: Tensor, norms: Tensor) -> None:
        """What is not finite is not learnt: a step that a GradScaler skips leaves no trace."""
        norms = norms.view(len(ids), -1)
        self.norms[ids] = torch.where(norms.isfinite(), norms.to(self.norms.dtype), self.norms[ids])
