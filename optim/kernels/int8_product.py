"""The gradient of a linear layer whose input was kept in int8 groups: unpacked as the product loads it.

``dW = dy^T x`` reads half the bytes for ``x`` that it would in bf16, and no unpacked copy exists. The
format is ``int8_groups``'; a group lies within a row, so the inputs are a multiple of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtrain.optim.kernels import lazy
from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.int8_groups import GROUP, Packed, int8_unpack, unpack_codes
from memtrain.optim.kernels.lazy import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

_CHUNK_INPUTS = 1024


@triton_kernel
def _int8_weight_gradient_kernel(
    dy_ptr,
    codes_ptr,
    scales_ptr,
    gradient_ptr,
    tokens,
    outputs,
    inputs,
    GROUP: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One group of inputs a block, so that a token has one scale there."""
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    place = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    total = tl.zeros([BLOCK_OUT, GROUP], dtype=tl.float32)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        real = token[:, None] < tokens
        token = token.to(tl.int64)
        dy = tl.load(
            dy_ptr + token[:, None] * outputs + output[None, :],
            mask=real & (output[None, :] < outputs),
            other=0.0,
        )
        codes = tl.load(codes_ptr + token[:, None] * inputs + place[None, :], mask=real, other=0)
        scale_place = token * (inputs // GROUP) + tl.program_id(1)
        scales = tl.load(scales_ptr + scale_place, mask=token < tokens, other=0.0).to(tl.float32)
        x = unpack_codes(codes, scales[:, None]).to(dy.dtype)
        total = tl.dot(tl.trans(dy), x, total)
    target = gradient_ptr + output[:, None].to(tl.int64) * inputs + place[None, :]
    tl.store(target, total, mask=output[:, None] < outputs)


def int8_weight_gradient(dy: Tensor, packed: Packed, inputs: int) -> Tensor:
    """``dy^T x`` in the dtype of ``dy``, for a linear layer whose input ``x`` is packed.

    Args:
        dy: ``[tokens, outputs]``.
        packed: ``x`` ``[tokens, inputs]``; ``inputs`` is a multiple of the group.

    Raises:
        ValueError: ``inputs`` is no multiple of the group, or the number of codes does not fit.
    """
    codes, _ = packed
    if inputs % codes.shape[1] or codes.numel() != dy.shape[0] * inputs:
        raise ValueError(
            f"{codes.numel()} codes in groups of {codes.shape[1]} are not {dy.shape[0]} tokens of {inputs} "
            "inputs in whole groups: unpack them and use the plain product"
        )
    kernel = lazy.takes_triton(dy) and dy.dtype in (torch.bfloat16, torch.float16)  # fp32 would become tf32
    return (_triton_gradient if kernel else _gradient_by_chunks)(dy.contiguous(), packed, inputs)


def _triton_gradient(dy: Tensor, packed: Packed, inputs: int) -> Tensor:
    tokens, outputs = dy.shape
    gradient = torch.zeros(outputs, inputs, dtype=dy.dtype, device=dy.device)
    if gradient.numel() and tokens:
        group = packed[0].shape[1]
        grid = (-(-outputs // 128), inputs // group)
        _int8_weight_gradient_kernel[grid](
            dy,
            *packed,
            gradient,
            tokens,
            outputs,
            inputs,
            GROUP=group,
            BLOCK_OUT=128,
            BLOCK_TOKENS=32,
            num_warps=8,
        )
    return gradient


def _gradient_by_chunks(dy: Tensor, packed: Packed, inputs: int) -> Tensor:
    """By chunks of inputs, each of which has its whole sum in one product."""
    codes, scales = packed
    group = codes.shape[1]
    tokens, outputs = dy.shape
    gradient = torch.empty(outputs, inputs, dtype=dy.dtype, device=dy.device)
    codes, scales = codes.view(tokens, inputs // group, group), scales.view(tokens, inputs // group)
    for start in range(0, inputs // group, groups := max(1, _CHUNK_INPUTS // group)):
        part = slice(start, start + groups)
        chosen = (codes[:, part].reshape(-1, group), scales[:, part].reshape(-1))
        x = int8_unpack(chosen, (tokens, codes[:, part].shape[1] * group), dy.dtype)
        gradient[:, start * group : (start + groups) * group] = dy.mT @ x
    return gradient


def _gradient_bytes(tokens: int, outputs: int, inputs: int, *, group: int, size: int) -> float:
    """Per element of x: codes and scales, ``dy`` and the gradient, each once for all blocks."""
    return 1 + 2 / group + size * (tokens * outputs + outputs * inputs) / (tokens * inputs)


def _gradient_variant(dtype: str, size: int) -> KernelVariant:
    moved = _gradient_bytes(8192, 4096, 4096, group=GROUP, size=size)
    return KernelVariant(
        label=dtype,
        signature={
            **dict.fromkeys(("dy_ptr", "gradient_ptr"), f"*{dtype}"),
            **{"codes_ptr": "*i8", "scales_ptr": "*bf16"},
            **dict.fromkeys(("tokens", "outputs", "inputs"), "i32:16"),
        },
        constexprs={"GROUP": GROUP, "BLOCK_OUT": 128, "BLOCK_TOKENS": 32},
        moved_bytes=moved,
        least_bytes=moved,
        num_warps=8,
    )


SPECS = (
    KernelSpec(
        kernel=_int8_weight_gradient_kernel,
        element="element of x",
        variants=[_gradient_variant("bf16", 2), _gradient_variant("fp16", 2)],
    ),
)
