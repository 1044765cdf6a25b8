"""The checker's part for bytes: what the device and each tier hold at their peaks, beside bill and budget."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator

from memtrain.planner.actions import THREAD_BYTES, Action, MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.check_blocks import (
    PAGE,
    compared,
    during_backward,
    gathered,
    left_behind,
    looking,
    room,
    running,
    sent,
    whole_pages,
)
from memtrain.planner.check_rules import Fault, Rule
from memtrain.planner.check_tables import gradients_twice, stepping, tables_on, tables_resident
from memtrain.planner.check_units import elements_of, is_on_cpu, one_by_one, parameters_of, tensors_of_state
from memtrain.planner.check_weights import resident_weights, weights_on, window_bytes
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile


def peak_faults(plan: Plan, profile: ModelProfile, machine: Machine, budget: Budget) -> Iterator[Fault]:
    """Where bill, peaks and capacities are not those of the decisions."""
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
        (Tier.DEVICE, "weight windows", window_bytes(plan)),
        (Tier.DEVICE, "staging", staged[Tier.DEVICE]),
        (Tier.HOST, "staging", staged[Tier.HOST]),
        (Tier.DEVICE, "tables", tables_resident(profile)),
        (Tier.DEVICE, "threads", _threads(plan, machine)),
        (Tier.DEVICE, "bookkeeping", _bookkeeping(plan, profile, machine)),
        *((tier, "tables", tables_on(profile, tier)) for tier in Tier if tier is not Tier.DEVICE),
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


def _device_need(plan: Plan, profile: ModelProfile, machine: Machine) -> int:
    """Walks the step in time, counting what comes and goes; what lives in slabs does neither."""
    on_cpu = is_on_cpu(machine)
    resident = profile.baseline_bytes + resident_weights(plan, profile) + profile.allocator_slack_bytes
    s = plan.staging
    resident += window_bytes(plan) + _staged(plan, profile, machine)[Tier.DEVICE]
    resident += s.gradient_slab_bytes - s.overlaid_bytes + tables_resident(profile)
    resident += _threads(plan, machine) + _bookkeeping(plan, profile, machine)
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
    if ahead and any(unit.name == "epilogue" for unit in profile.units):
        peak = max(peak, every + kept + _workspace(plan, profile, None, "epilogue"))
    at_once = plan.update_schedule is UpdateSchedule.IN_BACKWARD
    alone = one_by_one(plan)
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
    adding = gradients_twice(profile)
    peak = max(peak, held + kept + profile.prologue_peak_bytes + graphs * late + adding)
    peak = max(peak, held + stepping(profile)) if profile.tables else peak
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
            if is_on_cpu(machine) and state.gradient_tier is Tier.DEVICE and unit.gradient_bytes:
                beside += profile.largest_gradient_bytes
            largest = max(largest, beside)
    return largest


def _graphs(plan: Plan) -> int:
    """How many micro-batches lie between their forward and their backward at one time."""
    return plan.micro_batches if plan.micro_batch_order is MicroBatchOrder.VERTICAL else 1


def _threads(plan: Plan, machine: Machine) -> int:
    """In vertical order each micro-batch is a thread of the host, which on a CPU is the device."""
    vertical = plan.micro_batch_order is MicroBatchOrder.VERTICAL
    return plan.micro_batches * THREAD_BYTES if vertical and is_on_cpu(machine) else 0


def _bookkeeping(plan: Plan, profile: ModelProfile, machine: Machine) -> int:
    """Of the session's objects, which are in the host's memory. Shards end within 2 Ki elements of their size
    where parameters may be cut, and where a tile does; where not, each parameter may have one to itself."""
    if not is_on_cpu(machine):
        return 0
    filled = max(plan.staging.update_shard_elements - 2048, 2048)
    parameters = shards = 0
    for unit in profile.units:
        named = parameters_of(profile, unit)
        parameters += named
        shards += math.ceil(elements_of(profile, unit) / filled) if profile.elementwise else named
        shards += named - 1 if profile.elementwise and unit.tiled else 0
    return parameters * profile.parameter_object_bytes + shards * profile.shard_object_bytes


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
    whole = sum(slots * size for slots, size, _ in rings)
    whole += sum(c.staging_bytes for codings in (s.coded, s.coded_weights) for c in codings)
    if is_on_cpu(machine):
        return {Tier.DEVICE: whole - s.update_overlaid_bytes, Tier.HOST: 0}
    again = sum(copies * size for slots, size, copies in rings if slots)
    again += profile.largest_gradient_bytes if s.gradient_slots else 0
    # What weights pass through lies on both sides.
    return {Tier.DEVICE: again, Tier.HOST: whole + window_bytes(plan)}


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
        largest = max(largest, elements_of(profile, unit) * profile.update_workspace_bytes_per_element)
    return int(-(-largest // 1))


def _tier_need(plan: Plan, profile: ModelProfile, machine: Machine, tier: Tier) -> int:
    """What a tier must hold: rings, an extent per block, those of weights and gradients, and the records of
    state."""
    total = _staged(plan, profile, machine).get(tier, 0) + weights_on(plan, profile, tier)
    total += tables_on(profile, tier)
    for block, decision in zip(profile.blocks, plan.blocks, strict=True):
        if tier in sent(block, decision):
            # An extent for what goes there together; a swapped block has one even if it saved nothing.
            tensors = running(block, decision).saved_tensors if decision.action is Action.SWAP else 0
            least = whole_pages(64 * tensors)
            total += _graphs(plan) * max(least, room(left_behind(block, decision), tier))
    for unit, state in zip(profile.units, plan.states, strict=True):
        parameters = parameters_of(profile, unit)
        if state.gradient_tier is tier:
            total += _scattered(unit.gradient_bytes, parameters)
        if state.optimizer_tier is tier:
            # A shard of 256 Ki elements, the smallest there is, ends within 2 Ki of them; a parameter that
            # goes on in the next one has another piece there.
            pieces = parameters + int(elements_of(profile, unit) // (262144 - 2048)) * profile.elementwise
            whole = sum(update.record_bytes for update in unit.updates)
            whole = whole or _scattered(unit.state_bytes, pieces * tensors_of_state(profile))
            segments = [pieces + whole // c.segment_bytes for c in plan.staging.coded if c.tier is tier]
            total += whole + (PAGE * sum(segments) if whole else 0)
    return total


def _scattered(size: int, parts: int) -> int:
    """At most so much for ``size`` bytes in ``parts``, each on its own pages: all but the first byte of one
    page each are wasted at worst."""
    most = size + parts * (PAGE - 1)
    return most - most % PAGE if size else 0
