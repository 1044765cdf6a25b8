"""One step of GaLore or FRUGAL with Adam: down, a small Adam, and up into the weight.

    R = P^T G
    N = mhat / (sqrt(vhat) + eps)
    W = (1 - lr wd) W - lr scale P N - lr residual_scale sign(G - P R)

Three passes, of which only the first and the last see anything of the weight's size: G is read once (twice
with a residual), W read and written once, and neither the update nor the projected-back gradient exists as
a whole. GaLore: arXiv 2403.03507, FRUGAL: arXiv 2411.07837. Departures as in ``rules.adam``: weight decay
is decoupled and comes first, eps is added to the corrected root.

2048 x 2048, rank 256, bf16 basis, fp32, one core with AMX of a busy machine: down 2.5 to 2.7 ms, Adam 0.3, up
2.5 to 3, with the sign of the residual 5.2 to 5.7; torch's two products alone 3.4, on bf16 operands.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from memtrain.optim.kernels import native
from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel
from memtrain.optim.kernels.lowrank_down import project_down_
from memtrain.optim.kernels.lowrank_up import project_up_
from memtrain.optim.kernels.lowrank_up_cpu import Residual
from memtrain.optim.storage.random import RandomKey

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024
_CPU_CHUNK_ELEMENTS = 1 << 17
"""R of 256 x 2048 on two idle cores: 0.54 ms; 0.68 with 2^16, 1.5 with 2^15."""


def reference_direction(
    low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Adam on R, plainly; the moments are updated in place."""
    beta1, beta2 = betas
    exp_avg.lerp_(low, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(low, low, value=1 - beta2)
    root = exp_avg_sq.div(1 - beta2**step).sqrt_().add_(eps)
    return exp_avg.div(1 - beta1**step).div_(root)


@triton_kernel
def _lowrank_adam_kernel(
    low_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    direction_ptr,
    count,
    gain1,
    beta2,
    gain2,
    rate,
    root,
    eps,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    low = tl.load(low_ptr + index, mask=inside, other=0.0)
    mean = tl.load(exp_avg_ptr + index, mask=inside, other=0.0)
    square = tl.load(exp_avg_sq_ptr + index, mask=inside, other=0.0)
    mean += (low - mean) * gain1
    square = square * beta2 + low * low * gain2
    tl.store(exp_avg_ptr + index, mean, mask=inside)
    tl.store(exp_avg_sq_ptr + index, square, mask=inside)
    direction = mean * rate / (tl.sqrt(square) * root + eps)
    tl.store(direction_ptr + index, direction, mask=inside)


def adam_direction(
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Update both moments by ``low`` in place and return Adam's corrected direction in ``dtype``.

    Args:
        low: fp32, contiguous, as are the moments.
        step: steps of these moments including this one, from 1.

    Raises:
        ValueError: unlike shapes, other dtypes, ``step`` below 1.
    """
    _check(low, exp_avg, exp_avg_sq, step)
    direction = torch.empty_like(low, dtype=dtype)
    run = _triton_direction if low.is_cuda else _cpu_direction
    run(low, exp_avg, exp_avg_sq, direction, step, betas, eps)
    return direction


def _check(low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> None:
    for name, moment in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if moment.shape != low.shape or moment.dtype != torch.float32 or not moment.is_contiguous():
            raise ValueError(
                f"{name} must be fp32, contiguous and {tuple(low.shape)} as low is, got {moment.dtype} "
                f"{tuple(moment.shape)}"
            )
    if low.dtype != torch.float32 or not low.is_contiguous():
        raise ValueError(f"low must be fp32 and contiguous, got {low.dtype}")
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")


class Summed(NamedTuple):
    """What :func:`adam_summed` found, fp32."""

    direction: Tensor | None
    """Adam's; None where it was not to be kept."""
    sums: Tensor
    """``[3, m, 1]`` of rows or ``[3, 1, n]`` of columns: squares of R, squares of the direction, and products
    of R and ``back``, zero without it."""


def adam_summed(
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    by_rows: bool,
    step: int,
    betas: tuple[float, float],
    eps: float,
    back: Tensor | None = None,
    keep: bool = True,
) -> Summed:
    """As :func:`adam_direction` in fp32, and sums of squares and products: on a CPU in the same pass.

    Args:
        back: fp32, contiguous, of the shape of ``low``.
        keep: whether the direction is wanted itself.
    """
    run = native.function("lowrank_adam", "lowrank_adam_summed") if low.device.type == "cpu" else None
    if run is None:
        direction = adam_direction(low, exp_avg, exp_avg_sq, step=step, betas=betas, eps=eps)
        axis = -1 if by_rows else -2
        second = torch.zeros_like(low) if back is None else back
        sums = ((a * b).sum(axis, keepdim=True) for a, b in ((low, low), (direction,) * 2, (low, second)))
        return Summed(direction, torch.stack(tuple(sums)))
    _check(low, exp_avg, exp_avg_sq, step)
    rows, columns = low.shape
    direction = torch.empty_like(low) if keep else None
    sums = torch.empty((3, rows, 1) if by_rows else (3, 1, columns), dtype=torch.float32, device="cpu")
    none = ctypes.c_void_p()
    run(
        *map(native.pointer, (low, exp_avg, exp_avg_sq)),
        none if direction is None else native.pointer(direction),
        none if back is None else native.pointer(back),
        native.Matrix(rows, columns),
        native.flag(by_rows),
        native.pointer(sums),
        native.Direction(*_numbers(step, betas, eps)),
    )
    return Summed(direction, sums)


def lowrank_adam_step_(
    weight: Tensor,
    gradient: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    right: bool,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    residual_scale: float = 0.0,
    key: RandomKey | None = None,
    correction: Tensor | None = None,
) -> None:
    """One step in place: GaLore, or FRUGAL with the sign of the residual where ``residual_scale`` is not 0.

    Args:
        weight: bf16, fp16 or fp32 ``[m, n]``.
        gradient: ``[m, n]``, any floating dtype.
        basis: orthonormal columns, ``[m, r]``, or ``[n, r]`` with ``right``. Its dtype is that of the
            products: bf16 is several times faster than fp32 and what the hardware is made for.
        exp_avg, exp_avg_sq: fp32 ``[r, n]``, or ``[m, r]`` with ``right``.
        step: from 1, including this one.
        key: round a bf16 weight at random.
        correction: int8, of a bf16 weight's ``split24`` master.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    low = torch.empty_like(exp_avg)
    project_down_(low, gradient, basis, right=right)
    lowrank_adam_low_step_(
        weight,
        low,
        basis,
        exp_avg,
        exp_avg_sq,
        right=right,
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        scale=scale,
        residual=(gradient, low, lr * residual_scale) if residual_scale else None,
        key=key,
        correction=correction,
    )


def lowrank_adam_low_step_(
    weight: Tensor,
    low: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    right: bool,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    residual: Residual | None = None,
    key: RandomKey | None = None,
    correction: Tensor | None = None,
) -> None:
    """:func:`lowrank_adam_step_` from R on: ``low``, fp32 in the shape of the moments, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    direction = adam_direction(low, exp_avg, exp_avg_sq, step=step, betas=betas, eps=eps, dtype=basis.dtype)
    project_up_(
        weight,
        basis,
        direction,
        right=right,
        factor=lr * scale,
        decay=1 - lr * weight_decay,
        residual=residual,
        key=key,
        correction=correction,
    )


def _triton_direction(
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    direction: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    if not low.numel():
        return
    _lowrank_adam_kernel[(-(-low.numel() // _BLOCK),)](
        low, exp_avg, exp_avg_sq, direction, low.numel(), *_numbers(step, betas, eps), BLOCK=_BLOCK
    )


def _numbers(step: int, betas: tuple[float, float], eps: float) -> tuple[float, ...]:
    """gain1, beta2, gain2, rate, root, eps. In fp64: 1 - .999 formed in fp32 is wrong by 5e-5."""
    beta1, beta2 = betas
    return (1 - beta1, beta2, 1 - beta2, 1 / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps)


def _cpu_direction(
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    direction: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Compiled (``native/lowrank_adam.cpp``) for fp32 and bf16, elsewhere by chunks of plain torch: the
    reference's arithmetic with both corrections in the root, so that it has one pass less."""
    beta1, beta2 = betas
    wide = direction.dtype == torch.float32
    known = wide or direction.dtype == torch.bfloat16
    if known and (run := native.function("lowrank_adam", "lowrank_adam")) is not None:
        pointers = map(native.pointer, (low, exp_avg, exp_avg_sq))
        out = native.pointer(direction, direction.dtype)
        run(
            *pointers,
            out,
            ctypes.c_int32(wide),
            native.count(low),
            native.Direction(*_numbers(step, betas, eps)),
        )
        return
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    parts = (torch.split(t.view(-1), _CPU_CHUNK_ELEMENTS) for t in (low, exp_avg, exp_avg_sq, direction))
    root = torch.empty(min(low.numel(), _CPU_CHUNK_ELEMENTS), dtype=torch.float32, device="cpu")
    for gradient, mean, square, out in zip(*parts, strict=True):
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        divisor = torch.sqrt(square, out=root[: len(square)])
        divisor.mul_(correction1 / correction2**0.5).add_(eps * correction1)
        out.copy_(torch.div(mean, divisor, out=divisor))


SPECS = (
    KernelSpec(
        kernel=_lowrank_adam_kernel,
        element="element of R",
        variants=[
            KernelVariant(
                label=dtype,
                signature={
                    **dict.fromkeys(("low_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"), "*fp32"),
                    "direction_ptr": f"*{dtype}",
                    "count": "i32:16",
                    **dict.fromkeys(("gain1", "beta2", "gain2", "rate", "root", "eps"), "fp32"),
                },
                constexprs={"BLOCK": _BLOCK},
                moved_bytes=20 + size,
                least_bytes=20 + size,
            )
            for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4))
        ],
    ),
)
