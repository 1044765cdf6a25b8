"""Why streamed weights do not fit: the layer that makes the windows, or the slots of the update, so large."""

from __future__ import annotations

import dataclasses

from torch import nn

from memtrain.planner.actions import Tier
from memtrain.planner.plan import Plan, describe_windows
from memtrain.planner.profile import ModelProfile
from memtrain.planner.units import format_gib


def with_largest_layer(plan: Plan, profile: ModelProfile, model: nn.Module) -> Plan:
    """An infeasible ``plan``, whose remedies name the layer too, where its weights take turns on a device
    that is short; any other plan as it is."""
    staging = plan.staging
    if not dict(plan.shortfall_bytes).get(Tier.DEVICE) or not staging.weight_windows:
        return plan
    away = {state.unit for state in plan.states if state.weight_tier is not Tier.DEVICE}
    unit = max((u for u in profile.units if u.name in away), key=lambda u: u.weight_extent_bytes)
    parameters = dict(model.named_parameters())
    name = max(unit.parameters, key=lambda each: parameters[each].nbytes)
    limit_bytes = dict(plan.capacities)[Tier.DEVICE]
    words = (
        f"smaller layers: {unit.name} has {format_gib(unit.weight_extent_bytes)} of weights, the largest "
        f"{name} with {format_gib(parameters[name].nbytes)}, and {describe_windows(staging.weight_windows)}, "
        f"{format_gib(staging.weight_window_bytes)}, stand in the device's {format_gib(limit_bytes)}"
    )
    if not profile.elementwise and staging.update_slots:
        words += (
            f". The optimizer takes whole parameters, {staging.update_slots} slots of "
            f"{format_gib(staging.update_slot_bytes)}: memtrain.optim.autograd.TiledLinear cuts a layer into "
            "several"
        )
    return dataclasses.replace(plan, remedies=(*plan.remedies, words))
