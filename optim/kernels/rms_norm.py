"""RMSNorm that keeps the reciprocal root mean square of each row, and its backward pass from that.

``y = weight * n`` with ``n = x * rstd``, ``rstd = 1 / sqrt(mean(x^2) + eps)`` over the last dimension, in
one of the three ways that are in use (``Form``); they round differently. Backward needs ``x`` and ``rstd``
alone (four bytes a row): the normalised rows, which autograd keeps in fp32, are computed again.

Backward is in fp32 throughout and rounds once, where autograd rounds ``dy * weight`` to the dtype of ``x``
as well in the form of Llama. The weight's gradient is a sum in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

Form = Literal["round_then_scale", "scale_then_round", "one_plus_weight"]
"""``weight * n.to(x.dtype)``: Llama, Mistral, Qwen; ``(weight * n).to(x.dtype)``: torch.nn.RMSNorm, OLMo 2;
``((1 + weight) * n).to(x.dtype)``: Gemma."""
FORMS: dict[str, int] = {"round_then_scale": 0, "scale_then_round": 1, "one_plus_weight": 2}

MAX_COLUMNS = 1 << 13
"""A row stays in the registers of one block. Backward of 16,384 columns spills 200 bytes a thread on every
target."""
_CPU_CHUNK_ELEMENTS = 1 << 18
"""Rows of [2048, 2048] on two idle cores, bf16: forward 3.5 ms against 15.5 ms in one piece, backward 9.8
against 42; fp32: 3.6 against 4.3 and 7.7 against 25. Between 2^17 and 2^19 it is the same within 5 %."""


def reference_forward(
    x: Tensor, weight: Tensor, eps: float, form: Form = "round_then_scale"
) -> tuple[Tensor, Tensor]:
    """The arithmetic, plainly; ``rstd`` is ``[..., 1]`` in fp32."""
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if form == "round_then_scale":
        return weight * (wide * rstd).to(x.dtype), rstd
    return (_scale(weight, form) * (wide * rstd)).to(x.dtype), rstd


def reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: Form = "round_then_scale"
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``."""
    normalised = x.float() * rstd
    d_normalised = dy.float() * _scale(weight, form)
    along = (d_normalised * normalised).mean(-1, keepdim=True)
    dx = rstd * (d_normalised - normalised * along)
    scaled = normalised.to(x.dtype) if form == "round_then_scale" else normalised
    return dx.to(x.dtype), (dy.float() * scaled).flatten(0, -2).sum(0).to(weight.dtype)


def _scale(weight: Tensor, form: Form) -> Tensor:
    return weight.float() + 1 if form == "one_plus_weight" else weight.float()


@triton_kernel
def _rms_norm_forward_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, columns, eps, FORM: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / columns + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if FORM == 2:
        weight += 1.0
    normalised = wide * rstd
    if FORM == 0:
        normalised = normalised.to(x.dtype).to(tl.float32)
    tl.store(y_ptr + row * columns + column, normalised * weight, mask=inside)


@triton_kernel
def _rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    columns,
    rows_per_program,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A run of rows a program; its share of the weight's gradient stays in registers until the end."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if FORM == 2:
        weight += 1.0
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    first = program * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, rows)):
        offset = tl.cast(row, tl.int64) * columns + column
        x = tl.load(x_ptr + offset, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normalised = x.to(tl.float32) * rstd
        d_normalised = dy * weight
        along = tl.sum(d_normalised * normalised, 0) / columns
        tl.store(dx_ptr + offset, rstd * (d_normalised - normalised * along), mask=inside)
        if FORM == 0:
            normalised = normalised.to(x.dtype).to(tl.float32)
        dweight += dy * normalised
    tl.store(partial_ptr + program * columns + column, dweight, mask=inside)


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, form: Form = "round_then_scale"
) -> tuple[Tensor, Tensor]:
    """``(y, rstd)``, ``rstd`` being ``[..., 1]`` in fp32.

    ``y`` has the dtype of ``x``, in the form of Llama the promoted dtype of ``x`` and ``weight``.

    Raises:
        ValueError: shapes that do not fit, an unknown form, more than ``MAX_COLUMNS`` columns on CUDA.
    """
    _validate(x, weight, form)
    return (_triton_forward if x.is_cuda else _cpu_forward)(x, weight, eps, form)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: Form = "round_then_scale"
) -> tuple[Tensor, Tensor]:
    """``(dx, dweight)`` in the dtypes of ``x`` and ``weight``, from the ``rstd`` that forward returned.

    Raises:
        ValueError: shapes that do not fit, an unknown form, more than ``MAX_COLUMNS`` columns on CUDA.
    """
    _validate(x, weight, form)
    if dy.shape != x.shape or rstd.shape != (*x.shape[:-1], 1):
        raise ValueError(
            f"dy must be {tuple(x.shape)} and rstd {(*x.shape[:-1], 1)}, "
            f"got {tuple(dy.shape)} and {tuple(rstd.shape)}"
        )
    return (_triton_backward if x.is_cuda else _cpu_backward)(dy, x, weight, rstd, form)


def _validate(x: Tensor, weight: Tensor, form: Form) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} must have the last dimension of x {tuple(x.shape)}")
    if x.is_cuda and x.shape[-1] > MAX_COLUMNS:
        raise ValueError(f"at most {MAX_COLUMNS} columns on CUDA, got {x.shape[-1]}: use the plain module")


def _output_dtype(x: Tensor, weight: Tensor, form: Form) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if form == "round_then_scale" else x.dtype


def _triton_forward(x: Tensor, weight: Tensor, eps: float, form: Form) -> tuple[Tensor, Tensor]:
    flat = x.contiguous().view(-1, x.shape[-1])
    y = torch.empty(x.shape, dtype=_output_dtype(x, weight, form), device=x.device)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if x.numel():
        block, num_warps = row_launch(x.shape[-1])
        _rms_norm_forward_kernel[(len(flat),)](
            flat,
            weight.contiguous(),
            y,
            rstd,
            flat.shape[1],
            eps,
            FORM=FORMS[form],
            BLOCK=block,
            num_warps=num_warps,
        )
    return y, rstd


def _triton_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: Form
) -> tuple[Tensor, Tensor]:
    flat, columns = x.contiguous().view(-1, x.shape[-1]), x.shape[-1]
    dx = torch.empty_like(flat)
    rows = len(flat)
    if not flat.numel():
        return dx.view_as(x), torch.zeros_like(weight)
    programs = min(rows, row_programs(x.device))
    rows_per_program = -(-rows // programs)
    partial = torch.empty(-(-rows // rows_per_program), columns, dtype=torch.float32, device=x.device)
    block, num_warps = row_launch(columns)
    _rms_norm_backward_kernel[(len(partial),)](
        dy.contiguous(),
        flat,
        weight.contiguous(),
        rstd.contiguous(),
        dx,
        partial,
        rows,
        columns,
        rows_per_program,
        FORM=FORMS[form],
        BLOCK=block,
        num_warps=num_warps,
    )
    return dx.view_as(x), partial.sum(0).to(weight.dtype)


def row_launch(columns: int) -> tuple[int, int]:
    """``(BLOCK, num_warps)`` for a kernel that holds a whole row: at most 16 elements of it a thread."""
    block = 1 << max(columns - 1, 15).bit_length()
    return block, min(32, max(1, block // 512))


def row_programs(device: torch.device) -> int:
    """Blocks that run at one time: one a multiprocessor, so that partial sums stay few."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _cpu_forward(x: Tensor, weight: Tensor, eps: float, form: Form) -> tuple[Tensor, Tensor]:
    """By chunks of rows, whose fp32 intermediates stay in the cache."""
    y = torch.empty(x.shape, dtype=_output_dtype(x, weight, form), device="cpu")
    scale = _scale(weight, form)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device="cpu")
    for x_part, y_part, rstd_part in _row_chunks(x, y, rstd):
        wide = x_part.float()
        torch.linalg.vector_norm(wide, dim=1, keepdim=True, out=rstd_part)
        rstd_part.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        if form == "round_then_scale":
            torch.mul(weight, (wide * rstd_part).to(x.dtype), out=y_part)
        else:
            y_part.copy_(scale * (wide * rstd_part))
    return y, rstd


def _cpu_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    x, scale = x.contiguous(), _scale(weight, form)
    dx, dweight = torch.empty_like(x), torch.zeros(weight.shape, dtype=torch.float32, device="cpu")
    for dy_part, x_part, rstd_part, dx_part in _row_chunks(dy, x, rstd, dx):
        normalised = x_part.float() * rstd_part
        gradient = dy_part.float()
        rounded = normalised.to(x.dtype) if form == "round_then_scale" else normalised
        dweight += (gradient * rounded).sum(0)
        gradient = gradient * scale  # not in place: it may be dy itself
        along = (gradient * normalised).mean(1, keepdim=True)
        dx_part.copy_(gradient.addcmul_(normalised, along, value=-1).mul_(rstd_part))
    return dx, dweight.to(weight.dtype)


def _row_chunks(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """Chunks of the rows of contiguous tensors that have one number of rows and at least one element a
    row."""
    columns = max(1, max(t.shape[-1] for t in tensors))
    rows = max(1, _CPU_CHUNK_ELEMENTS // columns)
    flat = (t.contiguous().view(-1, t.shape[-1]) if t.numel() else t.flatten(0, -2) for t in tensors)
    return zip(*(torch.split(t, rows) for t in flat), strict=True)


_ROWS, _PROGRAMS = 8192, 108  # the traffic is counted at: 8192 tokens, the multiprocessors of an A100


def _variants(backward: bool) -> list[KernelVariant]:
    found = []
    for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for columns in (1024, 4096, 8192):
            block, num_warps = row_launch(columns)
            tensor = f"*{dtype}"
            signature = {"x_ptr": tensor, "weight_ptr": tensor, "rstd_ptr": "*fp32", "columns": "i32:16"}
            least = 2 * size + 4 / columns
            if backward:
                signature |= {"dy_ptr": tensor, "dx_ptr": tensor, "partial_ptr": "*fp32"}
                signature |= {"rows": "i32:16", "rows_per_program": "i32"}
                least += size
            else:
                signature |= {"y_ptr": tensor, "eps": "fp32"}
            # Partial sums are written once and read once by the sum over them.
            found.append(
                KernelVariant(
                    label=f"{dtype} {columns}",
                    signature=signature,
                    constexprs={"FORM": 0, "BLOCK": block},
                    moved_bytes=least + (8 * _PROGRAMS / _ROWS if backward else 0),
                    least_bytes=least,
                    num_warps=num_warps,
                )
            )
    return found


SPECS = (
    KernelSpec(kernel=_rms_norm_forward_kernel, element="element of x", variants=_variants(backward=False)),
    KernelSpec(kernel=_rms_norm_backward_kernel, element="element of x", variants=_variants(backward=True)),
)
