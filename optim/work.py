"""What fast paths are given and what they share.

A path is chosen from the settings of a group, shape and dtype of a parameter (``serves``), and from where and
how its tensors lie (``takes``): never from values or timings, so that a resumed run goes the same way.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from memtrain.optim.cell import MOMENT_STREAM, STEP, Cell, State, Turn, part
from memtrain.optim.kernels.pointwise import Keys
from memtrain.optim.rules import Adam


@dataclass(frozen=True)
class Work:
    """One parameter's share of a step; its basis is fresh, where one was due."""

    weight: Tensor
    gradient: Tensor
    state: State
    cell: Cell
    turn: Turn

    @property
    def step(self) -> int:
        """Updates since the moments were zero, this one included, once the state is counted up."""
        return int(self.state[STEP])

    def moment(self, name: str) -> dict[str, Tensor]:
        """As its format stores it."""
        return part(self.state, name)

    def keys(self) -> Keys | None:
        """From which the reference rounds, too; None where nothing is rounded."""
        if self.cell.dtype == torch.float32 and formats_of(self.cell) == {"fp32"}:
            return None
        # Where a path serves a part of a parameter, its moments have the shape of the weight.
        key = self.cell.key(self.turn).skip(self.cell.first_entry(None))
        return Keys(key, key.fold(MOMENT_STREAM), key.fold(MOMENT_STREAM + 1))


class Path(Protocol):
    """A fast way."""

    name: str
    """As ``GridOptimizer.paths`` prints it."""

    def serves(self, cell: Cell) -> bool:
        """Whether it does for such a cell what :meth:`Cell.update_` does, up to rounding."""
        ...

    def takes(self, weight: Tensor, gradient: Tensor) -> bool:
        """Whether it can where and as these tensors lie."""
        ...

    def update_(self, works: list[Work]) -> None:
        """One step of parameters of one group, all of which it serves and takes."""
        ...


class KernelPath:
    """One parameter after the other, by kernels for CPU and CUDA."""

    name = ""

    def takes(self, weight: Tensor, gradient: Tensor) -> bool:
        """A CPU, or CUDA with Triton; elsewhere and without it the reference path runs."""
        device = weight.device.type
        served = device == "cpu" or (device == "cuda" and _has_triton())
        return served and gradient.dtype in (torch.float32, torch.bfloat16)

    def update_(self, works: list[Work]) -> None:
        """See :class:`Path`."""
        for work in works:
            work.state[STEP] += 1
            self.step_(work)

    def step_(self, work: Work) -> None:
        """One parameter, its step counted."""
        raise NotImplementedError


def usual_adam(cell: Cell) -> bool:
    """Adam as the kernels have it: eps on the corrected root, weight decay first."""
    rule = cell.rule
    return type(rule) is Adam and rule.eps_on == "corrected" and cell.settings.decay_order == "before"


def kernel_weight(cell: Cell) -> bool:
    """Whether kernels can write the weight."""
    return cell.settings.master in ("none", "split24") and cell.dtype in (torch.float32, torch.bfloat16)


def formats_of(cell: Cell) -> set[str]:
    """Names of the formats of its moments."""
    return {each.name for each in cell.formats.values()}


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
