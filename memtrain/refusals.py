"""What ``prepare`` refuses, each with the value, the limit and the remedy in its message."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from memtrain.arena.passes import ALLOCATORS
from memtrain.copy_guard import is_planned
from memtrain.offload.device import Device
from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.in_backward import refuse_combination
from memtrain.offload.optimizer import OffloadedOptimizer
from memtrain.planner.actions import MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.check import check
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile
from memtrain.planner.units import format_gib
from memtrain.tiling import tiles_of


class PrepareError(ValueError):
    """What ``prepare`` was given does not fit together; the message names it and the remedy."""


class InfeasibleError(RuntimeError):
    """No plan fits the budget.

    Attributes:
        plan: its ``shortfall_bytes`` says what is short, ``remedies`` what would help, the cheapest first.
    """

    def __init__(self, plan: Plan) -> None:
        short = ", ".join(
            f"{tier.value} by {size} bytes ({format_gib(size)})" for tier, size in plan.shortfall_bytes
        )
        remedies = "; or ".join(plan.remedies) or "none known"
        super().__init__(f"the budget cannot work: short of {short or 'memory'}. Remedies: {remedies}")
        self.plan = plan


def refuse_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises PrepareError where a session is open, or where the model recomputes by itself."""
    if is_planned(model) or isinstance(optimizer, OffloadedOptimizer):
        raise PrepareError(
            "the model or the optimizer belongs to a session that is open: close it with session.close() "
            "before preparing again, and pass the optimizer that was given to it, not session.optimizer"
        )
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        raise PrepareError(
            "the model has its own gradient checkpointing switched on, which would work against the plan: "
            "call model.gradient_checkpointing_disable() first; the plan recomputes where that is best"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model is. Raises PrepareError where that is not one CPU or CUDA device."""
    devices = {parameter.device for parameter in model.parameters()}
    names = ", ".join(sorted(map(str, devices))) or "no device, for it has none"
    if len(devices) != 1 or {device.type for device in devices} - {"cpu", "cuda"}:
        raise PrepareError(
            f"the model's parameters are on {names}: memtrain trains on the CPU or on one CUDA device; move "
            f"all of the model there with model.to()"
        )
    return next(iter(devices))


def refuse_device(device: Device, place: torch.device, machine: Machine | None) -> None:
    """Raises PrepareError where ``device`` is not ``place``, which is where the model is."""
    if device.place != place:
        assert machine is not None
        raise PrepareError(
            f"the model is on {place}, machine {machine.name} computes on {machine.device}: move the model "
            f"there with model.to(), or plan for a machine whose device is {place}"
        )


def refuse_allocator(allocator: str, place: torch.device) -> None:
    """Raises PrepareError where it is unknown, or not for a model on ``place``."""
    if allocator not in ALLOCATORS or (allocator == "planned" and place.type != "cpu"):
        raise PrepareError(
            f"allocator is {allocator!r} for a model on {place}: give one of {', '.join(ALLOCATORS)}; "
            "planned is for models on the CPU"
        )


def refuse_with_tables(allocator: str, place: torch.device) -> None:
    """Raises PrepareError where tables by rows cannot be."""
    if allocator == "planned":
        raise PrepareError(
            "allocator is 'planned', and sparse_optimizer has tables by rows, of which each batch uses "
            "another number: its requests follow no plan. Use allocator 'default'"
        )
    if place.type != "cpu":
        raise PrepareError(
            f"sparse_optimizer has tables by rows, which are for models on the CPU, and the model is on "
            f"{place}: leave sparse_optimizer out, and the embeddings with sparse=False"
        )


def refuse_in_backward(options: PlannerOptions | None, plan: Plan | None, nonfinite: str) -> None:
    """Raises PlanMismatchError where updates may come during backward, and gradients are looked at first."""
    chosen = plan.update_schedule.value if plan is not None else options and options.update_schedule
    offered = plan is None and options is not None and options.gradients_untouched
    if offered or chosen == UpdateSchedule.IN_BACKWARD.value:
        refuse_combination(nonfinite)


def in_one_thread(options: PlannerOptions, plan: Plan | None) -> PlannerOptions:
    """``options`` without the order in which several passes are under way at once: addresses are planned for
    one, and the others would find their memory beside an arena that is resident.

    Raises:
        PrepareError: that order was asked for.
    """
    chosen = options.micro_batch_order if plan is None else plan.micro_batch_order.value
    if chosen == MicroBatchOrder.VERTICAL.value:
        raise PrepareError(
            "allocator is 'planned', and micro-batches are to pass the blocks together (micro_batch_order "
            "vertical): addresses are planned for one pass at a time. Use allocator 'default', or "
            "micro_batch_order 'horizontal'"
        )
    return dataclasses.replace(options, micro_batch_order=MicroBatchOrder.HORIZONTAL.value)


def refuse_broken(plan: Plan, profile: ModelProfile, machine: Machine, budget: Budget) -> None:
    """Raises PlanMismatchError where the checker finds that the plan does not hold."""
    broken = check(plan, profile, machine, budget)
    if broken:
        raise PlanMismatchError(
            "the plan does not hold for this model, machine and budget: "
            f"{'; '.join(map(str, broken[:3]))}. Plan again"
        )


def overwrites_disk(plan: Plan) -> bool:
    """Whether optimizer state or weights lie on nvme, where steps write them again."""
    return any(Tier.NVME in (state.optimizer_tier, state.weight_tier) for state in plan.states)


def refuse_overlaid_tiles(plan: Plan, model: nn.Module) -> None:
    """Raises PlanMismatchError where gradients would lie where activations were, for a model in tiles."""
    shared_bytes = plan.staging.overlaid_bytes + plan.staging.update_overlaid_bytes
    if shared_bytes and tiles_of(model):
        raise PlanMismatchError(
            f"the plan has gradients and updates share {shared_bytes} bytes with activations "
            "(options.overlay), and the model has layers in tiles, whose gradients have a slab of their own: "
            "plan with overlay=False"
        )


def check_spare(plan: Plan, budget: Budget, spare_bytes: int) -> None:
    """Raises PrepareError where the plan leaves less of the nvme budget."""
    free = budget.nvme_bytes - plan.peak(Tier.NVME)
    if spare_bytes > free and overwrites_disk(plan):
        raise PrepareError(
            f"{spare_bytes} bytes of nvme are to be spared for snapshots, the plan leaves {free} of "
            f"{budget.nvme_bytes}: raise budget.nvme by {spare_bytes - free} bytes, or spare less"
        )
