"""The machine of a plan: the tiers of a set-up as places, and the links that lead there.

DRAM and CXL memory are one copy away, over the GPU's bus; both are memory of the host, so they share the bus'
queues. A disk is two copies away: through slots in DRAM, over the disk's own link.

``ranges`` keeps a link's bandwidth for both directions at once by slowing each for good. A disk, which does
one thing at a time, is planned so. A bus is not: saved tensors go one way in forward and the other in
backward, and MEMO's published length from which a swap is hidden speaks for the full rate
(benchmarks/memo.py). Where state streams both ways at once, the bus is then taken for up to 1.37 times as
fast as it is.
"""

from __future__ import annotations

from memtrain.planner.actions import Tier
from memtrain.planner.compose import Setup
from memtrain.planner.hardware import Duplex
from memtrain.planner.ranges.model import Hop, Machine, Place

BUS = "host"
"""The link between device and host; every other link is called as its tier."""


def machine_of(setup: Setup, *, chunks: int, write_limit_bytes: int | None = None) -> Machine:
    """The places of ``setup`` in the order of its tiers.

    Args:
        setup: one GPU of a host, with its share.
        chunks: of a class of tensors, which travel as one copy: each is charged its share of a latency.
        write_limit_bytes: that may be written to NVMe in a step.

    Raises:
        ValueError: a disk without DRAM to pass through.
    """
    tiers = setup.tiers
    if Tier.NVME in tiers and setup.budget.host_bytes == 0:
        raise ValueError(
            "what goes to nvme passes through slots in DRAM, and the budget has none: give --dram, or leave "
            "--nvme out"
        )
    places = []
    for tier, link in tiers.items():
        capacity = setup.budget.capacity(tier)
        if not capacity:
            continue
        bus = _hop(BUS, setup.host_link if tier is Tier.NVME else link, None, chunks)
        way: tuple[Hop, ...] = (bus,)
        if tier is Tier.NVME:
            disk = setup.stores[tier]
            way = (bus, _hop(tier.value, disk, disk.mixed.value, chunks))
        places.append(
            Place(
                name=tier.value,
                capacity_bytes=capacity,
                hops=way,
                cpu_bytes_per_second=_cpu_rate(setup, tier),
                write_limit_bytes=write_limit_bytes if tier is Tier.NVME else None,
            )
        )
    staging = Tier.HOST.value if setup.budget.host_bytes else None
    return Machine(device_capacity_bytes=setup.budget.device_bytes, places=tuple(places), staging=staging)


def _hop(name: str, link: Duplex, mixed_bytes_per_second: float | None, chunks: int) -> Hop:
    return Hop(
        link=name,
        write_bytes_per_second=link.write.value,
        read_bytes_per_second=link.read.value,
        mixed_bytes_per_second=mixed_bytes_per_second,
        latency_seconds=link.latency_seconds.value / chunks if link.latency_seconds else 0.0,
    )


def _cpu_rate(setup: Setup, tier: Tier) -> float:
    """Of the CPU's optimizer on state that lies there: memory's bandwidth; a disk cannot be addressed."""
    if tier is Tier.HOST:
        return setup.dram_bytes_per_second.value
    return setup.stores[tier].mixed.value if tier is Tier.CXL else 0.0
