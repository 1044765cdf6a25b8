"""Differentiable k-means of a weight: DKM (Cho et al., arXiv 2108.12659), with what eDKM makes of its memory.

Each element attends to k centroids by its distance; the centroids move to the means that the attention gives,
a few times; the weight becomes the attention's mixture of centroids, which tends to one of k values as the
temperature falls. Gradients reach the weight through both. Autograd saves several maps of n rows and k
columns for every iteration: n * k * 4 bytes each, 16 times a bf16 weight for k = 8. With ``unique`` they are
tables of distinct rows (``unique_rows.py``), to the same bits in backward.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from memtrain.optim.autograd.unique_rows import UniqueRows


def initial_centroids(weight: Tensor, count: int) -> Tensor:
    """``count`` quantiles of the weight's values, fp32.

    Raises:
        ValueError: fewer than two.
    """
    if count < 2:
        raise ValueError(f"a palette has at least 2 centroids, got {count}")
    ordered = weight.detach().float().reshape(-1).sort().values
    places = (torch.arange(count, device=weight.device) + 0.5) / count * ordered.numel()
    return ordered[places.long().clamp_(max=ordered.numel() - 1)]


def soft_palette(
    weight: Tensor,
    centroids: Tensor,
    *,
    temperature: float,
    iterations: int = 1,
    unique: bool = True,
) -> tuple[Tensor, Tensor]:
    """The weight as mixtures of centroids, in its shape and dtype, and the centroids that it ended with.

    Args:
        weight: any shape, real.
        centroids: [k]; gradients reach those that are given, too.
        temperature: of the attention, in units of the weight.
        iterations: of k-means, at least 1.
        unique: keep the maps as distinct rows.

    Raises:
        ValueError: a temperature that is not above 0, no iteration, or centroids of another shape.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if centroids.dim() != 1 or centroids.numel() < 2:
        raise ValueError(f"centroids must be [k] with k >= 2, got shape {tuple(centroids.shape)}")
    with UniqueRows(weight) if unique and torch.is_grad_enabled() else nullcontext():
        column = weight.reshape(-1, 1).float()
        for _ in range(iterations):
            attention = _attention(column, centroids, temperature)
            centroids = (attention.t() @ column).squeeze(1) / attention.sum(0)
        mixed = _attention(column, centroids, temperature) @ centroids
        return mixed.to(weight.dtype).view(weight.shape), centroids


def _attention(column: Tensor, centroids: Tensor, temperature: float) -> Tensor:
    """[n, k]: how much of each centroid an element is."""
    return torch.softmax((column - centroids).abs() / -temperature, dim=1)
