"""The checker's account of weights that live on tiers: windows, reads, writes and their bytes.

Part of the independent checker (``check``). It knows nothing of how the timeline was made: a unit must be
read before whatever uses it, unless no more other units were used since it was used last than windows can
hold; at no time may more units be in memory than there are windows; and what an update has changed is written
once. Where windows have several sizes, all of that holds of each size and of the units that need just that.
A unit in tiles is read for every pass over it, and leaves nothing of other units in the windows of its
largest tile, nor in smaller ones that its smallest piece fits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from memtrain.planner.actions import MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.check_blocks import PAGE, again
from memtrain.planner.machine import Link, Machine, StateCodec
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
    """Every unit that is away must fit a window, every size is that of the largest unit that needs it, and
    there are as many windows of it as one part of the step needs."""
    units, windows = away(plan, profile), plan.staging.weight_windows
    largest = max((_in_window(unit) for unit in units.values()), default=0)
    sizes = [each.slot_bytes for each in windows]
    if any(size % PAGE for size in sizes):
        yield f"windows of {sizes} bytes are not all multiples of {PAGE}"
    if sizes != sorted(set(sizes)) or (max(sizes, default=0) < largest):
        yield f"windows of {sizes} bytes for weights, the largest unit needs {largest}"
        return
    at_once: dict[tuple[str, int, int], set[str]] = defaultdict(set)
    kinds: dict[int, set[str]] = defaultdict(set)
    for name in units:
        kinds[_kind(plan, units[name])].add(name)
    for name, event, count in _moments(plan, profile):
        for size in sizes:
            if _comes_into(plan, units[name], size):
                at_once[event, count, size].add(name)
    for each in windows:
        members = kinds[each.slot_bytes]
        need = max((_in_window(units[name]) for name in members), default=0)
        # Beside the tile that is used there may be the rest of its unit.
        counts = [
            len(names) + any(_in_tiles(units[name]) for name in names)
            for key, names in at_once.items()
            if key[2] == each.slot_bytes
        ]
        least = max(counts, default=1)
        if len(windows) == 1:
            least = max(least, 2)
        if each.slot_bytes != need or not least <= each.slots <= max(least, len(members)):
            yield (
                f"{each.slots} windows of {each.slot_bytes} bytes for weights, {len(members)} units need "
                f"{least} of {need}"
            )


def window_bytes(plan: Plan) -> int:
    """Of all windows."""
    total = 0
    for each in plan.staging.weight_windows:
        total += each.slots * each.slot_bytes
    return total


def _kind(plan: Plan, unit: UnitProfile) -> int:
    """The size of the windows that the unit takes turns in; 0 where it fits none."""
    fit = (w.slot_bytes for w in plan.staging.weight_windows if w.slot_bytes >= _in_window(unit))
    return min(fit, default=0)


def _comes_into(plan: Plan, unit: UnitProfile, size: int) -> bool:
    """Whether anything of the unit is ever in windows of that size: all of it, or some of its tiles."""
    if not _in_tiles(unit):
        return _kind(plan, unit) == size
    return (unit.least_window_bytes or unit.window_bytes) <= size <= _kind(plan, unit)


def _in_window(unit: UnitProfile) -> int:
    return unit.window_bytes or unit.weight_extent_bytes


def _in_tiles(unit: UnitProfile) -> bool:
    return 0 < unit.window_bytes < unit.weight_extent_bytes


def resident_weights(plan: Plan, profile: ModelProfile) -> int:
    """Bytes of weights that are always there."""
    return profile.weight_bytes - sum(unit.movable_weight_bytes for unit in away(plan, profile).values())


def weights_on(plan: Plan, profile: ModelProfile, tier: Tier) -> int:
    """Bytes of the extents of weights on ``tier``. Coded ones are cut into segments, which may come out a
    page larger each: those that a unit's bytes fill, and the end of every parameter."""
    units = away(plan, profile)
    segments = [coded.segment_bytes for coded in plan.staging.coded_weights if coded.tier is tier]
    total = 0
    for unit in (units[state.unit] for state in plan.states if state.weight_tier is tier):
        total += unit.weight_extent_bytes
        ends = len(unit.parameters) or math.ceil(unit.movable_weight_bytes / 65536)
        total += sum(PAGE * (ends + unit.weight_extent_bytes // size) for size in segments)
    return total


def weight_coding_faults(plan: Plan, machine: Machine) -> Iterator[str]:
    """Weights may be coded only through what the machine was measured with, once a tier, where some live."""
    homes = {state.weight_tier for state in plan.states}
    seen: set[Tier] = set()
    for coded in plan.staging.coded_weights:
        codec = next((link.weight_codec for link in machine.links if link.tier is coded.tier), None)
        is_so = coded.codec, coded.segment_bytes, coded.staging_bytes
        if codec is None or is_so != (codec.name, codec.segment_bytes, codec.staging_bytes):
            was = None if codec is None else (codec.name, codec.segment_bytes, codec.staging_bytes)
            yield f"weights on {coded.tier.value} are coded as {is_so}, the machine was measured with {was}"
        if coded.tier not in homes or coded.tier in seen:
            yield f"weights on {coded.tier.value} are coded, where none live, or twice"
        seen.add(coded.tier)


def _codec_of(plan: Plan, link: Link) -> StateCodec | None:
    """Through which weights move between the device and their tier."""
    tiers = [coded.tier for coded in plan.staging.coded_weights]
    return link.weight_codec if link.tier in tiers else None


def moved_weights(plan: Plan, profile: ModelProfile, machine: Machine) -> float:
    """Bytes that weights move in a step, both ways."""
    tiers = {state.unit: state.weight_tier for state in plan.states}
    reads = _reads(plan, profile)
    total = 0.0
    for name, unit in away(plan, profile).items():
        codec = _codec_of(plan, machine.link(tiers[name]))
        plain = unit.weight_extent_bytes * reads[name] + unit.written_extent_bytes
        total += plain if codec is None else plain * codec.ratio
    return total


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
    living: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for name, unit in units.items():
        link, tier = machine.link(tiers[name]), tiers[name].value
        reads = events[f"read weights {name}", f"read:{tier}"]
        writes = events[f"write weights {name}", f"write:{tier}"]
        rates = _codec_of(plan, link) or link
        for event in reads:
            yield from _long_enough(event, unit.weight_extent_bytes / rates.read_bytes_per_second)
        for event in writes:
            yield from _long_enough(event, unit.written_extent_bytes / rates.write_bytes_per_second)
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
            living[_kind(plan, unit)] += [(start, 1), (end - ROUNDING_SECONDS, -1)]
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
    for each in plan.staging.weight_windows:
        present = most = 0
        for _, change in sorted(living[each.slot_bytes]):
            present += change
            most = max(most, present)
        if most > each.slots:
            yield (
                "WINDOWS",
                f"{most} units are in memory at once, there are {each.slots} windows of {each.slot_bytes} "
                "bytes",
            )


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
    """Uses of units that are in no window: as many others that need windows of the same size were used since
    their last use as there are, or the tiles of another one, some of which come into windows of that size.
    Tiles themselves are always gone."""
    moments, units = _moments(plan, profile), away(plan, profile)
    slots = {each.slot_bytes: each.slots for each in plan.staging.weight_windows}
    kinds = {name: _kind(plan, unit) for name, unit in units.items()}
    tiles = {name for name, unit in units.items() if _in_tiles(unit)}
    order = [unit for unit, _, _ in moments]
    missing = []
    for place, unit in enumerate(order):
        since: set[str] = set()
        swept = False
        for other in (*reversed(order[:place]), *reversed(order[place:])):
            if other == unit:
                break
            if kinds[other] == kinds[unit]:
                since.add(other)
            swept = swept or (other in tiles and _comes_into(plan, units[other], kinds[unit]))
        if unit in tiles:
            gone = not _right_beside_update(plan, moments, place)
        else:
            gone = swept or len(since) >= slots.get(kinds[unit], 0)
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
    """An update that does not come right behind a backward pass makes weights anew where it has masters."""
    by_itself = plan.update_schedule is not UpdateSchedule.IN_BACKWARD and event == f"update {unit.name}"
    return by_itself and unit.overwritten


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
