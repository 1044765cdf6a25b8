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
from memtrain.planner.weight_coding import WeightWay
from memtrain.planner.weight_windows import Read, is_away, step_turns


class Add(Protocol):
    """Puts a job into a queue, with the bytes that it moves; its index."""

    def __call__(
        self, name: str, resource: str, amount: float, after: tuple[int, ...] = (), moved: float | None = None
    ) -> int: ...


class WeightJobs:
    """Walks through the turns of a step beside the simulator: ``needed``, ``written`` and ``over`` of each.

    Args:
        ways: by tier, what moving a byte takes.
        add: where jobs go.
    """

    def __init__(
        self,
        profile: ModelProfile,
        decisions: Decisions,
        ways: Mapping[Tier, WeightWay],
        add: Add,
    ) -> None:
        self._units, self._states = profile.units, decisions.states
        self._ways, self._add = ways, add
        self._turns = step_turns(
            profile,
            decisions.states,
            decisions.update_schedule,
            decisions.staging.weight_windows,
            decisions.micro_batch_order,
            recomputed={decision.block for decision in decisions.blocks if is_recomputed(decision)},
        )
        self._starting: dict[int | None, list[tuple[int, Read]]] = defaultdict(list)
        """Turns and their reads, by the turn that must be over before; None: they begin with the step."""
        for index, turn in enumerate(self._turns):
            for read in turn.reads:
                self._starting[read.begins_after].append((index, read))
        self._read: dict[int, tuple[int, ...]] = {}
        self._written: dict[int, int] = {}
        """By unit the job after which its window may be given to another one."""
        self._now = 0
        self._start(None, ())

    def needed(self) -> tuple[tuple[int, ...], float]:
        """Jobs that the present turn waits for, and seconds that they take of its arithmetic."""
        turn = self._turns[self._now]
        seconds = sum(
            self._units[read.unit].weight_extent_bytes * self._way(read.unit).cpu_seconds
            for read in turn.reads
        )
        # Where nothing is read, what gives way must have been written all the same.
        return self._read.get(self._now, self._written_before(turn.evicts)), seconds

    def is_written(self, unit: int) -> bool:
        """Whether the unit's update changes weights that live on a tier."""
        return is_away(self._states[unit]) and self._units[unit].written_extent_bytes > 0

    def writing_seconds(self, unit: int) -> float:
        """What writing a unit after its update takes of the arithmetic."""
        if not self.is_written(unit):
            return 0.0
        return self._units[unit].written_extent_bytes * self._way(unit).cpu_seconds

    def _way(self, unit: int) -> WeightWay:
        return self._ways[self._states[unit].weight_tier]

    def _move(self, unit: int, size_bytes: int, after: tuple[int, ...], *, read: bool) -> int:
        way, tier = self._way(unit), self._states[unit].weight_tier.value
        name = f"{'read' if read else 'write'} weights {self._units[unit].name}"
        where = f"{'read' if read else 'write'}:{tier}"
        return self._add(name, where, size_bytes * way.load(read=read), after, size_bytes * way.moved)

    def updated(self, unit: int, job: int) -> None:
        """The update of ``unit`` ends with ``job``: what it has changed is written."""
        if self.is_written(unit):
            size_bytes = self._units[unit].written_extent_bytes
            self._written[unit] = self._move(unit, size_bytes, (job,), read=False)

    def over(self, jobs: tuple[int, ...]) -> None:
        """The present turn ends with ``jobs``: reads that waited for a window follow."""
        self._start(self._now, jobs)
        self._now += 1

    def _written_before(self, evicted: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self._written[unit] for unit in evicted if unit in self._written)

    def _start(self, after: int | None, jobs: tuple[int, ...]) -> None:
        for index, read in self._starting[after]:
            size_bytes = self._units[read.unit].weight_extent_bytes
            free = (*jobs, *self._written_before(read.evicts))
            job = self._move(read.unit, size_bytes, free, read=True)
            self._read[index] = (*self._read.get(index, ()), job)
