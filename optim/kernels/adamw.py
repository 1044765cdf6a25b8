"""AdamW with moments in fp32 or bf16, in one pass: weight, master and moments are read and written once.

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    w = (1 - lr weight_decay) w - lr mhat / (sqrt(vhat) + eps)

with hats for the bias-corrected. A gradient that is not finite makes the moments and the weight of its
element NaN, and of no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtrain.optim.kernels import native
from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel
from memtrain.optim.kernels.pointwise import (
    ADAM_SIGNATURE,
    FP32,
    KEY_SIGNATURE,
    MOMENT_VARIANTS,
    WEIGHT_VARIANTS,
    AdamStep,
    Keys,
    Operands,
    Stored,
    check_state,
    launch_keys,
    load_values,
    moment_kind,
    operands,
    store_values,
    weight_bytes,
)
from memtrain.optim.storage import master_format, state_format

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024


def reference(o: Operands, first: Stored, second: Stored, a: AdamStep, state: str) -> None:
    """The arithmetic, plainly, for moments in any format."""
    form, holder = state_format(state), master_format("split24" if o.master else "none")
    shape, g, master = o.weight.shape, o.gradient.float(), dict(o.master)
    m = a.beta1 * form.load(dict(first), shape, signed=True) + (1 - a.beta1) * g
    v = a.beta2 * form.load(dict(second), shape, signed=False) + (1 - a.beta2) * g * g
    value = holder.load(o.weight, master) * (1 - a.lr * a.weight_decay)
    value = value - a.lr * (m / a.correction1) / ((v / a.correction2).sqrt() + a.eps)
    form.store_(dict(first), m, signed=True, key=o.key("first"))
    form.store_(dict(second), v, signed=False, key=o.key("second"))
    holder.store_(o.weight, master, value, key=o.key("weight"))


@triton_kernel
def adam_update(w, g, m, v, keep, rate, beta1, gain1, beta2, gain2, root, eps):
    """``(w, m, v)``, new."""
    m = beta1 * m + gain1 * g
    v = beta2 * v + gain2 * g * g
    return w * keep - rate * m / (tl.sqrt(v) * root + eps), m, v


@triton_kernel
def _adamw_kernel(
    weight_ptr,
    correction_ptr,
    gradient_ptr,
    first_ptr,
    second_ptr,
    count,
    keep,
    rate,
    beta1,
    gain1,
    beta2,
    gain2,
    root,
    eps,
    weight_key,
    first_key,
    second_key,
    offset,
    WEIGHT: tl.constexpr,
    MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    w = load_values(weight_ptr, correction_ptr, at, inside, WEIGHT)
    g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = load_values(first_ptr, first_ptr, at, inside, MOMENT)
    v = load_values(second_ptr, second_ptr, at, inside, MOMENT)
    w, m, v = adam_update(w, g, m, v, keep, rate, beta1, gain1, beta2, gain2, root, eps)
    store_values(first_ptr, first_ptr, at, m, inside, first_key, offset, MOMENT)
    store_values(second_ptr, second_ptr, at, v, inside, second_key, offset, MOMENT)
    store_values(weight_ptr, correction_ptr, at, w, inside, weight_key, offset, WEIGHT)


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    first: Stored,
    second: Stored,
    step: AdamStep,
    *,
    master: Stored | None = None,
    keys: Keys | None = None,
) -> None:
    """One step, in place.

    Args:
        weight: fp32 or bf16, any shape and strides.
        gradient: fp32 or bf16, of the same shape.
        first, second: what ``state_format("fp32" or "bf16").empty`` made.
        step: the numbers.
        master: what ``master_format("none" or "split24").empty`` made; None is "none".
        keys: needed where a bf16 weight or moments are rounded at random; with ``split24`` optional, as
            in storage/masters.py. All of one offset.

    Raises:
        ValueError, TypeError: operands that do not fit; nothing has been changed.
    """
    m, v = first["value"], second["value"]
    moment_kind(m)
    check_state("first", m, weight.shape, m.dtype)
    check_state("second", v, weight.shape, m.dtype)
    with operands(weight, gradient, master, keys, m, v) as o:
        (_triton if weight.is_cuda else _cpu)(o, m, v, step)


def _triton(o: Operands, m: Tensor, v: Tensor, step: AdamStep) -> None:
    if o.weight.numel():
        _adamw_kernel[(-(-o.weight.numel() // _BLOCK),)](
            *o.triton(),
            m,
            v,
            o.weight.numel(),
            *step.kernel_numbers(),
            *launch_keys(o.keys),
            WEIGHT=o.kind,
            MOMENT=moment_kind(m),
            BLOCK=_BLOCK,
        )


def _cpu(o: Operands, m: Tensor, v: Tensor, step: AdamStep) -> None:
    kernel = native.function("adamw", "adamw")
    if kernel is None:
        _by_pieces(o, m, v, step)
        return
    kernel(
        *o.native(),
        *o.native_moments(m, v),
        native.count(o.weight),
        native.Adam(*step.kernel_numbers()),
    )


def _by_pieces(o: Operands, m: Tensor, v: Tensor, step: AdamStep) -> None:
    state = "fp32" if moment_kind(m) == FP32 else "bf16"
    for piece, part in o.pieces():
        reference(part, {"value": m.view(-1)[piece]}, {"value": v.view(-1)[piece]}, step, state)


def bytes_per_element(weight: int, gradient: torch.dtype, moments: torch.dtype) -> int:
    """Bytes that a step moves a parameter, for a kind of weight and these dtypes."""
    return weight_bytes(weight) + gradient.itemsize + 4 * moments.itemsize


def _variants() -> Iterator[KernelVariant]:
    for weight in WEIGHT_VARIANTS:
        for moments in MOMENT_VARIANTS:
            moved = bytes_per_element(weight.kind, weight.dtype, moments.dtype)
            yield KernelVariant(
                label=f"{weight.label} weight, {moments.label} moments",
                signature={
                    **weight.signature,
                    **moments.signature,
                    "count": "i32:16",
                    **ADAM_SIGNATURE,
                    **KEY_SIGNATURE,
                },
                constexprs={"WEIGHT": weight.kind, "MOMENT": moments.kind, "BLOCK": _BLOCK},
                moved_bytes=moved,
                least_bytes=moved,
            )


SPECS = (KernelSpec(kernel=_adamw_kernel, element="parameter", variants=tuple(_variants())),)
