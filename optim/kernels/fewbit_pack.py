"""Few-bit activations: bins found and packed in the pass that computes the activation, levels applied in the
pass that multiplies by the gradient.

Bins, levels and bytes are those of ``autograd.fewbit`` and ``autograd.bitpack``: a code counts the borders
that its input (or magnitude, ``even``) is not below; a code of k bits is cut into fields of 4, 2 and 1 bits,
and a field of width w into ``8 / w`` parts whose j-th codes share byte j.

For a number of values divisible by 8 the parts of all fields line up: with ``S`` an eighth of the values,
strip q of eight holds values ``q S + j``, and its field of width w goes to byte ``(q mod 8 / w') S + j``,
w' the number of parts. So one block reads eight strips once and writes every field; Triton on CUDA and C++ on
a CPU. Other numbers of values run as plain torch on both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional

from memtrain.optim.autograd.bitpack import pack, packed_bytes, unpack
from memtrain.optim.kernels import lazy, native
from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel
from memtrain.optim.kernels.swiglu import gate_activation

if TYPE_CHECKING:
    import triton.language as tl

ActivationName = Literal["silu", "gelu", "gelu_tanh"]
_ACTIVATIONS: dict[str, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_CODES_ONLY = -1
_BLOCK = 128
_CPU_CHUNK_ELEMENTS = 1 << 16
_COMPARED_BORDERS = 15
"""Up to so many borders one comparison each is faster on a CPU than a binary search: on 4 M values 94 ms
against 182 ms with 15 of them, 29 against 126 with 3 (one core)."""
_KERNEL_BITS = 4
"""Wider codes gain nothing and would need a search: they run as plain torch."""


class _Table(ctypes.Structure):
    """``struct Table``: ``count`` is of the borders, or of the levels."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("bits", "even", "count"))


def reference_bins(values: Tensor, borders: Tensor, *, even: bool) -> Tensor:
    """uint8 codes of flat values: how many borders each is not below."""
    wide = values.reshape(-1).float()
    wide = wide.abs() if even else wide
    return (wide.unsqueeze(1) >= borders).sum(1).to(torch.uint8)


def reference_backward(packed: Tensor, levels: Tensor, gradient: Tensor, bits: int) -> Tensor:
    """The gradient times the level of each value's bin."""
    codes = unpack(packed, bits, gradient.numel())
    return (levels[codes.long()] * gradient.reshape(-1)).to(gradient.dtype).view(gradient.shape)


@triton_kernel
def _fewbit_forward_kernel(
    values_ptr,
    borders_ptr,
    output_ptr,
    packed_ptr,
    strip,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    strip = tl.cast(strip, tl.int64)  # eight of them may be more than 2^31 values
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = byte[None, :] < strip
    part = tl.arange(0, 8)[:, None]
    place = part * strip + byte[None, :]
    values = tl.load(values_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION >= 0:
        activated, _ = gate_activation(values, ACTIVATION)
        tl.store(output_ptr + place, activated, mask=inside)
    if EVEN:
        values = tl.abs(values)
    codes = tl.zeros([8, BLOCK], dtype=tl.int32)
    for border in tl.static_range(COUNT):
        codes += (values >= tl.load(borders_ptr + border)).to(tl.int32)
    # Fields from the widest to the narrowest, as they lie in memory.
    if BITS & 4:
        nibbles = tl.reshape((codes & 15) << (4 * (part // 4)), (2, 4, BLOCK))
        target = packed_ptr + tl.arange(0, 4)[:, None] * strip + byte[None, :]
        tl.store(target, tl.sum(nibbles, 0).to(tl.uint8), mask=inside)
        packed_ptr += 4 * strip
        codes = codes >> 4
    if BITS & 2:
        pairs = tl.reshape((codes & 3) << (2 * (part // 2)), (4, 2, BLOCK))
        target = packed_ptr + tl.arange(0, 2)[:, None] * strip + byte[None, :]
        tl.store(target, tl.sum(pairs, 0).to(tl.uint8), mask=inside)
        packed_ptr += 2 * strip
        codes = codes >> 2
    if BITS & 1:
        tl.store(packed_ptr + byte, tl.sum((codes & 1) << part, 0).to(tl.uint8), mask=byte < strip)


@triton_kernel
def _fewbit_backward_kernel(
    packed_ptr,
    levels_ptr,
    gradient_ptr,
    result_ptr,
    strip,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    strip = tl.cast(strip, tl.int64)  # eight of them may be more than 2^31 values
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = byte[None, :] < strip
    part = tl.arange(0, 8)[:, None]
    codes = tl.zeros([8, BLOCK], dtype=tl.int32)
    if BITS & 4:
        source = packed_ptr + tl.arange(0, 4)[:, None] * strip + byte[None, :]
        nibbles = tl.load(source, mask=inside, other=0).to(tl.int32)
        spread = tl.reshape(tl.broadcast_to(nibbles[None, :, :], (2, 4, BLOCK)), (8, BLOCK))
        codes += (spread >> (4 * (part // 4))) & 15
        packed_ptr += 4 * strip
    if BITS & 2:
        source = packed_ptr + tl.arange(0, 2)[:, None] * strip + byte[None, :]
        pairs = tl.load(source, mask=inside, other=0).to(tl.int32)
        spread = tl.reshape(tl.broadcast_to(pairs[None, :, :], (4, 2, BLOCK)), (8, BLOCK))
        codes += ((spread >> (2 * (part // 2))) & 3) << (BITS & 4)
        packed_ptr += 2 * strip
    if BITS & 1:
        singles = tl.load(packed_ptr + byte, mask=byte < strip, other=0).to(tl.int32)
        codes += ((singles[None, :] >> part) & 1) << (BITS & 6)
    place = part * strip + byte[None, :]
    gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32)
    level = tl.load(levels_ptr + codes, mask=inside, other=0.0)
    tl.store(result_ptr + place, level * gradient, mask=inside)


def fewbit_forward(
    values: Tensor,
    borders: Tensor,
    *,
    bits: int,
    even: bool = False,
    activation: ActivationName | None = None,
) -> tuple[Tensor, Tensor]:
    """``(activation(values), packed)``; without an activation the first is ``values`` itself.

    Args:
        values: any shape, floating point; compared in fp32.
        borders: fp32, increasing, fewer than ``2**bits``.
        bits: 1 to 8; kernels are for up to 4.
        even: bins are of the magnitude.

    Raises:
        ValueError: another width, too many borders, an unknown activation.
    """
    if not 1 <= bits <= 8 or borders.numel() >= 1 << bits:
        raise ValueError(f"1 to 8 bits for up to 2**bits - 1 borders, got {bits} and {borders.numel()}")
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)} or None, got {activation!r}")
    if bits <= _KERNEL_BITS and values.numel() % 8 == 0:
        if lazy.takes_triton(values):
            return _triton_forward(values.contiguous(), borders, bits, even, activation)
        if _native_serves(values, borders):
            return _activate(values, activation), _native_pack(values.contiguous(), borders, bits, even)
    return _activate(values, activation), pack(_bins(values.reshape(-1), borders, even), bits)


def _bins(flat: Tensor, borders: Tensor, even: bool) -> Tensor:
    """``reference_bins``, by parts and without a table of comparisons."""
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    for part in _chunks(flat):
        values = flat[part].float()
        values = values.abs() if even else values
        if len(borders) > _COMPARED_BORDERS:
            codes[part] = torch.bucketize(values, borders, out_int32=True, right=True)
            continue
        count = torch.zeros_like(values, dtype=torch.uint8)
        for border in borders:
            count += values >= border
        codes[part] = count
    return codes


def _chunks(flat: Tensor) -> Iterator[slice]:
    whole = flat.device.type != "cpu" or torch.compiler.is_compiling()
    step = max(flat.numel(), 1) if whole else _CPU_CHUNK_ELEMENTS
    for start in range(0, flat.numel(), step):
        yield slice(start, start + step)


def fewbit_backward(packed: Tensor, levels: Tensor, gradient: Tensor, *, bits: int) -> Tensor:
    """``gradient`` times the level of each value's bin, in its dtype.

    Args:
        packed: from ``fewbit_forward``.
        levels: fp32, one for each bin.

    Raises:
        ValueError: the number of bytes, or of levels, does not fit.
    """
    expected = packed_bytes(gradient.numel(), bits)
    if packed.numel() != expected:
        raise ValueError(
            f"{gradient.numel()} values of {bits} bits take {expected} bytes, got {packed.numel()}"
        )
    if levels.numel() > 1 << bits:
        raise ValueError(f"{levels.numel()} levels for {bits} bits, which number {1 << bits} bins")
    if bits <= _KERNEL_BITS and gradient.numel() % 8 == 0:
        if lazy.takes_triton(gradient):
            return _triton_backward(packed, levels, gradient.contiguous(), bits)
        if _native_serves(gradient, levels, packed):
            return _native_backward(packed, levels, gradient.contiguous(), bits)
    codes, flat = unpack(packed, bits, gradient.numel()), gradient.reshape(-1)
    result = torch.empty_like(flat)
    for part in _chunks(flat):
        result[part] = levels.index_select(0, codes[part].int()) * flat[part]
    return result.view(gradient.shape)


def _native_serves(values: Tensor, *others: Tensor) -> bool:
    fits = values.dtype in (torch.float32, torch.bfloat16) and native.is_plain(values, *others)
    return fits and native.function("fewbit", "fewbit_pack") is not None


def _native_pack(values: Tensor, borders: Tensor, bits: int, even: bool) -> Tensor:
    packed = torch.empty(packed_bytes(values.numel(), bits), dtype=torch.uint8, device="cpu")
    run = native.function("fewbit", "fewbit_pack")
    assert run is not None
    run(
        native.gradient(values),
        native.pointer(packed, torch.uint8),
        native.pointer(borders),
        ctypes.c_int64(values.numel() // 8),
        _Table(bits, even, borders.numel()),
    )
    return packed


def _native_backward(packed: Tensor, levels: Tensor, gradient: Tensor, bits: int) -> Tensor:
    result = torch.empty_like(gradient)
    run = native.function("fewbit", "fewbit_apply")
    assert run is not None
    run(
        native.pointer(packed, torch.uint8),
        native.pointer(levels),
        native.gradient(gradient),
        native.gradient(result),
        ctypes.c_int64(gradient.numel() // 8),
        _Table(bits, False, levels.numel()),
    )
    return result


def _activate(values: Tensor, activation: ActivationName | None) -> Tensor:
    if activation is None:
        return values
    if activation == "silu":
        return functional.silu(values)
    return functional.gelu(values, approximate="tanh" if activation == "gelu_tanh" else "none")


def _triton_forward(
    values: Tensor, borders: Tensor, bits: int, even: bool, activation: ActivationName | None
) -> tuple[Tensor, Tensor]:
    output = values if activation is None else torch.empty_like(values)
    packed = torch.empty(packed_bytes(values.numel(), bits), dtype=torch.uint8, device=values.device)
    if strip := values.numel() // 8:
        _fewbit_forward_kernel[(-(-strip // _BLOCK),)](
            values,
            borders,
            output,
            packed,
            strip,
            COUNT=borders.numel(),
            BITS=bits,
            EVEN=even,
            ACTIVATION=_CODES_ONLY if activation is None else _ACTIVATIONS[activation],
            BLOCK=_BLOCK,
        )
    return output, packed


def _triton_backward(packed: Tensor, levels: Tensor, gradient: Tensor, bits: int) -> Tensor:
    result = torch.empty_like(gradient)
    if strip := gradient.numel() // 8:
        _fewbit_backward_kernel[(-(-strip // _BLOCK),)](
            packed, levels, gradient, result, strip, BITS=bits, BLOCK=_BLOCK
        )
    return result


_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


def _forward_variant(dtype: str, bits: int, activation: int) -> KernelVariant:
    moved = _SIZES[dtype] * (1 if activation == _CODES_ONLY else 2) + bits / 8
    name = next((name for name, code in _ACTIVATIONS.items() if code == activation), "bins only")
    return KernelVariant(
        label=f"{dtype} {bits} bits {name}",
        signature={
            **dict.fromkeys(("values_ptr", "output_ptr"), f"*{dtype}"),
            **{"borders_ptr": "*fp32", "packed_ptr": "*u8", "strip": "i32:16"},
        },
        constexprs={
            "COUNT": (1 << bits) - 1,
            "BITS": bits,
            "EVEN": False,
            "ACTIVATION": activation,
            "BLOCK": _BLOCK,
        },
        moved_bytes=moved,
        least_bytes=moved,
    )


def _backward_variant(dtype: str, bits: int) -> KernelVariant:
    moved = 2 * _SIZES[dtype] + bits / 8
    return KernelVariant(
        label=f"{dtype} {bits} bits",
        signature={
            **dict.fromkeys(("gradient_ptr", "result_ptr"), f"*{dtype}"),
            **{"levels_ptr": "*fp32", "packed_ptr": "*u8", "strip": "i32:16"},
        },
        constexprs={"BITS": bits, "BLOCK": _BLOCK},
        moved_bytes=moved,
        least_bytes=moved,
    )


SPECS = (
    KernelSpec(
        kernel=_fewbit_forward_kernel,
        element="value",
        variants=[
            *(_forward_variant(dtype, bits, 1) for bits in (3, 1, 2, 4) for dtype in _SIZES),
            *(_forward_variant("bf16", 3, code) for code in (_CODES_ONLY, 0, 2)),
        ],
    ),
    KernelSpec(
        kernel=_fewbit_backward_kernel,
        element="value",
        variants=[_backward_variant(dtype, bits) for bits in (3, 1, 2, 4) for dtype in _SIZES],
    ),
)
