"""Fira and APOLLO on fp32 matrices: no tensor of the weight's size beside weight and gradient.

Every column of the residual (of a left basis; every row of a right one) is multiplied by one number s, which
the projection back leaves alone, so that Fira's update is one product and one scaled gradient:

    scale P N + c s (G - P R)  =  P (scale N - c s R) + c s G

The limiter behind c wants the norm of ``s (G - P R)``, which follows column by column from the norms of G and
R and, where P is rounded to bf16, from what its Gram matrix lacks of the identity. On a CPU with AMX product
and scaled gradient go into the weight in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtrain.optim.cell import Cell, part
from memtrain.optim.kernels import lowrank_products, native
from memtrain.optim.kernels.lowrank_adam import adam_direction
from memtrain.optim.kernels.lowrank_down import MAX_ELEMENTS, project_down_
from memtrain.optim.kernels.lowrank_up import project_up_
from memtrain.optim.kernels.scaled import add_scaled_, squares_of
from memtrain.optim.projection.matrix import RIGHT, MatrixProjector
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
        low = torch.empty(projector.low_shape, dtype=torch.float32, device=weight.device)
        project_down_(low, gradient, basis, right=right)
        mean, square = moments["exp_avg"], moments["exp_avg_sq"]
        direction = adam_direction(low, mean, square, step=work.step, betas=rule.betas, eps=rule.eps)
        cell.store_moments_(work.state, moments, work.turn)
        scaling = residual.scaling(low, direction, projector)
        norm = squares_of(gradient, by_rows=right).sqrt_()
        memory = part(work.state, "residual")
        if residual.kind == "scale_only":
            scaling.mul_(residual.scale**0.5)
            scaling.mul_(residual.limit_(torch.linalg.vector_norm(scaling * norm), memory))
        else:
            rest = _rest_norm(norm, low, basis, right)
            scaling.mul_(residual.limit_(torch.linalg.vector_norm(scaling * rest), memory))
            scaling.mul_(residual.residual_scale)
            combined = direction.mul_(residual.scale).sub_(low.mul_(scaling))
            if lowrank_products.serves(basis, weight, gradient):
                by = (lr * scaling).expand((len(weight), 1) if right else (1, weight.shape[1]))
                lowrank_products.project_up_(
                    weight,
                    basis,
                    combined,
                    right=right,
                    numbers=native.Up(decay, lr, 0.0),
                    gradient=gradient,
                    scaling=by.contiguous(),
                )
                torch.autograd.graph.increment_version(weight)
                return
            project_up_(weight, basis, combined, right=right, factor=lr, decay=decay)
            decay = 1.0
        add_scaled_(weight, gradient, scaling.mul_(lr), keep=decay)


def _rest_norm(norm: Tensor, low: Tensor, basis: Tensor, right: bool) -> Tensor:
    """|G - P R| by row or column: the root of ``|G|^2 - |R|^2 + R^T (P^T P - I) R``."""
    axis = -1 if right else -2
    kept: Tensor = torch.linalg.vector_norm(low, dim=axis, keepdim=True).square_()
    if basis.dtype != torch.float32:
        # What rounding has left of orthonormality, some 1e-3: bf16 is enough for it, but not for P^T P.
        excess = _gram(basis)
        excess.diagonal().sub_(1)
        excess = excess.to(basis.dtype)
        back = torch.empty_like(low)
        project_down_(back, low, excess, right=right)
        kept.sub_(back.mul_(low).sum(axis, keepdim=True))
    return norm.square().sub_(kept).clamp_min_(0).sqrt_()


def _gram(basis: Tensor) -> Tensor:
    """P^T P in fp32."""
    if basis.is_cuda or lowrank_products.serves(basis):
        found = basis.new_empty(basis.shape[1], basis.shape[1], dtype=torch.float32)
        project_down_(found, basis, basis, right=False)
        return found
    return basis.float().mT @ basis.float()
