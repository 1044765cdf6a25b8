"""How often to take a snapshot: what each one costs against what a failure would lose.

Failures come at random, independently, one in ``failure_seconds`` on average. The interval that loses least
is Young's square root, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974), as
refined by Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future
Generation Computer Systems 22 (2006), whose complete cost function is the loss here.

Both take training to stand still while a snapshot is written. One that is written while training goes on
delays it by less than it takes; the difference is not lost when nothing fails, but a failure falls back to a
snapshot that is older by as much. Here that is a longer restart, and no interval is shorter than a snapshot
takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotCost:
    """What snapshots of a run cost, as measured."""

    overhead_seconds: float
    """By which one delays training."""
    write_seconds: float
    """From asking for one until a restart would find it; at least the overhead."""
    restart_seconds: float
    """From a failure until training goes on where the snapshot was taken."""

    def __post_init__(self) -> None:
        for name in ("overhead_seconds", "write_seconds", "restart_seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of seconds >= 0, got {value}")
        if self.write_seconds < self.overhead_seconds:
            raise ValueError(
                f"write_seconds must be >= overhead_seconds, got {self.write_seconds} < "
                f"{self.overhead_seconds}"
            )

    @property
    def fallback_seconds(self) -> float:
        """What a failure costs beside the work since the snapshot that it falls back to was asked for."""
        return self.restart_seconds + self.write_seconds - self.overhead_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotOutcome:
    """What the snapshots of a run have cost, and what the best interval would; part of a run's summary.

    Fractions are of the time that training alone would take.
    """

    completed: int
    overhead_seconds: float
    """Measured, of one; of the next two too."""
    write_seconds: float
    restart_seconds: float
    step_seconds: float
    every_steps: int
    """Between snapshots, as it was."""
    overhead: float
    """Fraction that snapshots took, at that interval."""
    failure_seconds: float | None = None
    """Mean time between failures, as stated; None where nobody has, and of what follows from it."""
    expected_loss: float | None = None
    """Fraction that snapshots and failures take at that interval; None also where hardly an interval gets
    done between two failures."""
    best_steps: int | None = None
    """Between snapshots, where least is lost."""
    best_overhead: float | None = None
    best_expected_loss: float | None = None

    @classmethod
    def of(
        cls,
        cost: SnapshotCost,
        *,
        completed: int,
        every_steps: int,
        step_seconds: float,
        failure_seconds: float | None,
    ) -> SnapshotOutcome:
        """Out of what was measured. Raises ValueError: a time that is none."""
        if not step_seconds > 0:
            raise ValueError(f"step_seconds must be > 0, got {step_seconds}")

        def overhead(steps: int) -> float:
            return cost.overhead_seconds / (steps * step_seconds)

        def loss(steps: int) -> float | None:
            assert failure_seconds is not None
            found = expected_loss(steps * step_seconds, cost, failure_seconds)
            return found if math.isfinite(found) else None

        measured = cls(
            completed=completed,
            overhead_seconds=cost.overhead_seconds,
            write_seconds=cost.write_seconds,
            restart_seconds=cost.restart_seconds,
            step_seconds=step_seconds,
            every_steps=every_steps,
            overhead=overhead(every_steps),
        )
        if failure_seconds is None:
            return measured
        best = max(1, round(best_interval(cost, failure_seconds) / step_seconds))
        return replace(
            measured,
            failure_seconds=failure_seconds,
            expected_loss=loss(every_steps),
            best_steps=best,
            best_overhead=overhead(best),
            best_expected_loss=loss(best),
        )

    def text(self) -> str:
        """One line: the interval that loses least, and the one that was used."""
        every = f"every {self.every_steps} steps, as now"
        if self.failure_seconds is None or self.best_steps is None or self.best_overhead is None:
            return (
                f"snapshots {every}, take {self.overhead:.2%} of the time (measured); state "
                f"checkpoint.hours_between_failures to be told the interval that loses least"
            )
        return (
            f"at one failure in {self.failure_seconds / 3600:g} h, with {self.restart_seconds:.0f} s to "
            f"restart: a snapshot every {self.best_steps} steps "
            f"({self.best_steps * self.step_seconds:.0f} s) loses least, {_percent(self.best_expected_loss)} "
            f"of the time, {self.best_overhead:.2%} to snapshots (Young 1974, Daly 2006); {every}, "
            f"{_percent(self.expected_loss)}, {self.overhead:.2%} to snapshots (measured)"
        )


def _percent(loss: float | None) -> str:
    return "all" if loss is None else f"{loss:.2%}"


def young_interval(overhead_seconds: float, failure_seconds: float) -> float:
    """Seconds of training between snapshots, to first order."""
    return math.sqrt(2 * overhead_seconds * failure_seconds)


def daly_interval(overhead_seconds: float, failure_seconds: float) -> float:
    """Seconds of training between snapshots, to higher order; within 0.5 % of the best."""
    if overhead_seconds >= 2 * failure_seconds:
        return failure_seconds
    ratio = overhead_seconds / (2 * failure_seconds)
    longer = 1 + math.sqrt(ratio) / 3 + ratio / 9
    return young_interval(overhead_seconds, failure_seconds) * longer - overhead_seconds


def best_interval(cost: SnapshotCost, failure_seconds: float) -> float:
    """Seconds of training between snapshots that lose least, one being written at a time."""
    _check_failures(failure_seconds)
    return max(
        daly_interval(cost.overhead_seconds, failure_seconds), cost.write_seconds - cost.overhead_seconds
    )


def expected_loss(interval_seconds: float, cost: SnapshotCost, failure_seconds: float) -> float:
    """Time lost to snapshots and failures, as a fraction of the time that training alone would take: 0.02 is
    2 % longer. Infinite where hardly an interval gets done between two failures.

    Args:
        interval_seconds: of training between two snapshots, > 0.
    """
    _check_failures(failure_seconds)
    if interval_seconds <= 0:
        raise ValueError(f"interval_seconds must be > 0, got {interval_seconds}")
    try:
        segment = math.expm1((interval_seconds + cost.overhead_seconds) / failure_seconds)
        fallback = math.exp(cost.fallback_seconds / failure_seconds)
    except OverflowError:
        return math.inf
    return failure_seconds / interval_seconds * fallback * segment - 1


def _check_failures(failure_seconds: float) -> None:
    if not failure_seconds > 0:
        raise ValueError(
            f"failure_seconds, the mean time between failures, must be > 0, got {failure_seconds}"
        )
