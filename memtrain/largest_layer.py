"""Why streamed weights do not fit: the layer that makes the windows, or the slots of the update, so large,
and the size of tiles that would help, or has to be kept."""

from __future__ import annotations

import dataclasses

from torch import nn

from memtrain.planner.actions import Tier
from memtrain.planner.infeasible import MORE_DEVICE
from memtrain.planner.plan import Plan, describe_windows
from memtrain.planner.profile import ModelProfile
from memtrain.planner.units import MiB, format_gib
from memtrain.tiling import TILES_IN_FREE, TilingError, choose_cuts, cuts_of, tiles_of


def with_largest_layer(plan: Plan, profile: ModelProfile, model: nn.Module) -> Plan:
    """An infeasible ``plan``, whose remedies name the layer too, and tiles where they would help, where its
    weights take turns on a device that is short; any other plan as it is."""
    staging = plan.staging
    if not dict(plan.shortfall_bytes).get(Tier.DEVICE) or not staging.weight_windows:
        return plan
    away = {state.unit for state in plan.states if state.weight_tier is not Tier.DEVICE}
    unit = max((u for u in profile.units if u.name in away), key=lambda u: u.largest_window_bytes)
    parameters = dict(model.named_parameters())
    name = max(unit.parameters, key=lambda each: parameters[each].nbytes)
    limit_bytes = dict(plan.capacities)[Tier.DEVICE]
    words = (
        f"smaller layers: {unit.name} has {format_gib(unit.largest_window_bytes)} of weights in a window, "
        f"the largest {name} with {format_gib(parameters[name].nbytes)}, and "
        f"{describe_windows(staging.weight_windows)}, {format_gib(staging.weight_window_bytes)}, "
        f"stand in the device's {format_gib(limit_bytes)}"
    )
    words += _tiles(plan, profile, model, limit_bytes)
    if not profile.elementwise and staging.update_slots:
        words += (
            f". The optimizer takes whole parameters, {staging.update_slots} slots of "
            f"{format_gib(staging.update_slot_bytes)}: tiles are smaller ones"
        )
    return dataclasses.replace(plan, remedies=(*plan.remedies, words))


def with_tiles_kept(plan: Plan, model: nn.Module) -> Plan:
    """An infeasible ``plan``, whose remedies that name a larger device budget say how the tiles are kept that
    the budget has brought about: with them it holds, and by itself it cuts layers larger, or leaves them
    whole. Any other plan as it is.
    """
    cuts = cuts_of(model)
    size = cuts.automatic_bytes
    if size is None or not any(MORE_DEVICE in remedy for remedy in plan.remedies):
        return plan
    words = (
        f", with layers in tiles of at most {format_gib(size)} as now: a larger budget by itself cuts "
        "them larger or leaves them whole, which needs more"
    )
    if cuts.uncut:  # to ask for a size refuses what cannot be cut so far
        words += (
            f". No size can be set that keeps them, for {', '.join(sorted(cuts.uncut))} cannot be cut so far"
        )
    else:
        words += f". Keep them with {_asked_for(size)}"
    told = tuple(remedy + words if MORE_DEVICE in remedy else remedy for remedy in plan.remedies)
    return dataclasses.replace(plan, remedies=told)


def _asked_for(tile_bytes: int) -> str:
    return (
        f"streamed_model(..., tile_bytes={tile_bytes}), in a recipe model.streamed: true and model.tile: "
        f"{tile_bytes // MiB}MiB"
    )


def _tiles(plan: Plan, profile: ModelProfile, model: nn.Module, limit_bytes: int) -> str:
    """What to set, where layers can be cut into tiles that are smaller than the windows are."""
    free = max(0, limit_bytes - profile.baseline_bytes)
    size = max(MiB, free // TILES_IN_FREE // MiB * MiB)
    parameters = dict(model.named_parameters())
    units = [(unit.name, [(name, parameters[name]) for name in unit.parameters]) for unit in profile.units]
    told = ""
    while size < plan.staging.weight_windows[-1].slot_bytes and not tiles_of(model):
        try:
            choose_cuts(model, units, size)
        except TilingError as error:  # smaller than this model's layers can be cut
            told = f", and tiles do not help: {error}"
            size *= 2
            continue
        return f". Cut layers into tiles: {_asked_for(size)}"
    return told
