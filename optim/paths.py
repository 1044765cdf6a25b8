"""Fast ways through one step, for the points of the grid that have one.

The grid asks each path in turn whether it serves a cell; what none serves goes through :meth:`Cell.update_`,
which is slow, right, and what paths are tested against. A path gets all its parameters of a group at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from memtrain.optim.cell import STEP, Cell, State, Turn
from memtrain.optim.rules import Adam


@dataclass(frozen=True)
class Work:
    """One parameter's share of a step."""

    weight: Tensor
    gradient: Tensor
    state: State
    cell: Cell
    turn: Turn


class Path(Protocol):
    """A fast way."""

    def serves(self, cell: Cell) -> bool:
        """Whether it does for such a cell what :meth:`Cell.update_` does, up to rounding."""
        ...

    def update_(self, works: list[Work]) -> None:
        """One step of parameters of one group, all of which it serves."""
        ...


class WholeAdamW:
    """AdamW on whole fp32 gradients: torch's own, fused on a CPU and foreach elsewhere.

    Elsewhere not fused, because fused kernels read step counts from the device, and ours lie on the CPU.
    """

    def serves(self, cell: Cell) -> bool:
        """See :class:`Path`."""
        settings = cell.settings
        return (
            cell.projected is None
            and type(cell.rule) is Adam
            and cell.rule.eps_on == "corrected"
            and settings.decay_order == "before"
            and settings.master == "none"
            and cell.dtype == torch.float32
            and all(each.name == "fp32" for each in cell.formats.values())
        )

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


PATHS: tuple[Path, ...] = (WholeAdamW(),)


def path_of(cell: Cell) -> Path | None:
    """The first that serves the cell, unless its group asks for the reference."""
    if cell.settings.path == "reference":
        return None
    return next((path for path in PATHS if path.serves(cell)), None)
