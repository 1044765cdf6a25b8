"""int8 in groups that share a scale: packed by the kernel that has the values, unpacked by the product that
wants them.

The format is ``autograd.group_codec``'s with 8 bits, rounded to the nearest: groups of consecutive values,
codes -127..127, scales in bf16 rounded up, -128 for what is not finite. Alone, packing costs a pass; in the
SwiGLU that reads gate and up anyway (``swiglu_forward_int8``) it costs only its output, and a product that
unpacks as it loads (``int8_product``) moves half the bytes of one that reads bf16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtrain.optim.kernels import group_codes, lazy
from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel
from memtrain.optim.kernels.swiglu import gate_activation

if TYPE_CHECKING:
    import triton.language as tl

GROUP = 128
Packed = tuple[Tensor, Tensor]
"""``codes`` int8 ``[groups, group]`` and ``scales`` bf16 ``[groups]``."""
_TILE_ELEMENTS = 4096
_CPU_CHUNK_ELEMENTS = 1 << 16


def reference_pack(values: Tensor, group: int = GROUP) -> Packed:
    """The format, plainly; the last group is filled up with zeros."""
    flat = values.reshape(-1).float()
    grouped = torch.nn.functional.pad(flat, (0, -len(flat) % group)).view(-1, group)
    largest = grouped.abs().nan_to_num(nan=0.0, posinf=0.0).amax(1)
    bits = (largest / 127).view(torch.int32) + 0xFFFF  # up to the next bf16
    scales = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    steps = (grouped / torch.where(scales == 0, 1.0, scales.float()).unsqueeze(1)).round()
    codes = steps.nan_to_num(nan=-128.0, posinf=-128.0, neginf=-128.0)
    return codes.to(torch.int8), scales


def reference_unpack(packed: Packed, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The values again."""
    codes, scales = packed
    values = codes.float() * scales.float().unsqueeze(1)
    values = values.masked_fill(codes == -128, float("nan")).to(dtype)
    return values.view(-1)[: torch.Size(shape).numel()].view(shape)


@triton_kernel
def pack_groups(values):
    """``(codes, scales)`` of fp32 ``[groups, group]``: what any epilogue may call."""
    magnitude = tl.abs(values)
    finite = magnitude < float("inf")
    largest = tl.max(tl.where(finite, magnitude, 0.0), 1)
    bits = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)).to(tl.uint32, bitcast=True)
    scale_bits = (bits + 0xFFFF) >> 16
    scales = (scale_bits << 16).to(tl.float32, bitcast=True)
    divisor = tl.where(scales == 0.0, 1.0, scales)
    steps = tl.div_rn(tl.where(finite, values, 0.0), tl.broadcast_to(divisor[:, None], values.shape))
    # Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even.
    rounded = (steps + 12582912.0) - 12582912.0
    codes = tl.where(finite, rounded, -128.0).to(tl.int8)
    return codes, scale_bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton_kernel
def unpack_codes(codes, scales):
    """fp32 of codes and of fp32 scales that broadcast against them."""
    return tl.where(codes == -128, float("nan"), codes.to(tl.float32) * scales)


@triton_kernel
def _int8_pack_kernel(
    values_ptr, codes_ptr, scales_ptr, count, groups, GROUP: tl.constexpr, ROWS: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(values_ptr + place, mask=place < count, other=0.0).to(tl.float32)
    codes, scales = pack_groups(values)
    tl.store(codes_ptr + place, codes, mask=group[:, None] < groups)
    tl.store(scales_ptr + group, scales, mask=group < groups)


@triton_kernel
def _int8_unpack_kernel(codes_ptr, scales_ptr, values_ptr, count, GROUP: tl.constexpr, ROWS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = place < count
    codes = tl.load(codes_ptr + place, mask=inside, other=0)
    scales = tl.load(scales_ptr + group, mask=group * GROUP < count, other=0.0).to(tl.float32)
    tl.store(values_ptr + place, unpack_codes(codes, scales[:, None]), mask=inside)


@triton_kernel
def _swiglu_int8_kernel(
    gate_ptr,
    up_ptr,
    product_ptr,
    gate_codes_ptr,
    gate_scales_ptr,
    up_codes_ptr,
    up_scales_ptr,
    count,
    groups,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside, known = place < count, group < groups
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    activated, _ = gate_activation(gate.to(tl.float32), 0)
    tl.store(product_ptr + place, activated.to(gate.dtype).to(tl.float32) * up, mask=inside)
    codes, scales = pack_groups(gate.to(tl.float32))
    tl.store(gate_codes_ptr + place, codes, mask=known[:, None])
    tl.store(gate_scales_ptr + group, scales, mask=known)
    codes, scales = pack_groups(up)
    tl.store(up_codes_ptr + place, codes, mask=known[:, None])
    tl.store(up_scales_ptr + group, scales, mask=known)


def int8_pack(values: Tensor, *, group: int = GROUP) -> Packed:
    """``(codes, scales)`` of ``values``, read row by row. ``group`` is a power of two."""
    _check_group(group)
    return (_triton_pack if lazy.takes_triton(values) else _cpu_pack)(values.contiguous(), group)


def int8_unpack(packed: Packed, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The values again, as a new tensor. Raises ValueError when there are too few codes for ``shape``."""
    codes, _ = packed
    if not 0 <= codes.numel() - torch.Size(shape).numel() < max(codes.shape[1], 1):
        raise ValueError(f"{codes.numel()} codes in groups of {codes.shape[1]} are not {tuple(shape)} values")
    return (_triton_unpack if lazy.takes_triton(codes) else _cpu_unpack)(packed, shape, dtype)


def swiglu_forward_int8(gate: Tensor, up: Tensor, *, group: int = GROUP) -> tuple[Tensor, Packed, Packed]:
    """``silu(gate) * up``, and gate and up packed. Raises ValueError unless both have one shape and dtype."""
    _check_group(group)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} differ")
    if lazy.takes_triton(gate):
        return _triton_swiglu(gate.contiguous(), up.contiguous(), group)
    product = torch.nn.functional.silu(gate).mul_(up)
    return product, int8_pack(gate, group=group), int8_pack(up, group=group)


def _check_group(group: int) -> None:
    if group < 16 or group & (group - 1):
        raise ValueError(f"group must be a power of two of at least 16, got {group}")


def _empty(values: Tensor, group: int) -> Packed:
    groups = -(-values.numel() // group)
    codes = torch.empty(groups, group, dtype=torch.int8, device=values.device)
    return codes, torch.empty(groups, dtype=torch.bfloat16, device=values.device)


def _launch(groups: int, group: int) -> tuple[tuple[int], int]:
    rows = max(1, _TILE_ELEMENTS // group)
    return (-(-groups // rows),), rows


def _triton_pack(values: Tensor, group: int) -> Packed:
    codes, scales = _empty(values, group)
    if values.numel():
        grid, rows = _launch(len(codes), group)
        _int8_pack_kernel[grid](values, codes, scales, values.numel(), len(codes), GROUP=group, ROWS=rows)
    return codes, scales


def _triton_unpack(packed: Packed, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    codes, scales = packed
    values = torch.empty(shape, dtype=dtype, device=codes.device)
    if values.numel():
        grid, rows = _launch(*codes.shape)
        _int8_unpack_kernel[grid](codes, scales, values, values.numel(), GROUP=codes.shape[1], ROWS=rows)
    return values


def _triton_swiglu(gate: Tensor, up: Tensor, group: int) -> tuple[Tensor, Packed, Packed]:
    product = torch.empty_like(gate)
    gate_packed, up_packed = _empty(gate, group), _empty(up, group)
    if gate.numel():
        groups = len(gate_packed[0])
        grid, rows = _launch(groups, group)
        _swiglu_int8_kernel[grid](
            gate, up, product, *gate_packed, *up_packed, gate.numel(), groups, GROUP=group, ROWS=rows
        )
    return product, gate_packed, up_packed


def _cpu_pack(values: Tensor, group: int) -> Packed:
    if group_codes.serves(values, group):
        return group_codes.encode_groups(values, group=group, bits=8)
    codes, scales = _empty(values, group)
    rows = max(1, _CPU_CHUNK_ELEMENTS // group)
    flat = values.view(-1)
    for start in range(0, len(codes), rows):
        part = flat[start * group : (start + rows) * group]
        codes[start : start + rows], scales[start : start + rows] = reference_pack(part, group)
    return codes, scales


def _cpu_unpack(packed: Packed, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    codes, scales = packed
    values = torch.empty(shape, dtype=dtype, device=codes.device)
    flat, group = values.view(-1), codes.shape[1]
    if group_codes.serves(values, group):
        group_codes.decode_groups_(values, codes, scales, group=group, bits=8)
        return values
    rows = max(1, _CPU_CHUNK_ELEMENTS // group)
    for start in range(0, len(codes), rows):
        target = flat[start * group : (start + rows) * group]
        part = (codes[start : start + rows], scales[start : start + rows])
        target.copy_(reference_unpack(part, tuple(target.shape), dtype))
    return values


_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_SCALE_BYTES = 2 / GROUP


def _variants(whole: str, packed: str, numbers: str) -> list[KernelVariant]:
    """Of the arguments ``whole``, tensors in the dtype, and ``packed``, prefixes of codes and scales, each
    is moved once."""
    found = []
    for dtype, size in _SIZES.items():
        moved = len(whole.split()) * size + len(packed.split(",")) * (1 + _SCALE_BYTES)
        signature = dict.fromkeys(whole.split(), f"*{dtype}") | dict.fromkeys(numbers.split(), "i32:16")
        for prefix in packed.split(","):
            signature |= {f"{prefix}codes_ptr": "*i8", f"{prefix}scales_ptr": "*bf16"}
        found.append(
            KernelVariant(
                label=dtype,
                signature=signature,
                constexprs={"GROUP": GROUP, "ROWS": _TILE_ELEMENTS // GROUP},
                moved_bytes=moved,
                least_bytes=moved,
            )
        )
    return found


SPECS = (
    KernelSpec(
        kernel=_int8_pack_kernel, element="value", variants=_variants("values_ptr", "", "count groups")
    ),
    KernelSpec(kernel=_int8_unpack_kernel, element="value", variants=_variants("values_ptr", "", "count")),
    KernelSpec(
        kernel=_swiglu_int8_kernel,
        element="element of gate",
        variants=_variants("gate_ptr up_ptr product_ptr", "gate_,up_", "count groups"),
    ),
)
