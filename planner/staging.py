"""How many bytes units and blocks take in slots of rings, in slabs and in extents on tiers.

``staging_for`` is the one place that computes the slabs and rings of a plan.

Index letters: ``l`` block, ``u`` unit, ``t`` tier.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from memtrain.planner.actions import BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.block_parts import (
    PAGE_BYTES,
    groups,
    input_slot_bytes,
    is_recomputed,
    kept_slot_bytes,
    saved_slot_bytes,
)
from memtrain.planner.plan import CodedTier, Staging
from memtrain.planner.profile import ModelProfile, UnitProfile
from memtrain.planner.units import MiB, round_up
from memtrain.planner.weight_windows import DEFAULT_WINDOWS, WantedWindows, place_of, weight_windows

if TYPE_CHECKING:
    from memtrain.planner.decisions import Decisions

GRADIENT_SLOTS = 4
GRADIENT_SLOT_BYTES = 4 * MiB
"""Four pieces of 4 MiB: pieces of 4 to 8 MiB reach a local disk's bandwidth (reference: fio, direct I/O)."""
SMALLEST_PIECE_ELEMENTS = 65536  # parameters below this never leave memory
UPDATE_SLOTS = 6
"""Step a shard while others are read ahead and written behind: several small ones, so that the disk has work
while a block computes (docs/log.md: a tenth faster than three slots of twice the size)."""
WHOLE_UPDATE_SLOTS = 3
"""Read shard k+1, step k, write k-1: where a shard is a whole parameter, which may be large."""
SHARD_ELEMENTS = (1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22)
DEFAULT_SHARD_ELEMENTS = 1 << 20
"""Cuts the flat index where no state moves."""
MIRRORED_SLOTS = 2
"""Slots of a ring that a device with memory of its own holds too: one in use, one coming or going."""
SHARD_GRANULE = 2048
"""Elements: shards start at multiples of it (see docs/architecture.md)."""


def staging_tier(*, on_cpu: bool) -> Tier:
    """Where rings lie: what a GPU computes with passes through pinned memory of the host."""
    return Tier.DEVICE if on_cpu else Tier.HOST


def unit_elements(profile: ModelProfile, unit: UnitProfile) -> int:
    """Elements of a unit whose state or gradients may leave memory."""
    if unit.movable_elements:
        return unit.movable_elements
    by_state = unit.state_bytes / profile.state_bytes_per_element if profile.state_bytes_per_element else 0
    by_gradient = (
        unit.gradient_bytes / profile.gradient_bytes_per_element if profile.gradient_bytes_per_element else 0
    )
    return -int(-max(by_state, by_gradient) // 1)


def shard_sizes(profile: ModelProfile) -> tuple[int, ...]:
    """Sizes of an update shard that make a difference, in elements, ascending: none larger than the largest
    unit, none smaller than the largest parameter where an optimizer takes whole ones."""
    largest_unit = max((unit_elements(profile, unit) for unit in profile.units), default=0)
    cap = round_up(max(largest_unit, 1), SHARD_GRANULE)
    return tuple(sorted({max(min(size, cap), _least_shard(profile)) for size in SHARD_ELEMENTS}))


def _least_shard(profile: ModelProfile) -> int:
    return 0 if profile.elementwise else round_up(profile.largest_parameter_elements, SHARD_GRANULE)


def default_shard_elements(profile: ModelProfile) -> int:
    """The shard of a plan that moves no state."""
    return max(DEFAULT_SHARD_ELEMENTS, _least_shard(profile))


def gradients_come_and_go(profile: ModelProfile, schedule: UpdateSchedule) -> bool:
    """Whether a unit's gradients are gone before the next one's are there: updated in backward, and never
    added to."""
    return schedule is UpdateSchedule.IN_BACKWARD and profile.micro_batches == 1


def gradient_slab_bytes(profile: ModelProfile, unit: UnitProfile, decision: StateDecision) -> int:
    """A CPU's slab for the gradients of ``unit`` that stay: every parameter's begins on a page."""
    if decision.gradient_tier is not Tier.DEVICE or not unit.gradient_bytes:
        return 0
    return round_up(unit.gradient_bytes + PAGE_BYTES * most_parameters(profile, unit), PAGE_BYTES)


def gradient_extent_bytes(profile: ModelProfile, unit: UnitProfile) -> int:
    """The most that the unit's gradients take on a tier: an extent for each parameter."""
    return _whole_pages(unit.gradient_bytes, most_parameters(profile, unit))


def state_extent_bytes(profile: ModelProfile, unit: UnitProfile, coded: CodedTier | None = None) -> int:
    """The most that the unit's optimizer state takes on a tier: in the records every state tensor of every
    piece has pages of its own. Where it is coded there is room for what does not shrink, and a page more for
    each segment; a record ends in a segment of its own.

    A parameter is one piece, and one more wherever a shard ends within it: once in the elements of the
    smallest shard at most, less what may be left over at its end. Where a state tensor does not have its
    parameter's shape (never so for an elementwise optimizer), its size is the profile's estimate, or what the
    optimizer says that it is.
    """
    pieces = _most_pieces(profile, unit)
    if unit.updates:
        plain = sum(update.record_bytes for update in unit.updates)
    else:
        plain = _whole_pages(unit.state_bytes, pieces * _state_tensors(profile))
    if coded is None or not plain:
        return plain
    return plain + PAGE_BYTES * (pieces + plain // coded.segment_bytes)


def _most_pieces(profile: ModelProfile, unit: UnitProfile) -> int:
    cuts = unit_elements(profile, unit) // (SHARD_ELEMENTS[0] - SHARD_GRANULE) if profile.elementwise else 0
    return most_parameters(profile, unit) + cuts


def _whole_pages(size_bytes: int, parts: int) -> int:
    """The most that ``parts`` can take which are ``size_bytes`` together, where each fills whole pages."""
    return (size_bytes + parts * (PAGE_BYTES - 1)) // PAGE_BYTES * PAGE_BYTES if size_bytes else 0


def most_parameters(profile: ModelProfile, unit: UnitProfile) -> int:
    """The parameters of a unit, small and frozen ones among them. A profile without names does not know them:
    one per 64 Ki elements."""
    return len(unit.parameters) or max(1, -(-unit_elements(profile, unit) // SMALLEST_PIECE_ELEMENTS))


def _state_tensors(profile: ModelProfile) -> int:
    return profile.state_tensors or -int(-profile.state_bytes_per_element // 4)


def streams_update(decision: StateDecision) -> bool:
    """Whether the unit's update passes through the update ring: state or gradients come from a tier."""
    return decision.optimizer_tier is not Tier.DEVICE or decision.gradient_tier is not Tier.DEVICE


def update_slots(profile: ModelProfile) -> int:
    """Slots of the update ring."""
    return UPDATE_SLOTS if profile.elementwise else WHOLE_UPDATE_SLOTS


def update_slot_bytes(profile: ModelProfile, shard_elements: int) -> int:
    """One slot of the update ring: state, gradient and workspace of one shard.

    Where the profile knows the parameters one by one it is exact: what the largest run of them fills, without
    workspace, of which there is one however many slots there are.
    """
    if any(unit.updates for unit in profile.units):
        return max(size for unit in profile.units for size in whole_shards(unit, shard_elements))
    per_element = (
        profile.state_bytes_per_element
        + profile.gradient_bytes_per_element
        + profile.update_workspace_bytes_per_element
    )
    # A shard holds one piece per 64 Ki elements at most, and each piece's regions (gradient, workspace and
    # state tensors) begin on a page.
    pieces = shard_elements // SMALLEST_PIECE_ELEMENTS + 1
    regions = 2 + _state_tensors(profile)
    padding = pieces * regions * PAGE_BYTES
    return round_up(-int(-shard_elements * per_element // 1), PAGE_BYTES) + padding


def whole_shards(unit: UnitProfile, shard_elements: int) -> list[int]:
    """Bytes that the shards of a unit fill in a slot: parameters in order, as many as have at most
    ``shard_elements`` elements together; one at least."""
    shards: list[int] = []
    room = 0
    for update in unit.updates:
        if not shards or update.elements > room:
            shards.append(0)
            room = shard_elements
        shards[-1] += update.record_bytes + update.gradient_bytes
        room -= update.elements
    return shards


def update_workspace_bytes(profile: ModelProfile, unit: UnitProfile, *, streamed: bool) -> int:
    """Temporaries of a unit's update outside of slots. A shard that is streamed in pieces has them in its
    slot."""
    if unit.updates:
        return unit.workspace_bytes
    per_element = 0.0 if streamed else profile.update_workspace_bytes_per_element
    return -int(-per_element * unit_elements(profile, unit) // 1)


def staging_for(
    profile: ModelProfile,
    blocks: tuple[BlockDecision, ...],
    states: tuple[StateDecision, ...],
    *,
    saved_slots: int,
    input_slots: int,
    shard_elements: int,
    on_cpu: bool,
    coded: tuple[CodedTier, ...] = (),
    coded_weights: tuple[CodedTier, ...] = (),
    wanted_windows: WantedWindows = DEFAULT_WINDOWS,
    schedule: UpdateSchedule = UpdateSchedule.SEQUENTIAL,
    held_passes: int = 1,
    overlay: bool = False,
) -> Staging:
    """The slabs that ``blocks`` and ``states`` need; a ring that nothing uses has no slots."""
    decided = list(zip(profile.blocks, blocks, strict=True))
    saved = [size for b, d in decided if (size := saved_slot_bytes(b, d))]
    moved = [size for b, d in decided if (size := input_slot_bytes(b, d))]
    taken = [groups(b, d) for b, d in decided if is_recomputed(d)]
    kept = tuple(kept_slot_bytes(b, d) for b, d in decided) if on_cpu else ()
    resident = [gradient_slab_bytes(profile, u, d) for u, d in zip(profile.units, states, strict=True)]
    together = max if gradients_come_and_go(profile, schedule) else sum
    gradients = [
        unit.gradient_bytes
        for unit, d in zip(profile.units, states, strict=True)
        if d.gradient_tier is not Tier.DEVICE
    ]
    updates = any(streams_update(d) for d in states)
    overlaid_bytes = 0
    if on_cpu and overlays(profile, schedule, overlay):
        overlaid_bytes = _overlaid_bytes(profile, kept, resident)
    staging = Staging(
        saved_slots=min(saved_slots, len(saved) * held_passes),
        saved_slot_bytes=max(saved, default=0),
        input_slots=max(min(input_slots, sum(taken) * held_passes), max(taken, default=0)),
        input_slot_bytes=max(moved, default=0),
        gradient_slots=GRADIENT_SLOTS if gradients else 0,
        gradient_slot_bytes=gradient_slot_bytes(profile) if gradients else 0,
        update_slots=update_slots(profile) if updates else 0,
        update_slot_bytes=update_slot_bytes(profile, shard_elements) if updates else 0,
        update_shard_elements=shard_elements if updates else default_shard_elements(profile),
        kept_bytes=kept if any(kept) else (),
        gradient_slab_bytes=together(resident) * on_cpu if resident else 0,
        overlaid_bytes=overlaid_bytes,
        weight_windows=weight_windows(profile, states, wanted_windows),
        coded=coded,
        coded_weights=tuple(c for c in coded_weights if any(d.weight_tier is c.tier for d in states)),
    )
    if not (on_cpu and updates_overlay(schedule, overlay)):
        return staging
    # While gradients lie at the high end, all of the slab below them is free.
    left = staging.pass_ring_bytes + held_passes * staging.kept_slab_bytes - overlaid_bytes
    return dataclasses.replace(staging, update_overlaid_bytes=min(staging.update_ring_bytes, left))


def updates_overlay(schedule: UpdateSchedule, wanted: bool) -> bool:
    """Whether the update's slots may lie where activations and transfers of the passes were: where the whole
    update comes behind the last backward, and is over before the next forward."""
    return wanted and schedule is UpdateSchedule.SEQUENTIAL


def overlays(profile: ModelProfile, schedule: UpdateSchedule, wanted: bool) -> bool:
    """Whether gradients appear while activations go, and are gone when those come again. With several
    micro-batches all gradients are there while the last one's activations are; where a unit's are gone before
    the next one's come, there is nothing to gain."""
    return wanted and profile.micro_batches == 1 and not gradients_come_and_go(profile, schedule)


def _overlaid_bytes(profile: ModelProfile, kept: tuple[int, ...], gradients: list[int]) -> int:
    """How much less than both slabs is ever used: while block l's backward runs, there are places of blocks
    0 to l and gradients of l and all behind it; at last all gradients."""
    places = [place_of(unit) for unit in profile.units]
    most = sum(gradients)
    for block in range(len(kept)):
        made = sum(size for place, size in zip(places, gradients, strict=True) if place >= block)
        most = max(most, sum(kept[: block + 1]) + made)
    return sum(kept) + sum(gradients) - most


def mirror_bytes(profile: ModelProfile, decisions: Decisions) -> int:
    """What the device holds of rings that lie in host memory; 0 where they are its own memory.

    Two slots of each ring for activations: in forward what two blocks send away, in backward what one block
    works on and the next one will. Two update slots: one is stepped, one arrives. As much as the ring of
    gradients, for sums of several micro-batches, and the gradient that leaves while the next one is made.
    """
    if decisions.staging_tier is Tier.DEVICE:
        return 0
    staging = decisions.staging
    activations = staging.saved_slot_bytes + staging.input_slot_bytes
    gradients = staging.gradient_slots * staging.gradient_slot_bytes
    leaving = profile.largest_gradient_bytes if staging.gradient_slots else 0
    updates = staging.update_slot_bytes if staging.update_slots else 0
    return MIRRORED_SLOTS * (activations + updates) + gradients + leaving


def gradient_slot_bytes(profile: ModelProfile) -> int:
    """4 MiB, or less for a model whose largest unit has less."""
    largest = max((unit.gradient_bytes for unit in profile.units), default=0)
    return min(GRADIENT_SLOT_BYTES, round_up(max(largest, 1), PAGE_BYTES))
