"""Fira's and APOLLO's scalings in one call of C++, beside torch's operators."""

import pytest
import torch

from memtrain.optim import scaled_path
from memtrain.optim.kernels import lowrank_adam, lowrank_products, native
from memtrain.optim.residual import NORM, Residual

GENERATOR = torch.Generator().manual_seed(0)
SUMS = torch.rand(3, 33, 1, generator=GENERATOR) * torch.tensor([1.0, 1.0, 0.01]).view(3, 1, 1)
SUMS[0, 3] = 0  # a row of zeros
SQUARES = 2 * torch.rand(33, 1, generator=GENERATOR)  # some below those of R
SUMS[0, 5], SQUARES[5] = 1e-44, 0  # of a row so small that its squares are all but lost


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "function", lambda source, name: None)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("limiter", [1.01, None])
@pytest.mark.parametrize("last", [0.0, 1e-3, 1e3])
@pytest.mark.parametrize(
    "kind", [dict(kind="scaled", residual_scale=0.3), dict(kind="scale_only", scale=0.5)]
)
def test_scalings_and_the_limited_norm(monkeypatch, kind, last, limiter, granularity):
    residual, found = Residual(granularity=granularity, limiter=limiter, **kind), []
    for compiled in (True, False):
        if not compiled:
            without_compiler(monkeypatch)
        memory = {NORM: torch.tensor(last)} if limiter else {}
        scaling = scaled_path._limited(residual, SUMS.clone(), SQUARES.clone(), memory)
        found.append((scaling, memory.get(NORM, torch.zeros(()))))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
    assert found[0][0].isfinite().all()


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 401), (200, 7), (17, 128)], ids=str)
def test_sums_beside_adam(monkeypatch, shape, by_rows):
    low, back, mean = (torch.randn(shape, generator=GENERATOR) for _ in range(3))
    square, found = torch.rand(shape, generator=GENERATOR), []
    for compiled in (True, False):
        if not compiled:
            without_compiler(monkeypatch)
        moments = mean.clone(), square.clone()
        step = lowrank_adam.adam_summed(
            low, *moments, by_rows=by_rows, step=3, betas=(0.9, 0.99), eps=1e-8, back=back
        )
        found.append((*step, *moments))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (40, 33), (70, 600), (600, 300)], ids=str)
def test_squares_on_the_way_down_are_those_of_fp64(shape, dtype, right):
    gradient = (1e-8 * torch.randn(shape, generator=GENERATOR)).to(dtype)
    basis = torch.randn(shape[1 if right else 0], 3, generator=GENERATOR).bfloat16()
    if not lowrank_products.serves(basis, gradient):
        pytest.skip("no AMX")
    _, squares = scaled_path._down(gradient, basis, right)
    expected = gradient.double().square().sum(-1 if right else -2, keepdim=True).float()
    torch.testing.assert_close(squares, expected, rtol=1e-5, atol=0)
