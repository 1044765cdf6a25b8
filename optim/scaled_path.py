"""Fira and APOLLO on fp32 matrices: no tensor of the weight's size beside weight and gradient.

Every column of the residual (of a left basis; every row of a right one) is multiplied by one number s, which
the projection back leaves alone, so that Fira's update is one product and one scaled gradient:

    scale P N + c s (G - P R)  =  P (scale N - c s R) + c s G

The limiter behind c wants the norm of ``s (G - P R)``, which follows column by column from the norms of G and
R and, where P is rounded to bf16, from what its Gram matrix lacks of the identity. On a CPU with AMX product
and scaled gradient go into the weight in one pass.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from memtrain.optim.cell import Cell, part
from memtrain.optim.kernels import lowrank_products, native
from memtrain.optim.kernels.lowrank_adam import adam_summed
from memtrain.optim.kernels.lowrank_down import MAX_ELEMENTS, check, project_down_
from memtrain.optim.kernels.lowrank_up import project_up_
from memtrain.optim.kernels.scaled import add_scaled_, squares_of
from memtrain.optim.projection.matrix import RIGHT, MatrixProjector
from memtrain.optim.residual import NORM, Residual
from memtrain.optim.rules import Adam
from memtrain.optim.work import KernelPath, Work, usual_adam


class KernelScaled(KernelPath):
    """Adam behind a one-sided basis; the residual or the whole gradient scaled as Adam scales R."""

    name = "scaled low-rank adam"

    def serves(self, cell: Cell) -> bool:
        """See :class:`Path`."""
        if cell.projected is None or len(cell.shape) != 2 or cell.shape.numel() >= MAX_ELEMENTS:
            return False
        projector, _, residual = cell.projected
        one_sided = isinstance(projector, MatrixProjector) and len(projector.sides) == 1
        plain = cell.dtype == torch.float32 and cell.settings.master == "none"
        return one_sided and plain and residual.kind in ("scaled", "scale_only") and usual_adam(cell)

    def takes(self, weight: Tensor, gradient: Tensor) -> bool:
        """As :class:`KernelLowRank` does."""
        return super().takes(weight, gradient) and weight.is_contiguous()

    def step_(self, work: Work) -> None:
        """See :class:`KernelPath`."""
        cell, rule = work.cell, work.cell.rule
        assert cell.projected is not None
        assert isinstance(rule, Adam)
        projector, _, residual = cell.projected
        assert isinstance(projector, MatrixProjector)
        (side,) = projector.sides
        right, lr = side == RIGHT, float(work.turn.lr)
        decay = 1 - lr * cell.settings.weight_decay
        weight, gradient = work.weight.detach(), work.gradient.contiguous()
        basis = projector.open(part(work.state, "projector"), weight.device)[side].contiguous()
        moments = cell.load_moments(work.state)
        low, squares = _down(gradient, basis, right)
        moments = cell.load_moments(work.state)
        mean, square = moments["exp_avg"], moments["exp_avg_sq"]
        rest = residual.kind == "scaled"
        found = adam_summed(
            low,
            mean,
            square,
            by_rows=right,
            step=work.step,
            betas=rule.betas,
            eps=rule.eps,
            back=_excess(low, basis, right) if rest and basis.dtype != torch.float32 else None,
            keep=rest,
        )
        cell.store_moments_(work.state, moments, work.turn)
        scaling = _limited(residual, found.sums, squares, part(work.state, "residual"))
        if not rest:
            add_scaled_(weight, gradient, scaling.mul_(lr), keep=decay)
            return
        combined = found.direction
        assert combined is not None
        add_scaled_(combined, low, scaling, keep=residual.scale)
        scaling.mul_(lr)
        if lowrank_products.serves(basis, weight, gradient):
            lowrank_products.project_up_(
                weight,
                basis,
                combined,
                right=right,
                numbers=native.Up(decay, lr, 0.0),
                gradient=gradient,
                scaling=scaling,
            )
            torch.autograd.graph.increment_version(weight)
            return
        project_up_(weight, basis, combined, right=right, factor=lr, decay=decay)
        add_scaled_(weight, gradient, scaling, keep=1.0)


def _down(gradient: Tensor, basis: Tensor, right: bool) -> tuple[Tensor, Tensor]:
    """R, and the squares of the rows of the gradient (``right``) or of its columns."""
    (rows, columns), rank = gradient.shape, basis.shape[1]
    shape, squares_shape = ((rows, rank), (rows, 1)) if right else ((rank, columns), (1, columns))
    low = torch.empty(shape, dtype=torch.float32, device=gradient.device)
    if not lowrank_products.serves(basis, gradient):
        project_down_(low, gradient, basis, right=right)
        return low, squares_of(gradient, by_rows=right)
    check(low, gradient, basis, right=right)
    squares = torch.empty(squares_shape, dtype=torch.float32, device="cpu")
    lowrank_products.project_down_(low, gradient, basis, right=right, accumulate=False, squares=squares)
    return low, squares


def _limited(residual: Residual, sums: Tensor, squares: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """By what each row or column of the gradient is to be multiplied, |N| / |R| within the limiter.

    The norm that the limiter looks at follows from those of rows or columns; for the residual from
    ``|G - P R|^2 = |G|^2 - |R|^2 + R^T (P^T P - I) R`` of each.
    """
    rest = residual.kind == "scaled"
    before, after = (1.0, residual.residual_scale) if rest else (residual.scale**0.5, 1.0)
    by_channel = residual.granularity == "channel"
    last = memory.get(NORM)
    kernel = native.function("scaled", "limited") if squares.device.type == "cpu" else None
    if kernel is not None:
        scaling = torch.empty_like(squares)
        kernel(
            native.pointer(sums),
            native.pointer(squares),
            ctypes.c_void_p() if last is None else native.pointer(last),
            native.pointer(scaling),
            native.Limit(squares.numel(), before, after, residual.limiter or 0.0, by_channel, rest),
        )
        return scaling
    low, direction, common = sums
    above, below = (direction, low) if by_channel else (direction.sum(), low.sum())
    # Roots before the quotient: where R is tiny its square is a denormal number, and theirs would overflow.
    scaling = torch.where(below > 0, above.sqrt() / below.sqrt(), 0).mul_(before)
    if rest:
        squares = (squares - low - common).clamp_min_(0)
    norm = torch.linalg.vector_norm(scaling * squares.sqrt())
    scaling = scaling.expand_as(low).contiguous()
    return scaling.mul_(residual.limit_(norm, memory)).mul_(after)


def _excess(low: Tensor, basis: Tensor, right: bool) -> Tensor:
    """``(I - P^T P) R``: what rounding has left of orthonormality, some 1e-3 of R. bf16 is enough for it, but
    not for P^T P."""
    excess = _gram(basis).neg_()
    excess.diagonal().add_(1)
    excess = excess.to(basis.dtype)
    back = torch.empty_like(low)
    project_down_(back, low, excess, right=right)
    return back


def _gram(basis: Tensor) -> Tensor:
    """P^T P in fp32."""
    if basis.is_cuda or lowrank_products.serves(basis):
        found = basis.new_empty(basis.shape[1], basis.shape[1], dtype=torch.float32)
        project_down_(found, basis, basis, right=False)
        return found
    return basis.float().mT @ basis.float()
