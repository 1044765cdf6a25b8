"""How an optimizer's state is laid out for a plan: pieces, groups, specs, and the bytes of every slot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.lower_halves import LOWER_KEY, keeps_lower_half
from memtrain.offload.optimizer_probe import cuts_of_groups, state_spec, stepped_dtype
from memtrain.offload.shards import (
    MASTER_KEY,
    SMALL,
    FlatIndex,
    Shard,
    ShardLayout,
    StateSpec,
    StateTensor,
    Unit,
)
from memtrain.offload.state_cuts import Cuts
from memtrain.optim.storage import lower_half
from memtrain.planner.actions import Tier
from memtrain.planner.plan import Plan

_ELEMENTWISE_SHAPE = (8, 16)  # any: an elementwise optimizer's state follows the parameter's shape
_BLOCKWISE_SHAPE = (SMALL // 256, 256)  # any that is cut: the state of smaller ones may not be quantised


class OptimizerLayout:
    """Where everything of an optimizer lies.

    Args:
        optimizer: the user's.
        units: parameters in forward order.
        shard_elements: most elements of a shard.
        master_weights: whether bf16 and fp16 weights have fp32 masters.
        split_masters: whether records hold the lower halves of those, where ``keeps_lower_half`` says so.
        elementwise: whether the optimizer may be cut; None tries it out, and True is tried out too.

    Raises:
        PlanMismatchError: units and parameter groups do not hold the same trainable parameters; or the
            optimizer may not be cut, in a dtype that it steps, though it is said to be ``elementwise``.
        UnsupportedOptimizerError: the optimizer cannot be streamed.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        units: Sequence[Unit],
        shard_elements: int,
        *,
        master_weights: bool,
        split_masters: bool,
        elementwise: bool | None,
    ) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self._master_weights = master_weights
        self._cuts = (
            {} if elementwise is False else cuts_of_groups(optimizer, master_weights=self._master_weights)
        )
        """How state is cut, by number of the group and dtype that is stepped; None where it may not be."""
        self.elementwise = self._is_elementwise(elementwise)
        self.index = FlatIndex(units, shard_elements, whole_parameters=not self.elementwise)
        self.unplanned = {id(p): name for _, members in units for name, p in members if not p.requires_grad}
        """Names of parameters that were frozen when the plan was made, by ``id``: for messages."""
        self.group_of = self._match_groups()
        """Number of the parameter group, by parameter."""
        self.masters = frozenset(
            name
            for name, parameter in self.index.parameters.items()
            if self._stepped_dtype(parameter) != parameter.dtype
        )
        """Parameters that have fp32 masters."""
        self.halves = self._find_halves() if split_masters and self.elementwise else frozenset[str]()
        """Of these the ones of which records hold the lower half. Their gradients are widened by slices."""
        self.specs = self._find_specs()
        """What the optimizer keeps, by parameter, with masters as it sees them."""
        stored = {name: _stored(spec) if name in self.halves else spec for name, spec in self.specs.items()}
        widened = self.masters - self.halves
        self.shards: dict[Shard, ShardLayout] = {
            shard: ShardLayout(shard=shard, specs=stored, widened=widened)
            for shard in self.index.all_shards()
        }

    def check(self, plan: Plan) -> None:
        """Raise PlanMismatchError, with the bytes, where a shard that moves does not fit the plan's slots."""
        for shard, layout in self.shards.items():
            decision = plan.state(shard.unit)
            away = decision.optimizer_tier is not Tier.DEVICE or decision.gradient_tier is not Tier.DEVICE
            if shard.small or not away:
                continue
            if plan.staging.update_slots < 1 or plan.staging.update_slot_bytes < layout.slot_bytes:
                raise PlanMismatchError(
                    f"{shard.name} needs an update slot of {layout.slot_bytes} bytes, the plan has "
                    f"{plan.staging.update_slots} of {plan.staging.update_slot_bytes}: plan again for this "
                    f"optimizer"
                )

    def _stepped_dtype(self, parameter: Tensor) -> torch.dtype:
        return stepped_dtype(parameter, master_weights=self._master_weights)

    def _is_elementwise(self, asked: bool | None) -> bool:
        refused = [kind for kind, cuts in self._cuts.items() if cuts is None]
        if asked and refused:
            number, dtype = refused[0]
            raise PlanMismatchError(
                f"OptimizerConfig(elementwise=True), but {type(self.optimizer).__name__} with the settings "
                f"of parameter group {number} steps flat pieces of {dtype} to other bits than the whole, or "
                f"is not seen to step at all: leave elementwise at None, or set it to False, which streams "
                f"whole parameters"
            )
        return asked is not False and not refused

    def _match_groups(self) -> dict[str, int]:
        numbers = {id(p): number for number, group in enumerate(self.param_groups) for p in group["params"]}
        ours = {id(parameter): name for name, parameter in self.index.parameters.items()}
        for name, parameter in self.index.parameters.items():
            if id(parameter) not in numbers:
                raise PlanMismatchError(
                    f"{name} needs a gradient but is in no parameter group: add it, or set "
                    f"requires_grad_(False)"
                )
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and id(parameter) not in ours:
                    raise PlanMismatchError(
                        f"the optimizer has a trainable parameter of shape {tuple(parameter.shape)} that is "
                        f"in no unit"
                    )
        return {name: numbers[id(parameter)] for name, parameter in self.index.parameters.items()}

    def _find_halves(self) -> frozenset[str]:
        return frozenset(
            name
            for name in self.masters
            if keeps_lower_half(
                self.optimizer, self.param_groups[self.group_of[name]], self.index.parameters[name]
            )
        )

    def _find_specs(self) -> dict[str, StateSpec]:
        found: dict[Any, StateSpec] = {}
        specs = {}
        for name, parameter in self.index.parameters.items():
            group, dtype = self.group_of[name], self._stepped_dtype(parameter)
            cuts = self._cuts[group, dtype] if self.elementwise else None
            shape = _probed_shape(tuple(parameter.shape), cuts)
            key = (group, dtype, shape)
            if key not in found:
                found[key] = state_spec(self.optimizer, self.param_groups[group], shape, dtype, cuts=cuts)
            master = (StateTensor(key=MASTER_KEY, dtype=torch.float32),) if dtype != parameter.dtype else ()
            specs[name] = dataclasses.replace(found[key], tensors=master + found[key].tensors)
        return specs


def _stored(spec: StateSpec) -> StateSpec:
    """With the lower halves of masters in their place."""
    tensors = (
        StateTensor(key=LOWER_KEY, dtype=lower_half.DTYPE) if tensor.key == MASTER_KEY else tensor
        for tensor in spec.tensors
    )
    return dataclasses.replace(spec, tensors=tuple(tensors))


def _probed_shape(shape: tuple[int, ...], cuts: Cuts | None) -> tuple[int, ...]:
    """What stands for a parameter of ``shape`` when its state is looked at."""
    if cuts is None:
        return shape
    if all(per == 1 for per in cuts.values()):
        return _ELEMENTWISE_SHAPE
    return shape if math.prod(shape) < SMALL else _BLOCKWISE_SHAPE
