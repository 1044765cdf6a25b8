"""FRUGAL on coordinates in one pass: AdamW on some rows or columns, sign or SGD on all others.

FRUGAL (arXiv 2411.07837) splits the gradient by a projection; where that is a choice of rows or columns, each
element takes one of two point-wise updates, and neither a projected gradient nor a residual is ever written:
of all full-rank members of the family it moves the fewest bytes. A block of neighbouring rows is a choice of
rows. Moments exist for the active part alone and lie densely in the order of ``index``; sorted indices let
neighbouring threads of a GPU read neighbouring moments.

What happens to NaN: ``adamw.py`` for active elements, ``sign.py`` for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from memtrain.optim.kernels import native
from memtrain.optim.kernels.adamw import adam_update
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
from memtrain.optim.kernels.sign import PlainStep, native_rest, plain_update
from memtrain.optim.storage import master_format, state_format

if TYPE_CHECKING:
    import triton.language as tl

Axis = Literal["rows", "columns"]
_BLOCK = 512


def reference(
    o: Operands, first: Stored, second: Stored, index: Tensor, axis: Axis, a: AdamStep, rest: PlainStep
) -> None:
    """The arithmetic, plainly."""
    dim = 0 if axis == "rows" else 1
    holder, master = master_format("split24" if o.master else "none"), dict(o.master)
    form = state_format("fp32" if moment_kind(first["value"]) == FP32 else "bf16")
    value, g = holder.load(o.weight, master), o.gradient.float()
    update = g.sign() if rest.rule == "sign" else g
    new, g = value * rest.keep - rest.lr * update, g.index_select(dim, index)
    m = a.beta1 * form.load(dict(first), g.shape, signed=True) + (1 - a.beta1) * g
    v = a.beta2 * form.load(dict(second), g.shape, signed=False) + (1 - a.beta2) * g * g
    direction = (m / a.correction1) / ((v / a.correction2).sqrt() + a.eps)
    active = value.index_select(dim, index) * (1 - a.lr * a.weight_decay) - a.lr * direction
    form.store_(dict(first), m, signed=True, key=o.key("first"))
    form.store_(dict(second), v, signed=False, key=o.key("second"))
    holder.store_(o.weight, master, new.index_copy_(dim, index, active), key=o.key("weight"))


@triton_kernel
def split_update(
    pointers,
    at,
    place,
    inside,
    chosen,
    adam,
    rest,
    keys,
    offset,
    WEIGHT: tl.constexpr,
    MOMENT: tl.constexpr,
    SIGN: tl.constexpr,
):
    """Entries ``at``, of which those ``chosen`` have their moments at ``place``."""
    weight_ptr, correction_ptr, gradient_ptr, first_ptr, second_ptr = pointers
    keep, rate, beta1, gain1, beta2, gain2, root, eps = adam
    rest_keep, rest_lr = rest
    weight_key, first_key, second_key = keys
    old = load_values(weight_ptr, correction_ptr, at, inside, WEIGHT)
    g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = load_values(first_ptr, first_ptr, place, chosen, MOMENT)
    v = load_values(second_ptr, second_ptr, place, chosen, MOMENT)
    w, m, v = adam_update(old, g, m, v, keep, rate, beta1, gain1, beta2, gain2, root, eps)
    store_values(first_ptr, first_ptr, place, m, chosen, first_key, offset, MOMENT)
    store_values(second_ptr, second_ptr, place, v, chosen, second_key, offset, MOMENT)
    w = tl.where(chosen, w, plain_update(old, g, rest_keep, rest_lr, SIGN))
    store_values(weight_ptr, correction_ptr, at, w, inside, weight_key, offset, WEIGHT)


@triton_kernel
def _split_adamw_kernel(
    weight_ptr,
    correction_ptr,
    gradient_ptr,
    first_ptr,
    second_ptr,
    slot_ptr,
    columns,
    active,
    keep,
    rate,
    beta1,
    gain1,
    beta2,
    gain2,
    root,
    eps,
    rest_keep,
    rest_lr,
    weight_key,
    first_key,
    second_key,
    offset,
    WEIGHT: tl.constexpr,
    MOMENT: tl.constexpr,
    SIGN: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A stretch of one row a program; ``slot`` is the place among the moments of a row or column, or -1."""
    stretches = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0)
    row = (program // stretches).to(tl.int64)
    column = program % stretches * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    if BY_COLUMNS:
        slot = tl.load(slot_ptr + column, mask=inside, other=-1)
        place = row * active + slot
    else:
        slot = tl.load(slot_ptr + row) + tl.zeros([BLOCK], dtype=tl.int32)
        place = slot.to(tl.int64) * columns + column
    chosen = inside & (slot >= 0)
    at = row * columns + column
    split_update(
        (weight_ptr, correction_ptr, gradient_ptr, first_ptr, second_ptr),
        at,
        place,
        inside,
        chosen,
        (keep, rate, beta1, gain1, beta2, gain2, root, eps),
        (rest_keep, rest_lr),
        (weight_key, first_key, second_key),
        offset,
        WEIGHT,
        MOMENT,
        SIGN,
    )


def split_adamw_(
    weight: Tensor,
    gradient: Tensor,
    first: Stored,
    second: Stored,
    index: Tensor,
    axis: Axis,
    step: AdamStep,
    rest: PlainStep,
    *,
    master: Stored | None = None,
    keys: Keys | None = None,
) -> None:
    """One step, in place.

    Args:
        weight: ``[m, n]``, fp32 or bf16, any strides. gradient: fp32 or bf16, of the same shape. first,
        second: what ``state_format("fp32" or "bf16").empty`` made, ``[r, n]`` for rows and ``[m, r]`` for
            columns, in the order of ``index``.
        index: int64 ``[r]``, the active rows or columns, each once, in any order.
        axis: what ``index`` counts.
        step: the numbers for the active part.
        rest: the numbers and the rule for all else.
        master: what ``master_format("none" or "split24").empty`` made; None is "none".
        keys: needed where a bf16 weight or moments are rounded at random; with ``split24`` optional. All of
            offset 0.

    Raises:
        ValueError, TypeError: operands that do not fit; nothing has been changed. That each index occurs once
            is not checked.
    """
    if weight.dim() != 2 or axis not in ("rows", "columns") or index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(
            "need a matrix, axis 'rows' or 'columns', and int64 [r] indices; "
            f"got weight {tuple(weight.shape)}, {axis!r}, {index.dtype} {tuple(index.shape)}"
        )
    size = weight.shape[0 if axis == "rows" else 1]
    if not index.is_cuda and index.numel():  # on CUDA the look would wait for the device
        least, largest = map(int, index.aminmax())
        if not 0 <= least <= largest < size:
            raise ValueError(f"indices of {axis} must be in 0..{size - 1}, got {least}..{largest}")
    m, v = first["value"], second["value"]
    low = [len(index), weight.shape[1]] if axis == "rows" else [weight.shape[0], len(index)]
    moment_kind(m)
    check_state("first", m, low, m.dtype)
    check_state("second", v, low, m.dtype)
    with operands(weight, gradient, master, keys, m, v) as o:
        (_triton if weight.is_cuda else _cpu)(o, m, v, index, axis, step, rest)


def _slots(index: Tensor, size: int) -> Tensor:
    """int64 ``[size]``: where each row or column lies in ``index``; -1 where it does not."""
    slots = torch.full((size,), -1, dtype=torch.int64, device=index.device)
    slots[index] = torch.arange(len(index), device=index.device)
    return slots


def _triton(
    o: Operands, m: Tensor, v: Tensor, index: Tensor, axis: Axis, step: AdamStep, rest: PlainStep
) -> None:
    rows, columns = o.weight.shape
    if o.weight.numel():
        _split_adamw_kernel[(rows * -(-columns // _BLOCK),)](
            *o.triton(),
            m,
            v,
            _slots(index, rows if axis == "rows" else columns).to(torch.int32),
            columns,
            len(index),
            *step.kernel_numbers(),
            rest.keep,
            rest.lr,
            *launch_keys(o.keys),
            WEIGHT=o.kind,
            MOMENT=moment_kind(m),
            SIGN=rest.rule == "sign",
            BY_COLUMNS=axis == "columns",
            BLOCK=_BLOCK,
        )


def _cpu(
    o: Operands, m: Tensor, v: Tensor, index: Tensor, axis: Axis, step: AdamStep, rest: PlainStep
) -> None:
    kernel = native.function("split_adamw", "split_adamw")
    if kernel is None:
        reference(o, {"value": m}, {"value": v}, index, axis, step, rest)
        return
    index = index.contiguous()
    kernel(
        *o.native(),
        *o.native_moments(m, v),
        native.pointer(index, torch.int64),
        native.count(index),
        native.flag(axis == "columns"),
        native.Matrix(*o.weight.shape),
        native.Adam(*step.kernel_numbers()),
        native_rest(rest),
    )


def bytes_per_element(weight: int, gradient: torch.dtype, moments: torch.dtype, *, density: float) -> float:
    """Bytes that a step moves a parameter, with ``density`` of the rows or columns active."""
    return weight_bytes(weight) + gradient.itemsize + 4 * density * moments.itemsize


def _variants() -> Iterator[KernelVariant]:
    for weight in WEIGHT_VARIANTS:
        for moments in MOMENT_VARIANTS:
            for axis in ("rows", "columns"):
                # The slots of the columns stay in the cache.
                moved = bytes_per_element(weight.kind, weight.dtype, moments.dtype, density=0.25)
                yield KernelVariant(
                    label=f"{axis}, {weight.label} weight, {moments.label} moments",
                    signature={
                        **weight.signature,
                        **moments.signature,
                        "slot_ptr": "*i32",
                        "columns": "i32:16",
                        "active": "i32:16",
                        **ADAM_SIGNATURE,
                        "rest_keep": "fp32",
                        "rest_lr": "fp32",
                        **KEY_SIGNATURE,
                    },
                    constexprs={
                        "WEIGHT": weight.kind,
                        "MOMENT": moments.kind,
                        "SIGN": True,
                        "BY_COLUMNS": axis == "columns",
                        "BLOCK": _BLOCK,
                    },
                    moved_bytes=moved,
                    least_bytes=moved,
                )


SPECS = (KernelSpec(kernel=_split_adamw_kernel, element="parameter", variants=tuple(_variants())),)
