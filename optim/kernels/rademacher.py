"""Projection ``z = x S`` by random signs that are never stored: CompAct's way down, and a seeded projector's.

The signs are those of ``projection.draw.rademacher`` to the bit: entry ``e`` of the row-major ``[n, r]``
matrix is bit ``e mod 32`` of the key's word ``e div 32``. One word makes 32 signs, so a tile costs a hash
for every 32 entries, where a Gaussian one would cost more than the product itself. The kernel makes them
inside the product for ranks that are multiples of 32; others, and a CPU, make the matrix once and multiply.

The scale is the caller's: signs and powers of two are exact in every dtype, ``1 / sqrt(r)`` is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtrain.optim.kernels import lazy
from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel
from memtrain.optim.kernels.lowrank_down import precision
from memtrain.optim.kernels.pointwise import Keys, launch_keys, random_word
from memtrain.optim.projection.draw import rademacher, reference_rademacher
from memtrain.optim.storage import RandomKey

if TYPE_CHECKING:
    import triton.language as tl

_BITS = 32


def reference(x: Tensor, key: RandomKey, rank: int) -> Tensor:
    """The projection, plainly, in fp32."""
    return x.float() @ reference_rademacher(key, (x.shape[-1], rank), x.device)


@triton_kernel
def _rademacher_project_kernel(
    x_ptr,
    low_ptr,
    rows,
    columns,
    rank,
    key,
    key_offset,
    scale,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    vector = tl.program_id(0) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    word_of_rank = tl.program_id(0) * (BLOCK_RANK // 32) + tl.arange(0, BLOCK_RANK // 32)
    row = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_RANK], dtype=tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        x = tl.load(
            x_ptr + row[:, None] * columns + column[None, :],
            mask=(row[:, None] < rows) & (column[None, :] < columns),
            other=0.0,
        )
        place = column[:, None].to(tl.int64) * (rank // 32) + word_of_rank[None, :]
        words = random_word(key, place + key_offset)
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :].to(tl.uint32)) & 1
        signs = tl.reshape(bits, (BLOCK_COLUMNS, BLOCK_RANK)).to(tl.float32) * 2.0 - 1.0
        total = tl.dot(x, signs.to(x.dtype), total, input_precision=PRECISION)
    target = low_ptr + row[:, None] * rank + vector[None, :]
    tl.store(target, total * scale, mask=(row[:, None] < rows) & (vector[None, :] < rank))


def rademacher_project(x: Tensor, key: RandomKey, rank: int, *, scale: float = 1.0) -> Tensor:
    """``scale x S`` ``[..., rank]`` in the dtype of ``x`` ``[..., n]``, with signs S ``[n, rank]``.

    Args:
        key: of the signs.
        scale: a power of two.

    Raises:
        ValueError: ``rank`` below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if lazy.takes_triton(x) and x.dtype != torch.float64 and rank % _BITS == 0:
        return _triton_project(x.contiguous(), key, rank, scale)
    return x @ rademacher(key, (x.shape[-1], rank), x.device, scale=scale, dtype=x.dtype)


def _triton_project(x: Tensor, key: RandomKey, rank: int, scale: float = 1.0) -> Tensor:
    columns = x.shape[-1]
    low = torch.zeros(*x.shape[:-1], rank, dtype=x.dtype, device=x.device)
    if x.numel():
        rows = x.numel() // columns
        constants, num_warps = _launch(rank, x.dtype)
        packed, _, _, offset = launch_keys(Keys(key, key, key))
        grid = (-(-rank // constants["BLOCK_RANK"]), -(-rows // constants["BLOCK_ROWS"]))
        _rademacher_project_kernel[grid](
            x,
            low,
            rows,
            columns,
            rank,
            packed,
            offset,
            scale,
            PRECISION=precision(x.dtype),
            **constants,
            num_warps=num_warps,
        )
    return low


def _launch(rank: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """As many signs a row as fit, so that x is read once; blocks that share rows are launched side by
    side."""
    wide = dtype == torch.float32  # without tensor cores the operands take registers as well
    block_rank = min(32 if wide else 256, 1 << (rank - 1).bit_length())
    constants = {"BLOCK_ROWS": 64, "BLOCK_RANK": block_rank, "BLOCK_COLUMNS": 32}
    return constants, 8 if block_rank >= 128 else 4


def _variant(dtype: str, rank: int) -> KernelVariant:
    size = {"bf16": 2, "fp16": 2, "fp32": 4}[dtype]
    constants, num_warps = _launch(rank, torch.float32 if dtype == "fp32" else torch.bfloat16)
    moved = size * (1 + rank / 4096)
    return KernelVariant(
        label=f"{dtype} rank {rank} of 4096",
        signature={
            **dict.fromkeys(("x_ptr", "low_ptr"), f"*{dtype}"),
            **dict.fromkeys(("rows", "columns", "rank"), "i32:16"),
            **{"key": "i64", "key_offset": "i32:16", "scale": "fp32"},
        },
        constexprs={"PRECISION": "ieee" if dtype == "fp32" else "tf32", **constants},
        moved_bytes=moved,
        least_bytes=moved,
        num_warps=num_warps,
    )


SPECS = (
    KernelSpec(
        kernel=_rademacher_project_kernel,
        element="element of x",
        variants=[
            *(_variant(dtype, rank) for dtype in ("bf16", "fp16") for rank in (256, 64)),
            _variant("fp32", 32),
        ],
    ),
)
