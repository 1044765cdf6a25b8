"""Intervals against Daly's published ones, and the loss against a simulation and a search."""

from __future__ import annotations

import math
import random

import pytest

from memtrain.planner.checkpoint_interval import (
    SnapshotCost,
    SnapshotOutcome,
    best_interval,
    daly_interval,
    expected_loss,
    young_interval,
)

MINUTE, HOUR = 60.0, 3600.0


@pytest.mark.parametrize(("failures", "minutes"), [(24 * HOUR, 117), (6 * HOUR, 57), (15 * MINUTE, 9.1)])
def test_published_intervals(failures: float, minutes: float) -> None:
    """Daly (2006), figures 3 to 5: dumps of 5 minutes."""
    assert daly_interval(5 * MINUTE, failures) / MINUTE == pytest.approx(minutes, rel=0.006)


def test_young() -> None:
    assert young_interval(2.0, 100.0) == 20.0


@pytest.mark.parametrize("overhead", [0.5, 5.0, 60.0])
@pytest.mark.parametrize("failures", [15 * MINUTE, 24 * HOUR])
def test_no_other_interval_loses_much_less(overhead: float, failures: float) -> None:
    cost = SnapshotCost(overhead_seconds=overhead, write_seconds=overhead, restart_seconds=30.0)
    found = best_interval(cost, failures)
    least = min(expected_loss(found * 1.01**power, cost, failures) for power in range(-200, 200))
    assert expected_loss(found, cost, failures) <= least * 1.005


def test_a_snapshot_of_half_the_time_between_failures_and_more() -> None:
    assert daly_interval(30.0, 15.0) == 15.0
    assert daly_interval(300.0, 15.0) == 15.0
    cost = SnapshotCost(overhead_seconds=20_000.0, write_seconds=20_000.0, restart_seconds=0.0)
    assert expected_loss(15.0, cost, 15.0) == math.inf


def test_loss_by_hand() -> None:
    """1 s of overhead every 9 s, failures every 1000 s, restarts of 10 s that fall back by 4 s more:
    1000/9 * 1.0140985 * 0.0100502 - 1, which is nearly 1/9 + (10/2 + 14)/1000 * 10/9."""
    cost = SnapshotCost(overhead_seconds=1.0, write_seconds=5.0, restart_seconds=10.0)
    assert expected_loss(9.0, cost, 1000.0) == pytest.approx(0.132429, abs=1e-6)
    assert expected_loss(9.0, cost, 1000.0) == pytest.approx(1 / 9 + 0.019 * 10 / 9, rel=0.01)


def test_written_behind_training_against_a_simulation() -> None:
    """Snapshots of 2 s of overhead that are complete after 12 s, failures every 300 s."""
    cost = SnapshotCost(overhead_seconds=2.0, write_seconds=12.0, restart_seconds=5.0)
    rng, interval, failures = random.Random(0), 30.0, 300.0
    clock = done = saved = 0.0
    pending: tuple[float, float] | None = None  # complete at, work in it
    fails = rng.expovariate(1 / failures)
    total = 200_000.0
    while done < total:
        end = clock + interval + cost.overhead_seconds
        complete = pending[0] if pending else math.inf
        if complete <= min(end, fails) and pending:
            saved, pending = pending[1], None
        if fails < end:
            clock = fails + cost.restart_seconds
            done, pending = saved, None
            fails = clock + rng.expovariate(1 / failures)
            continue
        clock, done = end, done + interval
        pending = (clock - cost.overhead_seconds + cost.write_seconds, done)
    assert clock / total - 1 == pytest.approx(expected_loss(interval, cost, failures), rel=0.06)


def test_no_interval_is_shorter_than_a_snapshot() -> None:
    cost = SnapshotCost(overhead_seconds=0.0, write_seconds=40.0, restart_seconds=1.0)
    assert best_interval(cost, HOUR) == 40.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1.0, 2.0, 0.0), "overhead_seconds must be"),
        ((1.0, math.nan, 0.0), "write_seconds must be a number"),
        ((2.0, 1.0, 0.0), "write_seconds must be >= overhead_seconds, got 1.0 < 2.0"),
    ],
)
def test_costs_that_make_no_sense(values: tuple[float, float, float], message: str) -> None:
    overhead, write, restart = values
    with pytest.raises(ValueError, match=message):
        SnapshotCost(overhead_seconds=overhead, write_seconds=write, restart_seconds=restart)


def test_times_that_make_no_sense() -> None:
    cost = SnapshotCost(overhead_seconds=1.0, write_seconds=1.0, restart_seconds=0.0)
    with pytest.raises(ValueError, match="mean time between failures, must be > 0"):
        best_interval(cost, 0.0)
    with pytest.raises(ValueError, match="interval_seconds must be > 0"):
        expected_loss(0.0, cost, 10.0)


def test_the_outcome_says_what_is_lost_and_to_what() -> None:
    """Daly's figure 3 with snapshots that stop training: 117 minutes, here of steps of 10 s."""
    cost = SnapshotCost(overhead_seconds=300.0, write_seconds=300.0, restart_seconds=600.0)
    outcome = SnapshotOutcome.of(
        cost, completed=3, every_steps=100, step_seconds=10.0, failure_seconds=24 * 3600.0
    )
    text = outcome.text()
    assert "at one failure in 24 h, with 600 s to restart: a snapshot every 700 steps (7000 s)" in text
    # 86400/7000 * exp(600/86400) * (exp(7300/86400) - 1) = 12.34286 * 1.0069686 * 0.0881628 = 1.09576
    assert "loses least, 9.58% of the time, 4.29% to snapshots" in text  # 300 of 7000 s
    # 86.4 * 1.0069686 * (exp(1300/86400) - 1) = 86.4 * 1.0069686 * 0.0151601 = 1.31896
    assert "every 100 steps, as now, 31.90%, 30.00% to snapshots (measured)" in text
    assert outcome.overhead == 0.3
    assert outcome.best_steps == 700

    unstated = SnapshotOutcome.of(cost, completed=3, every_steps=100, step_seconds=10.0, failure_seconds=None)
    assert (unstated.overhead, unstated.expected_loss, unstated.best_steps) == (0.3, None, None)
    assert "take 30.00% of the time (measured)" in unstated.text()
    hopeless = SnapshotOutcome.of(
        cost, completed=1, every_steps=10**6, step_seconds=10.0, failure_seconds=60.0
    )
    assert hopeless.expected_loss is None
    assert "as now, all, " in hopeless.text()
    with pytest.raises(ValueError, match="step_seconds must be > 0, got 0"):
        SnapshotOutcome.of(cost, completed=1, every_steps=1, step_seconds=0, failure_seconds=None)
