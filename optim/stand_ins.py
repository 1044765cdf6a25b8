"""Steps on tensors that stand for the parameters of an optimizer, as its own steps would be.

Machinery that keeps states elsewhere brings a few at a time into memory and steps them on stand-ins
(memtrain's offload). What the grid does with a parameter follows from more than gradient, state and settings:
its number, which is in every random key, its turn in a schedule of refreshes, and its group's count of steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memtrain.optim.cell import Cell
from memtrain.optim.grid import GridOptimizer, Plan, Slot
from memtrain.optim.paths import path_of
from memtrain.optim.piece_cell import PieceCell
from memtrain.optim.settings import Settings

_STEP, _SKIPPED = "step", "skipped_refreshes"


class _Place(NamedTuple):
    """Of a parameter in the optimizer."""

    group: int
    number: int
    offset: int


class Kept(NamedTuple):
    """What one parameter's update keeps, and takes for a while, in bytes."""

    sizes: tuple[int, ...]
    """Of the state's tensors, in their order; counters, which are single numbers, left out."""
    projected: bool
    refresh_bytes: int
    """The most that renewing the basis takes beside gradient and state."""

    @property
    def state_bytes(self) -> int:
        """Of all its tensors."""
        return sum(self.sizes)


class StandIns:
    """Made when a step is asked for; its parts may then be done in any order, each once.

    Args:
        optimizer: whose parameters are stood for; its own states are not looked at.
    """

    def __init__(self, optimizer: GridOptimizer) -> None:
        self._optimizer = optimizer
        optimizer.replan()
        self._places = {
            parameter: _Place(slot.group, slot.number, optimizer._plans[slot.group].offsets[slot.place])
            for parameter, slot in optimizer._slots.items()
        }

    def count_step(self) -> None:
        """The optimizer has been asked for a step: its groups count it now.

        Raises:
            RuntimeError: gradients have been compressed on their way, which stand-ins know nothing of.
        """
        if self._optimizer.pending:
            raise RuntimeError(
                "SmallGradients keeps gradients of parameters whose states are offloaded: memtrain.prepare "
                "moves gradients itself. Leave SmallGradients out, or train without memtrain.prepare"
            )
        for group in self._optimizer.param_groups:
            group[_STEP] += 1

    def kept(self, parameter: Tensor, dtype: torch.dtype) -> Kept:
        """For a parameter, or a master of it in ``dtype``. Nothing is allocated."""
        group = self._optimizer.param_groups[self._places[parameter].group]
        cell = Cell(Settings.of_group(group), parameter.shape, dtype)
        state = cell.empty_state(torch.empty(parameter.shape, dtype=dtype, device="meta"))
        tensors = [value for value in state.values() if value.dim() > 0]
        refresh_bytes = 0
        if cell.projected is not None:
            refresh_bytes = cell.projected.projector.refresh_workspace(parameter.dtype, first=True).bytes
        return Kept(tuple(value.nbytes for value in tensors), cell.projected is not None, refresh_bytes)

    def run(
        self,
        groups: list[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        originals: Mapping[Tensor, tuple[Tensor, int]],
    ) -> dict[Tensor, dict[str, Any]]:
        """One step over stand-ins; their states after it.

        Args:
            groups: settings as they were when the step was asked for, with stand-ins as ``params``. A
                stand-in may have another dtype than its original (a master). It has the same shape, or is
                flat, and a piece of it.
            state: of the stand-ins that have one.
            originals: by stand-in, with the element of the original at which it begins. One that is not there
                is its own original; an original that is no parameter of the optimizer is stepped as the first
                of an optimizer of its own.

        Raises:
            ValueError: a piece of a parameter that cannot be updated piece by piece.
        """
        optimizer = self._optimizer
        twin: GridOptimizer = object.__new__(type(optimizer))
        twin.__dict__.update(optimizer.__dict__)
        twin.param_groups, twin.state, twin.pending = groups, defaultdict(dict, state), {}
        twin._plans, twin._slots = [], {}
        for number, group in enumerate(groups):
            members = group["params"]
            found = [originals.get(each, (each, 0)) for each in members]
            places = [self._places.get(whole, _Place(0, 0, 0)) for whole, _ in found]
            twin._plans.append(
                replace(_with_pieces(twin._plan(group), found), offsets=[place.offset for place in places])
            )
            for index, (each, place) in enumerate(zip(members, places, strict=True)):
                twin._slots[each] = Slot(number, index, place.number)
            before = group[_SKIPPED]
            twin.update_(members)
            if group[_SKIPPED] > before and found[0][0] in self._places:
                optimizer.param_groups[places[0].group][_SKIPPED] += group[_SKIPPED] - before
        return dict(twin.state)


def _with_pieces(plan: Plan, originals: Sequence[tuple[Tensor, int]]) -> Plan:
    """A plan for stand-ins some of which are pieces of their originals."""
    cells, paths = list(plan.cells), list(plan.paths)
    for index, (each, (whole, start)) in enumerate(zip(plan.parameters, originals, strict=True)):
        if each.shape != whole.shape:
            cell = PieceCell(plan.settings, whole.shape, start, each.numel(), each.dtype)
            path = path_of(cell)
            if path is None and cell.takes_roots and each.device.type == "cpu":
                raise ValueError(
                    "on a CPU the reference path rounds 8-bit second moments by the length of a tensor: "
                    f"update the parameter of shape {tuple(whole.shape)} whole, not in pieces"
                )
            cells[index], paths[index] = cell, path
    return replace(plan, cells=cells, paths=paths)
