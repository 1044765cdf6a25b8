"""First-in-first-out queues served event by event: jobs in, start and end of each out.

While both directions of a tier are busy each runs at the same fraction of its own rate, such that together
they move ``mixed_bytes_per_second``.
"""

from __future__ import annotations

from dataclasses import dataclass

from memtrain.planner.actions import Tier
from memtrain.planner.machine import Machine

COMPUTE = "compute"


@dataclass(slots=True)
class Job:
    """Something one resource does; ``after`` are the indices of the jobs it needs."""

    name: str
    resource: str
    amount: float
    """Seconds for the computing thread, bytes for a queue."""
    after: tuple[int, ...]


def run(jobs: list[Job], machine: Machine) -> tuple[list[float], list[float]]:
    """Start and end of every job: each queue serves its jobs in order, the head waits for what it needs."""
    queues: dict[str, list[int]] = {}
    for index, job in enumerate(jobs):
        queues.setdefault(job.resource, []).append(index)
    rates, shared, latency, opposite = _rates(machine)
    heads = dict.fromkeys(queues, 0)
    running: dict[str, int] = {}
    left = [0.0] * len(jobs)
    starts, ends = [0.0] * len(jobs), [0.0] * len(jobs)
    done = [False] * len(jobs)
    now, finished = 0.0, 0
    while finished < len(jobs):
        for resource, queue in queues.items():
            if resource in running or heads[resource] == len(queue):
                continue
            index = queue[heads[resource]]
            if all(done[other] for other in jobs[index].after):
                running[resource] = index
                starts[index] = now
                left[index] = jobs[index].amount + latency[resource] * rates[resource]
        assert running, "the jobs of a step wait for each other in a circle"
        speeds = {r: shared[r] if opposite.get(r) in running else rates[r] for r in running}
        step = min(left[index] / speeds[r] for r, index in running.items())
        now += step
        for resource, index in list(running.items()):
            left[index] -= step * speeds[resource]
            # Ends that coincide up to rounding are taken together.
            if left[index] <= 1e-12 * speeds[resource]:
                ends[index], done[index] = now, True
                finished += 1
                heads[resource] += 1
                del running[resource]
    return starts, ends


def _rates(
    machine: Machine,
) -> tuple[dict[str, float], dict[str, float], dict[str, float], dict[str, str]]:
    """Per queue: rate alone, rate while the other direction is busy, latency, and the other direction."""
    rates, shared, latency, opposite = {COMPUTE: 1.0}, {COMPUTE: 1.0}, {COMPUTE: 0.0}, {}
    for link in machine.links:
        read, write = f"read:{link.tier.value}", f"write:{link.tier.value}"
        fraction = mixed_fraction(machine, link.tier)
        for name, rate in (
            (read, link.read_bytes_per_second),
            (write, link.write_bytes_per_second),
        ):
            rates[name], shared[name], latency[name] = rate, rate * fraction, link.latency_seconds
        opposite[read], opposite[write] = write, read
    return rates, shared, latency, opposite


def mixed_fraction(machine: Machine, tier: Tier) -> float:
    """Part of its own rate at which each direction of ``tier`` runs while both are busy."""
    link = machine.link(tier)
    return min(1.0, link.mixed_bytes_per_second / (link.read_bytes_per_second + link.write_bytes_per_second))
