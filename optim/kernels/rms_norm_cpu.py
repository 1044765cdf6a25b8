"""RMSNorm on a CPU to the bit of eager torch, in a third of its time.

Eager torch runs eight operators forward and some fifteen backward, each of them once through memory, and
rounds between them. Here what lies between the sums is compiled (``native/rms_norm.cpp``), two passes each
way that round in the same places. The sums are torch's own, over the same numbers in the same layout: their
order is torch's affair. [512, 512] in bf16, one thread: forward 0.10 ms against 0.34 ms, backward 0.21
against 0.9, the output again 0.06 against 0.28.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from memtrain.optim.kernels import native
from memtrain.optim.kernels.rms_norm import FORMS, Form

_SOURCE = "rms_norm"


class Rows(ctypes.Structure):
    """``struct Rows``."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("wide", ctypes.c_int32),
        ("form", ctypes.c_int32),
    )


def serves(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """Whether there is a compiled form for these; for others the caller has its own operators."""
    return x.numel() > 0 and native.serves_exactly(_SOURCE, x, weight, *others)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, form: Form) -> tuple[Tensor, Tensor]:
    """``(y, rstd)``; ``rstd`` is ``[..., 1]`` in fp32."""
    shape = _rows(x, form)
    wide = torch.empty_like(x, dtype=torch.float32)
    _call("squares", native.pointer(x, x.dtype), native.pointer(wide), shape)
    means = wide.mean(-1, keepdim=True)
    y = torch.empty_like(x)
    at = native.pointer(means)  # overwritten by rstd
    _call(
        "scale_rows",
        native.pointer(x, x.dtype),
        native.pointer(weight, x.dtype),
        at,
        at,
        native.pointer(y, x.dtype),
        _float(eps),
        shape,
    )
    return y, means


def output_again(x: Tensor, weight: Tensor, rstd: Tensor, form: Form) -> Tensor:
    """``y`` from what forward gave."""
    y = torch.empty_like(x)
    operands = (
        native.pointer(x, x.dtype),
        native.pointer(weight, x.dtype),
        None,
        native.pointer(rstd),
        native.pointer(y, x.dtype),
    )
    _call("scale_rows", *operands, _float(0.0), _rows(x, form))
    return y


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    form: Form,
    *,
    needs_x: bool = True,
    needs_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dx_through_rstd, dweight)``: the gradient of ``x`` in two terms in fp32, summed in bf16."""
    shape = _rows(x, form)
    rounds_first = form == "round_then_scale"
    over_rows = (
        torch.empty_like(x, dtype=x.dtype if rounds_first else torch.float32) if needs_weight else None
    )
    along = torch.empty_like(x, dtype=torch.float32) if needs_x else None
    operands = [*(native.pointer(t, x.dtype) for t in (dy, x, weight)), native.pointer(rstd)]
    _call(
        "backward_terms",
        *operands,
        _pointer(over_rows, x.dtype if rounds_first else torch.float32),
        _pointer(along),
        shape,
    )
    dweight = None if over_rows is None else over_rows.sum_to_size(weight.shape).to(weight.dtype)
    if along is None:
        return None, None, dweight
    sums = along.sum(-1, keepdim=True)
    dx = torch.empty_like(x)
    through = along if x.dtype == torch.float32 else None
    _call(
        "backward_input",
        *operands,
        native.pointer(sums),
        native.pointer(dx, x.dtype),
        _pointer(through),
        shape,
    )
    return dx, through, dweight


def _rows(x: Tensor, form: Form) -> Rows:
    columns = x.shape[-1]
    return Rows(x.numel() // columns, columns, x.dtype == torch.float32, FORMS[form])


def _pointer(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> ctypes.c_void_p | None:
    return None if tensor is None else native.pointer(tensor, dtype)


def _float(value: float) -> ctypes.c_float:
    return ctypes.c_float(value)


def _call(name: str, *operands: object) -> None:
    run = native.function(_SOURCE, name)
    assert run is not None
    run(*operands)
