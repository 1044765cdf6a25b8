"""AdamW whose moments are 8-bit blocks (storage/blocks.py), in one pass.

The same update as ``adamw.py``; moments are decoded, used and encoded again while a block is in registers, so
that no fp32 moment is ever written. Of the new moments the update uses the full values, not what is stored.
A gradient that is not finite makes both moments of its block of 128 NaN, and the weight of its own element;
the next step makes the weights of the whole block NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtrain.optim.kernels import native
from memtrain.optim.kernels.adamw import adam_update, reference
from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel
from memtrain.optim.kernels.pointwise import (
    ADAM_SIGNATURE,
    WEIGHT_VARIANTS,
    AdamStep,
    Keys,
    Operands,
    Stored,
    check_state,
    launch_keys,
    load_values,
    operands,
    store_values,
    weight_bytes,
)
from memtrain.optim.storage.blocks import BLOCK, block_count

if TYPE_CHECKING:
    import triton.language as tl

_BLOCKS_PER_PROGRAM = 8


@triton_kernel
def _block_scale(values):
    """The largest magnitude of each row; bit patterns of magnitudes are ordered as integers, NaN above
    all.
    """
    largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    scale = tl.where(largest < 0x00800000, 0, largest)
    return tl.where(largest >= 0x7F800000, 0x7FC00000, scale).to(tl.float32, bitcast=True)


@triton_kernel
def _ratios(values, scale):
    """``values / scale``, and 0 where the scale is zero or NaN."""
    usable = scale > 0
    reciprocal = tl.where(usable, 1.0 / tl.where(usable, scale, 1.0), 0.0)
    return tl.where(usable[:, None], values, 0.0) * reciprocal[:, None]


@triton_kernel
def _adamw8bit_kernel(
    weight_ptr,
    correction_ptr,
    gradient_ptr,
    m_codes_ptr,
    m_scales_ptr,
    v_codes_ptr,
    v_scales_ptr,
    count,
    blocks,
    keep,
    rate,
    beta1,
    gain1,
    beta2,
    gain2,
    root,
    eps,
    weight_key,
    offset,
    WEIGHT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    exists, inside = block < blocks, at < count
    w = load_values(weight_ptr, correction_ptr, at, inside, WEIGHT)
    g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m_scale = tl.load(m_scales_ptr + block, mask=exists, other=0.0)
    v_scale = tl.load(v_scales_ptr + block, mask=exists, other=0.0)
    m_code = tl.load(m_codes_ptr + at, mask=inside, other=0).to(tl.float32)
    v_code = tl.load(v_codes_ptr + at, mask=inside, other=0).to(tl.float32) + 1.0
    m = m_code * tl.abs(m_code) * (m_scale / 16129.0)[:, None]
    v = v_code * v_code * v_code * (v_scale / 16777216.0)[:, None]
    w, m, v = adam_update(w, g, m, v, keep, rate, beta1, gain1, beta2, gain2, root, eps)
    store_values(weight_ptr, correction_ptr, at, w, inside, weight_key, offset, WEIGHT)
    m_scale, v_scale = _block_scale(tl.where(inside, m, 0.0)), _block_scale(tl.where(inside, v, 0.0))
    tl.store(m_scales_ptr + block, m_scale, mask=exists)
    tl.store(v_scales_ptr + block, v_scale, mask=exists)
    ratio = _ratios(m, m_scale)
    y = tl.floor(tl.sqrt(tl.abs(ratio)) * 127.0 + 0.5)
    tl.store(m_codes_ptr + at, tl.where(ratio < 0, -y, y).to(tl.int8), mask=inside)
    cube_root = tl.exp2(tl.log2(tl.maximum(_ratios(v, v_scale), 1e-30)) / 3.0)
    z = tl.floor(cube_root * 256.0 - 0.5)
    tl.store(v_codes_ptr + at, tl.minimum(tl.maximum(z, 0.0), 255.0).to(tl.uint8), mask=inside)


def adamw8bit_(
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
        first, second: what ``state_format("int8").empty`` made, signed and unsigned.
        step: the numbers.
        master: what ``master_format("none" or "split24").empty`` made; None is "none".
        keys: needed for a bf16 weight without a master, optional with ``split24``; of them ``weight`` alone
            is used.

    Raises:
        ValueError, TypeError: operands that do not fit; nothing has been changed.
    """
    for name, stored, dtype in (("first", first, torch.int8), ("second", second, torch.uint8)):
        check_state(f"{name} codes", stored["codes"], weight.shape, dtype)
        check_state(f"{name} scales", stored["scales"], [block_count(weight.numel())], torch.float32)
    with operands(weight, gradient, master, keys, *first.values(), *second.values()) as o:
        (_triton if weight.is_cuda else _cpu)(o, first, second, step)


def _triton(o: Operands, first: Stored, second: Stored, step: AdamStep) -> None:
    blocks = block_count(o.weight.numel())
    if blocks:
        weight_key, _, _, offset = launch_keys(o.keys)
        _adamw8bit_kernel[(-(-blocks // _BLOCKS_PER_PROGRAM),)](
            *o.triton(),
            first["codes"],
            first["scales"],
            second["codes"],
            second["scales"],
            o.weight.numel(),
            blocks,
            *step.kernel_numbers(),
            weight_key,
            offset,
            WEIGHT=o.kind,
            BLOCKS=_BLOCKS_PER_PROGRAM,
            BLOCK=BLOCK,
        )


def _cpu(o: Operands, first: Stored, second: Stored, step: AdamStep) -> None:
    kernel = native.function("adamw8bit", "adamw8bit")
    if kernel is None:
        _by_pieces(o, first, second, step)
        return
    states = (first["codes"], first["scales"], second["codes"], second["scales"])
    kernel(
        *o.native(),
        *(native.pointer(each, each.dtype) for each in states),
        native.count(o.weight),
        native.Adam(*step.kernel_numbers()),
    )


def _by_pieces(o: Operands, first: Stored, second: Stored, step: AdamStep) -> None:
    for piece, part in o.pieces():
        blocks = slice(piece.start // BLOCK, piece.stop // BLOCK)
        m, v = (
            {"codes": stored["codes"].view(-1)[piece], "scales": stored["scales"][blocks]}
            for stored in (first, second)
        )
        reference(part, m, v, step, "int8")


def bytes_per_element(weight: int, gradient: torch.dtype) -> float:
    """Bytes that a step moves a parameter, for a kind of weight and of gradient: codes and scales twice."""
    return weight_bytes(weight) + gradient.itemsize + 2 * (1 + 1) + 2 * (4 + 4) / BLOCK


def _variants() -> Iterator[KernelVariant]:
    for weight in WEIGHT_VARIANTS:
        moved = bytes_per_element(weight.kind, weight.dtype)
        yield KernelVariant(
            label=f"{weight.label} weight",
            signature={
                **weight.signature,
                "m_codes_ptr": "*i8",
                "m_scales_ptr": "*fp32",
                "v_codes_ptr": "*u8",
                "v_scales_ptr": "*fp32",
                "count": "i32:16",
                "blocks": "i32:16",
                **ADAM_SIGNATURE,
                "weight_key": "i64",
                "offset": "i32:16",
            },
            constexprs={"WEIGHT": weight.kind, "BLOCKS": _BLOCKS_PER_PROGRAM, "BLOCK": BLOCK},
            moved_bytes=moved,
            least_bytes=moved,
        )


SPECS = (KernelSpec(kernel=_adamw8bit_kernel, element="parameter", variants=tuple(_variants())),)
