"""What traffic counts beside a step's time: of plans that take as long, the one that moves the least.

Transfers hide behind arithmetic. Time alone does not tell a plan that moves what it must from one that moves
what could stay where it is, and moving is not free: a disk wears, and other programs want the links. So a
plan costs its predicted step and a small part of the seconds for which its traffic would occupy the queues,
each at its own rate, as if nothing hid it. What is written to a disk counts twice.

The part is so small that it decides between steps that are alike. No queue is busy for longer than a step:
at most ``2 n + 1`` seconds are counted for each second of a step over ``n`` links, seven with three, and of
those ``PART * gap`` are added. So the plan of the least cost takes at most 0.14 of the gap longer than the
fastest one that was looked at. Step, bound and gap of a plan are of its time alone. A search goes from one
plan to a faster one, as if traffic were free: what it passes, and ends with, is priced.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from memtrain.planner.actions import Tier
from memtrain.planner.machine import Machine
from memtrain.planner.queues import COMPUTE, Job

PART = 0.02
"""Of the gap, what a second of traffic counts."""
LEAST_GAP = 1e-5
"""Where a smaller one is asked for: seconds that differ by less differ by rounding."""


class Cost(NamedTuple):
    """Of a plan, in the order of a search: by the step, and of equal ones by bytes."""

    step_seconds: float
    bytes_moved: int
    priced_seconds: float
    """The step, and what its traffic counts: the smallest is the plan to take."""


NONE = Cost(float("inf"), 0, float("inf"))
"""Of no plan at all."""


def cost_of(step_seconds: float, bytes_moved: int, traffic_seconds: float, gap: float) -> Cost:
    """Of a plan whose traffic occupies the queues for ``traffic_seconds`` (``traffic_seconds_of``)."""
    priced = step_seconds + PART * max(gap, LEAST_GAP) * traffic_seconds
    return Cost(step_seconds, bytes_moved, priced)


def traffic_seconds_of(jobs: Iterable[Job], machine: Machine) -> float:
    """Seconds of all queues together; of writes to a disk twice."""
    rates: dict[str, float] = {}
    for link in machine.links:
        wear = 2.0 if link.tier is Tier.NVME else 1.0
        rates[f"read:{link.tier.value}"] = link.read_bytes_per_second
        rates[f"write:{link.tier.value}"] = link.write_bytes_per_second / wear
    return sum(job.amount / rates[job.resource] for job in jobs if job.resource != COMPUTE)
