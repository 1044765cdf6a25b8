"""GaLore and FRUGAL with Adam on the low-rank kernels: products in the dtype of the basis, the rest in fp32.

Neither the update nor the residual exists as a whole. With an fp32 basis it differs from the reference path
by the order of sums; with a bf16 one the reference rounds R and P N to bf16 and AMX and Triton do not, and a
sign falls the other way where the residual is rounding error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memtrain.optim.cell import STEP, Cell, part
from memtrain.optim.kernels.lowrank_adam import lowrank_adam_low_step_, lowrank_adam_step_
from memtrain.optim.kernels.lowrank_down import MAX_ELEMENTS
from memtrain.optim.projection.matrix import RIGHT, MatrixProjector
from memtrain.optim.rules import Adam
from memtrain.optim.work import KernelPath, Work, kernel_weight, usual_adam


class KernelLowRank(KernelPath):
    """Adam behind an orthonormal one-sided basis; nothing or the sign of the residual.

    Moments are in any format: they are small, and those that are not fp32 are opened as a whole.
    """

    name = "low-rank adam kernel"

    def serves(self, cell: Cell) -> bool:
        """See :class:`Path`."""
        if cell.projected is None:
            return False
        projector, _, residual = cell.projected
        if not isinstance(projector, MatrixProjector):
            return False
        one_sided = projector.orthonormal and len(projector.sides) == 1
        fits = cell.shape[-2] * cell.shape[-1] < MAX_ELEMENTS
        # Where the projection leaves nothing out, the sign is that of rounding: the reference takes none.
        full = projector.low_shape.numel() == projector.shape.numel()
        plain = residual.kind == "none" or (residual.kind == "sign" and not full)
        return one_sided and fits and plain and usual_adam(cell) and kernel_weight(cell)

    def takes(self, weight: Tensor, gradient: Tensor) -> bool:
        """The weight is written in place, so it must lie in order; the gradient is brought into order."""
        return super().takes(weight, gradient) and weight.is_contiguous()

    def step_(self, work: Work) -> None:
        """See :class:`KernelPath`; the matrices of a stack one after the other."""
        residual = work.cell.projected.residual if work.cell.projected else None
        assert residual is not None
        scale = residual.residual_scale if residual.kind == "sign" else 0.0
        gradients = _matrices(work.gradient.contiguous().view(work.cell.shape))
        with _opened(work) as matrices:
            for gradient, each in zip(gradients, matrices, strict=True):
                lowrank_adam_step_(each.weight, gradient, *each.state, residual_scale=scale, **each.numbers)

    def update_low_(self, work: Work) -> None:
        """One step of a parameter whose ``gradient`` is R, summed already, in the basis that there is."""
        work.state[STEP] += 1
        with _opened(work) as matrices:
            for low, each in zip(_matrices(work.gradient.contiguous()), matrices, strict=True):
                lowrank_adam_low_step_(each.weight, low, *each.state, **each.numbers)


class _Matrix(NamedTuple):
    """One of a stack: what a step takes beside the gradient."""

    weight: Tensor
    state: tuple[Tensor, Tensor, Tensor]
    """Basis and moments."""
    numbers: dict[str, Any]


@contextmanager
def _opened(work: Work) -> Iterator[list[_Matrix]]:
    """The matrices of a parameter; their moments are stored at the end."""
    cell = work.cell
    assert cell.projected is not None
    assert isinstance(cell.rule, Adam)
    projector, _, residual = cell.projected
    assert isinstance(projector, MatrixProjector)
    (side,) = projector.sides
    moments = cell.load_moments(work.state)
    weights = _matrices(work.weight.detach().view(cell.shape))
    bases = _matrices(part(work.state, "projector")[side])
    means, squares = _matrices(moments["exp_avg"]), _matrices(moments["exp_avg_sq"])
    correction = work.moment("master").get("correction")
    corrections = [None] * len(weights) if correction is None else list(_matrices(correction))
    key = cell.key(work.turn) if cell.dtype == torch.bfloat16 else None
    numbers = dict(
        right=side == RIGHT,
        step=work.step,
        lr=float(work.turn.lr),
        betas=cell.rule.betas,
        eps=cell.rule.eps,
        weight_decay=cell.settings.weight_decay,
        scale=residual.scale,
    )
    yield [
        _Matrix(
            weight,
            (bases[index], means[index], squares[index]),
            {
                **numbers,
                "key": None if key is None else key.skip(index * weight.numel()),
                "correction": corrections[index],
            },
        )
        for index, weight in enumerate(weights)
    ]
    cell.store_moments_(work.state, moments, work.turn)


def _matrices(stack: Tensor) -> Tensor:
    """A matrix as a stack of one."""
    return stack.view(-1, *stack.shape[-2:])
