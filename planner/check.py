"""The independent checker: is this plan what it says, for this profile, machine and budget?

It shares nothing with what made the plan but the words (profile, machine, plan): its own arithmetic of bytes,
its own reading of the timeline. Each violation names the rule that broke and the numbers.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from memtrain.planner.actions import Action, MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.check_blocks import (
    PAGE,
    again,
    compared,
    during_backward,
    gathered,
    impossible,
    left_behind,
    looking,
    loses,
    room,
    running,
    sent,
    whole_pages,
)
from memtrain.planner.check_timeline import timeline_faults
from memtrain.planner.check_weights import impossible_weights, resident_weights, weights_on, window_faults
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile, UnitProfile


class Rule(str, Enum):
    """What a plan must obey."""

    PROFILE_DIGEST = "made for another profile"
    MACHINE_DIGEST = "made for another machine"
    MICRO_BATCHES = "another number of micro-batches"
    ORDER = "vertical order only where there is something to order"
    BLOCK_DECIDED_ONCE = "every block decided exactly once"
    UNIT_DECIDED_ONCE = "every unit decided exactly once"
    TIER_EXISTS = "only tiers that machine and budget have"
    RECOMPUTABLE = "recompute, and other forms, only where they are possible"
    ERROR_BUDGET = "what lossy forms lose is what the plan says, and within its error budget"
    MOVABLE = "weights leave the device only where they may"
    STAGING = "staging slots large enough and present"
    BILL = "the bill sums to the peaks and covers every byte"
    DEVICE_PEAK = "the device's peak is what the decisions need"
    TIER_PEAK = "a tier's peak is what the decisions put there"
    CAPACITY = "no tier above its budget"
    PREPARING = "loading and measuring the model stayed inside the budget"
    OVERLAP = "one resource does one thing at a time"
    DEPENDENCY = "nothing starts before what it needs"
    DURATION = "nothing is faster than profile and links allow"
    WINDOWS = "no more units of weights in memory than there are windows"
    BYTES_MOVED = "bytes moved are those of the decisions"
    STEP_SECONDS = "the step ends with its last event"
    GAP = "bound, gap and status agree"


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A rule that does not hold, and the numbers."""

    rule: Rule
    detail: str


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
        *_staging(plan, profile),
        *_coding(plan, machine, budget),
        *_slabs(plan, profile, machine),
        *_peaks(plan, profile, machine, budget),
        *_preparing(profile, budget),
        *_bound(plan),
        *_errors(plan, profile),
    ]
    in_a_step = profile.in_a_step(machine.arithmetic_slowdown)
    faults += [(Rule[name], detail) for name, detail in timeline_faults(plan, in_a_step, machine)]
    return tuple(Violation(rule=rule, detail=detail) for rule, detail in faults)


Fault = tuple[Rule, str]


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
    if [s.unit for s in plan.states] == [u.name for u in profile.units]:
        yield from ((Rule.MOVABLE, reason) for reason in impossible_weights(plan, profile))


def _staging(plan: Plan, profile: ModelProfile) -> Iterator[Fault]:
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
    if staging.weight_slot_bytes % PAGE:
        yield Rule.STAGING, f"window of {staging.weight_slot_bytes} bytes is not a multiple of {PAGE}"
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
        regions = 2 + _tensors_of_state(profile)
        need = whole_pages(math.ceil(elements * one)) + PAGE * regions * (1 + elements // 65536)
        yield from _ring("update", need, staging.update_slots, staging.update_slot_bytes, 3)


def _coding(plan: Plan, machine: Machine, budget: Budget) -> Iterator[Fault]:
    """State is coded exactly where the machine was measured so, in the memory that this was found to take."""
    wanted = {
        (link.tier, codec.name, codec.segment_bytes, codec.staging_bytes)
        for link in machine.links
        if (codec := link.state_codec) is not None and budget.capacity(link.tier)
    }
    found = [(c.tier, c.codec, c.segment_bytes, c.staging_bytes) for c in plan.staging.coded]
    if set(found) != wanted or len(found) != len(wanted):
        yield Rule.STAGING, f"state is coded as {found}, the machine was measured with {sorted(wanted)}"


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


def _slabs(plan: Plan, profile: ModelProfile, machine: Machine) -> Iterator[Fault]:
    """On a CPU all that stays on the device has a slot or a place in a slab; elsewhere there are no slabs."""
    staging = plan.staging
    gradients = 0
    wanted = [0] * len(plan.blocks)
    if _on_cpu(machine):
        decided = zip(profile.blocks, plan.blocks, strict=True)
        wanted = [room(left_behind(block, decision), Tier.DEVICE) for block, decision in decided]
        stay = [
            _resident_gradient(profile, unit)
            for unit, state in zip(profile.units, plan.states, strict=True)
            if state.gradient_tier is Tier.DEVICE
        ]
        gradients = max([0, *stay]) if _one_by_one(plan) else sum(stay)
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
        or _graphs(plan) > 1
        or sum(staging.kept_bytes) + staging.gradient_slab_bytes - overlaid < least
    ):
        yield Rule.STAGING, f"slabs overlap by {overlaid} bytes; at once {least} bytes of them are in use"
    if staging.gradient_slab_bytes % PAGE:
        yield Rule.STAGING, f"gradient slab of {staging.gradient_slab_bytes} bytes, not a multiple of {PAGE}"


def _used_at_once(plan: Plan, profile: ModelProfile) -> int:
    """The most that the places of blocks and of gradients hold at one time: walks backward, where a block's
    place is left when all gradients of its unit are there. With several micro-batches, or where a unit's
    gradients have the place of another's, all may be there at once."""
    alive = sum(plan.staging.kept_bytes)
    if plan.micro_batches > 1 or _one_by_one(plan):
        return alive + plan.staging.gradient_slab_bytes
    new: dict[int | None, int] = defaultdict(int)
    for unit, state in zip(profile.units, plan.states, strict=True):
        if state.gradient_tier is Tier.DEVICE:
            when = len(plan.blocks) if unit.name == "epilogue" else unit.block
            new[when] += _resident_gradient(profile, unit)
    most = alive = alive + new[len(plan.blocks)]
    for block in reversed(range(len(plan.staging.kept_bytes))):
        alive += new[block]
        most = max(most, alive)
        alive -= plan.staging.kept_bytes[block]
    return max(most, alive + new[None])


def _one_by_one(plan: Plan) -> bool:
    """Each unit's gradients are used up before the next unit's come."""
    return plan.update_schedule is UpdateSchedule.IN_BACKWARD and plan.micro_batches == 1


def _on_cpu(machine: Machine) -> bool:
    return machine.device.startswith("cpu")


def _resident_gradient(profile: ModelProfile, unit: UnitProfile) -> int:
    """A unit's gradients in a slab: a page more per parameter."""
    if unit.gradient_bytes == 0:
        return 0
    return whole_pages(unit.gradient_bytes + _parameters(profile, unit) * PAGE)


def _ring(name: str, need: int, slots: int, slot_bytes: int, least: int) -> Iterator[Fault]:
    if need and (slots < least or slot_bytes < need):
        yield Rule.STAGING, f"{name} ring has {slots} slots of {slot_bytes} bytes, needs {least} of {need}"
    if slot_bytes % PAGE:
        yield Rule.STAGING, f"{name} slot of {slot_bytes} bytes is not a multiple of {PAGE}"


def _device_need(plan: Plan, profile: ModelProfile, machine: Machine) -> int:
    """Walks the step in time, counting what comes and goes; what lives in slabs does neither."""
    on_cpu = _on_cpu(machine)
    resident = profile.baseline_bytes + resident_weights(plan, profile) + profile.allocator_slack_bytes
    s = plan.staging
    resident += s.weight_slots * s.weight_slot_bytes
    resident += _staged(plan, profile, machine)[Tier.DEVICE] + s.gradient_slab_bytes - s.overlaid_bytes
    graphs = _graphs(plan)
    others = graphs - 1  # micro-batches that wait at an edge of the block that is worked on
    resident += graphs * sum(s.kept_bytes)
    gradient: dict[object, int] = defaultdict(int)
    for unit, state in zip(profile.units, plan.states, strict=True):
        resident += unit.resident_state_bytes
        if state.optimizer_tier is Tier.DEVICE:
            resident += unit.state_bytes
        if state.gradient_tier is Tier.DEVICE and not on_cpu:
            where = unit.block if unit.block is not None else ("end" if unit.name == "epilogue" else "start")
            gradient[where] += unit.gradient_bytes
    every = sum(gradient.values())
    many, ahead = profile.micro_batches > 1, plan.update_schedule is UpdateSchedule.AHEAD
    held = every if many or ahead else 0
    peak = held + profile.prologue_peak_bytes + others * profile.boundary_bytes
    if not many and ahead:
        held -= gradient["start"]
    kept, stack = others * profile.boundary_bytes, []
    for index, (block, decision) in enumerate(zip(profile.blocks, plan.blocks, strict=True)):
        stays = 0
        if not on_cpu:
            left = left_behind(block, decision)
            stays = sum(size for tier, size, _ in left if tier is Tier.DEVICE)
        rows = compared(block, decision)
        extra = 0 if decision.action is Action.KEEP else stays
        runs = running(block, decision)
        during = runs.saved_bytes + runs.forward_transient_bytes + gathered(block, decision) + rows
        most = kept + others * (stays + rows)
        peak = max(peak, held + most + extra + during, held + most + looking(block, decision))
        peak = max(peak, (every + kept + _workspace(plan, profile, index)) if ahead else 0)
        if not many and ahead:
            held -= gradient[index]
        kept += graphs * (stays + rows)
        stack.append((block, decision, graphs * (stays + rows)))
    held = every if many else gradient["end"]
    late = profile.persistent_backward_bytes
    peak = max(peak, held + kept + profile.epilogue_peak_bytes + others * late)
    if ahead:
        peak = max(peak, every + kept + _workspace(plan, profile, None, "epilogue"))
    at_once = plan.update_schedule is UpdateSchedule.IN_BACKWARD
    alone = _one_by_one(plan)
    if at_once:
        beside = _beside_update(plan, profile, machine, None, "epilogue")
        peak = max(peak, held + kept + beside)
    for index in reversed(range(len(stack))):
        block, decision, stays = stack[index]
        held = gradient[index] if alone else held + (0 if many else gradient[index])
        local = during_backward(block, decision)
        peak = max(peak, held + kept + local + graphs * late)
        kept -= stays
        if at_once:
            peak = max(peak, held + kept + _beside_update(plan, profile, machine, index))
    held = gradient["start"] if alone else every
    peak = max(peak, held + kept + profile.prologue_peak_bytes + graphs * late)
    if at_once:
        return resident + max(peak, held + _beside_update(plan, profile, machine, None, "prologue"))
    places: list[tuple[int | None, str]] = [(None, "prologue")]
    if not ahead:
        places += [(None, "epilogue"), *((i, "") for i in range(len(stack)))]
    return resident + max(peak, every + max(_workspace(plan, profile, *place) for place in places))


def _beside_update(
    plan: Plan, profile: ModelProfile, machine: Machine, block: int | None, part: str = ""
) -> int:
    """The largest update at one place of a backward pass, and what that pass holds meanwhile: gradients of
    tied tables, that of a block's input, and, where gradients lie in a slab, the unit's last one outside."""
    largest = 0
    for unit, state in zip(profile.units, plan.states, strict=True):
        if unit.block == block and (block is not None or (unit.name == "epilogue") is (part == "epilogue")):
            beside = _workspace(plan, profile, block, part) + profile.persistent_backward_bytes
            beside += max([0, *(each.input_bytes for each in profile.blocks)])
            if _on_cpu(machine) and state.gradient_tier is Tier.DEVICE and unit.gradient_bytes:
                beside += profile.largest_gradient_bytes
            largest = max(largest, beside)
    return largest


def _graphs(plan: Plan) -> int:
    """How many micro-batches lie between their forward and their backward at one time."""
    return plan.micro_batches if plan.micro_batch_order is MicroBatchOrder.VERTICAL else 1


def _staged(plan: Plan, profile: ModelProfile, machine: Machine) -> dict[Tier, int]:
    """Bytes of rings by tier. Beside a GPU they are the host's, and the GPU holds part of each again: two
    blocks' activations, two update shards, the gradients' ring, and one gradient that is on its way out."""
    s = plan.staging
    rings = [
        (s.saved_slots, s.saved_slot_bytes, 2),
        (s.input_slots, s.input_slot_bytes, 2),
        (s.gradient_slots, s.gradient_slot_bytes, s.gradient_slots),
        (s.update_slots, s.update_slot_bytes, 2),
    ]
    whole = sum(slots * size for slots, size, _ in rings) + sum(c.staging_bytes for c in s.coded)
    if _on_cpu(machine):
        return {Tier.DEVICE: whole, Tier.HOST: 0}
    again = sum(copies * size for slots, size, copies in rings if slots)
    again += profile.largest_gradient_bytes if s.gradient_slots else 0
    # What weights pass through lies on both sides.
    return {Tier.DEVICE: again, Tier.HOST: whole + s.weight_slots * s.weight_slot_bytes}


def _workspace(plan: Plan, profile: ModelProfile, block: int | None, part: str = "") -> int:
    """Temporaries of the largest update at one place: of state that stays on the device, and of parameters
    that are updated whole, wherever their state is."""
    largest = 0.0
    for unit, state in zip(profile.units, plan.states, strict=True):
        here = unit.block == block
        if block is None and part:
            here = here and (unit.name == "epilogue") is (part == "epilogue")
        if not here:
            continue
        if unit.updates:
            refresh = max(update.refresh_bytes for update in unit.updates)
            largest = max(largest, refresh + sum(update.workspace_bytes for update in unit.updates))
            continue
        if state.optimizer_tier is not Tier.DEVICE:
            continue
        largest = max(largest, _elements(profile, unit) * profile.update_workspace_bytes_per_element)
    return int(-(-largest // 1))


def _tier_need(plan: Plan, profile: ModelProfile, machine: Machine, tier: Tier) -> int:
    """What a tier must hold: rings, an extent per block, those of weights and gradients, and the records of
    state."""
    total = _staged(plan, profile, machine).get(tier, 0) + weights_on(plan, profile, tier)
    for block, decision in zip(profile.blocks, plan.blocks, strict=True):
        if tier in sent(block, decision):
            # An extent for what goes there together; a swapped block has one even if it saved nothing.
            tensors = running(block, decision).saved_tensors if decision.action is Action.SWAP else 0
            least = whole_pages(64 * tensors)
            total += _graphs(plan) * max(least, room(left_behind(block, decision), tier))
    for unit, state in zip(profile.units, plan.states, strict=True):
        parameters = _parameters(profile, unit)
        if state.gradient_tier is tier:
            total += _scattered(unit.gradient_bytes, parameters)
        if state.optimizer_tier is tier:
            # A shard of 256 Ki elements, the smallest there is, ends within 2 Ki of them; a parameter that
            # goes on in the next one has another piece there.
            pieces = parameters + int(_elements(profile, unit) // (262144 - 2048)) * profile.elementwise
            whole = sum(update.record_bytes for update in unit.updates)
            whole = whole or _scattered(unit.state_bytes, pieces * _tensors_of_state(profile))
            segments = [pieces + whole // c.segment_bytes for c in plan.staging.coded if c.tier is tier]
            total += whole + (PAGE * sum(segments) if whole else 0)
    return total


def _scattered(size: int, parts: int) -> int:
    """At most so much for ``size`` bytes in ``parts``, each on its own pages: all but the first byte of one
    page each are wasted at worst."""
    most = size + parts * (PAGE - 1)
    return most - most % PAGE if size else 0


def _tensors_of_state(profile: ModelProfile) -> int:
    return profile.state_tensors or math.ceil(profile.state_bytes_per_element / 4)


def _parameters(profile: ModelProfile, unit: UnitProfile) -> int:
    """How many parameters a unit may have: all that are named, or, if none is, one per 64 Ki elements."""
    return len(unit.parameters) or max(1, math.ceil(_elements(profile, unit) / 65536))


def _elements(profile: ModelProfile, unit: UnitProfile) -> float:
    """Elements of a unit's parameters that may leave, whole."""
    counts = [0.0]
    if profile.state_bytes_per_element:
        counts.append(unit.state_bytes / profile.state_bytes_per_element)
    if profile.gradient_bytes_per_element:
        counts.append(unit.gradient_bytes / profile.gradient_bytes_per_element)
    return float(math.ceil(max(counts)))


def _peaks(plan: Plan, profile: ModelProfile, machine: Machine, budget: Budget) -> Iterator[Fault]:
    billed: Counter[Tier] = Counter()
    for line in plan.bill:
        billed[line.tier] += line.size_bytes
        if line.size_bytes < 0:
            yield Rule.BILL, f"{line.category} on {line.tier.value} is {line.size_bytes} bytes"
    tiers = {Tier.DEVICE, *dict(plan.peaks), *billed, *dict(plan.capacities)}
    lines = {(line.tier, line.category): line.size_bytes for line in plan.bill}
    slack = lines.get((Tier.DEVICE, "slack"), 0)
    if slack < profile.allocator_slack_bytes:
        yield Rule.BILL, f"slack {slack} bytes is below the allocator's {profile.allocator_slack_bytes}"
    staged = _staged(plan, profile, machine)
    for tier, category, size in (
        (Tier.DEVICE, "libraries", profile.baseline_bytes),
        (Tier.DEVICE, "weights", resident_weights(plan, profile)),
        (Tier.DEVICE, "weight windows", plan.staging.weight_slots * plan.staging.weight_slot_bytes),
        (Tier.DEVICE, "staging", staged[Tier.DEVICE]),
        (Tier.HOST, "staging", staged[Tier.HOST]),
    ):
        if (found := lines.get((tier, category), 0)) != size:
            yield Rule.BILL, f"{category} on {tier.value} is {found} bytes, should be {size}"
    staging = plan.staging
    for category, size in (
        (
            "activations",
            _graphs(plan) * sum(staging.kept_bytes),
        ),
        ("gradients", staging.gradient_slab_bytes - staging.overlaid_bytes),
    ):
        if lines.get((Tier.DEVICE, category), 0) < size:
            yield Rule.BILL, f"{category} is {lines.get((Tier.DEVICE, category), 0)} bytes, slabs take {size}"
    for tier in sorted(tiers, key=lambda t: t.value):
        if billed[tier] != plan.peak(tier):
            yield Rule.BILL, f"{tier.value}: lines sum to {billed[tier]}, the peak is {plan.peak(tier)}"
        capacity = budget.capacity(tier)
        if plan.peak(tier) > capacity:
            yield Rule.CAPACITY, f"{tier.value}: peak {plan.peak(tier)} above the budget's {capacity} bytes"
        if dict(plan.capacities).get(tier, capacity) != capacity:
            yield (
                Rule.CAPACITY,
                f"{tier.value}: plan says {dict(plan.capacities)[tier]}, the budget {capacity}",
            )
        if tier is Tier.DEVICE:
            need, said = (
                _device_need(plan, profile, machine),
                plan.peak(tier) - slack + profile.allocator_slack_bytes,
            )
            if need != said:
                yield Rule.DEVICE_PEAK, f"needs {need} bytes before the margin, the plan says {said}"
            if need > capacity:
                yield Rule.CAPACITY, f"device: needs {need} of {capacity} bytes"
        elif (held := _tier_need(plan, profile, machine, tier)) != plan.peak(tier):
            yield (
                Rule.TIER_PEAK,
                f"{tier.value}: decisions put {held} bytes there, the plan says {plan.peak(tier)}",
            )


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
