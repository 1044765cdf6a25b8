"""The independent checker: is this plan what it says, for this profile, machine and budget?

It shares nothing with what made the plan but the words (profile, machine, plan): its own arithmetic of bytes,
its own reading of the timeline. Each violation names the rule that broke and the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

from memtrain.planner.actions import MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.check_blocks import impossible, loses
from memtrain.planner.check_peaks import peak_faults
from memtrain.planner.check_rules import Fault, Rule, Violation
from memtrain.planner.check_staging import coding_faults, slab_faults, staging_faults
from memtrain.planner.check_tables import table_faults
from memtrain.planner.check_timeline import timeline_faults
from memtrain.planner.check_weights import impossible_weights
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile

__all__ = ["Rule", "Violation", "check"]


def check(plan: Plan, profile: ModelProfile, machine: Machine, budget: Budget) -> tuple[Violation, ...]:
    """Everything that is wrong with ``plan``; empty when it may be executed.

    An infeasible plan is reported as above capacity. Bytes and times are only looked at once decisions,
    tiers and digests are sound, for they mean nothing before.
    """
    structure = tuple(
        Violation(rule=rule, detail=detail) for rule, detail in _structure(plan, profile, machine, budget)
    )
    if structure:
        return structure
    faults = [
        *staging_faults(plan, profile),
        *coding_faults(plan, machine, budget),
        *slab_faults(plan, profile, machine),
        *peak_faults(plan, profile, machine, budget),
        *_preparing(profile, budget),
        *_bound(plan),
        *_errors(plan, profile),
    ]
    in_a_step = profile.in_a_step(machine.arithmetic_slowdown)
    faults += [(Rule[name], detail) for name, detail in timeline_faults(plan, in_a_step, machine)]
    return tuple(Violation(rule=rule, detail=detail) for rule, detail in faults)


def _structure(plan: Plan, profile: ModelProfile, machine: Machine, budget: Budget) -> Iterator[Fault]:
    if plan.profile_digest != profile.digest:
        yield Rule.PROFILE_DIGEST, f"plan says {plan.profile_digest}, the profile is {profile.digest}"
    if plan.machine_digest != machine.digest:
        yield Rule.MACHINE_DIGEST, f"plan says {plan.machine_digest}, the machine is {machine.digest}"
    if plan.micro_batches != profile.micro_batches:
        yield Rule.MICRO_BATCHES, f"plan {plan.micro_batches}, profile {profile.micro_batches}"
    if plan.micro_batch_order is MicroBatchOrder.VERTICAL and profile.micro_batches < 2:
        yield Rule.ORDER, f"vertical with {profile.micro_batches} micro-batch"
    if (
        plan.micro_batch_order is MicroBatchOrder.VERTICAL
        and plan.update_schedule is UpdateSchedule.IN_BACKWARD
    ):
        yield Rule.ORDER, "vertical with updates in backward"
    if [b.block for b in plan.blocks] != list(range(len(profile.blocks))):
        yield Rule.BLOCK_DECIDED_ONCE, f"blocks {[b.block for b in plan.blocks]} of {len(profile.blocks)}"
    if [s.unit for s in plan.states] != [u.name for u in profile.units]:
        yield (
            Rule.UNIT_DECIDED_ONCE,
            f"units {[s.unit for s in plan.states]} of {[u.name for u in profile.units]}",
        )
    linked = {link.tier for link in machine.links}
    usable = {Tier.DEVICE} | {tier for tier in linked if budget.capacity(tier) > 0}
    for block in plan.blocks:
        for tier in {block.saved_tier, block.input_tier, block.rest_tier} - usable:
            yield Rule.TIER_EXISTS, f"block {block.block} uses {tier.value}"
        if block.block < len(profile.blocks):
            measured = profile.blocks[block.block]
            for reason in impossible(measured, block, exact_only=plan.exact_only):
                yield Rule.RECOMPUTABLE, f"block {block.block} ({measured.name}): {reason}"
    for state in plan.states:
        for tier in {state.gradient_tier, state.optimizer_tier, state.weight_tier} - usable:
            yield Rule.TIER_EXISTS, f"unit {state.unit} uses {tier.value}"
    yield from table_faults(profile, machine, budget)
    if [s.unit for s in plan.states] == [u.name for u in profile.units]:
        yield from ((Rule.MOVABLE, reason) for reason in impossible_weights(plan, profile))


def _preparing(profile: ModelProfile, budget: Budget) -> Iterator[Fault]:
    """The budget holds for the whole process, not from the first step on."""
    over = profile.prepare_peak_bytes - budget.capacity(Tier.DEVICE)
    if over > 0:
        yield Rule.PREPARING, f"{profile.prepare_peak_bytes} bytes, {over} more than the device's budget"


def _errors(plan: Plan, profile: ModelProfile) -> Iterator[Fault]:
    """Every byte that a block saves in the plain form counts with the error of the form it gets."""
    saved = lost = 0.0
    for block, decision in zip(profile.blocks, plan.blocks, strict=True):
        saved += block.saved_bytes
        lost += block.saved_bytes * loses(block, decision)
    mean = lost / saved if saved else 0.0
    if abs(mean - plan.error) > 1e-8:
        yield Rule.ERROR_BUDGET, f"forms lose {mean:.9f} of gradients, the plan says {plan.error:.9f}"
    if plan.error_budget is not None and mean > plan.error_budget + 1e-8:
        yield Rule.ERROR_BUDGET, f"forms lose {mean:.9f} of gradients, the budget is {plan.error_budget}"


def _bound(plan: Plan) -> Iterator[Fault]:
    if plan.status not in ("optimal", "gap", "heuristic", "infeasible"):
        yield Rule.GAP, f"unknown status {plan.status!r}"
    if plan.status == "infeasible":
        return
    if plan.lower_bound_seconds > plan.step_seconds + 1e-9:
        yield Rule.GAP, f"bound {plan.lower_bound_seconds} above the step's {plan.step_seconds} seconds"
    gap = (plan.step_seconds - plan.lower_bound_seconds) / plan.step_seconds if plan.step_seconds else 0.0
    if abs(gap - plan.gap) > 1e-6:
        yield Rule.GAP, f"gap is {gap:.6f}, the plan says {plan.gap:.6f}"
