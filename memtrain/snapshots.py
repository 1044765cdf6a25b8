"""Snapshots of a run beside its training: when a recipe asks for them, what they cost, and how often they
should be taken.

The work is ``memtrain.offload``'s (``async_snapshot``, ``held``); here are a run's folders, what is said
before the first step and after the last, and the recipe's section.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtrain.memory import cgroup_limit, machine_memory
from memtrain.offload.async_snapshot import AsyncCheckpointer, snapshot_bytes
from memtrain.offload.held import HeldSnapshots, check_room
from memtrain.offload.placed import WINDOW_BYTES
from memtrain.offload.store import PIECE_BYTES
from memtrain.planner.actions import Tier
from memtrain.planner.checkpoint_interval import SnapshotCost, SnapshotOutcome
from memtrain.planner.units import format_gib, parse_bytes
from memtrain.recipe import CheckpointSection

if TYPE_CHECKING:
    from memtrain.session import Session

MEMORY_BYTES = 2 * PIECE_BYTES + WINDOW_BYTES
"""What snapshots beside training take of the budget's memory: two pieces of a record on their way, and what
of the files is not yet on the disk."""


@dataclass(slots=True)
class _Seconds:
    """Of steps, by whether a snapshot was being written."""

    quiet: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)


class RunSnapshots:
    """The snapshots of one run.

    Args:
        section: the recipe's ``checkpoint``.
        output: the run's folder; the process that holds snapshots in memory has ``holder`` in it.

    Raises:
        HolderError: the holder cannot be started, or another process trains there.
    """

    def __init__(self, section: CheckpointSection, output: Path) -> None:
        self._section = section
        self._writer: AsyncCheckpointer | None = None
        self._held = HeldSnapshots(output / "holder") if section.hold_every else None
        self._found = ExitStack()
        self._seconds = _Seconds()
        self._restart_seconds = 0.0

    @property
    def wanted(self) -> bool:
        """Whether anything is written while training goes on."""
        return self._section.beside_training

    @property
    def memory_bytes(self) -> int:
        """To be kept out of the plan's budget."""
        return MEMORY_BYTES if self.wanted else 0

    @property
    def spare_bytes(self) -> int:
        """On the disk tier beyond the plan, for what updates would overwrite."""
        return parse_bytes(self._section.spare)

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._writer is not None and self._writer.busy

    def find_held(self) -> Path | None:
        """The last snapshot in memory as a folder, until ``attach``; None where none is held."""
        if self._held is None or self._section.resume == "never":
            return None
        return self._found.enter_context(self._held.folder())

    def attach(self, session: Session, restart_seconds: float) -> list[str]:
        """Be ready to take snapshots of ``session``; what is to be said of them before the first step.

        Args:
            restart_seconds: from this process's start to now.

        Raises:
            HolderError: no room to hold snapshots in memory.
            TierFullError: no room for the spares.
        """
        self._found.close()
        self._restart_seconds = restart_seconds
        if not self.wanted:
            return []
        whole_bytes = snapshot_bytes(session)
        lines = []
        if self._held is not None:
            limits = [limit for limit in (cgroup_limit(), machine_memory()) if limit is not None]
            tightest = min(limits, key=lambda limit: limit.free_bytes)
            to_come = max(0, session.budget.device_bytes - session.device_used_bytes())
            free_bytes = tightest.free_bytes - (to_come if session.machine.on_cpu else 0)
            check_room(whole_bytes, free_bytes, tightest.source)
            lines.append(
                f"snapshots in memory: every {self._section.hold_every} steps, {format_gib(2 * whole_bytes)} "
                f"outside of the budget at most, held by process {self._held.holder_pid}"
            )
        used = any(Tier.NVME in (state.optimizer_tier, state.weight_tier) for state in session.plan.states)
        spare = {Tier.NVME: self.spare_bytes} if self.spare_bytes and used else {}
        self._writer = AsyncCheckpointer(session, spare_bytes=spare)
        if self.spare_bytes:
            what = "for what updates would overwrite" if spare else "not used: no state is kept there"
            lines.append(f"snapshots: {format_gib(self.spare_bytes)} on nvme {what}")
        if self._section.asynchronous and self._section.every:
            lines.append(
                f"snapshots on disk: every {self._section.every} steps, beside training; "
                f"{format_gib(whole_bytes)} each, {self._section.keep + 1} while one is written"
            )
        return lines

    def save(self, folder: Path, *, progress: dict[str, Any], published: Any) -> None:
        """Begin a checkpoint; ``published`` is called when it is complete. Raises OffloadError."""
        assert self._writer is not None
        self._writer.save(folder, progress=progress, published=published)

    def hold(self, name: str, *, progress: dict[str, Any]) -> None:
        """Begin a snapshot in memory. Raises OffloadError."""
        assert self._writer is not None
        held = self._held
        assert held is not None
        self._writer.begin(lambda: held.publish(name), name, progress=progress)

    def note_step(self, seconds: float, beside: bool) -> None:
        """A step took ``seconds``; ``beside``: a snapshot was being written when it began."""
        (self._seconds.beside if beside else self._seconds.quiet).append(seconds)

    def wait(self) -> None:
        """Return when none is being written. Raises OffloadError of one that failed."""
        if self._writer is not None:
            self._writer.wait()

    def lines(self, step_seconds: float) -> list[str]:
        """What snapshots have cost, and how often they should be taken."""
        if self._writer is None or not self._writer.statistics.completed:
            return []
        done = self._writer.statistics
        cost = self._cost()
        found = [
            f"{done.completed} snapshots beside training: {cost.overhead_seconds:.2f} s of training and "
            f"{cost.write_seconds:.2f} s until complete each, {format_gib(done.bytes_written)} in all; "
            f"updates waited {done.waited_seconds:.2f} s for them"
        ]
        outcome = self.outcome(step_seconds)
        return found if outcome is None else [*found, outcome.text()]

    def outcome(self, step_seconds: float) -> SnapshotOutcome | None:
        """What they have cost against what they are for; None where none was completed, or no step was
        timed."""
        if self._writer is None or not self._writer.statistics.completed or not step_seconds > 0:
            return None
        hours, section = self._section.hours_between_failures, self._section
        steps = section.hold_every or section.every
        assert steps is not None
        return SnapshotOutcome.of(
            self._cost(),
            completed=self._writer.statistics.completed,
            every_steps=steps,
            step_seconds=step_seconds,
            failure_seconds=None if hours is None else 3600 * hours,
        )

    def close(self, *, finished: bool) -> None:
        """End what is being written. The process that holds snapshots ends when the run is ``finished``, or
        holds none; else it waits for a trainer that takes the last one up. May be called twice."""
        self._found.close()
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            if self._held is not None:
                if finished or not self._held.names:
                    self._held.close()
                else:
                    self._held.leave()

    def _cost(self) -> SnapshotCost:
        """As measured. Without a step that no snapshot was beside, what it slowed others down is not known,
        and only what the training thread stood still for is counted."""
        assert self._writer is not None
        done = self._writer.statistics
        slower = 0.0
        if self._seconds.quiet and self._seconds.beside:
            usual = statistics.median(self._seconds.quiet)
            slower = max(0.0, sum(seconds - usual for seconds in self._seconds.beside))
        overhead = (done.request_seconds + max(slower, done.waited_seconds)) / done.completed
        return SnapshotCost(
            overhead_seconds=overhead,
            write_seconds=max(overhead, done.write_seconds / done.completed),
            restart_seconds=self._restart_seconds,
        )
