"""The bill: how many bytes each tier holds, position by position, and at its peak.

A step is walked through once: forward of prologue and blocks, the epilogue, backward, and the update. At
each position the device holds what is always there (libraries, weights that stay, windows for those that do
not, staging, resident state), what has been kept so far, and what that position needs for a moment. With
several micro-batches the last one is the largest, because all resident gradients are present; so one
micro-batch is enough. In vertical order the micro-batches stand at an edge of a block together: while one is
worked on, all others hold what passes that edge, and what blocks leave for backward is held for each of them.

On a CPU what stays on the device lives in slabs that are there throughout (``Staging``): activations kept and
gradients do not vary by position, and the heap holds nothing longer than a block's forward or backward.

On a GPU the rings lie in host memory and are on the host's bill; the device is billed for their mirrors.

A block that does not keep its tensors is charged ``saved_bytes`` during its forward all the same: the profile
measured a forward that saves, and of the working set of one that does not this is the proven upper bound.
In the first step the executor looks at the tokens of a block that is cut before it runs it: where that takes
more than the forward, it is what is charged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from memtrain.planner import tables
from memtrain.planner.actions import Action, BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.block_parts import (
    activation_extents,
    backward_bytes,
    gathered_bytes,
    kept_bytes,
    probe_bytes,
    witness_bytes,
)
from memtrain.planner.bookkeeping import bookkeeping_bytes
from memtrain.planner.decisions import (
    Decisions,
    gradient_extent_bytes,
    gradients_come_and_go,
    mirror_bytes,
    state_extent_bytes,
    update_workspace_bytes,
)
from memtrain.planner.plan import BillLine, Staging
from memtrain.planner.profile import BlockProfile, ModelProfile, UnitProfile
from memtrain.planner.weight_coding import weight_room_bytes
from memtrain.planner.weight_windows import away_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Bytes of the device that vary, at one place of the step."""

    name: str
    kept_bytes: int
    gradient_bytes: int
    transient_bytes: int

    @property
    def total_bytes(self) -> int:
        """What varies, together."""
        return self.kept_bytes + self.gradient_bytes + self.transient_bytes


def forward_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """Bytes that a block needs during its forward, above what earlier blocks keep."""
    beside = 0 if decision.action is Action.KEEP else kept_bytes(block, decision)
    return max(beside + _running_bytes(block, decision), probe_bytes(block, decision))


def slab_forward_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """The same where what is kept is copied into slabs: the originals are there until the forward ends."""
    return max(_running_bytes(block, decision), probe_bytes(block, decision))


def _running_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    beside = gathered_bytes(block, decision) + witness_bytes(block, decision)
    form = block.in_form(decision.form)
    return form.saved_bytes + form.forward_transient_bytes + beside


def lasting_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """What is there of a block from its forward to its backward, where there are no slabs. Where there are,
    ``witness_bytes`` alone vary."""
    return kept_bytes(block, decision) + witness_bytes(block, decision)


def device_positions(profile: ModelProfile, decisions: Decisions) -> list[Position]:
    """Every position at which the device may reach its peak."""
    gradients = _GradientCount(profile, decisions)
    blocks = list(zip(profile.blocks, decisions.blocks, strict=True))
    in_slabs = _in_slabs(decisions.staging)
    during_forward = slab_forward_bytes if in_slabs else forward_bytes
    lasting = witness_bytes if in_slabs else lasting_bytes
    passes = decisions.held_passes(profile)
    waiting = (passes - 1) * profile.boundary_bytes
    late = (passes - 1) * profile.persistent_backward_bytes  # of the micro-batches that wait
    positions = [
        Position(
            name="forward prologue",
            kept_bytes=waiting,
            gradient_bytes=gradients.at_forward(-1),
            transient_bytes=profile.prologue_peak_bytes,
        )
    ]
    kept_before = [waiting]
    for index, (block, decision) in enumerate(blocks):
        positions.append(
            Position(
                name=f"forward {block.name}",
                kept_bytes=kept_before[-1] + (passes - 1) * lasting(block, decision),
                gradient_bytes=gradients.at_forward(index),
                transient_bytes=during_forward(block, decision),
            )
        )
        kept_before.append(kept_before[-1] + passes * lasting(block, decision))
    positions.append(
        Position(
            name="epilogue",
            kept_bytes=kept_before[-1],
            gradient_bytes=gradients.at_epilogue(),
            transient_bytes=profile.epilogue_peak_bytes + late,
        )
    )
    for index, (block, decision) in reversed(list(enumerate(blocks))):
        positions.append(
            Position(
                name=f"backward {block.name}",
                kept_bytes=kept_before[index + 1],
                gradient_bytes=gradients.at_backward(index),
                transient_bytes=profile.persistent_backward_bytes + late + backward_bytes(block, decision),
            )
        )
    positions.append(
        Position(
            name="backward prologue",
            kept_bytes=waiting,
            gradient_bytes=gradients.at_end(),
            transient_bytes=profile.persistent_backward_bytes
            + late
            + profile.prologue_peak_bytes
            + tables.accumulating_bytes(profile),
        )
    )
    positions += _update_positions(profile, decisions, gradients, kept_before)
    if profile.tables:
        positions.append(
            Position(
                name="update tables",
                kept_bytes=0,
                gradient_bytes=gradients.at_end(),
                transient_bytes=tables.update_bytes(profile),
            )
        )
    return positions


def _in_slabs(staging: Staging) -> bool:
    """Whether activations that stay are copied into slabs; where none stay, both ways count the same."""
    return staging.kept_slab_bytes > 0


class _GradientCount:
    """Gradients resident on the device outside a slab, by position.

    With several micro-batches all of them are there throughout the last one. With one, a unit's gradient
    is there from its backward until its update: to the end of ``step()``, or, when the update runs ahead,
    until just before the unit's next forward, or, in backward, to the end of its own backward.
    """

    def __init__(self, profile: ModelProfile, decisions: Decisions) -> None:
        self._accumulates = profile.micro_batches > 1
        self._ahead = decisions.update_schedule is UpdateSchedule.AHEAD
        self._alone = gradients_come_and_go(profile, decisions.update_schedule)
        self.prologue = self.epilogue = 0
        self.blocks = [0] * len(profile.blocks)
        for unit, decision in zip(profile.units, decisions.states, strict=True):
            if decision.gradient_tier is not Tier.DEVICE or decisions.staging.gradient_slab_bytes:
                continue
            if unit.block is not None:
                self.blocks[unit.block] += unit.gradient_bytes
            elif unit.name == "epilogue":
                self.epilogue += unit.gradient_bytes
            else:
                self.prologue += unit.gradient_bytes
        self.total = self.prologue + self.epilogue + sum(self.blocks)

    def at_forward(self, index: int) -> int:
        """Before the forward of block ``index`` (-1: the prologue), its own included."""
        if self._accumulates:
            return self.total
        if not self._ahead:
            return 0
        own = self.prologue if index < 0 else 0
        return own + sum(self.blocks[max(index, 0) :]) + self.epilogue

    def at_epilogue(self) -> int:
        """While the loss is computed."""
        return self.total if self._accumulates else self.epilogue

    def at_backward(self, index: int) -> int:
        """While the backward of block ``index`` runs, its own gradient included."""
        if self._alone:
            return self.blocks[index]
        return self.total if self._accumulates else self.epilogue + sum(self.blocks[index:])

    def at_end(self) -> int:
        """While the backward of the prologue runs."""
        return self.prologue if self._alone else self.total

    def at_update(self, unit: UnitProfile) -> int:
        """While the unit is updated."""
        if not self._alone:
            return self.total
        if unit.block is not None:
            return self.blocks[unit.block]
        return self.epilogue if unit.name == "epilogue" else self.prologue


def _update_positions(
    profile: ModelProfile, decisions: Decisions, gradients: _GradientCount, kept_before: list[int]
) -> list[Position]:
    """Updates: the arithmetic's temporaries over the whole unit, but for what slots hold of them."""
    positions = []
    in_backward = decisions.update_schedule is UpdateSchedule.IN_BACKWARD
    during_pass = in_backward or decisions.update_schedule is UpdateSchedule.AHEAD
    for unit, decision in zip(profile.units, decisions.states, strict=True):
        streamed = decision.optimizer_tier is not Tier.DEVICE
        workspace = update_workspace_bytes(profile, unit, streamed=streamed)
        if in_backward:
            in_slab = bool(decisions.staging.gradient_slab_bytes)
            workspace += beside_update_bytes(profile, unit, decision, in_slab=in_slab)
        kept = 0
        if during_pass and unit.block is not None:
            kept = kept_before[unit.block]
        elif during_pass and unit.name == "epilogue":
            kept = kept_before[-1]
        positions.append(
            Position(
                name=f"update {unit.name}",
                kept_bytes=kept,
                gradient_bytes=gradients.at_update(unit),
                transient_bytes=workspace,
            )
        )
    return positions


def beside_update_bytes(
    profile: ModelProfile, unit: UnitProfile, decision: StateDecision, *, in_slab: bool
) -> int:
    """What a backward pass holds of its own while the unit is updated in it: gradients of tied tables, the
    gradient of a block's input, and the last gradient of the unit, which has not been copied into a slab."""
    edge = max((block.input_bytes for block in profile.blocks), default=0)
    copied = in_slab and decision.gradient_tier is Tier.DEVICE and unit.gradient_bytes > 0
    return profile.persistent_backward_bytes + edge + profile.largest_gradient_bytes * copied


def constant_bytes(profile: ModelProfile, decisions: Decisions) -> dict[str, int]:
    """What the device holds at every position, by category."""
    state = sum(unit.resident_state_bytes for unit in profile.units) + sum(
        unit.state_bytes
        for unit, decision in zip(profile.units, decisions.states, strict=True)
        if decision.optimizer_tier is Tier.DEVICE
    )
    own_rings = decisions.staging_tier is Tier.DEVICE
    return {
        "libraries": profile.baseline_bytes,
        "weights": profile.weight_bytes - away_bytes(profile, decisions.states),
        "weight windows": decisions.staging.weight_window_bytes,
        "optimizer state": state,
        "staging": decisions.staging.total_bytes if own_rings else mirror_bytes(profile, decisions),
        "gradients": decisions.staging.gradient_slab_bytes - decisions.staging.overlaid_bytes,
        "activations": decisions.held_passes(profile) * decisions.staging.kept_slab_bytes,
        "tables": tables.resident_bytes(profile),
        "threads": decisions.thread_bytes(profile),
        "bookkeeping": own_rings * bookkeeping_bytes(profile, decisions.staging.update_shard_elements),
    }


def device_need_bytes(profile: ModelProfile, decisions: Decisions) -> int:
    """Peak of the device before the safety margin."""
    fixed = sum(constant_bytes(profile, decisions).values()) + profile.allocator_slack_bytes
    return fixed + max(position.total_bytes for position in device_positions(profile, decisions))


def with_margin(need_bytes: int, safety_margin: float) -> int:
    """A need on the device with the safety margin on top."""
    return need_bytes + math.ceil(need_bytes * safety_margin)


def tier_contents(profile: ModelProfile, decisions: Decisions, tier: Tier) -> dict[str, int]:
    """Bytes that a tier beside the device holds, by category: extents in whole pages, and rings.

    Never less than what is allocated; by how much more at most, ``staging`` says.
    """
    blocks = zip(profile.blocks, decisions.blocks, strict=True)
    units = list(zip(profile.units, decisions.states, strict=True))
    # Beside a GPU every window has a part in host memory, which the tier reads and writes.
    rings = decisions.staging.total_bytes + decisions.staging.weight_window_bytes
    sent = sum(size for block, d in blocks for where, size in activation_extents(block, d) if where is tier)
    return {
        "activations": decisions.held_passes(profile) * sent,
        "gradients": sum(gradient_extent_bytes(profile, u) for u, d in units if d.gradient_tier is tier),
        "optimizer state": sum(
            state_extent_bytes(profile, u, decisions.staging.coded_on(tier))
            for u, d in units
            if d.optimizer_tier is tier
        ),
        "weights": sum(
            weight_room_bytes(u, decisions.staging.weights_coded_on(tier))
            for u, d in units
            if d.weight_tier is tier
        ),
        "staging": rings if decisions.staging_tier is tier else 0,
        "tables": tables.tier_bytes(profile, tier),
    }


def tier_peaks(
    profile: ModelProfile, decisions: Decisions, tiers: tuple[Tier, ...], safety_margin: float
) -> dict[Tier, int]:
    """Predicted peak of the device and of each of ``tiers``."""
    peaks = {Tier.DEVICE: with_margin(device_need_bytes(profile, decisions), safety_margin)}
    peaks.update({tier: sum(tier_contents(profile, decisions, tier).values()) for tier in tiers})
    return peaks


def make_bill(
    profile: ModelProfile, decisions: Decisions, tiers: tuple[Tier, ...], safety_margin: float
) -> tuple[BillLine, ...]:
    """What fills each tier at its peak: lines of one tier sum exactly to its peak."""
    top = max(device_positions(profile, decisions), key=lambda position: position.total_bytes)
    device = constant_bytes(profile, decisions)
    device["gradients"] += top.gradient_bytes
    device["activations"] += top.kept_bytes
    device["transients"] = top.transient_bytes
    need = sum(device.values()) + profile.allocator_slack_bytes
    device["slack"] = profile.allocator_slack_bytes + with_margin(need, safety_margin) - need
    lines = [BillLine(category=c, tier=Tier.DEVICE, size_bytes=size) for c, size in device.items() if size]
    for tier in tiers:
        contents = tier_contents(profile, decisions, tier)
        lines += [BillLine(category=c, tier=tier, size_bytes=size) for c, size in contents.items() if size]
    return tuple(lines)
