"""Whether an optimizer may be run on the rows that a sparse gradient names, found out by running it.

It may where a step with a sparse gradient leaves all other rows alone, weights and state, and where the rows
come out the same, bit for bit, when they are stepped apart. ``torch.optim.SparseAdam`` is made so. AdamW is
not: rows without a gradient decay, in weights and in both moments, at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memtrain.offload.optimizer_probe import Runner, UnsupportedOptimizerError, hyperparameters
from memtrain.offload.row_records import RowState, scalar_copy
from memtrain.offload.state_cuts import same_scalar

_SHAPE = (11, 37)  # no multiple of a vector's lanes
_STEPS = ((1, 4, 5, 9), (0, 4, 10), (), (5, 9))
_LEARNING_RATE = 1e-2
_REMEDY = (
    "use torch.optim.SparseAdam for tables whose layers have sparse=True, or sparse=False and an "
    "OffloadedOptimizer, which streams all of the state"
)


def row_states(optimizer: torch.optim.Optimizer, group: dict[str, Any], dtype: torch.dtype) -> list[RowState]:
    """The state of a table under one parameter group.

    Raises:
        UnsupportedOptimizerError: it takes no sparse gradients, touches other rows, keeps state that has no
            rows, or does not begin with the same number everywhere.
    """
    name = type(optimizer).__name__
    hyper = {**hyperparameters(group), "lr": _LEARNING_RATE}
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(_SHAPE, generator=generator).to(dtype)
    whole, cut = _Table(optimizer, hyper, start), _Table(optimizer, hyper, start)
    states: list[RowState] = []
    for rows in _STEPS:
        values = torch.randn((len(rows), _SHAPE[1]), generator=generator).to(dtype)
        before = whole.weight.clone()
        if not states:
            whole.step(list(range(_SHAPE[0])), [], values[:0])
            states = [_row_state(name, key, value) for key, value in whole.tensors.items()]
            if not states:
                raise UnsupportedOptimizerError(f"{name} keeps no state of a table's rows: it needs no tier")
            cut.step(list(range(_SHAPE[0])), [], values[:0])
        whole.step(list(range(_SHAPE[0])), list(rows), values)
        half = len(rows) // 2
        scalars = cut.scalars
        for part, given in ((rows[:half], values[:half]), (rows[half:], values[half:])):
            cut.scalars = {key: scalar_copy(value) for key, value in scalars.items()}
            cut.step(list(part), list(range(len(part))), given)
        others = [row for row in range(_SHAPE[0]) if row not in rows]
        if not torch.equal(whole.weight[others], before[others]):
            raise UnsupportedOptimizerError(
                f"{name} changes rows that have no gradient, so that a table's other rows would have to be "
                f"read and written as well: {_REMEDY}"
            )
        _compare(name, whole, cut)
    return states


class _Table:
    """A small table, its state, and steps on some of its rows."""

    def __init__(self, optimizer: torch.optim.Optimizer, hyper: dict[str, Any], start: Tensor) -> None:
        self.weight = start.clone()
        self.tensors: dict[str, Tensor] = {}
        self.scalars: dict[str, Any] = {}
        self._runner, self._hyper = Runner(optimizer), hyper

    def step(self, rows: list[int], places: list[int], values: Tensor) -> None:
        """Step ``rows`` alone, with a gradient at ``places`` among them."""
        name = self._runner.name
        weight = self.weight[rows] if rows else self.weight[:1].clone()
        weight.grad = sparse_rows(torch.tensor(places, dtype=torch.int64), values, weight.shape)
        state = {key: value[rows] if rows else value[:1].clone() for key, value in self.tensors.items()}
        given = {weight: {**state, **self.scalars}} if state or self.scalars else {}
        try:
            after = self._runner.run([{**self._hyper, "params": [weight]}], given).get(weight, {})
        except Exception as error:
            raise UnsupportedOptimizerError(
                f"{name}.step() fails on a sparse gradient ({error}): {_REMEDY}"
            ) from error
        for key, value in after.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                self.scalars[key] = value
                continue
            if value.layout is not torch.strided or value.shape != weight.shape:
                raise UnsupportedOptimizerError(
                    f"{name} keeps state {key!r} of shape {tuple(value.shape)} and layout {value.layout}, "
                    f"which has no rows of the table: {_REMEDY}"
                )
            if rows:
                self.tensors.setdefault(key, torch.empty(self.weight.shape, dtype=value.dtype))[rows] = value
        if rows:
            self.weight[rows] = weight.detach()


def sparse_rows(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """A coalesced gradient of ``shape`` that has ``values`` at ``rows``, which are in order and different."""
    return torch.sparse_coo_tensor(rows.view(1, -1), values, shape, is_coalesced=True, check_invariants=False)


def _row_state(name: str, key: str, value: Tensor) -> RowState:
    initial = value.reshape(-1)[0]
    if not bool((value == initial).all()):
        raise UnsupportedOptimizerError(
            f"{name} begins with different numbers in state {key!r}: rows that were never used would have to "
            f"be on the tier. {_REMEDY}"
        )
    return RowState(key=key, dtype=value.dtype, initial=float(initial))


def _compare(name: str, whole: _Table, cut: _Table) -> None:
    same = torch.equal(whole.weight, cut.weight) and whole.tensors.keys() == cut.tensors.keys()
    same = same and all(torch.equal(value, cut.tensors[key]) for key, value in whole.tensors.items())
    same = same and whole.scalars.keys() == cut.scalars.keys()
    if not same or not all(same_scalar(value, cut.scalars[key]) for key, value in whole.scalars.items()):
        raise UnsupportedOptimizerError(
            f"{name} gives other numbers when rows are stepped apart, or touches rows without a gradient: "
            f"{_REMEDY}"
        )
