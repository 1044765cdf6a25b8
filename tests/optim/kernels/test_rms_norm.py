"""RMSNorm: the reference against autograd, the CPU path and the kernel against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memtrain.optim.kernels import rms_norm
from tests.optim.kernels.compare import close
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
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        *((shape, "round_then_scale") for shape in SHAPES),
        ((7, 65), "scale_then_round"),
        ((7, 65), "one_plus_weight"),
    ],
)
def test_paths_agree_with_the_reference(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    form: rms_norm.Form,
) -> None:
    x, weight, dy = operands(shape, dtype)
    y, rstd = forward(x, weight, EPS, form)
    expected_y, expected_rstd = rms_norm.reference_forward(x, weight, EPS, form)
    close(y, expected_y, rounds=2)
    close(rstd, expected_rstd, rounds=4)
    dx, dweight = backward(dy, x, weight, expected_rstd, form)
    expected_dx, expected_dweight = rms_norm.reference_backward(dy, x, weight, expected_rstd, form)
    close(dx, expected_dx, rounds=2)
    close(dweight, expected_dweight, rounds=16)


@pytest.mark.parametrize("form", ["scale_then_round", "one_plus_weight"])
def test_the_other_forms_are_torchs_and_gemmas(form: rms_norm.Form) -> None:
    x, weight, dy = (t.double().requires_grad_() for t in operands((3, 7), torch.float32))
    scale = 1 + weight if form == "one_plus_weight" else weight
    expected = torch.nn.functional.rms_norm(x, (7,), scale, EPS)
    expected.backward(dy.detach())
    narrow = [t.detach().float() for t in (dy, x, weight)]
    y, rstd = rms_norm.reference_forward(narrow[1], narrow[2], EPS, form)
    dx, dweight = rms_norm.reference_backward(*narrow, rstd, form)
    for actual, wanted in ((y, expected.detach()), (dx, x.grad), (dweight, weight.grad)):
        assert wanted is not None
        close(actual, wanted.float(), rounds=8)


@pytest.mark.venv_optim
def test_traffic_is_what_the_spec_says() -> None:
    x, weight, dy = operands((32, 1024), torch.bfloat16)
    rstd = rms_norm.reference_forward(x, weight, EPS)[1]
    with count_traffic(x=x, weight=weight) as traffic:
        rms_norm._triton_forward(x, weight, EPS, "round_then_scale")
    spec = {v.label: v for v in rms_norm.SPECS[0].variants}["bf16 1024"]
    assert traffic.moved_bytes(cached=["weight"]) - weight.nbytes == spec.moved_bytes * x.numel()
    with count_traffic(x=x, weight=weight, dy=dy, rstd=rstd) as traffic:
        rms_norm._triton_backward(dy, x, weight, rstd, "round_then_scale")
    spec = {v.label: v for v in rms_norm.SPECS[1].variants}["bf16 1024"]
    partial_bytes = 4 * 4 * 1024  # 4 programs in the interpreter, fp32
    assert (
        traffic.moved_bytes(cached=["weight"]) - weight.nbytes - partial_bytes == spec.least_bytes * x.numel()
    )


def test_wrong_shapes_are_refused() -> None:
    x, weight, dy = operands((3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"weight \(7,\) must have the last dimension of x \(3, 8\)"):
        rms_norm.rms_norm_forward(x, weight[:7], EPS)
    with pytest.raises(ValueError, match="form must be one of round_then_scale"):
        rms_norm.rms_norm_forward(x, weight, EPS, "gemma")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rstd \(3, 1\), got \(3, 8\) and \(3,\)"):
        rms_norm.rms_norm_backward(dy, x, weight, torch.ones(3))
