"""Gated and ungated activations with the linear layer behind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrain.optim.autograd import swiglu
from memtrain.optim.autograd.saved_bytes import SavedBytes
from memtrain.optim.autograd.swiglu import (
    ACTIVATIONS,
    activation_linear,
    gated_linear,
    swiglu_backward,
    swiglu_forward,
)

PLAIN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
SHAPES = [(3, 5, 16), (1, 7), (2, 1, 33), (0, 8), (9,)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def leaves(shape: tuple[int, ...], dtype: torch.dtype, out: int = 6) -> list[Tensor]:
    """gate, up, weight, bias."""
    generator = torch.Generator().manual_seed(1)
    sizes = [shape, shape, (out, shape[-1]), (out,)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes
    ]


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    return torch.autograd.grad(output, inputs, upstream)


def assert_same(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


def test_every_activation_is_compared() -> None:
    assert set(PLAIN) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_bit_equal(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    gate, up, weight, bias = inputs = leaves(shape, dtype)
    mine = gated_linear(gate, up, weight, bias, activation=activation)
    theirs = F.linear(PLAIN[activation](gate) * up, weight, bias)
    assert torch.equal(mine, theirs)
    assert_same(gradients(mine, inputs), gradients(theirs, inputs))
    ungated = [gate, weight]
    mine = activation_linear(gate, weight, activation=activation)
    theirs = F.linear(PLAIN[activation](gate), weight)
    assert torch.equal(mine, theirs)
    assert_same(gradients(mine, ungated), gradients(theirs, ungated))


def test_transposed_weight_is_that_of_conv1d() -> None:
    x, _, weight, bias = leaves((2, 3, 8), torch.float32)
    stored = weight.detach().t().contiguous().requires_grad_()
    inputs = [x, stored, bias]
    mine = activation_linear(x, stored, bias, transposed=True)
    theirs = torch.addmm(bias, F.gelu(x).view(-1, 8), stored).view(2, 3, 6)
    assert torch.equal(mine, theirs)
    assert_same(gradients(mine, inputs), gradients(theirs, inputs))


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_autocast_is_bit_equal(parameters: torch.dtype) -> None:
    _, _, weight, bias = leaves((4, 16), parameters)
    gate, up, *_ = leaves((4, 16), torch.bfloat16)  # what autocast's linear layers give
    inputs = [gate, up, weight, bias]
    with torch.autocast("cpu", torch.bfloat16):
        mine = gated_linear(gate, up, weight, bias)
        theirs = F.linear(F.silu(gate) * up, weight, bias)
    assert torch.equal(mine, theirs)
    assert_same(gradients(mine, inputs), gradients(theirs, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_gate_and_up_alone(dtype: torch.dtype) -> None:
    gate, up, weight, bias = (t.detach() for t in leaves((2, 32, 24), dtype))
    for tensor in (gate, up, weight, bias):
        tensor.requires_grad_()
    with SavedBytes([weight, bias]) as saved:
        kept = gated_linear(gate * 1, up * 1, weight, bias)
    assert saved.total_bytes == 2 * 64 * 24 * gate.element_size()
    with SavedBytes([weight, bias]) as saved:
        kept = activation_linear(gate * 1, weight, bias)
    assert saved.total_bytes == 64 * 24 * gate.element_size()
    with SavedBytes([weight, bias]) as plain:
        kept = F.linear(F.silu(gate * 1) * (up * 1), weight, bias)
    assert plain.total_bytes == 4 * 64 * 24 * gate.element_size()
    assert kept.requires_grad


def test_what_is_frozen_costs_nothing() -> None:
    gate, up, weight, bias = (t.detach() for t in leaves((4, 8), torch.float32))
    bias.requires_grad_()
    with SavedBytes([weight]) as saved:
        out = gated_linear(gate, up, weight, bias)
    assert saved.total_bytes == 0
    out.sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 4.0))  # type: ignore[arg-type]
    for trained in ("gate", "up", "weight"):
        inputs = dict(zip(("gate", "up", "weight"), leaves((4, 8), torch.float32), strict=False))
        for name, tensor in inputs.items():
            tensor.requires_grad_(name == trained)
        mine = gated_linear(**inputs)
        theirs = F.linear(F.silu(inputs["gate"]) * inputs["up"], inputs["weight"])
        assert_same(gradients(mine, [inputs[trained]]), gradients(theirs, [inputs[trained]]))


def test_gradcheck_and_the_refusal_of_a_second_derivative() -> None:
    inputs = leaves((2, 3, 5), torch.float64)
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda *t, a=activation: gated_linear(*t, activation=a), inputs)
    with pytest.raises(RuntimeError, match="gated_linear has no second derivative"):
        torch.autograd.grad(gated_linear(*inputs).sum(), inputs[0], create_graph=True)


def test_checkpointing_tied_weights_scaled_losses_and_a_second_backward() -> None:
    gate, up, weight, _ = leaves((4, 6), torch.float32)
    inputs = [gate, up, weight]

    def twice(g: Tensor, u: Tensor) -> Tensor:
        return gated_linear(gated_linear(g, u, weight), u, weight)

    theirs = F.linear(F.silu(F.linear(F.silu(gate) * up, weight)) * up, weight)
    expected = gradients(theirs, inputs)
    assert_same(gradients(twice(gate, up), inputs), expected)
    assert_same(gradients(checkpoint(twice, gate, up, use_reentrant=False), inputs), expected)
    out = twice(gate, up)
    for factor in (1.0, 0.25):
        got = torch.autograd.grad(
            out,
            inputs,
            factor * torch.randn(out.shape, generator=torch.Generator().manual_seed(2)),
            retain_graph=True,
        )
        assert_same(got, tuple(factor * g for g in expected))


def test_the_two_calls_that_a_kernel_may_take_over() -> None:
    gate, up, *_ = (t.detach() for t in leaves((4, 6), torch.float64))
    dproduct = torch.randn(4, 6, dtype=torch.float64)
    inputs = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    product = F.silu(inputs[0]) * inputs[1]
    expected = torch.autograd.grad(product, inputs, dproduct)
    assert torch.equal(swiglu_forward(gate, up), product)
    for backward in (swiglu_backward, swiglu.kernels.swiglu_backward):  # the latter takes over on CUDA
        dgate, dup, again = backward(dproduct.clone(), gate, up)
        assert torch.equal(again, product)
        assert_same((dgate, dup), expected)
    assert torch.equal(swiglu.kernels.swiglu_forward(gate, up), product)


def test_torch_compile_traces_it() -> None:
    inputs = leaves((4, 8), torch.float32)
    mine = torch.compile(gated_linear, backend="aot_eager", fullgraph=True)(*inputs)
    for a, b in zip(gradients(mine, inputs), gradients(gated_linear(*inputs), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_input_is_named() -> None:
    gate, up, weight, _ = leaves((4, 8), torch.float32)
    with pytest.raises(
        ValueError, match="activation must be one of silu, gelu, gelu_tanh, relu, got 'swish'"
    ):
        gated_linear(gate, up, weight, activation="swish")
    with pytest.raises(ValueError, match="one shape and dtype"):
        gated_linear(gate, up[:2], weight)
    with pytest.raises(ValueError, match="one shape and dtype"):
        gated_linear(gate, up.double(), weight)
    with pytest.raises(ValueError, match="weight takes 8 features, the activation has 7"):
        activation_linear(gate[:, :7], weight)
