"""The way up of GaLore and FRUGAL, ending in the weight: no update of the weight's size is ever written.

    W = decay * W - factor * U - residual_factor * sign(G - up(R))        U = P N, or N Q^T

Legend as in ``lowrank_down``. Without a residual this is GaLore's last step (arXiv 2403.03507), with it
FRUGAL's (arXiv 2411.07837): ``P N`` and ``P R`` are two products over the same tiles of P. Products take
their operands in the dtype of the basis and sum in fp32; W is read, changed in fp32 and written once, rounded
to the nearest, or at random with a key, in the way of ``storage.stochastic_round``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel
from memtrain.optim.kernels.lowrank_down import check, precision
from memtrain.optim.kernels.lowrank_up_cpu import Residual, project_up_on_cpu_
from memtrain.optim.kernels.pointwise import (
    FP32,
    RANDOM_BF16,
    SPLIT24,
    Keys,
    launch_keys,
    load_values,
    store_values,
)
from memtrain.optim.storage.random import RandomKey

if TYPE_CHECKING:
    import triton.language as tl


def reference(
    weight: Tensor,
    basis: Tensor,
    direction: Tensor,
    *,
    right: bool,
    factor: float,
    decay: float = 1.0,
    residual: Residual | None = None,
) -> Tensor:
    """The new weight in fp32, plainly. ``residual`` is (gradient, low, residual_factor)."""

    def up(low: Tensor) -> Tensor:
        rounded = low.to(basis.dtype).float()
        return rounded @ basis.float().mT if right else basis.float() @ rounded

    value = decay * weight.float() - factor * up(direction)
    if residual is not None:
        gradient, low, residual_factor = residual
        value -= residual_factor * torch.sign(gradient.float() - up(low))
    return value


@triton_kernel
def _lowrank_up_kernel(
    weight_ptr,
    correction_ptr,
    basis_ptr,
    direction_ptr,
    gradient_ptr,
    low_ptr,
    short,
    other,
    rank,
    short_stride,
    other_stride,
    low_rank_stride,
    low_other_stride,
    factor,
    decay,
    residual_factor,
    key,
    key_offset,
    RESIDUAL: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_SHORT: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_SHORT + tl.arange(0, BLOCK_SHORT)
    column = tl.program_id(1) * BLOCK_OTHER + tl.arange(0, BLOCK_OTHER)
    update = tl.zeros([BLOCK_SHORT, BLOCK_OTHER], dtype=tl.float32)
    inner = tl.zeros([BLOCK_SHORT, BLOCK_OTHER], dtype=tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        vector = start + tl.arange(0, BLOCK_RANK)
        basis = tl.load(
            basis_ptr + row[:, None] * rank + vector[None, :],
            mask=(row[:, None] < short) & (vector[None, :] < rank),
            other=0.0,
        )
        place = vector[:, None] * low_rank_stride + column[None, :] * low_other_stride
        known = (vector[:, None] < rank) & (column[None, :] < other)
        direction = tl.load(direction_ptr + place, mask=known, other=0.0).to(basis.dtype)
        update = tl.dot(basis, direction, update, input_precision=PRECISION)
        if RESIDUAL:
            low = tl.load(low_ptr + place, mask=known, other=0.0).to(basis.dtype)
            inner = tl.dot(basis, low, inner, input_precision=PRECISION)
    offset = row[:, None] * short_stride + column[None, :] * other_stride
    inside = (row[:, None] < short) & (column[None, :] < other)
    value = load_values(weight_ptr, correction_ptr, offset, inside, KIND) * decay - factor * update
    if RESIDUAL:
        rest = tl.load(gradient_ptr + offset, mask=inside, other=0.0).to(tl.float32) - inner
        value -= residual_factor * tl.where(rest > 0, 1.0, tl.where(rest < 0, -1.0, 0.0))
    wide_offset = offset.to(tl.int64)  # as random words are counted
    store_values(weight_ptr, correction_ptr, wide_offset, value, inside, key, key_offset, KIND)


def project_up_(
    weight: Tensor,
    basis: Tensor,
    direction: Tensor,
    *,
    right: bool,
    factor: float,
    decay: float = 1.0,
    residual: Residual | None = None,
    key: RandomKey | None = None,
    correction: Tensor | None = None,
) -> None:
    """Update ``weight`` in place: ``decay * weight - factor * up(direction)``, and the sign of the residual.

    On a CPU without AMX (``lowrank_products``) the products leave in the dtype of the basis, by chunks of
    rows that stay in the cache.

    Args:
        weight: bf16, fp16 or fp32 ``[m, n]``, contiguous.
        basis: ``[m, r]``, or ``[n, r]`` with ``right``, contiguous.
        direction: fp32 or the dtype of the basis, ``[r, n]``, or ``[m, r]`` with ``right``; contiguous.
        factor: learning rate times scale.
        decay: ``1 - lr * weight_decay``.
        residual: FRUGAL's ``(gradient, low, residual_factor)``; the gradient in the weight's shape, ``low``
            what ``project_down_`` made of it.
        key: round a bf16 weight at random; with a correction, what the two hold.
        correction: int8 in the weight's shape, of a bf16 weight's ``split24`` master.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit; a key or a correction and a weight that is not
            bf16.
    """
    check(direction, weight, basis, right=right)
    if residual is not None:
        check(residual[1], residual[0], basis, right=right)
        if residual[0].shape != weight.shape:
            raise ValueError(f"gradient {tuple(residual[0].shape)} and weight {tuple(weight.shape)} differ")
    if key is not None and weight.dtype != torch.bfloat16:
        raise ValueError(f"only bf16 weights are rounded at random, this is {weight.dtype}: leave key out")
    if correction is not None:
        fits = correction.shape == weight.shape and correction.dtype == torch.int8
        if weight.dtype != torch.bfloat16 or not fits or not correction.is_contiguous():
            raise ValueError(
                "a correction is int8 and contiguous, beside a bf16 weight of its shape: got "
                f"{correction.dtype} {tuple(correction.shape)}, weight {weight.dtype} {tuple(weight.shape)}"
            )
    run = _triton_up if weight.is_cuda else project_up_on_cpu_
    run(weight.detach(), basis, direction, right, factor, decay, residual, key, correction)
    torch.autograd.graph.increment_version(weight)


def _triton_up(
    weight: Tensor,
    basis: Tensor,
    direction: Tensor,
    right: bool,
    factor: float,
    decay: float,
    residual: Residual | None,
    key: RandomKey | None,
    correction: Tensor | None,
) -> None:
    if not weight.numel():
        return
    (m, n), rank = weight.shape, basis.shape[1]
    short, other = (n, m) if right else (m, n)
    strides = (1, n, 1, rank) if right else (n, 1, n, 1)
    gradient, low, residual_factor = residual or (weight, direction, 0.0)
    packed_key, _, _, key_offset = launch_keys(None if key is None else Keys(key, key, key))
    constants = _blocks(basis.dtype, residual is not None)
    grid = (-(-short // constants["BLOCK_SHORT"]), -(-other // constants["BLOCK_OTHER"]))
    _lowrank_up_kernel[grid](
        weight,
        weight if correction is None else correction,
        basis,
        direction,
        gradient,
        low,
        short,
        other,
        rank,
        *strides,
        factor,
        decay,
        residual_factor,
        packed_key,
        key_offset,
        RESIDUAL=residual is not None,
        KIND=SPLIT24 if correction is not None else RANDOM_BF16 if key is not None else FP32,
        PRECISION=precision(basis.dtype),
        **constants,
        num_warps=8,
    )


def _blocks(basis_dtype: torch.dtype, residual: bool) -> dict[str, int]:
    """Tiles of 128 x 128, so that the weight is written by whole cache lines; with a residual there are two
    accumulators, and an fp32 R in shared memory: half as wide."""
    if basis_dtype == torch.float32:  # no tensor cores: the operands take registers as well
        return {"BLOCK_SHORT": 64, "BLOCK_OTHER": 64, "BLOCK_RANK": 32}
    return {
        "BLOCK_SHORT": 128,
        "BLOCK_OTHER": 64 if residual else 128,
        "BLOCK_RANK": 32 if residual else 64,
    }


def _moved_bytes(
    short: int, other: int, rank: int, *, weight_size: int, basis_size: int, residual: bool, kind: int
) -> float:
    """Per element of the weight: it and its correction read and written, the gradient, and the small operands
    once for all blocks (the basis and N in its dtype, R in fp32)."""
    small = basis_size * short * rank + (basis_size + 4 * residual) * rank * other
    kept = weight_size + (1 if kind == SPLIT24 else 0)
    return 2 * kept + weight_size * residual + small / (short * other)


def _variant(dtype: str, basis: str, kind: int, *, right: bool, residual: bool) -> KernelVariant:
    short, other, rank = 4096, 11008, 256  # the projections of Llama 7B's MLP
    size = {"bf16": 2, "fp32": 4}
    moved = _moved_bytes(
        short, other, rank, weight_size=size[dtype], basis_size=size[basis], residual=residual, kind=kind
    )
    one, wide = ("short", "other") if right else ("other", "short")
    low_one, low_wide = ("rank", "other") if right else ("other", "rank")
    words = [
        "right" if right else "left",
        dtype,
        "by",
        basis,
        *["frugal"] * residual,
        ("", "sr", "split24")[kind],
    ]
    signature = dict.fromkeys(("weight_ptr", "gradient_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("basis_ptr", "direction_ptr"), f"*{basis}")
    signature |= {"low_ptr": "*fp32" if residual else f"*{basis}"}
    signature |= dict.fromkeys(
        ("short", "other", "rank", f"{wide}_stride", f"low_{low_wide}_stride"), "i32:16"
    )
    signature |= dict.fromkeys(("factor", "decay", "residual_factor"), "fp32")
    signature |= {"correction_ptr": "*i8", "key": "i64", "key_offset": "i32:16"}
    torch_dtype = torch.float32 if basis == "fp32" else torch.bfloat16
    return KernelVariant(
        label=" ".join(words).strip(),
        signature=signature,
        constexprs={
            f"{one}_stride": 1,
            f"low_{low_one}_stride": 1,
            "RESIDUAL": residual,
            "KIND": kind,
            "PRECISION": precision(torch_dtype),
            **_blocks(torch_dtype, residual),
        },
        moved_bytes=moved,
        least_bytes=moved,
        num_warps=8,
    )


SPECS = (
    KernelSpec(
        kernel=_lowrank_up_kernel,
        element="parameter",
        variants=[
            _variant(dtype, basis, kind, right=right, residual=residual)
            for dtype, basis, kind in (
                ("bf16", "bf16", RANDOM_BF16),
                ("bf16", "bf16", SPLIT24),
                ("bf16", "bf16", FP32),
                ("fp32", "bf16", FP32),
                ("fp32", "fp32", FP32),
            )
            for residual in (False, True)
            for right in (False, True)
        ],
    ),
)
