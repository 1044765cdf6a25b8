"""SwiGLU and GeGLU: bit-equal to autograd on the CPU, the kernel within roundings of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memtrain.optim.kernels import swiglu
from tests.optim.kernels.compare import close
from tests.optim.kernels.traffic import count_traffic

SHAPES = [(5, 123, 123), (1,), (7, 0), (2, 1025)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POINTS: dict[str, tuple[int, Callable[..., Any], Callable[..., Any], Callable[[Tensor], Tensor]]] = {
    "silu": (0, swiglu.swiglu_forward, swiglu.swiglu_backward, functional.silu),
    "gelu": (1, swiglu.geglu_forward, swiglu.geglu_backward, functional.gelu),
    "gelu_tanh": (
        2,
        partial(swiglu.geglu_forward, approximate="tanh"),
        partial(swiglu.geglu_backward, approximate="tanh"),
        partial(functional.gelu, approximate="tanh"),
    ),
}


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up, dproduct = (3 * torch.randn(shape, generator=generator) for _ in range(3))
    return gate.to(dtype), up.to(dtype), dproduct.to(dtype)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_is_autograd_to_the_bit(point: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    _, forward, backward, activation = POINTS[point]
    gate, up, dproduct = (t.requires_grad_() for t in operands(shape, dtype))
    product = activation(gate) * up
    product.backward(dproduct)
    with torch.no_grad():
        assert torch.equal(forward(gate, up), product)
        dgate, dup, again = backward(dproduct, gate, up)
    assert torch.equal(again, product)
    assert torch.equal(dgate, gate.grad)
    assert torch.equal(dup, up.grad)


@pytest.mark.parametrize("point", POINTS)
def test_derivatives_in_fp64(point: str) -> None:
    activation, *_ = POINTS[point]

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            return swiglu.reference_forward(gate, up, activation)

        @staticmethod
        def backward(ctx: Any, dproduct: Tensor) -> tuple[Tensor, Tensor]:
            return swiglu.reference_backward(dproduct, *ctx.saved_tensors, activation)[:2]

    gate, up, _ = (t.requires_grad_() for t in operands((3, 7), torch.float64))
    assert torch.autograd.gradcheck(Gated.apply, (gate, up))


@pytest.mark.venv_optim
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_agree_with_the_reference(point: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    activation, *_ = POINTS[point]
    gate, up, dproduct = operands(shape, dtype)
    actual = (
        swiglu._triton_forward(gate, up, activation),
        *swiglu._triton_backward(dproduct, gate, up, activation),
    )
    if dtype == torch.float32:  # torch's own derivative of the tanh form is off by 12 roundings
        gate, up, dproduct = gate.double(), up.double(), dproduct.double()
    expected = (
        swiglu.reference_forward(gate, up, activation),
        *swiglu.reference_backward(dproduct, gate, up, activation),
    )
    for one, other in zip(actual, expected, strict=True):
        close(one, other.to(dtype), rounds=4)


@pytest.mark.venv_optim
def test_large_gates_neither_overflow_nor_make_nan() -> None:
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4])
    ones = torch.ones(4)
    for activation, *_ in POINTS.values():
        forward = swiglu._triton_forward(gate, ones, activation)
        torch.testing.assert_close(forward, torch.tensor([0.0, 0.0, 100.0, 1e4]), rtol=0, atol=1e-30)
        dgate, _, _ = swiglu._triton_backward(ones, gate, ones, activation)
        torch.testing.assert_close(dgate, torch.tensor([0.0, 0.0, 1.0, 1.0]), rtol=0, atol=1e-30)


@pytest.mark.venv_optim
def test_traffic_is_what_the_spec_says() -> None:
    gate, up, dproduct = operands((3, 1000), torch.bfloat16)
    specs = {spec.name: spec.variants[0].moved_bytes for spec in swiglu.SPECS}
    with count_traffic() as traffic:
        swiglu._triton_forward(gate, up, 0)
    assert traffic.moved_bytes() == specs["gated_forward"] * gate.numel()
    with count_traffic() as traffic:
        swiglu._triton_backward(dproduct, gate, up, 0)
    assert traffic.moved_bytes() == specs["gated_backward"] * gate.numel()


def test_unlike_operands_are_refused() -> None:
    gate, up, dproduct = operands((2, 3), torch.float32)
    with pytest.raises(ValueError, match=r"one shape and dtype, got \(2, 3\) torch.float32 and \(2, 2\)"):
        swiglu.swiglu_forward(gate, up[:, :2])
    with pytest.raises(ValueError, match="bfloat16"):
        swiglu.swiglu_backward(dproduct.bfloat16(), gate, up)
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'erf'"):
        swiglu.geglu_forward(gate, up, approximate="erf")  # type: ignore[arg-type]
