"""The parts that stand between a plan and its executors, in the order in which ``Session`` installs them.

What is told to ``undo`` takes the part away again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from torch import nn

from memtrain import malloc
from memtrain.arena.passes import PlannedPasses
from memtrain.copy_guard import CopyGuard
from memtrain.forms import BlockForms
from memtrain.offload.codec import Codec
from memtrain.offload.device import Device
from memtrain.offload.engine import Engine, open_engine
from memtrain.offload.gradient_slab import GradientSlab
from memtrain.offload.in_backward import guard_modules, is_applied
from memtrain.offload.offloaded_grad import OffloadedGrad
from memtrain.offload.optimizer import OffloadedOptimizer
from memtrain.offload.overlaid_slab import OverlaidSlab
from memtrain.offload.shards import Unit
from memtrain.offload.store import Store
from memtrain.planner import resident
from memtrain.planner.actions import PLAIN, Tier, UpdateSchedule
from memtrain.planner.decisions import gradients_come_and_go
from memtrain.planner.machine import Budget
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile
from memtrain.planner.weight_windows import place_of
from memtrain.reclaim import Reclaimer, transients_of
from memtrain.tiling import tiles_of
from memtrain.weight_guard import WeightGuard

_ARENA_ALLOWANCE = 1.125
"""Of the planned peak, where the budget has as much: a program may hold more graphs at once than the plan
foresaw. What was foreseen fits without: state and gradients, which stay, are reserved first, and what a pass
over the blocks saves comes and goes behind them."""


def set_use_cache(model: nn.Module, value: bool | None) -> bool | None:
    """Set the configuration's switch where there is one; what it was before.

    Training has no use for a key-value cache, and a block that is recomputed would fill it twice.
    """
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if not isinstance(before, bool) or value is None:
        return None
    config.use_cache = value  # type: ignore[union-attr]
    return before


def put_forms_on(
    forms: BlockForms, blocks: Sequence[tuple[str, nn.Module]], plan: Plan, undo: ExitStack
) -> list[nn.Module]:
    """Give the blocks the forms of the plan; the modules whose forward that bypasses."""
    bypassing: list[nn.Module] = []
    for (name, _), decision in zip(blocks, plan.blocks, strict=True):
        if decision.form != PLAIN:
            undo.callback(forms.take_off, name)
            forms.put_on(name, decision.form)
            bypassing += forms.bypassing(name, decision.form)
    return bypassing


def open_tiers(
    plan: Plan,
    budget: Budget,
    device: Device,
    *,
    codecs: Mapping[Tier, Codec],
    weight_codecs: Mapping[Tier, Codec],
    lent: Mapping[Tier, Store],
    spare_state_bytes: int,
) -> Engine:
    """The stores of the tiers, with room for what the plan sends there and ``spare_state_bytes`` of nvme.

    Args:
        lent: those that are open already, and stay so.
    """
    staged = sum(
        line.size_bytes for line in plan.bill if (line.tier, line.category) == (Tier.HOST, "staging")
    )
    sent = {
        tier: int((plan.peak(tier) - size) * _ARENA_ALLOWANCE)
        for tier, size in ((Tier.NVME, 0), (Tier.HOST, staged))
    }
    sent[Tier.NVME] += spare_state_bytes
    return open_engine(
        budget,
        device,
        nvme_bytes=min(sent[Tier.NVME], budget.nvme_bytes) if budget.nvme_bytes else None,
        host_bytes=min(sent[Tier.HOST], budget.host_bytes - staged),
        codecs=codecs,
        weight_codecs=weight_codecs,
        lent=lent,
    )


def make_gradient_slab(
    plan: Plan, profile: ModelProfile, optimizer: OffloadedOptimizer, overlaid: OverlaidSlab | None
) -> GradientSlab:
    """Where gradients lie that stay: in ``overlaid`` where the plan has them share what blocks keep."""
    return GradientSlab(
        index=optimizer.index,
        tiers={decision.unit: decision.gradient_tier for decision in plan.states},
        slab_bytes=plan.staging.gradient_slab_bytes,
        before_overwrite=optimizer.ensure,
        one_unit_at_a_time=gradients_come_and_go(profile, plan.update_schedule),
        overlaid=overlaid if overlaid is not None and overlaid.has_gradients else None,
        latest_first=[unit.name for unit in sorted(profile.units, key=place_of, reverse=True)],
    )


def bring_gradients_back(model: nn.Module) -> None:
    """Gradients that had left become ordinary tensors; those of what is updated already go."""
    for parameter in model.parameters():
        if is_applied(parameter.grad):
            parameter.grad = None
        elif isinstance(parameter.grad, OffloadedGrad):
            parameter.grad = parameter.grad.materialize()


def put_guards_on(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    plan: Plan,
    units: Sequence[Unit],
    optimizer: OffloadedOptimizer,
    bypassing: Sequence[nn.Module],
    undo: ExitStack,
) -> None:
    """The model is not copied, nor read between the halves of a step, nor before its update."""
    undo.callback(CopyGuard(model).remove)
    if plan.update_schedule is UpdateSchedule.IN_BACKWARD:
        for hook in guard_modules([model, *(block for _, block in blocks)], optimizer.refuse_half_done):
            undo.callback(hook.remove)
    if plan.update_schedule is UpdateSchedule.AHEAD:
        guard = WeightGuard(
            model, blocks, units, optimizer.ensure, bypassing=bypassing, tiles=tiles_of(model)
        )
        undo.callback(guard.remove)


def make_reclaimer(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    optimizer: OffloadedOptimizer,
    plan: Plan,
    profile: ModelProfile,
    passes: PlannedPasses | None,
) -> Reclaimer:
    """What asks freed memory back near the plan's peak, on a CPU."""
    return Reclaimer(
        model,
        blocks,
        optimizer,
        limit_bytes=plan.peak(Tier.DEVICE),
        transients=transients_of(plan, profile),
        is_served=lambda: passes is not None and passes.follows,
        rss_bytes=resident.rss_bytes if passes is None else passes.occupied_bytes,
        # While a step follows planned addresses all that it frees elsewhere is kept (``PlannedAllocator``).
        keep_freed=lambda keep: not (passes is not None and passes.follows) and malloc.keep_freed(keep),
    )
