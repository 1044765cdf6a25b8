"""From a plan's tiers of weights to what streams them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from torch import nn

from memtrain.offload.engine import Engine
from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.shards import Unit
from memtrain.offload.stored_weights import StoredWeights
from memtrain.planner import resident
from memtrain.planner.actions import Tier
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile
from memtrain.streamed_models import bring_home
from memtrain.tiling import tiles_of


def plan_units(model: nn.Module, profile: ModelProfile) -> list[Unit]:
    """The profile's units, with the model's parameters."""
    parameters = dict(model.named_parameters())
    return [(unit.name, [(name, parameters[name]) for name in unit.parameters]) for unit in profile.units]


def stream_weights(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    units: Sequence[Unit],
    *,
    plan: Plan,
    profile: ModelProfile,
    engine: Engine,
    stored: StoredWeights | None,
    undo: ExitStack,
) -> ParameterStreamer | None:
    """Weights that the plan has on tiers leave, and come when they are used; None where all stay.

    Args:
        stored: where the weights of a streamed model are; None for any other model.
        undo: is told how they come home, or go back to the streamed model's tier.

    Raises:
        PlanMismatchError: the plan has them on another tier than a streamed model, or other windows.
        OffloadError: a tier cannot serve.
    """
    tiers = {decision.unit: decision.weight_tier for decision in plan.states}
    if stored is not None:
        for unit, members in units:
            if tiers[unit] is Tier.DEVICE:
                bring_home(stored, members)
            elif tiers[unit] is not stored.store.tier:
                raise PlanMismatchError(
                    f"the plan has the weights of {unit} on {tiers[unit].value}, those of this streamed "
                    f"model are on {stored.store.tier.value}: plan with options.force "
                    f'{{"state": {{"weight_tier": "{stored.store.tier.value}"}}}}, or stream the model '
                    "with a budget of one tier"
                )
    if all(tier is Tier.DEVICE for tier in tiers.values()):
        return None
    streamer = ParameterStreamer(
        model,
        blocks,
        units,
        tiers=tiers,
        engine=engine,
        slots=plan.staging.weight_windows,
        borrowed={name for unit in profile.units if unit.block is None for name in unit.borrows},
        placed=None if stored is None else stored.extents,
        tiles=tiles_of(model),
    )
    if stored is None:
        undo.callback(streamer.remove)
    else:
        undo.callback(lambda: stored.take_back(streamer.release()))
    streamer.install()
    resident.trim()  # of what the weights took
    return streamer
