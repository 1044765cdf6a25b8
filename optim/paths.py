"""Fast ways through one step, for the points of the grid that have one.

The grid asks each path in turn whether it serves a cell; what none serves goes through :meth:`Cell.update_`,
which is slow, right, and what paths are tested against. A path gets all its parameters of a group at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from memtrain.optim.cell import STEP, Cell, part
from memtrain.optim.kernels.adamw import adamw_
from memtrain.optim.kernels.adamw8bit import adamw8bit_
from memtrain.optim.kernels.pointwise import AdamStep
from memtrain.optim.kernels.randk import randk_adamw_
from memtrain.optim.kernels.sign import LionStep, PlainStep, lion_
from memtrain.optim.kernels.split_adamw import split_adamw_
from memtrain.optim.lowrank_path import KernelLowRank
from memtrain.optim.projection.coordinates import INDEX, CoordinateProjector
from memtrain.optim.rules import Adam, Lion
from memtrain.optim.scaled_path import KernelScaled
from memtrain.optim.work import KernelPath, Path, Work, formats_of, kernel_weight, usual_adam

_AXES: dict[str, Literal["rows", "columns"]] = {"columns": "columns", "rows": "rows", "block": "rows"}


class WholeAdamW:
    """AdamW on whole fp32 gradients: torch's own, fused on a CPU and foreach elsewhere.

    Elsewhere not fused, because fused kernels read step counts from the device, and ours lie on the CPU.
    """

    name = "torch AdamW"

    def serves(self, cell: Cell) -> bool:
        """See :class:`Path`."""
        plain = cell.settings.master == "none" and cell.dtype == torch.float32
        return cell.projected is None and plain and usual_adam(cell) and formats_of(cell) == {"fp32"}

    def takes(self, weight: Tensor, gradient: Tensor) -> bool:
        """Fused kernels walk through memory and do not look at strides."""
        same = weight.dtype == gradient.dtype
        return same and weight.is_contiguous() and gradient.is_contiguous()

    def update_(self, works: list[Work]) -> None:
        """See :class:`Path`."""
        by_device: dict[torch.device, list[Work]] = {}
        for work in works:
            by_device.setdefault(work.weight.device, []).append(work)
        for device, group in by_device.items():
            cell, lr = group[0].cell, group[0].turn.lr
            rule, fused = cell.rule, device.type == "cpu"
            assert isinstance(rule, Adam)
            adamw(
                [work.weight.detach() for work in group],
                [work.gradient for work in group],
                [work.state["exp_avg.value"] for work in group],
                [work.state["exp_avg_sq.value"] for work in group],
                [],
                [work.state[STEP] for work in group],
                foreach=not fused,
                fused=fused,
                amsgrad=False,
                beta1=rule.betas[0],
                beta2=rule.betas[1],
                lr=lr if fused else float(lr),
                weight_decay=cell.settings.weight_decay,
                eps=rule.eps,
                maximize=False,
            )


class KernelAdamW(KernelPath):
    """AdamW on whole gradients: bf16 weights, split masters, bf16 and 8-bit moments."""

    name = "adamw kernel"

    def serves(self, cell: Cell) -> bool:
        """See :class:`Path`."""
        formats = formats_of(cell)
        served = len(formats) == 1 and formats <= {"fp32", "bf16", "int8"}
        return cell.projected is None and usual_adam(cell) and kernel_weight(cell) and served

    def step_(self, work: Work) -> None:
        """See :class:`KernelPath`."""
        kernel: Callable[..., None] = adamw8bit_ if formats_of(work.cell) == {"int8"} else adamw_
        first, second = work.moment("exp_avg"), work.moment("exp_avg_sq")
        step = _adam_step(work, lr=float(work.turn.lr), decay=work.cell.settings.weight_decay)
        kernel(
            work.weight, work.gradient, first, second, step, master=work.moment("master"), keys=work.keys()
        )


class KernelLion(KernelPath):
    """Lion on whole gradients."""

    name = "lion kernel"

    def serves(self, cell: Cell) -> bool:
        """See :class:`Path`."""
        lion = type(cell.rule) is Lion and cell.settings.decay_order == "before"
        return (
            cell.projected is None and lion and kernel_weight(cell) and formats_of(cell) <= {"fp32", "bf16"}
        )

    def step_(self, work: Work) -> None:
        """See :class:`KernelPath`."""
        rule, decay = work.cell.rule, work.cell.settings.weight_decay
        assert isinstance(rule, Lion)
        step = LionStep(lr=float(work.turn.lr), beta1=rule.betas[0], beta2=rule.betas[1], weight_decay=decay)
        master, moment = work.moment("master"), work.moment("momentum")
        lion_(work.weight, work.gradient, moment, step, master=master, keys=work.keys())


class KernelCoordinates(KernelPath):
    """FRUGAL on rows, columns, blocks of a matrix, or single entries: one pass over gradient and weight."""

    name = "split adamw kernel"

    def serves(self, cell: Cell) -> bool:
        """See :class:`Path`."""
        if cell.projected is None or cell.settings.split not in (None, 1):
            return False
        projector, _, residual = cell.projected
        split = isinstance(projector, CoordinateProjector) and (
            projector.kind == "randk" or len(cell.shape) == 2
        )
        rest = residual.kind in ("sign", "sgd") and residual.scale > 0 and residual.residual_scale > 0
        return (
            split
            and rest
            and usual_adam(cell)
            and kernel_weight(cell)
            and (formats_of(cell) <= {"fp32", "bf16"})
        )

    def step_(self, work: Work) -> None:
        """See :class:`KernelPath`."""
        assert work.cell.projected is not None
        projector, _, residual = work.cell.projected
        assert isinstance(projector, CoordinateProjector)
        lr, decay = float(work.turn.lr), work.cell.settings.weight_decay
        # A kernel decays by its own lr times its own decay: the product is the same on both sides.
        active = _adam_step(work, lr=lr * residual.scale, decay=decay / residual.scale)
        rest = PlainStep(
            lr=lr * residual.residual_scale,
            weight_decay=decay / residual.residual_scale,
            rule="sign" if residual.kind == "sign" else "sgd",
        )
        operands = (work.weight, work.gradient, work.moment("exp_avg"), work.moment("exp_avg_sq"))
        others: dict[str, Any] = {"master": work.moment("master"), "keys": work.keys()}
        stored = part(work.state, "projector")
        if projector.kind == "randk":
            randk_adamw_(*operands, projector.choice_key(stored), active, rest, **others)
        else:
            index = projector.open(stored, work.weight.device)[INDEX]
            split_adamw_(*operands, index, _AXES[projector.kind], active, rest, **others)


def _adam_step(work: Work, *, lr: float, decay: float) -> AdamStep:
    rule = work.cell.rule
    assert isinstance(rule, Adam)
    beta1, beta2 = rule.betas
    return AdamStep(lr=lr, step=work.step, beta1=beta1, beta2=beta2, eps=rule.eps, weight_decay=decay)


PATHS: tuple[Path, ...] = (
    WholeAdamW(),
    KernelAdamW(),
    KernelLion(),
    KernelCoordinates(),
    KernelLowRank(),
    KernelScaled(),
)


def path_of(cell: Cell) -> Path | None:
    """The first that serves the cell, unless its group asks for the reference.

    None of a projected part of a parameter: paths know nothing of the sums over the other parts.
    """
    if cell.settings.path == "reference" or (cell.projected is not None and not cell.is_whole):
        return None
    return next((path for path in PATHS if path.serves(cell)), None)
