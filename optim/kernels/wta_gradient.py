"""The weight's gradient from sampled rows: gathered and weighted as the product loads them.

WTA-CRS (arXiv 2305.15265) keeps ``k`` rows of a linear layer's input; its backward needs ``sum_k factor_k
dy[row_k]^T x_k``. Gathering ``dy`` first would write and read ``k`` rows more; here the product takes each
row from where it lies. The rows of ``x`` are together already: they are what was kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtrain.optim.kernels import lazy
from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel
from memtrain.optim.kernels.lowrank_down import precision

if TYPE_CHECKING:
    import triton.language as tl


def reference(dy: Tensor, kept: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
    """The gradient, plainly: weighted rows are rounded to the dtype of ``dy``, as a product takes them."""
    weighted = (dy[rows].float() * factors.unsqueeze(1)).to(dy.dtype)
    return (weighted.float().mT @ kept.float()).to(dy.dtype)


@triton_kernel
def _wta_gradient_kernel(
    dy_ptr,
    kept_ptr,
    rows_ptr,
    factors_ptr,
    gradient_ptr,
    count,
    outputs,
    inputs,
    PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
):
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    place = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    total = tl.zeros([BLOCK_OUT, BLOCK_IN], dtype=tl.float32)
    for start in range(0, count, BLOCK_COUNT):
        sample = start + tl.arange(0, BLOCK_COUNT)
        drawn = sample < count
        row = tl.load(rows_ptr + sample, mask=drawn, other=0)
        factor = tl.load(factors_ptr + sample, mask=drawn, other=0.0)
        dy = tl.load(
            dy_ptr + row[:, None] * outputs + output[None, :],
            mask=drawn[:, None] & (output[None, :] < outputs),
            other=0.0,
        )
        kept = tl.load(
            kept_ptr + sample[:, None].to(tl.int64) * inputs + place[None, :],
            mask=drawn[:, None] & (place[None, :] < inputs),
            other=0.0,
        )
        weighted = (dy.to(tl.float32) * factor[:, None]).to(dy.dtype)
        total = tl.dot(tl.trans(weighted), kept, total, input_precision=PRECISION)
    target = gradient_ptr + output[:, None].to(tl.int64) * inputs + place[None, :]
    tl.store(target, total, mask=(output[:, None] < outputs) & (place[None, :] < inputs))


def wta_weight_gradient(dy: Tensor, kept: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
    """``sum_k factors[k] * dy[rows[k]]^T kept[k]``, ``[outputs, inputs]`` in the dtype of ``dy``.

    Args:
        dy: ``[tokens, outputs]``.
        kept: ``[k, inputs]`` in the dtype of ``dy``, the sampled rows of the input.
        rows: int64 ``[k]``, which they were; a row may come more than once.
        factors: fp32 ``[k]``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    count = rows.shape[0]
    if dy.dim() != 2 or kept.dim() != 2 or kept.shape[0] != count or factors.shape != rows.shape:
        raise ValueError(
            "dy [tokens, outputs], kept [k, inputs], rows [k] and factors [k] are wanted, "
            f"got {tuple(dy.shape)}, {tuple(kept.shape)}, {tuple(rows.shape)}, {tuple(factors.shape)}"
        )
    if kept.dtype != dy.dtype or rows.dtype != torch.int64 or factors.dtype != torch.float32:
        raise ValueError(
            f"kept must have the dtype of dy ({dy.dtype}), rows int64 and factors fp32, got {kept.dtype}, "
            f"{rows.dtype}, {factors.dtype}"
        )
    if lazy.takes_triton(dy) and dy.dtype != torch.float64:
        return _triton_gradient(dy.contiguous(), kept.contiguous(), rows, factors)
    return (dy[rows] * factors.unsqueeze(1)).to(dy.dtype).mT @ kept


def _triton_gradient(dy: Tensor, kept: Tensor, rows: Tensor, factors: Tensor) -> Tensor:
    (count, inputs), outputs = kept.shape, dy.shape[1]
    gradient = torch.zeros(outputs, inputs, dtype=dy.dtype, device=dy.device)
    if count and gradient.numel():
        constants = _blocks(dy.dtype)
        grid = (-(-outputs // constants["BLOCK_OUT"]), -(-inputs // constants["BLOCK_IN"]))
        _wta_gradient_kernel[grid](
            dy,
            kept,
            rows.contiguous(),
            factors.contiguous(),
            gradient,
            count,
            outputs,
            inputs,
            PRECISION=precision(dy.dtype),
            **constants,
            num_warps=8,
        )
    return gradient


def _blocks(dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:  # without tensor cores the operands take registers as well
        return {"BLOCK_OUT": 64, "BLOCK_IN": 64, "BLOCK_COUNT": 32}
    return {"BLOCK_OUT": 128, "BLOCK_IN": 128, "BLOCK_COUNT": 32}


def _moved_bytes(count: int, outputs: int, inputs: int, size: int) -> float:
    """Per element of the kept rows: the operands and the gradient once for all blocks, rows and factors."""
    total = size * (count * (outputs + inputs) + outputs * inputs) + 12 * count
    return total / (count * inputs)


def _variant(dtype: str, size: int) -> KernelVariant:
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    moved = _moved_bytes(2458, 4096, 4096, size)  # 0.3 of 8,192 tokens
    return KernelVariant(
        label=dtype,
        signature={
            **dict.fromkeys(("dy_ptr", "kept_ptr", "gradient_ptr"), f"*{dtype}"),
            **{"rows_ptr": "*i64", "factors_ptr": "*fp32", "count": "i32"},
            **dict.fromkeys(("outputs", "inputs"), "i32:16"),
        },
        constexprs={"PRECISION": precision(torch_dtype), **_blocks(torch_dtype)},
        moved_bytes=moved,
        least_bytes=moved,
        num_warps=8,
    )


SPECS = (
    KernelSpec(
        kernel=_wta_gradient_kernel,
        element="element of the kept rows",
        variants=[_variant(dtype, size) for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4))],
    ),
)
