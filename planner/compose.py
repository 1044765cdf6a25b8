"""A machine that is not here, put together from presets and what the user says of it.

``machine_for("a800-80g", gpus=8, dram="1TiB", nvme="4TB@6GB/s")`` describes one of eight GPUs of a host: the
host's memory and disks, and what they can move, are divided evenly, and so is the bus to the host where GPUs
stand behind one switch (``Accelerator.gpus_per_uplink``). What comes out are the planner's ``Machine`` and
``Budget``, with every number's source. Nothing is measured unless a measured machine's links are given:
``Machine.source`` says ``preset``, and a plan made for it is a prediction. Processor time per byte is left at
0: copies do not slow a GPU's arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from memtrain.planner.actions import Tier
from memtrain.planner.flags import TierSpec, parse_channels, parse_duplex, parse_rate, parse_tier
from memtrain.planner.gpus import accelerator
from memtrain.planner.hardware import (
    GIVEN,
    Accelerator,
    Duplex,
    Interconnect,
    Quoted,
    find,
    in_series,
    slower,
)
from memtrain.planner.links import (
    CXL_DEVICES,
    DISKS,
    DRAM_CHANNELS,
    HOST_LINKS,
    INTERCONNECTS,
    bus_mixed,
    host_link,
)
from memtrain.planner.machine import Budget, Link, Machine
from memtrain.planner.units import MOST_BYTES, GiB, format_gib, parse_bytes

DEVICE_RESERVE = Quoted(
    value=GiB,
    source="assumption: CUDA context, libraries and collectives' buffers outside PyTorch's allocator",
)
HOST_SHARE = Quoted(
    value=0.9, source="assumption: a tenth of DRAM stays with the operating system and data loading"
)
SWAP_PLACE = "/path/to/swap"
"""Stands in the budget where no swap directory was named."""
_CXL_NODE = "1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One line of an answer to "where is that from?"."""

    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """One GPU of a host, with its share of the host. All rates are this GPU's."""

    machine: Machine
    budget: Budget
    accelerator: Accelerator
    gpus: int
    """GPUs that share the host, all used."""
    host_link: Duplex
    """Device and DRAM, limited by the share of DRAM's bandwidth."""
    interconnect: Interconnect
    dram_bytes_per_second: Quoted
    """Share of what DRAM sustains: for an optimizer on the CPU."""
    tiers: Mapping[Tier, Duplex]
    """The same links as ``machine.links``, each number with its own source."""
    stores: Mapping[Tier, Duplex]
    """CXL memory and disks by themselves, as the processor reaches them: no bus of a GPU limits these."""

    def facts(self) -> tuple[Fact, ...]:
        """Every number with unit and source."""
        found = [
            Fact(name=f"{self.accelerator.name}: {name}", value=q.value, unit=_unit(name), source=q.source)
            for name, q in self.accelerator.numbers().items()
        ]
        for tier, link in self.tiers.items():
            for direction in ("read", "write", "mixed"):
                rate: Quoted = getattr(link, direction)
                found.append(_rate_fact(f"{tier.value}: {direction}", rate))
            if link.latency_seconds is not None:
                wait = link.latency_seconds
                found.append(
                    Fact(name=f"{tier.value}: latency", value=wait.value * 1e6, unit="us", source=wait.source)
                )
        found.append(_rate_fact("DRAM, this GPU's share", self.dram_bytes_per_second))
        found.append(_rate_fact(f"{self.interconnect.name}: peer", self.interconnect.peer_bytes_per_second))
        ring = self.interconnect.collective_bytes_per_second
        found.append(_rate_fact(f"{self.interconnect.name}: collective", ring))
        return tuple(found)


def machine_for(
    gpu: str | Accelerator,
    *,
    gpus: int = 1,
    dram: str | None = None,
    cxl: str | None = None,
    nvme: str | None = None,
    host_link: str | None = None,
    interconnect: str | None = None,
    budget: Mapping[str, str] | None = None,
    cores: int = 1,
    measured: Machine | None = None,
) -> Setup:
    """Describe one of ``gpus`` equal GPUs of a host.

    Args:
        gpu: name of a preset, or an ``Accelerator`` (``accelerator(name).given({...})`` overrides numbers).
        gpus: how many of them share the host's memory, disks and DRAM bandwidth.
        dram, cxl, nvme: the whole host's, as ``flags`` reads them; a tier that is None does not exist.
        host_link: a preset's name, or ``25GB/s`` or ``25GB/s,24GB/s,40GB/s`` (read, write, both at once),
            of each GPU for itself; without it the GPU's own, shared with those behind the same switch.
        interconnect: a preset's name or a rate; without it the GPU's own, or the host link where it has none.
        budget: bytes that this GPU's job may use by tier, such as ``{"device": "70GiB"}``; all that is there
            by default (``DEVICE_RESERVE``, ``HOST_SHARE``).
        cores: processor cores for this GPU's process, only written down.
        measured: whose links stand in for presets, where no rate is given: the host's as it is, those of cxl
            and nvme as one device's. What it does not have is quoted.

    Raises:
        ValueError: something cannot be read, a budget is above what is there, or ``measured`` has no link
            that could be used.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    device = accelerator(gpu) if isinstance(gpu, str) else gpu
    specs = {
        Tier(name): parse_tier(name, text)
        for name, text in (("cxl", cxl), ("nvme", nvme))
        if text is not None
    }
    memory = None if dram is None else parse_tier("dram", dram)
    unknown = {tier for tier, spec in specs.items() if spec.rates is None}
    links = _measured_links(measured, unknown | ({Tier.HOST} if host_link is None else set()))
    bus = _host_link(device, host_link, gpus, links.get(Tier.HOST))
    dram_rate = _dram_rate(memory, bus, device, gpus)
    bus = in_series(Duplex(name="DRAM", read=dram_rate, write=dram_rate, mixed=dram_rate), bus)
    tiers = {Tier.HOST: bus} if memory is not None else {}
    stores = {
        tier: _store(tier, spec, _generation(device, bus), links.get(tier)).scaled(
            spec.count / gpus, f"{spec.count}/{gpus}, devices a GPU,"
        )
        for tier, spec in specs.items()
    }
    tiers |= {tier: in_series(bus, store) for tier, store in stores.items()}
    capacities = {Tier.HOST: memory, **specs}
    return Setup(
        machine=_machine(device, tiers, dram_rate, gpus, cores),
        budget=_budget(device, capacities, gpus, budget or {}),
        accelerator=device,
        gpus=gpus,
        host_link=bus,
        interconnect=_interconnect(device, bus, interconnect),
        dram_bytes_per_second=dram_rate,
        tiers=tiers,
        stores=stores,
    )


def _measured_links(measured: Machine | None, wanted: set[Tier]) -> dict[Tier, Duplex]:
    """The measured links of ``wanted`` tiers."""
    if measured is None:
        return {}
    found = {link.tier: _measured(measured, link) for link in measured.links if link.tier in wanted}
    if not found:
        has = ", ".join(link.tier.value for link in measured.links) or "none"
        raise ValueError(
            f"machine {measured.name} has measured links to {has}, and none of them is used: describe the "
            "tier (--nvme, --cxl) without rates of your own, drop --host-link, measure with a device of its "
            "own memory, or leave the machine out"
        )
    return found


def _measured(machine: Machine, link: Link) -> Duplex:
    source = f"{link.source} on {machine.name}"
    return Duplex(
        name=f"{link.tier.value} of {machine.name}",
        read=Quoted(value=link.read_bytes_per_second, source=source),
        write=Quoted(value=link.write_bytes_per_second, source=source),
        mixed=Quoted(value=link.mixed_bytes_per_second, source=source),
        latency_seconds=Quoted(value=link.latency_seconds, source=source) if link.latency_seconds else None,
    )


def _host_link(device: Accelerator, text: str | None, gpus: int, measured: Duplex | None) -> Duplex:
    if text is not None:
        return parse_duplex("--host-link", text, HOST_LINKS, bus_mixed)
    sharers = min(gpus, device.gpus_per_uplink.value)
    why = f"1/{sharers:g}, GPUs behind one switch ({device.gpus_per_uplink.source})"
    return (measured or host_link(device.host_link)).scaled(1 / sharers, why)


def _generation(device: Accelerator, bus: Duplex) -> str:
    """Of the host's PCI Express, by the bus if it is a preset, or else by the GPU's own."""
    parts = [part for name in (bus.name, device.host_link) for part in name.split("-")]
    return next(part for part in parts if part.startswith("gen"))


def _dram_rate(memory: TierSpec | None, bus: Duplex, device: Accelerator, gpus: int) -> Quoted:
    """This GPU's share: what the user says, or two channels of a desktop, or eight a socket and four GPUs.

    More than two consumer GPUs stand in a server's board: no desktop has the lanes.
    """
    share = f"1/{gpus} for this GPU"
    if memory is not None and memory.rates is not None:
        return parse_channels(memory.rates).scaled(1 / gpus, share)
    desktop = device.consumer and gpus <= 2
    channel = DRAM_CHANNELS["ddr5-4800" if desktop or _generation(device, bus) == "gen5" else "ddr4-3200"]
    channels = 2 if desktop else 8 * math.ceil(gpus / 4)
    why = f"assumption: {channels} channels for {gpus} GPU{'s' if gpus > 1 else ''}"
    return channel.scaled(channels, why).scaled(1 / gpus, share)


def _store(tier: Tier, spec: TierSpec, generation: str, measured: Duplex | None) -> Duplex:
    """One device of the tier: as given, as measured, a disk of the host's generation, the CXL card known."""
    presets = CXL_DEVICES if tier is Tier.CXL else DISKS
    if spec.rates is not None:
        return parse_duplex(f"--{tier.value}", spec.rates, presets)
    if measured is not None:
        return measured
    if tier is Tier.CXL:
        return CXL_DEVICES[0]
    return find("nvme preset", f"nvme-{generation}", DISKS)


def _interconnect(device: Accelerator, bus: Duplex, text: str | None) -> Interconnect:
    if text is not None and "/" in text:
        rate = parse_rate("--interconnect", text)
        return Interconnect(name=GIVEN, peer_bytes_per_second=rate, collective_bytes_per_second=rate)
    if text is not None or device.interconnect is not None:
        return find("interconnect", text or str(device.interconnect), INTERCONNECTS)
    ring = bus.mixed.scaled(0.5, "half (a ring sends and receives at once)")
    return Interconnect(
        name=f"{bus.name} through the host",
        peer_bytes_per_second=slower(bus.read, bus.write),
        collective_bytes_per_second=ring,
    )


def _machine(
    device: Accelerator, tiers: Mapping[Tier, Duplex], dram: Quoted, gpus: int, cores: int
) -> Machine:
    links = tuple(
        Link(
            tier=tier,
            read_bytes_per_second=link.read.value,
            write_bytes_per_second=link.write.value,
            mixed_bytes_per_second=link.mixed.value,
            latency_seconds=link.latency_seconds.value if link.latency_seconds else 0.0,
            source=_link_source(link),
        )
        for tier, link in tiers.items()
    )
    return Machine(
        name=f"{device.name}, one of {gpus}" if gpus > 1 else device.name,
        device="cuda:0",
        cores=cores,
        dram_copy_bytes_per_second=dram.value,
        links=links,
        source=f"preset: {device.name}; quoted numbers, nothing measured",
    )


def _link_source(link: Duplex) -> str:
    sources = {"read": link.read.source, "write": link.write.source, "mixed": link.mixed.source}
    if set(sources.values()) == {GIVEN}:
        return GIVEN
    kind = GIVEN if GIVEN in sources["read"] and GIVEN in sources["write"] else "preset"
    return f"{kind}: " + "; ".join(f"{name}: {source}" for name, source in sources.items())


def _budget(
    device: Accelerator, specs: Mapping[Tier, TierSpec | None], gpus: int, given: Mapping[str, str]
) -> Budget:
    room = {
        Tier.DEVICE: int(device.memory_bytes.value),
        **{tier: spec.size_bytes // gpus for tier, spec in specs.items() if spec is not None},
    }
    for tier, size in room.items():
        if size > MOST_BYTES:
            raise ValueError(
                f"{tier.value} of {size:.3g} bytes is more than can be addressed, {MOST_BYTES >> 40} TiB: "
                "lower it"
            )
    bytes_of = dict(room)
    bytes_of[Tier.DEVICE] -= int(DEVICE_RESERVE.value)
    if Tier.HOST in bytes_of:
        bytes_of[Tier.HOST] = int(bytes_of[Tier.HOST] * HOST_SHARE.value)
    for name, text in given.items():
        tier = _known_tier(name, room)
        bytes_of[tier] = parse_bytes(text)
        if bytes_of[tier] > room[tier]:
            raise ValueError(
                f"--budget {name}={text} is above the {format_gib(room[tier])} that one of {gpus} GPU(s) of "
                f"{device.name} has there; lower it, or describe a larger machine"
            )
    places = {tier: spec.place for tier, spec in specs.items() if spec is not None}
    cxl, nvme = bytes_of.get(Tier.CXL), bytes_of.get(Tier.NVME)
    return Budget(
        device=bytes_of[Tier.DEVICE],
        host=bytes_of.get(Tier.HOST, 0),
        cxl=f"{places[Tier.CXL] or _CXL_NODE}:{cxl}" if cxl else None,
        nvme=f"{places[Tier.NVME] or SWAP_PLACE}:{nvme}" if nvme else None,
    )


def _known_tier(name: str, room: Mapping[Tier, int]) -> Tier:
    for tier in room:
        if tier.value == name:
            return tier
    raise ValueError(
        f"there is no tier {name!r} to budget; this machine has {', '.join(tier.value for tier in room)}: "
        f"describe the tier with --dram, --cxl or --nvme, or drop it from --budget"
    )


def _rate_fact(name: str, rate: Quoted) -> Fact:
    return Fact(name=name, value=rate.value / 1e9, unit="GB/s", source=rate.source)


def _unit(field: str) -> str:
    if field.endswith("flops_per_second"):
        return "FLOP/s"
    if field.endswith("bytes_per_second"):
        return "bytes/s"
    if field == "gpus_per_uplink":
        return "GPUs"
    return "bytes" if field.endswith("bytes") else "of the peak"
