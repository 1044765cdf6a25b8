"""SwiGLU, GeGLU and their ungated relatives together with the linear layer behind them.

Plain PyTorch saves for ``down(silu(gate) * up)``: gate, up, the activation and the product, the last as the
input of the linear layer. Activation and product are element by element in gate and up, so here these two
alone are saved and backward computes the others again: of a bf16 Llama layer, 4 of 8 bytes per intermediate
feature and token. Without a gate (``linear(gelu(x))``, GPT-2) 2 of 4.

Forward and every gradient run the operators that autograd runs, in its order: bit-equal to the plain
expression in fp32, bf16 and under autocast; on a CPU the products of one pass are compiled
(``memtrain.optim.kernels.gated_cpu``). On CUDA SwiGLU and GeGLU go through the kernels of
``memtrain.optim.kernels.swiglu``, one pass each way, which round where these operators round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memtrain.optim.autograd.recomputed import (
    autocast_dtype,
    plain_linear,
    refuse_double_backward,
    without_autocast,
)
from memtrain.optim.kernels import gated_cpu
from memtrain.optim.kernels import swiglu as kernels

_aten = torch.ops.aten


class Activation(NamedTuple):
    """A function of one element and what autograd does for its gradient."""

    forward: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]
    """``(gradient of the output, input)``: turns the former, in place, into the gradient of the input."""


def _silu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    _aten.silu_backward.grad_input(grad, x, grad_input=grad)
    return grad


def _gelu_backward_(grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    _aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=grad)
    return grad


def _relu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    _aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
    return grad


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _silu_backward_),
    "gelu": Activation(F.gelu, _gelu_backward_),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"), partial(_gelu_backward_, approximate="tanh")
    ),
    "relu": Activation(F.relu, _relu_backward_),
}


_GELU_KINDS: dict[str, kernels.Approximate] = {"gelu": "none", "gelu_tanh": "tanh"}


def swiglu_forward(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """``activation(gate) * up``."""
    if gate.is_cuda and activation == "silu":
        return kernels.swiglu_forward(gate, up)
    if gate.is_cuda and activation in _GELU_KINDS:
        return kernels.geglu_forward(gate, up, approximate=_GELU_KINDS[activation])
    activated = ACTIVATIONS[activation].forward(gate)
    return gated_cpu.product_(activated, up) if gated_cpu.serves(activated, up) else activated.mul_(up)


def swiglu_backward(
    dproduct: Tensor, gate: Tensor, up: Tensor, activation: str = "silu"
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dgate, dup, product)``: the gradients, and what forward returned. ``dproduct`` may be overwritten.

    Three tensors are alive, of which two become gradients of the caller: on a CPU pages that are touched for
    the first time cost more than the arithmetic.
    """
    if gate.is_cuda and activation == "silu":
        return kernels.swiglu_backward(dproduct, gate, up)
    if gate.is_cuda and activation in _GELU_KINDS:
        return kernels.geglu_backward(dproduct, gate, up, approximate=_GELU_KINDS[activation])
    function = ACTIVATIONS[activation]
    activated = function.forward(gate)
    if gated_cpu.serves(activated, dproduct, up):
        dactivated, dup, product = gated_cpu.products_backward_(dproduct, activated, up)
    else:
        product = activated * up
        dup = activated.mul_(dproduct)
        dactivated = dproduct.mul_(up)
    return function.backward_(dactivated, gate), dup, product


def gated_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "silu",
    transposed: bool = False,
) -> Tensor:
    """``(activation(gate) * up) @ weight.T + bias``, saving gate and up alone.

    Saved: ``gate.nbytes + up.nbytes``, nothing where neither they nor the weight need a gradient; the weight
    by reference, and only if gate or up need a gradient.

    Args:
        gate, up: ``[..., in]``, the same shape and dtype.
        weight: ``[out, in]``; ``[in, out]`` if ``transposed``.
        bias: ``[out]``.
        activation: a key of ``ACTIVATIONS``: silu (SwiGLU), gelu and gelu_tanh (GeGLU), relu.

    Raises:
        ValueError: an unknown activation, shapes or dtypes that do not fit.
        RuntimeError: in backward under ``create_graph=True``.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must have one shape and dtype, got {tuple(gate.shape)} {gate.dtype} "
            f"and {tuple(up.shape)} {up.dtype}"
        )
    return _activated_linear(gate, up, weight, bias, activation, transposed)


def activation_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "gelu",
    transposed: bool = False,
) -> Tensor:
    """``activation(x) @ weight.T + bias``, saving ``x`` alone. Arguments and errors as ``gated_linear``."""
    return _activated_linear(x, None, weight, bias, activation, transposed)


def _activated_linear(
    gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str, transposed: bool
) -> Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    features = weight.shape[0 if transposed else 1]
    if gate.shape[-1] != features:
        raise ValueError(f"weight takes {features} features, the activation has {gate.shape[-1]}")
    if torch.compiler.is_compiling():
        activated = ACTIVATIONS[activation].forward(gate)
        return plain_linear(activated if up is None else activated * up, weight, bias, transposed=transposed)
    result: Tensor = _ActivatedLinear.apply(  # type: ignore[no-untyped-call]
        gate, up, weight, bias, activation, transposed
    )
    return result


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        transposed: bool,
    ) -> Tensor:
        ctx.activation, ctx.transposed, ctx.dtype = activation, transposed, autocast_dtype(gate)
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(gate, up, weight)
        product = _product(gate, up, activation)
        if ctx.dtype is None:
            return plain_linear(product, weight, bias, transposed=transposed)
        with without_autocast(gate):
            bias = None if bias is None else bias.to(ctx.dtype)
            return plain_linear(product.to(ctx.dtype), weight.to(ctx.dtype), bias, transposed=transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("gated_linear")
        needs_gate, needs_up, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        rows = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
        dgate = dup = dweight = product = None
        with without_autocast(grad):
            dbias = rows.sum(0) if needs_bias else None
            if not (needs_gate or needs_up or needs_weight):
                return None, None, None, dbias, None, None
            gate, up, weight = ctx.saved_tensors
            if needs_gate or needs_up:
                dproduct = _input_gradient(rows, weight, grad.shape[:-1], ctx).to(gate.dtype)
                if up is None:
                    dgate = ACTIVATIONS[ctx.activation].backward_(dproduct, gate)
                else:
                    dgate, dup, product = swiglu_backward(dproduct, gate, up, ctx.activation)
            if needs_weight:
                product = _product(gate, up, ctx.activation) if product is None else product
                dweight = _weight_gradient(rows, _cast(product, ctx.dtype), ctx)
        return (dgate if needs_gate else None, dup if needs_up else None, dweight, dbias, None, None)


def _product(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation].forward(gate) if up is None else swiglu_forward(gate, up, activation)


def _input_gradient(rows: Tensor, weight: Tensor, shape: torch.Size, ctx: Any) -> Tensor:
    """``grad @ weight`` as autograd does it, ``[*shape, in]``; ``rows`` is ``grad`` in two dimensions."""
    weight = _cast(weight, ctx.dtype)
    product = rows @ (weight.t() if ctx.transposed else weight)
    return product if len(shape) == 1 else product.view(*shape, product.shape[1])


def _weight_gradient(rows: Tensor, x: Tensor, ctx: Any) -> Tensor:
    """``grad.T @ x`` as autograd computes it."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x.t() @ rows if ctx.transposed else rows.t() @ x


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)
