"""How far slabs, rings and arena of a CPU are, together, from the most that a step has in them at once.

Each of them is as large as what it holds at its own fullest moment: of slabs and transients that is their
load, by construction or by packing. They are not full at the same moment; what one address space for all of
them could save is the difference between the sum of their largest and the largest of their sums. Worked out
from the plan, position by position, as the bill is.

Index letters: ``l`` block, ``u`` unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from memtrain.planner.actions import UpdateSchedule
from memtrain.planner.bill import device_positions
from memtrain.planner.decisions import Decisions, gradient_slab_bytes, gradients_come_and_go
from memtrain.planner.profile import ModelProfile
from memtrain.planner.weight_windows import BEYOND, place_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Together:
    """Bytes of what comes and goes in a step: kept activations, gradients, staging, transients."""

    held_bytes: int
    """Of all slabs and rings, and of the largest transients."""
    load_bytes: int
    """The most that is in them at one position of a step."""
    position: str
    """Where that is."""

    @property
    def over(self) -> float:
        """Held over load, less one."""
        return self.held_bytes / self.load_bytes - 1 if self.load_bytes else 0.0


def together(profile: ModelProfile, decisions: Decisions) -> Together:
    """Of a step on a CPU. A ring counts whole at each position at which any of its slots may be in use."""
    staging = decisions.staging
    positions = device_positions(profile, decisions)
    step = _Step(profile, decisions)
    sums = [
        (step.in_slabs(p.name) + step.in_rings(p.name) + p.kept_bytes + p.transient_bytes, p.name)
        for p in positions
    ]
    load, name = max(sums, key=lambda each: each[0])
    passes = decisions.held_passes(profile)
    held = passes * staging.kept_slab_bytes + staging.gradient_slab_bytes - staging.overlaid_bytes
    held += staging.total_bytes + max(p.kept_bytes + p.transient_bytes for p in positions)
    return Together(held_bytes=held, load_bytes=load, position=name)


class _Step:
    def __init__(self, profile: ModelProfile, decisions: Decisions) -> None:
        self._decisions = decisions
        self._passes = decisions.held_passes(profile)
        self._blocks = {block.name: index for index, block in enumerate(profile.blocks)}
        self._units = {unit.name: place_of(unit) for unit in profile.units}
        self._accumulates = profile.micro_batches > 1
        self._alone = gradients_come_and_go(profile, decisions.update_schedule)
        self._gradients = [
            (place_of(unit), gradient_slab_bytes(profile, unit, state))
            for unit, state in zip(profile.units, decisions.states, strict=True)
        ]

    def in_slabs(self, position: str) -> int:
        """Places of blocks and of gradients that are in use."""
        part, _, name = position.partition(" ")
        kept = self._decisions.staging.kept_bytes or (0,) * len(self._blocks)
        block = self._blocks.get(name, -1)
        ahead = self._decisions.update_schedule is UpdateSchedule.AHEAD
        updates_in_pass = self._decisions.update_schedule is not UpdateSchedule.SEQUENTIAL
        if position == "epilogue":
            return self._passes * sum(kept) + self._made_from(BEYOND)
        if part == "update":
            place = self._units[name]
            before = len(kept) if place == BEYOND else max(place, 0)
            unused = self._made_from(place if ahead else -1, place)
            return self._passes * sum(kept[:before]) * updates_in_pass + unused
        if part == "forward":
            left = self._made_from(block, block) if self._accumulates or ahead else 0
            return self._passes * sum(kept[: block + 1]) + left
        return self._passes * sum(kept[: block + 1]) + self._made_from(block, block)

    def _made_from(self, place: int, alone: int = BEYOND) -> int:
        """Gradients of the units from ``place`` on; all where they are added to, one unit's where each
        is used up before the next."""
        if self._alone:
            return max([size for where, size in self._gradients if where == alone], default=0)
        return sum(size for where, size in self._gradients if where >= place or self._accumulates)

    def in_rings(self, position: str) -> int:
        """Rings of which slots are in use, whole."""
        staging, part = self._decisions.staging, position.partition(" ")[0]
        schedule = self._decisions.update_schedule
        in_pass = part != "update" or schedule is not UpdateSchedule.SEQUENTIAL
        total = sum(each.staging_bytes for each in (*staging.coded, *staging.coded_weights))
        if in_pass:
            total += staging.saved_slots * staging.saved_slot_bytes
            total += staging.input_slots * staging.input_slot_bytes
        if part != "forward" or schedule is UpdateSchedule.AHEAD or self._accumulates:
            total += staging.gradient_slots * staging.gradient_slot_bytes
        while_updating = {
            UpdateSchedule.SEQUENTIAL: part == "update",
            UpdateSchedule.AHEAD: part in ("update", "forward"),
            UpdateSchedule.IN_BACKWARD: part != "forward",
        }
        if while_updating[schedule]:
            total += staging.update_slots * staging.update_slot_bytes
        return total
