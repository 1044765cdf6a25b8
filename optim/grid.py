"""One optimizer: every combination of projection, rule, residual, refresh, state format and master weights.

    optimizer = GridOptimizer(model.parameters(), lr=1e-2, projection="power", rank=128, update_gap=200)

A ``torch.optim.Optimizer``: parameter groups may differ in any setting (:class:`~memtrain.optim.settings.
Settings` lists them), schedulers change ``lr``, ``betas`` or ``momentum``, and ``state_dict`` holds plain
tensors and numbers alone. In a group with a projection matrices ``[m, n]`` and stacks ``[E, m, n]`` are
projected, vectors and scalars keep whole moments. Parameters may be fp32, bf16 or fp16; all arithmetic is
fp32.

Two counters: a group's ``step`` counts optimizer steps and decides about refreshes and random numbers; a
parameter's ``step`` counts its updates since its moments were zero and decides about bias correction, so that
a parameter that is unused for a while, or whose moments a refresh has reset, is corrected rightly.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from memtrain.optim.cell import Cell, State, Turn
from memtrain.optim.loading import Verbatim, check_state
from memtrain.optim.lowrank_path import KernelLowRank
from memtrain.optim.paths import path_of
from memtrain.optim.settings import PROJECTED_FIELDS, RULE_FIELDS, RULES, Settings, Unchanged
from memtrain.optim.work import Path, Work

if TYPE_CHECKING:
    from memtrain.optim.stand_ins import StandIns

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STEP, _SKIPPED = "step", "skipped_refreshes"
_FOREIGN = ("params", "param_names", _STEP, _SKIPPED)
_NOT_SERVED = ("maximize", "amsgrad", "differentiable")
"""Of torch's optimizers: they would change the update, and groups written for those may carry them."""
_NUMBERS = (*RULE_FIELDS, "weight_decay", "decay_order", "update_gap", "scale", "residual_scale")
"""Settings that leave the tensors of a state as they are, and that schedulers change every step."""


class NonFiniteGradientWarning(UserWarning):
    """A refresh was due and the gradient held an infinity or NaN: basis and parameter stay as they were."""


@dataclass(frozen=True)
class Plan:
    """How one group is updated; made anew when its settings or its parameters have changed."""

    settings: Settings
    parameters: list[Tensor]
    cells: list[Cell]
    paths: list[Path | None]
    offsets: list[int]
    unchanged: Unchanged

    def holds(self, group: dict[str, Any]) -> bool:
        """Whether it still is that of the group."""
        return (self.unchanged(group) or Settings.of_group(group) == self.settings) and self.holds_parameters(
            group["params"]
        )

    def holds_parameters(self, parameters: list[Tensor]) -> bool:
        """Looked at every step: kernels that are handed a state of another size than they were made for
        write beyond its end."""
        return len(parameters) == len(self.parameters) and all(
            parameter is known
            and parameter.dtype is cell.dtype
            and cell.own(parameter).shape == cell.own_shape
            for parameter, known, cell in zip(parameters, self.parameters, self.cells, strict=True)
        )


class Slot(NamedTuple):
    """Where a parameter is: its group, its place in it, and its number in the optimizer."""

    group: int
    place: int
    number: int


@dataclass
class Pending:
    """What has become of a parameter's gradient since the last step; kept by ``SmallGradients``."""

    low: Tensor | None = None
    """The sum of its projections, fp32; the gradient itself is None then."""
    summed: bool = False
    """Whether that went through :meth:`Cell.summed`."""
    backwards: int = 0
    """How many gradients have arrived."""
    updated: bool = False
    """Whether the parameter has had its update of this step."""


class GridOptimizer(Optimizer):
    """See the module.

    A parameter whose gradient is not finite when its basis is to be made of it is left alone in that step;
    its group counts this in ``skipped_refreshes``, and the refresh is tried again at the next step. A
    gradient of zeros says nothing about a basis either: the refresh waits for another one, and the step is
    taken. In all other steps what is not finite goes into moments and weights, as with torch's optimizers.

    Args:
        params: parameters, named parameters, or dicts of groups with settings of their own.
        lr: a float, or a tensor of one element.
        settings: fields of :class:`Settings`, for all groups that do not say otherwise.

    Raises:
        TypeError: an unknown setting.
        ValueError: a setting cannot be honoured, or a parameter cannot be updated under it.
    """

    def __init__(self, params: Iterable[Any], lr: float | Tensor = 1e-3, **settings: Any) -> None:
        known = {field.name: field.default for field in fields(Settings)}
        if unknown := settings.keys() - known.keys():
            raise TypeError(f"unknown settings {sorted(unknown)}: there are {', '.join(sorted(known))}")
        # Schedulers look for betas or momentum in the defaults: only numbers of this rule may be there.
        general = {name: value for name, value in known.items() if name not in RULE_FIELDS}
        rule = RULES.get(settings.get("rule", known["rule"]))
        numbers = {field.name: field.default for field in fields(rule)} if rule else {}
        self._slots: dict[Tensor, Slot] = {}
        self._plans: list[Plan] = []
        self.pending: dict[Tensor, Pending] = {}
        self._leaders: dict[Tensor, Tensor] = {}
        super().__init__(params, {"lr": lr, **general, **numbers, **settings})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Also after training has begun; the group's own step counter starts at zero.

        Raises:
            ValueError: see the class.
        """
        super().add_param_group(self._independent(dict(param_group)))
        group = self.param_groups[-1]
        group.setdefault(_STEP, 0)
        group.setdefault(_SKIPPED, 0)
        del self._plans[len(self.param_groups) - 1 :]  # of groups that were taken out
        try:
            self._plans.append(self._plan(group))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        rule = self._plans[-1].settings.rule_part
        # Written out, so that schedulers of betas or momentum find what they are to change.
        group.update({name: getattr(rule, name) for name in RULE_FIELDS if hasattr(rule, name)})
        self._number()

    def _number(self) -> None:
        """By place in the groups, as after a resume."""
        places = [
            (parameter, index, place)
            for index, group in enumerate(self.param_groups)
            for place, parameter in enumerate(group["params"])
        ]
        self._slots = {each: Slot(index, place, n) for n, (each, index, place) in enumerate(places)}

    def _independent(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group that names another rule, or no projection, does not inherit numbers that belong to the
        constructor's. Foreign keys may be in it, as in any torch optimizer, unless they look misspelt."""
        for key in group.keys() - self.defaults.keys() - set(_FOREIGN):
            if near := difflib.get_close_matches(key, self.defaults, n=1, cutoff=0.8):
                raise TypeError(f"unknown setting {key!r} in a group: did you mean {near[0]!r}?")
        for key in _NOT_SERVED:
            if group.get(key):
                raise ValueError(f"{key}={group[key]!r} in a group: these optimizers have no {key}")
        dropped: tuple[str, ...] = ()
        if group.get("rule", self.defaults["rule"]) != self.defaults["rule"]:
            dropped += RULE_FIELDS
        if "projection" in group and group["projection"] is None:
            dropped += PROJECTED_FIELDS
        for size, other in (("rank", "density"), ("density", "rank")):
            if group.get(size) is not None and other not in group:
                dropped += (other,)
        return {**dict.fromkeys(dropped), **group}

    def _plan(self, group: dict[str, Any]) -> Plan:
        if not float(group["lr"]) >= 0:
            raise ValueError(f"lr must be >= 0, got {group['lr']}")
        settings = Settings.of_group(group)
        cells: list[Cell] = []
        for index, parameter in enumerate(group["params"]):
            if parameter.dtype not in _DTYPES:
                raise ValueError(
                    f"{_name(group, index)} is {parameter.dtype}: states and arithmetic are fp32, and "
                    "parameters fp32, bf16 or fp16. Use torch.optim for others"
                )
            try:
                cells.append(_cell(settings, parameter))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{_name(group, index)}: {error}") from None
        offsets = [0] * len(cells)
        if settings.projection is not None and settings.refresh_part.spread:
            projected = [index for index, cell in enumerate(cells) if cell.projected is not None]
            for turn, index in enumerate(projected):
                offsets[index] = turn * settings.refresh_part.gap // len(projected)
        paths = [path_of(cell) for cell in cells]
        return Plan(settings, list(group["params"]), cells, paths, offsets, Unchanged(group))

    def _renew(self, index: int) -> None:
        """A group whose settings a scheduler has changed, or whose parameters were replaced, cast or added.

        Raises:
            ValueError: a state is there that was made under settings, or for a parameter, of another kind.
        """
        group, old = self.param_groups[index], self._plans[index]
        plan = self._plan(group)
        numbers = {name: getattr(plan.settings, name) for name in _NUMBERS}
        if not old.holds_parameters(plan.parameters) or replace(old.settings, **numbers) != plan.settings:
            for number, parameter in enumerate(plan.parameters):
                if self.state.get(parameter):
                    own, cell = plan.cells[number].own(parameter), plan.cells[number]
                    check_state(_name(group, number), self.state[parameter], cell, own)
        self._plans[index] = plan
        self._number()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient.

        Raises:
            ValueError: a gradient is sparse, or settings or parameters of a group have been changed in a way
                that its states cannot follow; then nothing has been updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.replan()
        for group in self.param_groups:
            self.refuse_sparse(group["params"])
        for group in self.param_groups:
            self._update_(group["params"])
            group[_STEP] += 1
        self.pending.clear()
        return loss

    def replan(self) -> None:
        """Take note of settings that a scheduler has changed, of groups taken out, and of parameters that
        were cast, or that a wrapper has put in the place of others, as accelerate does where it shards a
        model after its optimizer was made.

        Raises:
            ValueError: the states cannot follow.
        """
        del self._plans[len(self.param_groups) :]
        for index, group in enumerate(self.param_groups):
            if not self._plans[index].holds(group):
                self._renew(index)

    def cell_of(self, parameter: Tensor) -> Cell:
        """The parts that update it."""
        slot = self._slots[parameter]
        return self._plans[slot.group].cells[slot.place]

    def situation(self, parameter: Tensor) -> tuple[Cell, State, Turn]:
        """What an update of it needs; its state is made now if there is none."""
        slot = self._slots[parameter]
        group, plan = self.param_groups[slot.group], self._plans[slot.group]
        state, cell = self.state[parameter], plan.cells[slot.place]
        if not state:
            state.update(cell.empty_state(cell.own(parameter)))
        leader = self._slots.get(self._leaders.get(parameter, parameter), slot)
        offset = self._plans[leader.group].offsets[leader.place]
        return cell, state, Turn(group["lr"], group[_STEP], slot.number, offset, leader.number)

    def share_basis(self, parameters: Iterable[Tensor]) -> None:
        """Give seeded projections of parameters with the same short dimension one basis and one schedule,
        those of the first; from the next refresh on.

        Raises:
            ValueError: they are not all in one group, projected, and from a seed.
        """
        first, *others = parameters
        for each in (first, *others):
            projected = self.cell_of(each).projected
            if projected is None or projected.projector.needs_gradient:
                raise ValueError(
                    f"{self.name_of(each)} cannot share a basis: it has none, or one of its own gradient"
                )
            if self._slots[each].group != self._slots[first].group:
                raise ValueError(
                    f"{self.name_of(each)} and {self.name_of(first)} are in different groups, and cannot "
                    "share a basis: put them into one"
                )
        self._leaders.update(dict.fromkeys(others, first))

    @torch.no_grad()
    def update_(self, parameters: Iterable[Tensor]) -> None:
        """Update those of one group that have a gradient; :meth:`step` does so with all, and counts.

        Raises:
            ValueError: a gradient is sparse; then nothing has been updated.
        """
        parameters = list(parameters)
        self.refuse_sparse(parameters)
        self._update_(parameters)

    def _update_(self, parameters: list[Tensor]) -> None:
        works: dict[Path, list[Work]] = {}
        for parameter in parameters:
            pending, gradient = self.pending.get(parameter), parameter.grad
            if pending is not None and pending.low is not None:
                self._update_low_(parameter, pending.low, pending.summed)
                continue
            if gradient is None or parameter.numel() == 0:
                continue
            cell, state, turn = self.situation(parameter)
            weight, gradient = cell.own(parameter), cell.own(gradient)
            slot = self._slots[parameter]
            path = self._plans[slot.group].paths[slot.place]
            if not cell.refresh_if_due_(gradient, state, turn):
                self.param_groups[slot.group][_SKIPPED] += 1
                warnings.warn(
                    f"{self.name_of(parameter)} has a gradient that is not finite at its refresh: basis and "
                    "parameter stay, and the refresh is tried again at the next step",
                    NonFiniteGradientWarning,
                    stacklevel=5,  # through torch's wrappers, to who called step
                )
            elif path is not None and path.takes(weight, gradient):
                works.setdefault(path, []).append(Work(weight, gradient, state, cell, turn))
            else:
                cell.update_(weight, gradient, state, turn)
        for path, batch in works.items():
            path.update_(batch)

    def refuse_sparse(self, parameters: Iterable[Tensor]) -> None:
        """
        Raises:
            ValueError: a gradient is.
        """
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"{self.name_of(parameter)} has a gradient of layout {parameter.grad.layout}: dense ones "
                    "are needed. Make its embedding with sparse=False, or give it an optimizer of its own"
                )

    def _update_low_(self, parameter: Tensor, low: Tensor, summed: bool) -> None:
        """From the sum of a gradient's projections."""
        cell, state, turn = self.situation(parameter)
        slot, weight = self._slots[parameter], cell.own(parameter)
        path = self._plans[slot.group].paths[slot.place]
        low = low if summed else cell.summed(low)
        if isinstance(path, KernelLowRank) and path.takes(weight, low):
            path.update_low_(Work(weight, low, state, cell, turn))
        else:
            cell.update_low_(weight, low, state, turn)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also drops what has been accumulated of gradients that were not kept whole.

        Raises:
            RuntimeError: gradients were applied in backward and :meth:`step` has not been called since.
        """
        if any(pending.updated for pending in self.pending.values()):
            raise RuntimeError(
                "zero_grad() between an update in backward and step(): the update cannot be taken back. Call "
                "step() first; where steps are to be skipped, as with GradScaler, use update='step'"
            )
        self.pending.clear()
        super().zero_grad(set_to_none)

    def name_of(self, parameter: Tensor) -> str:
        """For messages: its name, if it has one, and its shape."""
        slot = self._slots[parameter]
        return _name(self.param_groups[slot.group], slot.place)

    def paths(self) -> dict[str, str]:
        """By which way each parameter is updated, ``reference`` being the plain one, for a gradient that lies
        as its parameter does. Printable; it follows from settings, shapes, dtypes and devices alone."""
        self.replan()
        chosen = {}
        for group, plan in zip(self.param_groups, self._plans, strict=True):
            for parameter, path, cell in zip(group["params"], plan.paths, plan.cells, strict=True):
                weight = cell.own(parameter)
                taken = path is not None and path.takes(weight, weight)
                chosen[f"{self._slots[parameter].number}: {self.name_of(parameter)}"] = (
                    path.name if path is not None and taken else "reference"
                )
        return chosen

    def state_bytes(self) -> dict[str, int]:
        """Bytes of state once every parameter has been updated, by part: moments, master, projector,
        counters. Equal to the live tensors to the byte."""
        self.replan()
        total = dict.fromkeys(("moments", "master", "projector", "counters"), 0)
        for group, plan in zip(self.param_groups, self._plans, strict=True):
            for parameter, cell in zip(group["params"], plan.cells, strict=True):
                if parameter.requires_grad and parameter.numel():
                    for part, count in cell.state_bytes().items():
                        total[part] += count
        return total

    def stand_ins(self) -> StandIns:
        """For machinery that keeps the states itself and steps tensors in place of the parameters."""
        from memtrain.optim.stand_ins import StandIns  # which is made of this module

        return StandIns(self)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; of sharded parameters DTensors, which DCP reads on any number
        of processes."""
        self.replan()
        packed = super().state_dict()
        cells = [cell for plan in self._plans for cell in plan.cells]
        packed["state"] = {number: cells[number].exported(each) for number, each in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Exactly what was saved; torch would cast every floating state to the dtype of its parameter.

        Tensors are copied. Settings of the groups are the saved ones, as with every torch optimizer.

        Raises:
            ValueError: groups or states do not fit the parameters; then nothing has been changed.
        """
        wrapped = {number: Verbatim.wrap(state) for number, state in state_dict["state"].items()}
        before = dict(self.__dict__)
        try:
            super().load_state_dict({**state_dict, "state": wrapped})
        except BaseException:
            self.__dict__.update(before)
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self.pending = [], {}
        self.__dict__.setdefault("_leaders", {})  # a copy's parameters are others, and share no bases
        self._number()
        for group in self.param_groups:
            group.setdefault(_STEP, 0)
            group.setdefault(_SKIPPED, 0)
            plan = self._plan(group)
            self._plans.append(plan)
            for index, parameter in enumerate(group["params"]):
                if parameter in self.state:
                    loaded = Verbatim.unwrap(self.state[parameter], parameter.device)
                    cell = plan.cells[index]
                    loaded = cell.imported(loaded)
                    check_state(_name(group, index), loaded, cell, cell.own(parameter))
                    self.state[parameter] = loaded


def _cell(settings: Settings, parameter: Tensor) -> Cell:
    # A DTensor exists only where its module is imported, which costs half a second.
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor

        from memtrain.optim.distributed.cell import ShardedCell

        if isinstance(parameter, DTensor):
            return ShardedCell(settings, parameter)
    return Cell(settings, parameter.shape, parameter.dtype)


def _name(group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    shape = tuple(group["params"][index].shape)
    return f"parameter {names[index]!r} {shape}" if names else f"parameter {index} of its group, {shape}"
