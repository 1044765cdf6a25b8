"""T3: a solution of rank 48 passes by in subspaces of 8, a new one each 20 steps, under gradient noise.

Moments in coordinates of an old basis mislead. Three seeds are three matrices of one stack, which are
projected and renewed each for itself: one run, and each seed's result as if it were alone.
"""

import functools

import pytest
import torch
from torch import nn

from memtrain.optim.grid import GridOptimizer

SEEDS, STEPS, LR = (0, 1, 2), 1500, 0.02
LARGEST = {0.0: 1e-4, 0.3: 4e-3, 1.0: 2.2e-2}
"""By noise: what rotated moments leave of the loss. Measured: 5e-11 to 2e-5, 2.3e-3 to 3.1e-3, 1.2e-2 to
1.8e-2; kept ones leave 7e-4 to 9e-3, 6e-3 to 2e-2, 4.9e-2 to 8.9e-2, each seed at least 1.9 times as much."""


@functools.cache
def remaining_loss(projection: str, basis_dtype: str, noise: float, refresh: str) -> torch.Tensor:
    """``|W - W*|^2`` relative to the start, after lr has gone down linearly; 64 x 64; of each seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]

    def draw(*shape: int) -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    solution = draw(64, 48) @ draw(48, 64) / 48**0.5
    weight = nn.Parameter(torch.zeros_like(solution))
    optimizer = GridOptimizer(
        [weight], projection=projection, basis_dtype=basis_dtype, rank=8, update_gap=20, refresh=refresh
    )
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        weight.grad = (weight - solution).detach()
        if noise:
            weight.grad += noise * draw(64, 64)
        optimizer.step()
    return (weight.detach() - solution).square().sum((1, 2)) / solution.square().sum((1, 2))


@pytest.mark.parametrize(
    ("projection", "basis_dtype", "noise"),
    [
        *(("svd", "fp32", noise) for noise in LARGEST),
        *(("power", "fp32", noise) for noise in LARGEST),
        ("power", "bf16", 0.0),
        ("power", "bf16", 1.0),
    ],
)
def test_rotated_moments_beat_kept_ones(projection: str, basis_dtype: str, noise: float) -> None:
    kept, rotated = (remaining_loss(projection, basis_dtype, noise, each) for each in ("keep", "rotate"))
    assert bool((rotated < 0.6 * kept).all())
    assert bool((rotated < LARGEST[noise]).all())
    if noise:
        spread = (rotated.max() - rotated.min()) / rotated.median()
        assert spread < 0.25


@pytest.mark.parametrize("projection", ["svd", "power"])
def test_rotated_moments_beat_cleared_ones_under_noise(projection: str) -> None:
    """Measured: .4 of what cleared ones leave. Without noise, under svd, clearing is the better (4e-9)."""
    rotated = remaining_loss(projection, "fp32", 1.0, "rotate")
    cleared = remaining_loss(projection, "fp32", 1.0, "reset")
    assert bool((rotated < 0.6 * cleared).all())
    if projection == "svd":
        assert bool((remaining_loss("svd", "fp32", 0.0, "reset") < 1e-7).all())
