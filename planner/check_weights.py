"""The checker's account of weights that live on tiers: windows, reads, writes and their bytes.

Part of the independent checker (``check``). It knows nothing of how the timeline was made: a unit must be
read before whatever uses it, unless no more other units were used since it was used last than windows can
hold; at no time may more units be in memory than there are windows; and what an update has changed is written
once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from memtrain.planner.actions import MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.check_blocks import again
from memtrain.planner.machine import Machine
from memtrain.planner.plan import Event, Plan
from memtrain.planner.profile import ModelProfile, UnitProfile

ROUNDING_SECONDS = 1e-8

Fault = tuple[str, str]
Events = dict[tuple[str, str], list[Event]]
Moments = list[tuple[str, str, int]]
"""Unit, name of the computing event that uses its weights, and which of those events it is."""


def away(plan: Plan, profile: ModelProfile) -> dict[str, UnitProfile]:
    """The units whose weights are not on the device."""
    found = zip(profile.units, plan.states, strict=True)
    return {unit.name: unit for unit, state in found if state.weight_tier is not Tier.DEVICE}


def impossible_weights(plan: Plan, profile: ModelProfile) -> Iterator[str]:
    """Units whose weights are away and may not be."""
    for unit in away(plan, profile).values():
        if not unit.movable_weight_bytes:
            yield f"unit {unit.name}: its weights may not leave the device"


def window_faults(plan: Plan, profile: ModelProfile) -> Iterator[str]:
    """Windows must hold the largest unit that is away, and as many as one part of the step needs."""
    staging, units = plan.staging, away(plan, profile)
    need = max((u.window_bytes or u.weight_extent_bytes for u in units.values()), default=0)
    at_once: dict[tuple[str, int], set[str]] = defaultdict(set)
    for unit, event, count in _moments(plan, profile):
        at_once[event, count].add(unit)
    slots, size = staging.weight_slots, staging.weight_slot_bytes
    # Beside the tile that is used there may be the rest of its unit.
    counts = [len(names) + any(_in_tiles(units[name]) for name in names) for names in at_once.values()]
    least = max(2, *counts) if units else 0
    if slots < least or size < need or slots > max(least, len(units)):
        yield f"{slots} windows of {size} bytes for weights, {len(units)} units need {least} of {need}"


def _in_tiles(unit: UnitProfile) -> bool:
    return 0 < unit.window_bytes < unit.weight_extent_bytes


def resident_weights(plan: Plan, profile: ModelProfile) -> int:
    """Bytes of weights that are always there."""
    return profile.weight_bytes - sum(unit.movable_weight_bytes for unit in away(plan, profile).values())


def weights_on(plan: Plan, profile: ModelProfile, tier: Tier) -> int:
    """Bytes of the extents of weights on ``tier``."""
    units = away(plan, profile)
    return sum(units[s.unit].weight_extent_bytes for s in plan.states if s.weight_tier is tier)


def moved_weights(plan: Plan, profile: ModelProfile) -> int:
    """Bytes that weights move in a step, both ways."""
    units = away(plan, profile)
    read = sum(units[unit].weight_extent_bytes * count for unit, count in _reads(plan, profile).items())
    return read + sum(unit.written_extent_bytes for unit in units.values())


def weight_faults(plan: Plan, profile: ModelProfile, machine: Machine, events: Events) -> Iterator[Fault]:
    """What is wrong with the reads and writes of a timeline."""
    units = away(plan, profile)
    if not units:
        return
    wanted = _reads(plan, profile)
    tiers = {state.unit: state.weight_tier for state in plan.states}
    by_unit: dict[str, list[Event]] = defaultdict(list)
    for used, name, count in _moments(plan, profile):
        by_unit[used] += _computing(events, name, count)
    made_anew = {
        unit for unit, event, _ in _missing(plan, profile) if _without_read(plan, units[unit], event)
    }
    living: list[tuple[float, int]] = []
    for name, unit in units.items():
        link, tier = machine.link(tiers[name]), tiers[name].value
        reads = events[f"read weights {name}", f"read:{tier}"]
        writes = events[f"write weights {name}", f"write:{tier}"]
        for event in reads:
            yield from _long_enough(event, unit.weight_extent_bytes / link.read_bytes_per_second)
        for event in writes:
            yield from _long_enough(event, unit.written_extent_bytes / link.write_bytes_per_second)
        if len(reads) != wanted[name]:
            yield "DEPENDENCY", f"weights of {name} are read {len(reads)} times, {wanted[name]} are needed"
            continue
        if len(writes) != (1 if unit.written_extent_bytes else 0):
            yield "DEPENDENCY", f"weights of {name} are written {len(writes)} times in a step"
            continue
        updates = events[f"update {name}", "compute"]
        for write in writes:
            if updates and write.start_seconds < updates[-1].end_seconds - ROUNDING_SECONDS:
                yield "DEPENDENCY", f"write weights {name} starts before its update is over"
        entries = [read.start_seconds for read in reads]
        entries += [step.start_seconds for step in updates[:1] if name in made_anew]
        spans = _spans(sorted(entries), [*by_unit[name], *writes], plan.step_seconds)
        for start, end in spans:
            living += [(start, 1), (end - ROUNDING_SECONDS, -1)]
        for use in by_unit[name]:
            if any(
                read.start_seconds <= use.start_seconds < read.end_seconds - ROUNDING_SECONDS
                for read in reads
            ):
                yield "DEPENDENCY", f"{use.name} starts before the weights of {name} are read"
            elif not any(
                start - ROUNDING_SECONDS <= use.start_seconds and use.end_seconds <= end + ROUNDING_SECONDS
                for start, end in spans
            ):
                yield "DEPENDENCY", f"{use.name} uses weights of {name} that are in no window"
    present = most = 0
    for _, change in sorted(living):
        present += change
        most = max(most, present)
    if most > plan.staging.weight_slots:
        yield "WINDOWS", f"{most} units are in memory at once, there are {plan.staging.weight_slots} windows"


def _spans(edges: list[float], uses: list[Event], step_seconds: float) -> list[tuple[float, float]]:
    """From when to when a unit is in memory: from each time that it comes to the last use, or the write of
    what it changed, before it comes again. The step before was as this one, and so is the next."""
    if not edges:
        return [(0.0, step_seconds)]
    spans = []
    ends = [event.end_seconds for event in uses]
    before = [end for end in ends if end <= edges[0] + ROUNDING_SECONDS]
    for edge, following in zip(edges, [*edges[1:], None], strict=True):
        if following is None:
            last = step_seconds if before else max((end for end in ends if end > edge), default=edge)
        else:
            last = max((end for end in ends if edge < end <= following + ROUNDING_SECONDS), default=edge)
        spans.append((edge, last))
    if before:
        spans.append((0.0, max(before)))
    return spans


def _moments(plan: Plan, profile: ModelProfile) -> Moments:
    """Every use of weights that are away, in order of a step."""
    units = {unit.name: unit for unit in profile.units}
    gone = away(plan, profile)

    def at(block: int | None, part: str) -> list[str]:
        own = [
            u.name
            for u in profile.units
            if u.block == block and (block is not None or (u.name == "epilogue") is (part == "epilogue"))
        ]
        needed = [name for unit in own for name in (unit, *units[unit].borrows)]
        return [name for name in dict.fromkeys(needed) if name in gone]

    # By part of a pass: its computing events, and the units that all of them use.
    parts = [(["forward prologue"], at(None, "prologue"))]
    parts += [([f"forward {block.name}"], at(index, "")) for index, block in enumerate(profile.blocks)]
    parts += [(["loss epilogue"], at(None, "epilogue"))]
    for index, block in reversed(list(enumerate(profile.blocks))):
        first = ["recompute"] if again(plan.blocks[index]) else []
        parts += [([f"{verb} {block.name}" for verb in (*first, "backward")], at(index, ""))]
    parts += [(["backward prologue"], at(None, "prologue"))]
    walk = [(part, count) for count in range(profile.micro_batches) for part in range(len(parts))]
    if plan.micro_batch_order is MicroBatchOrder.VERTICAL:
        walk.sort()
    moments = [
        (unit, name, count) for part, count in walk for name in parts[part][0] for unit in parts[part][1]
    ]
    updated = [unit.name for unit in gone.values() if unit.written_extent_bytes]
    if plan.update_schedule is UpdateSchedule.SEQUENTIAL:
        return moments + [(unit, f"update {unit}", -1) for unit in updated]
    if plan.update_schedule is UpdateSchedule.IN_BACKWARD:
        return _updated_in_backward(moments, updated, profile)
    ahead: Moments = []
    for unit, event, count in moments:
        first_use = count == 0 and event.startswith(("forward", "loss")) and unit in updated
        if first_use:
            updated.remove(unit)
            ahead.append((unit, f"update {unit}", -1))
        ahead.append((unit, event, count))
    return ahead


def _updated_in_backward(moments: Moments, updated: list[str], profile: ModelProfile) -> Moments:
    """Each unit's update right behind the last pass's use of its own place."""
    places = {
        u.name: f"backward {profile.blocks[u.block].name}" for u in profile.units if u.block is not None
    }
    last = profile.micro_batches - 1
    found: Moments = []
    for unit, event, count in moments:
        found.append((unit, event, count))
        own = places.get(unit, "loss epilogue" if unit == "epilogue" else "backward prologue")
        if count == last and event == own and unit in updated:
            found.append((unit, f"update {unit}", -1))
    return found


def _computing(events: Events, name: str, count: int) -> list[Event]:
    """One event of that name; for -1 all of them."""
    found = events[name, "compute"]
    return found if count < 0 else found[count : count + 1]


def _missing(plan: Plan, profile: ModelProfile) -> Moments:
    """Uses of units that are in no window: as many others were used since their last use as there are, or the
    tiles of another one, which go through all windows. Tiles themselves are always gone."""
    moments = _moments(plan, profile)
    tiles = {unit.name for unit in profile.units if _in_tiles(unit)}
    order = [unit for unit, _, _ in moments]
    missing = []
    for place, unit in enumerate(order):
        since: set[str] = set()
        for other in (*reversed(order[:place]), *reversed(order[place:])):
            if other == unit:
                break
            since.add(other)
        if unit in tiles:
            gone = not _right_beside_update(plan, moments, place)
        else:
            gone = bool(since & tiles) or len(since) >= plan.staging.weight_slots
        if gone:
            missing.append(moments[place])
    return missing


def _right_beside_update(plan: Plan, moments: Moments, place: int) -> bool:
    """A tile that is updated ahead of its forward, or behind its backward, is there for both."""
    if plan.update_schedule is UpdateSchedule.SEQUENTIAL or place == 0:
        return False
    (before, first, _), (unit, second, _) = moments[place - 1 : place + 1]
    return before == unit and "update" in (first.split()[0], second.split()[0])


def _without_read(plan: Plan, unit: UnitProfile, event: str) -> bool:
    """An update that nothing follows at once makes weights anew where it has masters."""
    after_backward = plan.update_schedule is UpdateSchedule.SEQUENTIAL and event == f"update {unit.name}"
    return after_backward and unit.overwritten


def _reads(plan: Plan, profile: ModelProfile) -> dict[str, int]:
    """How often each unit is read in a step."""
    units = away(plan, profile)
    reads = dict.fromkeys(units, 0)
    for unit, event, _ in _missing(plan, profile):
        reads[unit] += not _without_read(plan, units[unit], event)
    for unit, event, _ in _moments(plan, profile):
        # The loss is forward and backward in one event: tiles come once more for the latter.
        reads[unit] += event == "loss epilogue" and _in_tiles(units[unit])
    return reads


def _long_enough(event: Event, least: float) -> Iterator[Fault]:
    took = event.end_seconds - event.start_seconds
    if took < least - ROUNDING_SECONDS:
        yield (
            "DURATION",
            f"{event.name} takes {took:.9f} s on {event.resource}, at least {least:.9f} s are needed",
        )
