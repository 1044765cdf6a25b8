"""Steps along a gradient of which every row, or every column, is multiplied by a number of its own.

    squares_of    sums of squares of rows or columns, from which the norm of the product follows
    add_scaled_   W = keep W - s G, one pass

Fira and APOLLO end in it. On a CPU compiled, elsewhere torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtrain.optim.kernels import native

_CHUNK_ELEMENTS = 1 << 17
"""512 KiB of fp32: a chunk of the weight stays in the cache between its passes."""


def squares_of(gradient: Tensor, *, by_rows: bool) -> Tensor:
    """fp32 ``[m, 1]``, or ``[1, n]`` of columns, of a contiguous ``[m, n]``."""
    kernel = _function("squares", gradient)
    if kernel is None:
        return reference_squares(gradient, by_rows=by_rows)
    rows, columns = gradient.shape
    squares = torch.empty((rows, 1) if by_rows else (1, columns), dtype=torch.float32, device="cpu")
    kernel(
        native.gradient(gradient), native.Matrix(rows, columns), native.flag(by_rows), native.pointer(squares)
    )
    return squares


def reference_squares(gradient: Tensor, *, by_rows: bool) -> Tensor:
    """Plainly."""
    axis = -1 if by_rows else -2
    norm: Tensor = torch.linalg.vector_norm(gradient, dim=axis, keepdim=True, dtype=torch.float32)
    return norm.square_()


def add_scaled_(weight: Tensor, gradient: Tensor, scaling: Tensor, *, keep: float) -> None:
    """``weight = keep * weight - scaling * gradient``.

    Args:
        weight: fp32 ``[m, n]``, contiguous, as is the gradient.
        scaling: fp32 ``[m, 1]``, ``[1, n]`` or ``[1, 1]``.
    """
    kernel = _function("scaled_step", gradient)
    if kernel is None:
        reference_step_(weight, gradient, scaling, keep=keep)
        return
    rows, columns = weight.shape
    by_rows = scaling.shape == (rows, 1)  # not by their number: a square matrix has as many columns
    # Named, so that it lives until the call returns.
    held = (scaling if by_rows else scaling.expand(1, columns)).contiguous()
    kernel(
        native.pointer(weight),
        native.gradient(gradient),
        native.pointer(held),
        native.Matrix(rows, columns),
        native.flag(by_rows),
        native.real(keep),
    )
    torch.autograd.graph.increment_version(weight)


def reference_step_(weight: Tensor, gradient: Tensor, scaling: Tensor, *, keep: float) -> None:
    """Plainly, by chunks of rows."""
    rows, columns = weight.shape
    chunk = max(1, _CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, chunk):
        by = scaling[start : start + chunk] if len(scaling) == rows else scaling
        weight[start : start + chunk].mul_(keep).sub_(gradient[start : start + chunk] * by)


def _function(name: str, gradient: Tensor) -> native.Function | None:
    served = gradient.device.type == "cpu" and gradient.dtype in (torch.float32, torch.bfloat16)
    return native.function("scaled", name) if served else None
