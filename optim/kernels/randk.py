"""FRUGAL on single entries in one pass: AdamW on one entry of each stratum, sign or SGD on all others.

Whether an entry is active, and where its moments lie, is computed from its place (``projection/strata.py``):
no index is stored or read, the moments lie in the order of the entries, and the bytes that move are those of
FRUGAL on rows. What happens to NaN: as in ``split_adamw.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from memtrain.optim.kernels import native, split_adamw
from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel
from memtrain.optim.kernels.pointwise import (
    ADAM_SIGNATURE,
    KEY_SIGNATURE,
    MOMENT_VARIANTS,
    WEIGHT_VARIANTS,
    AdamStep,
    Keys,
    Operands,
    Stored,
    check_state,
    launch_keys,
    moment_kind,
    operands,
    packed_key,
    random_word,
)
from memtrain.optim.kernels.sign import PlainStep, native_rest
from memtrain.optim.kernels.split_adamw import split_update
from memtrain.optim.projection.strata import check_strata, native_strata, shift, stratified_indices
from memtrain.optim.storage import RandomKey

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 512


def reference(
    o: Operands, first: Stored, second: Stored, choice: RandomKey, a: AdamStep, rest: PlainStep
) -> None:
    """The arithmetic, plainly: entries are the rows of a matrix of one column."""
    weight, gradient = o.weight.view(-1, 1), o.gradient.view(-1, 1)
    master = {name: tensor.view(-1, 1) for name, tensor in o.master.items()}
    m, v = ({"value": stored["value"].view(-1, 1)} for stored in (first, second))
    index = stratified_indices(choice, len(m["value"]), len(weight), weight.device)
    split_adamw.reference(Operands(weight, gradient, master, o.keys), m, v, index, "rows", a, rest)


@triton_kernel
def _quotient(dividend, divisor):
    """Of whole numbers below 2**51, rounded down: int64 by fp64, whose division is the faster one."""
    return tl.floor((dividend.to(tl.float64) + 0.5) / divisor.to(tl.float64)).to(tl.int64)


@triton_kernel
def _randk_adamw_kernel(
    weight_ptr,
    correction_ptr,
    gradient_ptr,
    first_ptr,
    second_ptr,
    size,
    count,
    shift,
    choice_key,
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
    BLOCK: tl.constexpr,
):
    """A stretch of entries a program. With ``past`` as far as an entry is past the beginning of its stratum
    in parts of 1/count, ``past / count`` is its place there."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    at = begin + lane
    inside = at < size
    whole, many = tl.cast(size, tl.int64), tl.cast(count, tl.int64)
    above = (begin + 1) * many - shift - 1 + whole
    behind = above % whole + lane * many
    further = _quotient(behind, whole)
    past = behind - further * whole
    slot = above // whole - 1 + further
    slot = tl.where(slot < 0, many - 1, slot)
    place = _quotient(past, many)
    length = place + 1 + _quotient(whole - 1 - past, many)
    taken = tl.umulhi(random_word(choice_key, slot), length.to(tl.uint32))
    chosen = inside & (taken.to(tl.int64) == place)
    split_update(
        (weight_ptr, correction_ptr, gradient_ptr, first_ptr, second_ptr),
        at,
        slot,
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


def randk_adamw_(
    weight: Tensor,
    gradient: Tensor,
    first: Stored,
    second: Stored,
    choice: RandomKey,
    step: AdamStep,
    rest: PlainStep,
    *,
    master: Stored | None = None,
    keys: Keys | None = None,
) -> None:
    """One step, in place.

    Args:
        weight: fp32 or bf16, any shape and strides. gradient: fp32 or bf16, of the same shape.
        first, second: what ``state_format("fp32" or "bf16").empty`` made, ``[k]``; k entries are active.
        choice: from which they are chosen, as ``stratified_indices`` does it.
        step: the numbers for the active entries.
        rest: the numbers and the rule for all others.
        master: what ``master_format("none" or "split24").empty`` made; None is "none".
        keys: needed where a bf16 weight or moments are rounded at random; with ``split24`` optional. All of
            offset 0.

    Raises:
        ValueError, TypeError: operands that do not fit; nothing has been changed.
    """
    m, v = first["value"], second["value"]
    if not 1 <= m.numel() <= weight.numel():
        raise ValueError(f"1 to {weight.numel()} entries of the weight may be active, got {m.numel()}")
    check_strata(m.numel(), weight.numel())
    moment_kind(m)
    check_state("first", m, [m.numel()], m.dtype)
    check_state("second", v, m.shape, m.dtype)
    with operands(weight, gradient, master, keys, m, v) as o:
        (_triton if weight.is_cuda else _cpu)(o, m, v, choice, step, rest)


def _triton(o: Operands, m: Tensor, v: Tensor, choice: RandomKey, step: AdamStep, rest: PlainStep) -> None:
    size = o.weight.numel()
    _randk_adamw_kernel[(-(-size // _BLOCK),)](
        *o.triton(),
        m,
        v,
        size,
        m.numel(),
        shift(choice, size),
        packed_key(choice),
        *step.kernel_numbers(),
        rest.keep,
        rest.lr,
        *launch_keys(o.keys),
        WEIGHT=o.kind,
        MOMENT=moment_kind(m),
        SIGN=rest.rule == "sign",
        BLOCK=_BLOCK,
    )


def _cpu(o: Operands, m: Tensor, v: Tensor, choice: RandomKey, step: AdamStep, rest: PlainStep) -> None:
    kernel = native.function("randk", "randk_adamw")
    if kernel is None:
        reference(o, {"value": m}, {"value": v}, choice, step, rest)
        return
    kernel(
        *o.native(),
        *o.native_moments(m, v),
        native_strata(choice, m.numel(), o.weight.numel()),
        native.Adam(*step.kernel_numbers()),
        native_rest(rest),
    )


def _variants() -> Iterator[KernelVariant]:
    for weight in WEIGHT_VARIANTS:
        for moments in MOMENT_VARIANTS:
            moved = split_adamw.bytes_per_element(weight.kind, weight.dtype, moments.dtype, density=0.25)
            yield KernelVariant(
                label=f"{weight.label} weight, {moments.label} moments",
                signature={
                    **weight.signature,
                    **moments.signature,
                    **dict.fromkeys(("size", "count"), "i32:16"),
                    **dict.fromkeys(("shift", "choice_key"), "i64"),
                    **ADAM_SIGNATURE,
                    "rest_keep": "fp32",
                    "rest_lr": "fp32",
                    **KEY_SIGNATURE,
                },
                constexprs={"WEIGHT": weight.kind, "MOMENT": moments.kind, "SIGN": True, "BLOCK": _BLOCK},
                moved_bytes=moved,
                least_bytes=moved,
            )


SPECS = (KernelSpec(kernel=_randk_adamw_kernel, element="parameter", variants=tuple(_variants())),)
