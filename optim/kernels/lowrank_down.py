"""The way down of GaLore and FRUGAL: ``R = P^T G``, or ``G Q``, added to what is there if that is wanted.

Legend: the gradient is ``[m, n]``; a left basis ``[m, r]`` makes R ``[r, n]``, a right one ``[n, r]`` makes
R ``[m, r]``. The *short* axis is the one that the product sums over, *other* is the one that stays.

Operands enter the product in the dtype of the basis, sums are in fp32, and R is fp32: a sum over
micro-batches loses nothing that the products had. The kernel casts a wider gradient as it loads it, so that
no copy of it exists. One block holds all of up to 256 basis vectors against 64 of the other axis and reads
its part of the gradient once; above that, blocks that share a part are launched next to one another and
find it in the L2 cache. The sum is not split between blocks: that would need atomics, whose order changes
the last bit, or partial results, whose traffic is as large as R many times over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtrain.optim.kernels import lowrank_products
from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

MAX_ELEMENTS = 1 << 31
"""Offsets inside a matrix are int32."""
_CPU_ROWS_LEFT, _CPU_ROWS_RIGHT = 1024, 512
"""fp32 gradient 2048 x 2048, bf16 basis of rank 256, two idle cores: left 2.8 ms with 1,024 rows, 3.4 with
512, 4.9 with 256, and 3.1 by chunks of 1,024 columns; right 3.1 ms with 512 rows, 3.5 with 256."""


def reference(gradient: Tensor, basis: Tensor, *, right: bool) -> Tensor:
    """The arithmetic, plainly: operands rounded to the dtype of the basis, products and sums in fp32."""
    rounded = gradient.to(basis.dtype).float()
    return rounded @ basis.float() if right else basis.float().mT @ rounded


@triton_kernel
def _lowrank_down_kernel(
    low_ptr,
    gradient_ptr,
    basis_ptr,
    short,
    other,
    rank,
    gradient_short_stride,
    gradient_other_stride,
    low_rank_stride,
    low_other_stride,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_SHORT: tl.constexpr,
):
    vector = tl.program_id(0) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    place = tl.program_id(1) * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER)
    total = tl.zeros([BLOCK_RANK, BLOCK_OTHER], dtype=tl.float32)
    for start in range(0, short, BLOCK_SHORT):
        summed = start + tl.arange(0, BLOCK_SHORT)
        basis = tl.load(
            basis_ptr + summed[:, None] * rank + vector[None, :],
            mask=(summed[:, None] < short) & (vector[None, :] < rank),
            other=0.0,
        )
        gradient = tl.load(
            gradient_ptr + summed[:, None] * gradient_short_stride + place[None, :] * gradient_other_stride,
            mask=(summed[:, None] < short) & (place[None, :] < other),
            other=0.0,
        )
        total = tl.dot(tl.trans(basis), gradient.to(basis.dtype), total, input_precision=PRECISION)
    target = low_ptr + vector[:, None] * low_rank_stride + place[None, :] * low_other_stride
    inside = (vector[:, None] < rank) & (place[None, :] < other)
    if ACCUMULATE:
        total += tl.load(target, mask=inside, other=0.0)
    tl.store(target, total, mask=inside)


def project_down_(
    low: Tensor, gradient: Tensor, basis: Tensor, *, right: bool, accumulate: bool = False
) -> None:
    """Write ``basis^T gradient`` (or ``gradient basis``, ``right``) into ``low``, or add it to ``low``.

    On a CPU without AMX (``lowrank_products``) the product leaves in the dtype of the basis: torch has none
    there that takes bf16 and gives fp32.

    Args:
        low: fp32 ``[r, n]``, or ``[m, r]`` with ``right``; contiguous.
        gradient: ``[m, n]``, contiguous.
        basis: bf16, fp16 or fp32 ``[m, r]``, or ``[n, r]`` with ``right``; contiguous.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    check(low, gradient, basis, right=right)
    if low.dtype != torch.float32:
        raise ValueError(f"low must be fp32, got {low.dtype}")
    if not gradient.numel():  # a sum of nothing
        if not accumulate:
            low.zero_()
    elif gradient.is_cuda:
        _triton_down(low, gradient, basis, right, accumulate)
    elif low.numel() and lowrank_products.serves(basis, gradient):
        lowrank_products.project_down_(low, gradient, basis, right=right, accumulate=accumulate)
    else:
        _cpu_down(low, gradient, basis, right, accumulate)


def check(low: Tensor, full: Tensor, basis: Tensor, *, right: bool) -> None:
    """Raise ValueError unless the three are contiguous matrices that fit one another."""
    if full.dim() != 2 or basis.dim() != 2:
        raise ValueError(f"matrices are wanted, got shapes {tuple(full.shape)} and {tuple(basis.shape)}")
    (m, n), (length, rank) = full.shape, basis.shape
    expected = (m, rank) if right else (rank, n)
    if length != (n if right else m) or tuple(low.shape) != expected:
        raise ValueError(
            f"with {'right' if right else 'left'} basis {tuple(basis.shape)} a matrix {tuple(full.shape)} "
            f"has a low part {expected}, got {tuple(low.shape)}"
        )
    if not (low.is_contiguous() and full.is_contiguous() and basis.is_contiguous()):
        raise ValueError("low part, matrix and basis must be contiguous")
    if full.numel() >= MAX_ELEMENTS:
        raise ValueError(f"a matrix of {full.numel()} elements is too large: at most {MAX_ELEMENTS - 1}")


def precision(dtype: torch.dtype) -> str:
    """Of products: fp32 operands are not cut to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _triton_down(low: Tensor, gradient: Tensor, basis: Tensor, right: bool, accumulate: bool) -> None:
    (m, n), rank = gradient.shape, basis.shape[1]
    if not low.numel():
        return
    short, other = (n, m) if right else (m, n)
    constants, num_warps = _launch(rank, basis.dtype)
    grid = (-(-rank // constants["BLOCK_RANK"]), -(-other // constants["BLOCK_OTHER"]))
    strides = (1, n, 1, rank) if right else (n, 1, n, 1)
    _lowrank_down_kernel[grid](
        low,
        gradient,
        basis,
        short,
        other,
        rank,
        *strides,
        ACCUMULATE=accumulate,
        PRECISION=precision(basis.dtype),
        **constants,
        num_warps=num_warps,
    )


def _launch(rank: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Block sizes and warps: as many basis vectors as fit, so that the gradient is read once (in fp32,
    without tensor cores, the operands take registers as well)."""
    wide = dtype == torch.float32
    block_rank = min(64 if wide else 256, max(16, 1 << (rank - 1).bit_length()))
    constants = {"BLOCK_RANK": block_rank, "BLOCK_OTHER": 64, "BLOCK_SHORT": 32 if wide else 64}
    return constants, 8 if block_rank >= 128 else 4


def _cpu_down(low: Tensor, gradient: Tensor, basis: Tensor, right: bool, accumulate: bool) -> None:
    """A gradient of another dtype is cast by chunks of rows, into one buffer."""
    if gradient.dtype == basis.dtype:
        _put_(low, gradient @ basis if right else basis.mT @ gradient, accumulate)
        return
    rows, columns = gradient.shape
    chunk = _CPU_ROWS_RIGHT if right else _CPU_ROWS_LEFT
    cast = torch.empty(min(chunk, rows), columns, dtype=basis.dtype, device="cpu")
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        rounded = cast[: len(gradient[part])].copy_(gradient[part])
        if right:
            _put_(low[part], rounded @ basis, accumulate)
        else:
            _put_(low, basis[part].mT @ rounded, accumulate or start > 0)


def _put_(low: Tensor, product: Tensor, accumulate: bool) -> None:
    if accumulate:
        low += product
    else:
        low.copy_(product)


def _moved_bytes(
    short: int, other: int, rank: int, *, gradient_size: int, basis_size: int, accumulate: bool
) -> float:
    """Per element of the gradient: it once, the basis once for all blocks, R."""
    low_bytes = (8 if accumulate else 4) * rank * other
    return gradient_size + (low_bytes + basis_size * short * rank) / (short * other)


def _variant(dtype: str, basis: str, *, right: bool, accumulate: bool) -> KernelVariant:
    torch_dtype = torch.float32 if basis == "fp32" else torch.bfloat16
    short, other, rank = 4096, 11008, 64 if basis == "fp32" else 256  # the projections of Llama 7B's MLP
    size = {"bf16": 2, "fp16": 2, "fp32": 4}
    moved = _moved_bytes(
        short, other, rank, gradient_size=size[dtype], basis_size=size[basis], accumulate=accumulate
    )
    constants, num_warps = _launch(rank, torch_dtype)
    one, wide = ("short", "other") if right else ("other", "short")
    low_one, low_wide = ("rank", "other") if right else ("other", "rank")
    pointers = {"low_ptr": "*fp32", "gradient_ptr": f"*{dtype}", "basis_ptr": f"*{basis}"}
    strides = (f"gradient_{wide}_stride", f"low_{low_wide}_stride")
    return KernelVariant(
        label=f"{'right' if right else 'left'} {dtype} by {basis}{' added' if accumulate else ''}",
        signature={**pointers, **dict.fromkeys(("short", "other", "rank", *strides), "i32:16")},
        constexprs={
            f"gradient_{one}_stride": 1,
            f"low_{low_one}_stride": 1,
            "ACCUMULATE": accumulate,
            "PRECISION": precision(torch_dtype),
            **constants,
        },
        moved_bytes=moved,
        least_bytes=moved,
        num_warps=num_warps,
    )


SPECS = (
    KernelSpec(
        kernel=_lowrank_down_kernel,
        element="element of G",
        variants=[
            _variant(dtype, basis, right=right, accumulate=accumulate)
            for dtype, basis in (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("fp32", "fp32"))
            for accumulate in (False, True)
            for right in (False, True)
        ],
    ),
)
