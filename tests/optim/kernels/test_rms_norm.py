"""RMSNorm: the reference against autograd, the CPU path and the kernel against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memtrain.optim.kernels import rms_norm
from tests.optim.kernels.traffic import count_traffic

SHAPES = [(5, 123, 123), (1, 1), (3, 1), (7, 64), (2, 0, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
PATHS = [
    pytest.param(rms_norm.rms_norm_forward, rms_norm.rms_norm_backward, id="public"),
    pytest.param(
        rms_norm._triton_forward, rms_norm._triton_backward, id="triton", marks=pytest.mark.venv_optim
    ),
]


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x, (1 + 0.1 * torch.randn(shape[-1], generator=generator)).to(dtype), dy


def llama(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def close(actual: Tensor, expected: Tensor, *, rounds: float) -> None:
    """Within ``rounds`` roundings of the dtype, relative to the largest."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.numel():
        limit = rounds * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_llamas_norm_and_its_gradients(dtype: torch.dtype) -> None:
    x, weight, dy = operands((5, 12, 33), dtype)
    y, rstd = rms_norm.reference_forward(x, weight, EPS)
    assert torch.equal(y, llama(x, weight))
    x64, weight64 = (t.double().requires_grad_() for t in (x, weight))
    (weight64 * x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + EPS)).backward(dy.double())
    dx, dweight = rms_norm.reference_backward(dy, x, weight, rstd)
    assert x64.grad is not None
    assert weight64.grad is not None
    close(dx, x64.grad.to(dtype), rounds=2)
    close(dweight, weight64.grad.to(dtype), rounds=4)


@pytest.mark.parametrize(("forward", "backward"), PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_paths_agree_with_the_reference(
    forward: Callable[..., Any], backward: Callable[..., Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, weight, dy = operands(shape, dtype)
    y, rstd = forward(x, weight, EPS)
    expected_y, expected_rstd = rms_norm.reference_forward(x, weight, EPS)
    close(y, expected_y, rounds=2)
    close(rstd, expected_rstd, rounds=4)
    dx, dweight = backward(dy, x, weight, expected_rstd)
    expected_dx, expected_dweight = rms_norm.reference_backward(dy, x, weight, expected_rstd)
    close(dx, expected_dx, rounds=2)
    close(dweight, expected_dweight, rounds=16)


@pytest.mark.venv_optim
def test_traffic_is_what_the_spec_says() -> None:
    x, weight, dy = operands((32, 1024), torch.bfloat16)
    rstd = rms_norm.reference_forward(x, weight, EPS)[1]
    with count_traffic(x=x, weight=weight) as traffic:
        rms_norm._triton_forward(x, weight, EPS)
    spec = {v.label: v for v in rms_norm.SPECS[0].variants}["bf16 1024"]
    assert traffic.moved_bytes(cached=["weight"]) - weight.nbytes == spec.moved_bytes * x.numel()
    with count_traffic(x=x, weight=weight, dy=dy, rstd=rstd) as traffic:
        rms_norm._triton_backward(dy, x, weight, rstd)
    spec = {v.label: v for v in rms_norm.SPECS[1].variants}["bf16 1024"]
    partial_bytes = 4 * 4 * 1024  # 4 programs in the interpreter, fp32
    assert (
        traffic.moved_bytes(cached=["weight"]) - weight.nbytes - partial_bytes == spec.least_bytes * x.numel()
    )


def test_wrong_shapes_are_refused() -> None:
    x, weight, dy = operands((3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"weight \(7,\) must have the last dimension of x \(3, 8\)"):
        rms_norm.rms_norm_forward(x, weight[:7], EPS)
    with pytest.raises(ValueError, match=r"rstd \(3, 1\), got \(3, 8\) and \(3,\)"):
        rms_norm.rms_norm_backward(dy, x, weight, torch.ones(3))
