"""The simulator's jobs for weights that live on tiers: reads ahead of the turns that need them, and writes.

Which turns need a read, and from when it may run, is ``weight_windows``'; here it becomes jobs in the order
in which the queues get them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol

from memtrain.planner.actions import Tier
from memtrain.planner.block_parts import is_recomputed
from memtrain.planner.decisions import Decisions
from memtrain.planner.profile import ModelProfile
from memtrain.planner.weight_windows import Turn, is_away, step_turns


class Add(Protocol):
    """Puts a job into a queue; its index."""

    def __call__(self, name: str, resource: str, amount: float, after: tuple[int, ...] = ()) -> int: ...


class WeightJobs:
    """Walks through the turns of a step beside the simulator: ``needed``, ``written`` and ``over`` of each.

    Args:
        cpu_seconds_per_byte: by tier, what moving a byte takes of the arithmetic.
        add: where jobs go.
    """

    def __init__(
        self,
        profile: ModelProfile,
        decisions: Decisions,
        cpu_seconds_per_byte: Mapping[Tier, float],
        add: Add,
    ) -> None:
        self._units, self._states = profile.units, decisions.states
        self._cpu, self._add = cpu_seconds_per_byte, add
        self._turns = step_turns(
            profile,
            decisions.states,
            decisions.update_schedule,
            decisions.staging.weight_slots,
            decisions.micro_batch_order,
            recomputed={decision.block for decision in decisions.blocks if is_recomputed(decision)},
        )
        self._starting: dict[int | None, list[int]] = defaultdict(list)
        """Turns whose reads begin when another one is over, or with the step."""
        for index, turn in enumerate(self._turns):
            if turn.reads:
                self._starting[turn.begins_after].append(index)
        self._read: dict[int, tuple[int, ...]] = {}
        self._written: dict[int, int] = {}
        """By unit the job after which its window may be given to another one."""
        self._now = 0
        self._start(None, ())

    def needed(self) -> tuple[tuple[int, ...], float]:
        """Jobs that the present turn waits for, and seconds that they take of its arithmetic."""
        turn = self._turns[self._now]
        seconds = sum(
            self._units[unit].weight_extent_bytes * self._cpu[self._states[unit].weight_tier]
            for unit in turn.reads
        )
        # Where nothing is read, what gives way must have been written all the same.
        return self._read.get(self._now, self._written_before(self._turns[self._now])), seconds

    def is_written(self, unit: int) -> bool:
        """Whether the unit's update changes weights that live on a tier."""
        return is_away(self._states[unit]) and self._units[unit].written_extent_bytes > 0

    def writing_seconds(self, unit: int) -> float:
        """What writing a unit after its update takes of the arithmetic."""
        if not self.is_written(unit):
            return 0.0
        return self._units[unit].written_extent_bytes * self._cpu[self._states[unit].weight_tier]

    def updated(self, unit: int, job: int) -> None:
        """The update of ``unit`` ends with ``job``: what it has changed is written."""
        if self.is_written(unit):
            profile, where = self._units[unit], f"write:{self._states[unit].weight_tier.value}"
            self._written[unit] = self._add(
                f"write weights {profile.name}", where, profile.written_extent_bytes, (job,)
            )

    def over(self, jobs: tuple[int, ...]) -> None:
        """The present turn ends with ``jobs``: reads that waited for a window follow."""
        self._start(self._now, jobs)
        self._now += 1

    def _written_before(self, turn: Turn) -> tuple[int, ...]:
        return tuple(self._written[unit] for unit in turn.evicts if unit in self._written)

    def _start(self, after: int | None, jobs: tuple[int, ...]) -> None:
        for index in self._starting[after]:
            turn = self._turns[index]
            free = self._written_before(turn)
            self._read[index] = tuple(
                self._add(
                    f"read weights {self._units[unit].name}",
                    f"read:{self._states[unit].weight_tier.value}",
                    self._units[unit].weight_extent_bytes,
                    (*jobs, *free),
                )
                for unit in turn.reads
            )
