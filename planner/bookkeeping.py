"""What a session's own objects take in the host's memory: some KB for each parameter and for each shard.

Little beside a tensor, but a deep model has thousands of shards, and in the smallest budget that it can be
trained in nothing is left over. The profile says what one parameter and one shard take; how many shards there
are is the plan's decision.
"""

from __future__ import annotations

from memtrain.planner.profile import ModelProfile, UnitProfile
from memtrain.planner.staging import (
    SHARD_GRANULE,
    most_parameters,
    unit_elements,
    update_slot_bytes,
    update_slots,
)

PARAMETER_OBJECT_BYTES = 14 << 10
"""Hooks and guards of it and of its module, extents of its weight and gradient, its part of the block's turn.
Measured as the growth with depth of a Llama of which all is streamed: Python's objects are 11.8 KB of it, the
rest is C++ and what an allocator rounds up (docs/log.md). Of what stays in memory there is less."""
SHARD_OBJECT_BYTES = 4 << 10
"""Pieces, places in a slot and on a tier, checksums, events of the plan's timeline: 2.9 KB in Python."""


def bookkeeping_bytes(profile: ModelProfile, shard_elements: int) -> int:
    """Of all parameters, and of all shards of ``shard_elements``: state that stays is cut all the same."""
    parameters = sum(most_parameters(profile, unit) for unit in profile.units)
    shards = sum(_shards(profile, unit, shard_elements) for unit in profile.units)
    return parameters * profile.parameter_object_bytes + shards * profile.shard_object_bytes


def least_shard(profile: ModelProfile, sizes: tuple[int, ...], *, on_cpu: bool) -> int:
    """Of ``sizes`` the one with which slots of the update and objects take the least of the device: small
    shards have small slots, but of a model of billions of parameters they are tens of thousands."""
    if not on_cpu:
        return min(sizes)
    slots = update_slots(profile)
    return min(
        sizes, key=lambda size: slots * update_slot_bytes(profile, size) + bookkeeping_bytes(profile, size)
    )


def _shards(profile: ModelProfile, unit: UnitProfile, shard_elements: int) -> int:
    """A parameter that may be cut fills what its shard has left, but for less than a granule; tiles are units
    of their own, each with a shard that may not be full."""
    if not profile.elementwise:
        return most_parameters(profile, unit)
    least = max(shard_elements - SHARD_GRANULE, SHARD_GRANULE)
    ends = most_parameters(profile, unit) - 1 if unit.tiled else 0
    return -(-unit_elements(profile, unit) // least) + ends
