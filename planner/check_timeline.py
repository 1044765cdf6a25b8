"""The checker's reading of a plan's timeline: order, overlap, durations and bytes.

Part of the independent checker (``check``): it knows what must come before what, and how fast a link is at
most, but nothing of how the timeline was made.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

from memtrain.planner.actions import Action, MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.check_blocks import again, joined, least_seconds_again, left_behind, running, sent
from memtrain.planner.check_tables import step_faults, tables_moved
from memtrain.planner.check_weights import moved_weights, weight_faults
from memtrain.planner.machine import Machine
from memtrain.planner.plan import Event, Plan
from memtrain.planner.profile import ModelProfile, UnitProfile

ROUNDING_SECONDS = 1e-8
"""Times are written with nine digits; a sum of a few is off by less than this."""

Fault = tuple[str, str]
Events = dict[tuple[str, str], list[Event]]
"""By name and kind of resource (compute, read, write), each in order of time."""


def timeline_faults(plan: Plan, profile: ModelProfile, machine: Machine) -> Iterator[Fault]:
    """Names of rules broken by the timeline, with the numbers. An infeasible plan has no timeline."""
    if plan.status == "infeasible":
        return
    yield from _one_thing_at_a_time(plan)
    events: Events = defaultdict(list)
    for event in sorted(plan.timeline, key=lambda e: (e.start_seconds, e.end_seconds)):
        events[event.name, event.resource].append(event)
    yield from _passes(plan, profile, machine, events)
    for index in range(len(profile.blocks)):
        yield from _block(plan, profile, machine, events, index)
    yield from _units(plan, profile, machine, events)
    yield from weight_faults(plan, profile, machine, events)
    yield from step_faults(plan, profile, events)
    if plan.staging.update_overlaid_bytes:
        yield from _slots_are_left(plan)
    yield from _bytes_moved(plan, profile, machine)
    end = max((event.end_seconds for event in plan.timeline), default=0.0)
    if abs(end - plan.step_seconds) > ROUNDING_SECONDS:
        yield "STEP_SECONDS", f"the last event ends at {end}, the step takes {plan.step_seconds}"


def _one_thing_at_a_time(plan: Plan) -> Iterator[Fault]:
    by_resource: dict[str, list[Event]] = defaultdict(list)
    for event in plan.timeline:
        by_resource[event.resource].append(event)
        if event.end_seconds < event.start_seconds:
            yield "OVERLAP", f"{event.name} ends before it starts"
    for resource, events in by_resource.items():
        events.sort(key=lambda e: (e.start_seconds, e.end_seconds))
        for before, after in itertools.pairwise(events):
            if after.start_seconds < before.end_seconds - ROUNDING_SECONDS:
                yield "OVERLAP", f"{resource}: {after.name} starts before {before.name} is over"


def _passes(plan: Plan, profile: ModelProfile, machine: Machine, events: Events) -> Iterator[Fault]:
    """Forward in order, the loss, backward in reverse order, once per micro-batch, each long enough; in
    vertical order each of these for all micro-batches before the next.

    On a CPU long enough includes the copies out of the heap of what a block leaves for its backward; and of
    gradients that stay the copy, from the second micro-batch on the addition, which takes half as long again.
    """
    copy = _copy_seconds_per_byte(machine)
    gradient: dict[str, float] = defaultdict(float)
    for unit, state in zip(profile.units, plan.states, strict=True):
        if state.gradient_tier is Tier.DEVICE:
            edge = "loss epilogue" if unit.name == "epilogue" else "backward prologue"
            where = edge if unit.block is None else f"backward {profile.blocks[unit.block].name}"
            gradient[where] += unit.gradient_bytes * copy
    sequence = [("forward prologue", profile.prologue_forward_seconds)]
    sequence += [
        (
            f"forward {b.name}",
            running(b, d).forward_seconds + copy * sum(size for _, size, _ in left_behind(b, d)),
        )
        for b, d in zip(profile.blocks, plan.blocks, strict=True)
    ]
    sequence += [("loss epilogue", profile.epilogue_forward_seconds + profile.epilogue_backward_seconds)]
    sequence += [
        (f"backward {b.name}", running(b, d).backward_seconds)
        for b, d in reversed(list(zip(profile.blocks, plan.blocks, strict=True)))
    ]
    sequence += [("backward prologue", profile.prologue_backward_seconds)]
    over = 0.0
    for name, _ in sequence:
        if len(events[name, "compute"]) != profile.micro_batches:
            count = len(events[name, "compute"])
            yield "DEPENDENCY", f"{name} happens {count} times in {profile.micro_batches} micro-batches"
            return
    turns = [(count, part) for count in range(profile.micro_batches) for part in sequence]
    if _vertical(plan):
        turns.sort(key=lambda turn: sequence.index(turn[1]))
    for count, (name, least) in turns:
        event = events[name, "compute"][count]
        if event.start_seconds < over - ROUNDING_SECONDS:
            yield "DEPENDENCY", f"{name}, time {count}, starts before what precedes it is over"
        yield from _long_enough(event, least + gradient[name] * (1.5 if count else 1.0))
        over = event.end_seconds


def _copy_seconds_per_byte(machine: Machine) -> float:
    """Of memory to memory; a GPU's arithmetic is not held up by it."""
    return 1 / machine.dram_copy_bytes_per_second if machine.device.startswith("cpu") else 0.0


def _long_enough(event: Event, least: float) -> Iterator[Fault]:
    if event.end_seconds - event.start_seconds < least - ROUNDING_SECONDS:
        took = event.end_seconds - event.start_seconds
        yield (
            "DURATION",
            f"{event.name} takes {took:.9f} s on {event.resource}, at least {least:.9f} s are needed",
        )


def _vertical(plan: Plan) -> bool:
    return plan.micro_batch_order is MicroBatchOrder.VERTICAL


def _read_again(plan: Plan, index: int, tier: Tier, profile: ModelProfile) -> int:
    """Of how many micro-batches what the block sent to ``tier`` is read: the last that went through a ring
    are still in their slots when backward begins. A block takes a slot for each tier, in the order of their
    names."""
    swap = plan.blocks[index].action is Action.SWAP
    later = [
        (d.block, to.value)
        for b, d in zip(profile.blocks, plan.blocks, strict=True)
        for to in sent(b, d)
        if (d.action is Action.SWAP) is swap and (d.block, to.value) > (index, tier.value)
    ]
    slots = plan.staging.saved_slots if swap else plan.staging.input_slots
    if not _vertical(plan):
        return 0 if len(later) < slots else profile.micro_batches
    # Every micro-batch fills slots at each block before the next block begins.
    own = [to for to in sent(profile.blocks[index], plan.blocks[index])]
    behind = [to for to in own if to.value > tier.value]
    blocks_later = len(later) - len(behind)
    after = (
        profile.micro_batches * blocks_later + others * len(own) + len(behind)
        for others in range(profile.micro_batches)
    )
    return sum(count >= slots for count in after)


def _block(
    plan: Plan, profile: ModelProfile, machine: Machine, events: Events, index: int
) -> Iterator[Fault]:
    block, decision = profile.blocks[index], plan.blocks[index]
    count = profile.micro_batches
    forward, backward = (
        events[f"forward {block.name}", "compute"],
        events[f"backward {block.name}", "compute"],
    )
    first_use = backward
    if again(decision):
        first_use = events[f"recompute {block.name}", "compute"]
        least = least_seconds_again(block, decision)
        least += joined(block, decision) * _copy_seconds_per_byte(machine)
        if len(first_use) != count:
            yield "DEPENDENCY", f"{block.name} is recomputed {len(first_use)} times in {count} micro-batches"
            return
        for second, use in zip(first_use, backward, strict=False):
            yield from _long_enough(second, least)
            if second.end_seconds > use.start_seconds + ROUNDING_SECONDS:
                yield "DEPENDENCY", f"backward {block.name} starts before its recompute is over"
    for tier, size in sent(block, decision).items():
        link = machine.link(tier)
        writes = events[f"write {block.name}", f"write:{tier.value}"]
        reads = events[f"read {block.name}", f"read:{tier.value}"]
        wanted = _read_again(plan, index, tier, profile)
        if (len(writes), len(reads)) != (count, wanted):
            yield (
                "DEPENDENCY",
                f"{block.name}: {len(writes)} writes and {len(reads)} reads on {tier.value}, "
                f"{count} and {wanted} are needed",
            )
            continue
        for done, write in zip(forward, writes, strict=False):
            yield from _long_enough(write, size / link.write_bytes_per_second)
            if write.start_seconds < done.end_seconds - ROUNDING_SECONDS:
                yield "DEPENDENCY", f"write {block.name} starts before its forward is over"
        # In vertical order what was written last is needed first, and the first to be needed is in its slot.
        written = writes[::-1] if _vertical(plan) else writes
        there = count - wanted
        for write, read, use in zip(written[there:], reads, first_use[there:], strict=False):
            yield from _long_enough(read, size / link.read_bytes_per_second)
            if read.start_seconds < write.end_seconds - ROUNDING_SECONDS:
                yield "DEPENDENCY", f"read {block.name} starts before its write is over"
            if use.start_seconds < read.end_seconds - ROUNDING_SECONDS:
                yield "DEPENDENCY", f"backward {block.name} starts before its read is over"


def _units(plan: Plan, profile: ModelProfile, machine: Machine, events: Events) -> Iterator[Fault]:
    """Gradients written before they are read, updates after both, and all of it long enough."""
    for unit, state in zip(profile.units, plan.states, strict=True):
        steps = events[f"update {unit.name}", "compute"]
        took = sum(e.end_seconds - e.start_seconds for e in steps)
        if took < unit.update_seconds - ROUNDING_SECONDS * (1 + len(steps)):
            yield (
                "DURATION",
                f"update {unit.name} takes {took:.9f} s, at least {unit.update_seconds:.9f} s are needed",
            )
        if plan.update_schedule is UpdateSchedule.AHEAD and steps:
            name = profile.blocks[unit.block].name if unit.block is not None else unit.name
            verb = "loss" if name == "epilogue" and unit.block is None else "forward"
            name = "prologue" if unit.block is None and verb == "forward" else name
            if (
                events[f"{verb} {name}", "compute"][0].start_seconds
                < steps[-1].end_seconds - ROUNDING_SECONDS
            ):
                yield "DEPENDENCY", f"{verb} {name} starts before the update of {unit.name} is over"
        if plan.update_schedule is UpdateSchedule.SEQUENTIAL and steps:
            last = events["backward prologue", "compute"][-1].end_seconds
            if steps[0].start_seconds < last - ROUNDING_SECONDS:
                yield "DEPENDENCY", f"update {unit.name} starts before backward is over"
        if plan.update_schedule is UpdateSchedule.IN_BACKWARD:
            yield from _in_backward(profile, unit, events, steps)
        for tier in sorted({state.optimizer_tier, state.gradient_tier} - {Tier.DEVICE}):
            link = machine.link(tier)
            rates = link if link.state_codec is None else link.state_codec
            own = unit.state_bytes if state.optimizer_tier is tier else 0
            gradient = unit.gradient_bytes if state.gradient_tier is tier else 0
            read = own / rates.read_bytes_per_second + gradient / link.read_bytes_per_second
            written = own / rates.write_bytes_per_second
            reads = events[f"read update {unit.name}", f"read:{tier.value}"]
            writes = events[f"write update {unit.name}", f"write:{tier.value}"]
            yield from _sum_long_enough(f"read update {unit.name}", reads, read)
            yield from _sum_long_enough(f"write update {unit.name}", writes, written)
            for step, write in zip(steps, writes, strict=False):
                if write.start_seconds < step.end_seconds - ROUNDING_SECONDS:
                    yield "DEPENDENCY", f"write update {unit.name} starts before its step is over"
            each = max(1, len(reads) // max(1, len(steps)))
            for position, read_event in enumerate(reads if steps else ()):
                step = steps[min(position // each, len(steps) - 1)]
                if step.start_seconds < read_event.end_seconds - ROUNDING_SECONDS:
                    yield "DEPENDENCY", f"update {unit.name} starts before its state is read"
        if state.gradient_tier is not Tier.DEVICE and unit.gradient_bytes:
            yield from _leaving_gradient(unit, state.gradient_tier, profile.micro_batches, machine, events)


def _slots_are_left(plan: Plan) -> Iterator[Fault]:
    """Where an update's slots lie over those of the passes, it fills none before these are written."""
    left = [
        e.end_seconds
        for e in plan.timeline
        if e.resource.startswith("write") and not e.name.startswith(("write update", "write weights"))
    ]
    for e in plan.timeline:
        if e.name.startswith("read update") and e.start_seconds < max(left, default=0.0) - ROUNDING_SECONDS:
            yield "DEPENDENCY", f"{e.name} starts before the passes have left the memory that it goes to"
            return


def _in_backward(
    profile: ModelProfile, unit: UnitProfile, events: Events, steps: list[Event]
) -> Iterator[Fault]:
    """An update begins when the last pass over its unit is over, and gradients that left were written; its
    reads, when that pass has begun."""
    own = "loss epilogue" if unit.name == "epilogue" else "backward prologue"
    own = own if unit.block is None else f"backward {profile.blocks[unit.block].name}"
    complete = events[own, "compute"][-1].end_seconds
    if steps and steps[0].start_seconds < complete - ROUNDING_SECONDS:
        yield "DEPENDENCY", f"update {unit.name} starts before {own} of the last micro-batch is over"
    begun = events["loss epilogue", "compute"][-1].end_seconds
    written = [
        e.end_seconds
        for (name, resource), each in events.items()
        if name == f"write gradient {unit.name}" and resource.startswith("write")
        for e in each
    ]
    for (name, resource), reads in events.items():
        if name != f"read update {unit.name}" or not resource.startswith("read"):
            continue
        if reads[0].start_seconds < begun - ROUNDING_SECONDS:
            yield "DEPENDENCY", f"read update {unit.name} starts before the last backward pass"
        if written and reads[0].start_seconds < max(written) - ROUNDING_SECONDS:
            yield "DEPENDENCY", f"read update {unit.name} starts before its gradient is written"


def _leaving_gradient(
    unit: UnitProfile, tier: Tier, micro_batches: int, machine: Machine, events: Events
) -> Iterator[Fault]:
    """Each piece gone over before it is written; both long enough.

    Three passes at the speed of a copy: copy, norm, largest element. Once there is a sum, an addition takes
    the copy's place, and half as long again.
    """
    name = f"gradient {unit.name}"
    writes = events[f"write {name}", f"write:{tier.value}"]
    stored = events[name, "compute"]
    written = micro_batches * unit.gradient_bytes / machine.link(tier).write_bytes_per_second
    yield from _sum_long_enough(f"write {name}", writes, written)
    copies = 3 + 3.5 * (micro_batches - 1)
    least = copies * unit.gradient_bytes * _copy_seconds_per_byte(machine)
    yield from _sum_long_enough(name, stored, least)
    if len(stored) != len(writes):
        yield "DEPENDENCY", f"{name} is stored {len(stored)} times and written {len(writes)} times"
    for piece, write in zip(stored, writes, strict=False):
        if write.start_seconds < piece.end_seconds - ROUNDING_SECONDS:
            yield "DEPENDENCY", f"write {name} starts before the gradient is stored"


def _sum_long_enough(name: str, events: list[Event], least: float) -> Iterator[Fault]:
    took = sum(event.end_seconds - event.start_seconds for event in events)
    if took < least - ROUNDING_SECONDS * (1 + len(events)):
        yield "DURATION", f"{name} takes {took:.9f} s together, at least {least:.9f} s are needed"


def _bytes_moved(plan: Plan, profile: ModelProfile, machine: Machine) -> Iterator[Fault]:
    moved = moved_weights(plan, profile, machine) + tables_moved(profile)
    for index, (block, decision) in enumerate(zip(profile.blocks, plan.blocks, strict=True)):
        for tier, once in sent(block, decision).items():
            moved += (profile.micro_batches + _read_again(plan, index, tier, profile)) * once
    for unit, state in zip(profile.units, plan.states, strict=True):
        if state.gradient_tier is not Tier.DEVICE:
            # Written once per micro-batch, fetched to be added to in all but the first, and for the update.
            moved += 2 * profile.micro_batches * unit.gradient_bytes
        if state.optimizer_tier is not Tier.DEVICE:
            codec = machine.link(state.optimizer_tier).state_codec
            moved += 2 * unit.state_bytes * (1.0 if codec is None else codec.ratio)
    if abs(moved - plan.bytes_moved_per_step) > 1:
        yield "BYTES_MOVED", f"the decisions move {moved} bytes, the plan says {plan.bytes_moved_per_step}"
