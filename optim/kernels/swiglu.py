"""SwiGLU and GeGLU in one pass, and their backward pass from gate and up alone.

``product = activation(gate) * up``. Backward computes ``activation(gate)`` and the product again, so that
neither has to be kept: the product is what the gradient of the next weight needs, and comes out of the same
pass.

Roundings are those of eager torch: the activation is rounded to the dtype of ``gate`` before it meets ``up``,
and so is ``dproduct * up`` before it meets the derivative. What leaves here is what autograd would have made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

Approximate = Literal["none", "tanh"]
Gradients = tuple[Tensor, Tensor, Tensor]
_SILU, _GELU, _GELU_TANH = 0, 1, 2
_BLOCK = 1024
_CPU_CHUNK_ELEMENTS = 1 << 18
"""Backward of 4 Mi elements on two idle cores: fp32 8.8 ms against 13.5 ms in one piece, bf16 6.9 against
6.3 but without two whole intermediates; 2^16: 9.7 and 7.6. Forward gains nothing by chunks."""


def reference_forward(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    """The arithmetic, plainly."""
    return _activate(gate, activation) * up


def reference_backward(dproduct: Tensor, gate: Tensor, up: Tensor, activation: int) -> Gradients:
    """``(dgate, dup, product)``."""
    activated = _activate(gate, activation)
    return _derive(dproduct * up, gate, activation), dproduct * activated, activated * up


def _activate(gate: Tensor, activation: int) -> Tensor:
    if activation == _SILU:
        return functional.silu(gate)
    return functional.gelu(gate, approximate=_approximate(activation))


def _derive(dactivated: Tensor, gate: Tensor, activation: int) -> Tensor:
    if activation == _SILU:
        silu_gradient: Tensor = torch.ops.aten.silu_backward(dactivated, gate)
        return silu_gradient
    gradient: Tensor = torch.ops.aten.gelu_backward(dactivated, gate, approximate=_approximate(activation))
    return gradient


def _approximate(activation: int) -> Approximate:
    return "tanh" if activation == _GELU_TANH else "none"


@triton_kernel
def _sigmoid(x):
    """Without overflow for any ``x``."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton_kernel
def gate_activation(x, ACTIVATION: tl.constexpr):
    """``(f(x), f'(x))`` in fp32: SiLU 0, GELU 1, its tanh approximation 2."""
    if ACTIVATION == 0:
        sigmoid = _sigmoid(x)
        return x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACTIVATION == 1:
        distribution = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return x * distribution, distribution + x * density
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # (1 + tanh(y)) / 2 = sigmoid(2 y)
        distribution = _sigmoid(2.0 * inner)
        slope = 2.0 * 0.7978845608028654 * (1.0 + 0.134145 * x * x) * distribution * _sigmoid(-2.0 * inner)
        return x * distribution, distribution + x * slope


@triton_kernel
def _gated_forward_kernel(
    gate_ptr, up_ptr, product_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    gate = tl.load(gate_ptr + index, mask=inside, other=0.0)
    up = tl.load(up_ptr + index, mask=inside, other=0.0).to(tl.float32)
    activated, _ = gate_activation(gate.to(tl.float32), ACTIVATION)
    tl.store(product_ptr + index, activated.to(gate.dtype).to(tl.float32) * up, mask=inside)


@triton_kernel
def _gated_backward_kernel(
    dproduct_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    product_ptr,
    count,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    dproduct = tl.load(dproduct_ptr + index, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + index, mask=inside, other=0.0)
    up = tl.load(up_ptr + index, mask=inside, other=0.0).to(tl.float32)
    activated, slope = gate_activation(gate.to(tl.float32), ACTIVATION)
    activated = activated.to(gate.dtype).to(tl.float32)
    dactivated = (dproduct * up).to(gate.dtype).to(tl.float32)
    tl.store(dgate_ptr + index, dactivated * slope, mask=inside)
    tl.store(dup_ptr + index, dproduct * activated, mask=inside)
    tl.store(product_ptr + index, activated * up, mask=inside)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``. Raises ValueError unless both have one shape and dtype."""
    return _forward(gate, up, _SILU)


def swiglu_backward(dproduct: Tensor, gate: Tensor, up: Tensor) -> Gradients:
    """``(dgate, dup, product)``, the product as forward made it. Raises ValueError as forward does."""
    return _backward(dproduct, gate, up, _SILU)


def geglu_forward(gate: Tensor, up: Tensor, *, approximate: Approximate = "none") -> Tensor:
    """``gelu(gate) * up``. Raises ValueError unless both have one shape and dtype."""
    return _forward(gate, up, _gelu(approximate))


def geglu_backward(
    dproduct: Tensor, gate: Tensor, up: Tensor, *, approximate: Approximate = "none"
) -> Gradients:
    """``(dgate, dup, product)``, the product as forward made it. Raises ValueError as forward does."""
    return _backward(dproduct, gate, up, _gelu(approximate))


def _gelu(approximate: Approximate) -> int:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return _GELU_TANH if approximate == "tanh" else _GELU


def _forward(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    _validate(gate, up)
    return (_triton_forward if gate.is_cuda else _cpu_forward)(gate, up, activation)


def _backward(dproduct: Tensor, gate: Tensor, up: Tensor, activation: int) -> Gradients:
    _validate(gate, up)
    _validate(gate, dproduct)
    return (_triton_backward if gate.is_cuda else _cpu_backward)(dproduct, gate, up, activation)


def _validate(gate: Tensor, other: Tensor) -> None:
    if gate.shape != other.shape or gate.dtype != other.dtype:
        raise ValueError(
            f"gate, up and dproduct must have one shape and dtype, got {tuple(gate.shape)} {gate.dtype} "
            f"and {tuple(other.shape)} {other.dtype}"
        )


def _triton_forward(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    product = torch.empty_like(gate)
    if gate.numel():
        _gated_forward_kernel[(-(-gate.numel() // _BLOCK),)](
            gate, up, product, gate.numel(), ACTIVATION=activation, BLOCK=_BLOCK
        )
    return product


def _triton_backward(dproduct: Tensor, gate: Tensor, up: Tensor, activation: int) -> Gradients:
    dproduct, gate, up = dproduct.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, product = (torch.empty_like(gate) for _ in range(3))
    if gate.numel():
        _gated_backward_kernel[(-(-gate.numel() // _BLOCK),)](
            dproduct, gate, up, dgate, dup, product, gate.numel(), ACTIVATION=activation, BLOCK=_BLOCK
        )
    return dgate, dup, product


def _cpu_forward(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    return _activate(gate, activation).mul_(up)


def _cpu_backward(dproduct: Tensor, gate: Tensor, up: Tensor, activation: int) -> Gradients:
    """By chunks, whose intermediates stay in the cache."""
    dproduct, gate, up = dproduct.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, product = (torch.empty_like(gate) for _ in range(3))
    for d, g, u, dg, du, p in _chunks(dproduct, gate, up, dgate, dup, product):
        activated = _activate(g, activation)
        torch.mul(activated, u, out=p)
        torch.mul(d, activated, out=du)
        dg.copy_(_derive(torch.mul(d, u, out=activated), g, activation))
    return dgate, dup, product


def _chunks(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(*(torch.split(t.view(-1), _CPU_CHUNK_ELEMENTS) for t in tensors), strict=True)


def _variants(backward: bool) -> list[KernelVariant]:
    inputs, outputs = (3, 3) if backward else (2, 1)
    names = ["gate_ptr", "up_ptr", "product_ptr", *(["dproduct_ptr", "dgate_ptr", "dup_ptr"] * backward)]
    return [
        KernelVariant(
            label=f"{activation} {dtype}",
            signature={**dict.fromkeys(names, f"*{dtype}"), "count": "i32:16"},
            constexprs={"ACTIVATION": code, "BLOCK": _BLOCK},
            moved_bytes=(inputs + outputs) * size,
            least_bytes=(inputs + outputs) * size,
        )
        for activation, code in (("silu", _SILU), ("gelu", _GELU), ("gelu_tanh", _GELU_TANH))
        for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4))
    ]


SPECS = (
    KernelSpec(kernel=_gated_forward_kernel, element="element of gate", variants=_variants(backward=False)),
    KernelSpec(kernel=_gated_backward_kernel, element="element of gate", variants=_variants(backward=True)),
)
