"""The compiled passes of RMSNorm and of gated products: to the bit of the operators that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memtrain.optim.autograd import norms
from memtrain.optim.autograd.norms import RMSNormForm, rms_norm
from memtrain.optim.autograd.swiglu import gated_linear
from memtrain.optim.kernels import gated_cpu, native, rms_norm_cpu

EPS = 1e-6
SHAPES = [(3, 5, 16), (2, 129, 200), (1, 7), (257, 512)]
"""The last two are worth a second thread, and have rows and columns beside whole vectors."""
DTYPES = [torch.float32, torch.bfloat16]


def operands(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[Tensor]:
    """From denormal to large."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-30, 4, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return [(torch.randn(shape, generator=generator) * sizes).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("form", RMSNormForm)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, form: RMSNormForm) -> None:
    x, dy = operands(shape, dtype, 2)
    weight = torch.randn(shape[-1], generator=torch.Generator().manual_seed(2)).to(dtype)
    assert rms_norm_cpu.serves(x, weight, dy)
    y, rstd = norms.rms_norm_forward(x, weight, EPS, form)
    mine, my_rstd = rms_norm_cpu.rms_norm_forward(x, weight, EPS, form.value)
    assert torch.equal(mine, y)
    assert torch.equal(my_rstd, rstd)
    assert torch.equal(rms_norm_cpu.output_again(x, weight, rstd, form.value), y)
    for needs in ({}, {"needs_x": False}, {"needs_weight": False}):
        theirs = norms.rms_norm_backward(dy, x, weight, rstd, form, **needs)
        got = rms_norm_cpu.rms_norm_backward(dy, x, weight, rstd, form.value, **needs)
        for a, b in zip(got, theirs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (torch.equal(a, b) and a.dtype == b.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_products(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    activated, up, dproduct = operands(shape, dtype, 3)
    expected = dproduct * up, dproduct * activated, activated * up
    assert torch.equal(gated_cpu.product_(activated.clone(), up), expected[2])
    got = gated_cpu.products_backward_(dproduct.clone(), activated.clone(), up)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_nan_and_infinity_stay_what_they_are() -> None:
    x = torch.tensor([[float("inf"), 1.0], [float("nan"), 1.0], [3e38, 3e38]]).bfloat16()
    weight = torch.ones(2, dtype=torch.bfloat16)
    y, _ = norms.rms_norm_forward(x, weight, EPS)
    mine, _ = rms_norm_cpu.rms_norm_forward(x, weight, EPS, "round_then_scale")
    torch.testing.assert_close(mine, y, rtol=0, atol=0, equal_nan=True)


def test_what_they_do_not_serve() -> None:
    x, weight = torch.zeros(4, 8), torch.zeros(8)
    assert rms_norm_cpu.serves(x, weight)
    assert not rms_norm_cpu.serves(x.double(), weight.double())
    assert not rms_norm_cpu.serves(x.bfloat16(), weight)
    assert not rms_norm_cpu.serves(torch.zeros(8, 4).t(), weight)
    assert not rms_norm_cpu.serves(x[:0], weight)
    assert not rms_norm_cpu.serves(x.to("meta"), weight.to("meta"))
    with torch._subclasses.FakeTensorMode() as mode:
        assert not rms_norm_cpu.serves(mode.from_tensor(x), mode.from_tensor(weight))


def step(shape: tuple[int, ...]) -> list[Tensor]:
    x, up = (t.bfloat16().requires_grad_() for t in operands(shape, torch.float32, 2))
    weight = torch.ones(shape[-1], dtype=torch.bfloat16, requires_grad=True)
    out = gated_linear(rms_norm(x, weight, EPS), up, torch.eye(shape[-1], dtype=torch.bfloat16))
    return [out, *torch.autograd.grad(out.sum(), [x, up, weight])]


def test_without_a_compiler_the_operators_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = step((64, 48))
    calls: list[str] = []
    monkeypatch.setattr(native, "_library", lambda source: calls.append(source))
    plain = step((64, 48))
    assert set(calls) == {"rms_norm", "gated"}
    for a, b in zip(compiled, plain, strict=True):
        assert torch.equal(a, b)
