"""One complete choice of the planner: an action per block, tiers per unit of parameters, the schedule of the
update and the staging slabs.

What may be chosen is in ``options`` and ``space``, how large slabs and rings are in ``staging``; their names
can be had here too.
"""

from __future__ import annotations

from dataclasses import dataclass

from memtrain.planner.actions import (
    THREAD_BYTES,
    BlockDecision,
    MicroBatchOrder,
    StateDecision,
    Tier,
    UpdateSchedule,
)
from memtrain.planner.options import PlannerOptions
from memtrain.planner.plan import Plan, Staging
from memtrain.planner.profile import ModelProfile
from memtrain.planner.space import Space, open_space
from memtrain.planner.staging import (
    DEFAULT_SHARD_ELEMENTS,
    GRADIENT_SLOT_BYTES,
    GRADIENT_SLOTS,
    MIRRORED_SLOTS,
    SMALLEST_PIECE_ELEMENTS,
    UPDATE_SLOTS,
    gradient_extent_bytes,
    gradient_slab_bytes,
    gradient_slot_bytes,
    gradients_come_and_go,
    mirror_bytes,
    staging_for,
    staging_tier,
    state_extent_bytes,
    streams_update,
    unit_elements,
    update_slot_bytes,
    update_slots,
    update_workspace_bytes,
    whole_shards,
)

__all__ = [
    "DEFAULT_SHARD_ELEMENTS",
    "GRADIENT_SLOTS",
    "GRADIENT_SLOT_BYTES",
    "MIRRORED_SLOTS",
    "SLOT_COUNTS",
    "SMALLEST_PIECE_ELEMENTS",
    "UPDATE_SLOTS",
    "Decisions",
    "PlannerOptions",
    "Space",
    "gradient_extent_bytes",
    "gradient_passes",
    "gradient_slab_bytes",
    "gradient_slot_bytes",
    "gradients_come_and_go",
    "mirror_bytes",
    "open_space",
    "staging_for",
    "state_extent_bytes",
    "streams_update",
    "unit_elements",
    "update_slot_bytes",
    "update_slots",
    "update_workspace_bytes",
    "whole_shards",
]

SLOT_COUNTS = (2, 3, 4)
"""Two is the least that overlaps a transfer with a block; beyond four nothing was gained in simulation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decisions:
    """One complete choice, without any prediction of what it costs."""

    blocks: tuple[BlockDecision, ...]
    states: tuple[StateDecision, ...]
    staging: Staging
    update_schedule: UpdateSchedule
    staging_tier: Tier = Tier.DEVICE
    """Where the rings lie: on a CPU in the device's own memory; otherwise in host memory, and the device
    holds mirrors of some of their slots (``mirror_bytes``)."""
    micro_batch_order: MicroBatchOrder = MicroBatchOrder.HORIZONTAL

    def held_passes(self, profile: ModelProfile) -> int:
        """Micro-batches whose activations are held at the same time."""
        return profile.micro_batches if self.micro_batch_order is MicroBatchOrder.VERTICAL else 1

    def thread_bytes(self, profile: ModelProfile) -> int:
        """On the device, of the threads that vertical order runs micro-batches in."""
        threads = profile.micro_batches if self.micro_batch_order is MicroBatchOrder.VERTICAL else 0
        return threads * THREAD_BYTES if self.staging_tier is Tier.DEVICE else 0

    @classmethod
    def of(cls, plan: Plan, *, on_cpu: bool) -> Decisions:
        """What ``plan`` decided; ``on_cpu`` is that of the machine it was made for (``Machine.on_cpu``)."""
        return cls(
            blocks=plan.blocks,
            states=plan.states,
            staging=plan.staging,
            update_schedule=plan.update_schedule,
            staging_tier=staging_tier(on_cpu=on_cpu),
            micro_batch_order=plan.micro_batch_order,
        )


def gradient_passes(*, stays: bool, first: bool) -> float:
    """How often a CPU goes over a unit's gradient in one micro-batch, in copies of as many bytes.

    The first micro-batch's is copied out of the heap (1), a later one is added to the sum, which reads a
    second operand (1.5). What leaves is gone over twice more while it is in memory: for its norm, and for its
    largest element. What stays is judged only where gradients are clipped, once a step and not here.
    """
    return (1.0 if first else 1.5) + (0.0 if stays else 2.0)
