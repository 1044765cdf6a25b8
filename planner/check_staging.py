"""The checker's part for staging: slots, slabs and coding, large enough and present."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from memtrain.planner.actions import MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.check_blocks import PAGE, again, left_behind, room, sent, whole_pages
from memtrain.planner.check_rules import Fault, Rule
from memtrain.planner.check_units import is_on_cpu, one_by_one, parameters_of, tensors_of_state
from memtrain.planner.check_weights import weight_coding_faults, window_faults
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile, UnitProfile


def staging_faults(plan: Plan, profile: ModelProfile) -> Iterator[Fault]:
    """Where a ring has too few slots, or too small ones, for what passes through it."""
    staging = plan.staging
    saved = inputs = 0
    groups = 1
    for block, decision in zip(profile.blocks, plan.blocks, strict=True):
        away = [tier for tier in Tier if tier is not Tier.DEVICE]
        leaves = room(left_behind(block, decision), *away)
        if again(decision):
            inputs, groups = max(inputs, leaves), max(groups, len(sent(block, decision)))
        else:
            saved = max(saved, leaves)
    yield from _ring("saved", saved, staging.saved_slots, staging.saved_slot_bytes, 1)
    yield from _ring("input", inputs, staging.input_slots, staging.input_slot_bytes, groups)
    gradients_leave = any(s.gradient_tier is not Tier.DEVICE for s in plan.states)
    yield from _ring(
        "gradient", PAGE if gradients_leave else 0, staging.gradient_slots, staging.gradient_slot_bytes, 2
    )
    yield from ((Rule.STAGING, detail) for detail in window_faults(plan, profile))
    elements = staging.update_shard_elements
    if elements <= 0 or (not profile.elementwise and elements < profile.largest_parameter_elements):
        yield (
            Rule.STAGING,
            f"update shard of {elements} elements, the largest parameter has "
            f"{profile.largest_parameter_elements}",
        )
    moves = any(Tier.DEVICE not in {s.optimizer_tier} & {s.gradient_tier} for s in plan.states)
    if moves and any(unit.updates for unit in profile.units):
        yield from _ring(
            "update", _whole_slot(profile, elements), staging.update_slots, staging.update_slot_bytes, 3
        )
    elif moves:
        one = profile.state_bytes_per_element + profile.gradient_bytes_per_element
        one += profile.update_workspace_bytes_per_element
        # Each piece of a shard (one per 64 Ki elements, and what is left over) puts its gradient, its
        # workspace and its state tensors on pages of their own.
        regions = 2 + tensors_of_state(profile)
        need = whole_pages(math.ceil(elements * one)) + PAGE * regions * (1 + elements // 65536)
        yield from _ring("update", need, staging.update_slots, staging.update_slot_bytes, 3)


def coding_faults(plan: Plan, machine: Machine, budget: Budget) -> Iterator[Fault]:
    """State is coded exactly where the machine was measured so, in the memory that this was found to take;
    weights there at most, and only where some live."""
    wanted = {
        (link.tier, codec.name, codec.segment_bytes, codec.staging_bytes)
        for link in machine.links
        if (codec := link.state_codec) is not None and budget.capacity(link.tier)
    }
    found = [(c.tier, c.codec, c.segment_bytes, c.staging_bytes) for c in plan.staging.coded]
    if set(found) != wanted or len(found) != len(wanted):
        yield Rule.STAGING, f"state is coded as {found}, the machine was measured with {sorted(wanted)}"
    yield from ((Rule.STAGING, detail) for detail in weight_coding_faults(plan, machine))


def _whole_slot(profile: ModelProfile, elements: int) -> int:
    """What the parameters fill that pass through a slot together: a run of a unit's, ended by the first one
    with which they would have more than ``elements``."""
    most = 0
    for unit in profile.units:
        run: list[tuple[int, int]] = []
        for update in unit.updates:
            if sum(count for count, _ in run) + update.elements > elements:
                run = []
            run.append((update.elements, update.record_bytes + update.gradient_bytes))
            most = max(most, sum(size for _, size in run))
    return most


def slab_faults(plan: Plan, profile: ModelProfile, machine: Machine) -> Iterator[Fault]:
    """On a CPU all that stays on the device has a slot or a place in a slab; elsewhere there are no slabs."""
    staging = plan.staging
    gradients = 0
    wanted = [0] * len(plan.blocks)
    if is_on_cpu(machine):
        decided = zip(profile.blocks, plan.blocks, strict=True)
        wanted = [room(left_behind(block, decision), Tier.DEVICE) for block, decision in decided]
        stay = [
            _resident_gradient(profile, unit)
            for unit, state in zip(profile.units, plan.states, strict=True)
            if state.gradient_tier is Tier.DEVICE
        ]
        gradients = max([0, *stay]) if one_by_one(plan) else sum(stay)
    found = staging.kept_bytes or (0,) * len(wanted)
    if len(found) != len(wanted):
        yield Rule.STAGING, f"{len(found)} places for what blocks keep, there are {len(wanted)} blocks"
    for index, (size, need) in enumerate(zip(found, wanted, strict=False)):
        if size < need or (size and not need) or size % PAGE:
            yield Rule.STAGING, f"block {index} has a place of {size} bytes for what it keeps, needs {need}"
    if staging.gradient_slab_bytes < gradients or (staging.gradient_slab_bytes and not gradients):
        yield (
            Rule.STAGING,
            f"gradient slab of {staging.gradient_slab_bytes} bytes, the gradients that stay take {gradients}",
        )
    overlaid, least = staging.overlaid_bytes, _used_at_once(plan, profile)
    if overlaid and (
        overlaid < 0
        or overlaid % PAGE
        or plan.micro_batch_order is MicroBatchOrder.VERTICAL
        or sum(staging.kept_bytes) + staging.gradient_slab_bytes - overlaid < least
    ):
        yield Rule.STAGING, f"slabs overlap by {overlaid} bytes; at once {least} bytes of them are in use"
    yield from _update_over_passes(plan, profile, machine)
    if staging.gradient_slab_bytes % PAGE:
        yield Rule.STAGING, f"gradient slab of {staging.gradient_slab_bytes} bytes, not a multiple of {PAGE}"


def _update_over_passes(plan: Plan, profile: ModelProfile, machine: Machine) -> Iterator[Fault]:
    """Where the update's ring lies over memory of the passes, they take turns; all there is must do for
    either of both: rings, places and gradients of a pass; all gradients and the ring of an update."""
    s = plan.staging
    shared = s.update_overlaid_bytes
    if not shared:
        return
    ring = s.update_slots * s.update_slot_bytes
    others = s.saved_slots * s.saved_slot_bytes + s.input_slots * s.input_slot_bytes
    others += s.gradient_slots * s.gradient_slot_bytes
    waiting = (
        (plan.micro_batches - 1) * sum(s.kept_bytes) * (plan.micro_batch_order is MicroBatchOrder.VERTICAL)
    )
    there = others + ring + waiting + sum(s.kept_bytes) + s.gradient_slab_bytes - s.overlaid_bytes - shared
    in_pass = others + waiting + _used_at_once(plan, profile)
    in_update = ring + s.gradient_slab_bytes
    if not is_on_cpu(machine) or plan.update_schedule is not UpdateSchedule.SEQUENTIAL:
        yield (
            Rule.STAGING,
            f"the update's ring shares {shared} bytes with the passes, but is in use while they run "
            f"(update_schedule {plan.update_schedule.value} on {machine.device})",
        )
    if not 0 < shared <= ring or shared % PAGE or there < max(in_pass, in_update):
        yield (
            Rule.STAGING,
            f"the update's ring of {ring} bytes shares {shared} with the passes: {there} bytes are left, "
            f"a pass needs {in_pass} and an update {in_update}",
        )


def _used_at_once(plan: Plan, profile: ModelProfile) -> int:
    """The most that the places of blocks and of gradients hold at one time: walks backward, where a block's
    place is left when all gradients of its unit are there. With several micro-batches, or where a unit's
    gradients have the place of another's, all may be there at once."""
    alive = sum(plan.staging.kept_bytes)
    if plan.micro_batches > 1 or one_by_one(plan):
        return alive + plan.staging.gradient_slab_bytes
    new: dict[int | None, int] = defaultdict(int)
    for unit, state in zip(profile.units, plan.states, strict=True):
        if state.gradient_tier is Tier.DEVICE:
            when = len(plan.blocks) if unit.name == "epilogue" else unit.block
            new[when] += _resident_gradient(profile, unit)
    most = alive = alive + new[len(plan.blocks)]
    for block, place in reversed(list(enumerate(plan.staging.kept_bytes or (0,) * len(plan.blocks)))):
        alive += new[block]
        most = max(most, alive)
        alive -= place
    return max(most, alive + new[None])


def _resident_gradient(profile: ModelProfile, unit: UnitProfile) -> int:
    """A unit's gradients in a slab: a page more per parameter."""
    if unit.gradient_bytes == 0:
        return 0
    return whole_pages(unit.gradient_bytes + parameters_of(profile, unit) * PAGE)


def _ring(name: str, need: int, slots: int, slot_bytes: int, least: int) -> Iterator[Fault]:
    if need and (slots < least or slot_bytes < need):
        yield Rule.STAGING, f"{name} ring has {slots} slots of {slot_bytes} bytes, needs {least} of {need}"
    if slot_bytes % PAGE:
        yield Rule.STAGING, f"{name} slot of {slot_bytes} bytes is not a multiple of {PAGE}"
