"""What lies between GPUs, memory and disks: buses, interconnects, DRAM, CXL cards, NVMe, each with a source.

A bus is quoted as somebody measured it, not as its specification has it, and for one GPU that copies alone
(``Accelerator.gpus_per_uplink``). GB are 1e9 bytes. Where no measurement was found the source begins with
``assumption:`` or ``derived:``.
"""

from __future__ import annotations

import dataclasses

from memtrain.planner.hardware import Duplex, Interconnect, Quoted, find, time_shared

_NETWORK = "https://github.com/stas00/ml-engineering/blob/master/network/README.md (2026-08)"
_NVBANDWIDTH = "https://github.com/NVIDIA/nvbandwidth/blob/main/README.md"
_A800 = (
    "https://tweakers.net/nieuws/203182/nvidia-introduceert-a800-gpu-voor-china-die-niet-onder-exportrestricties-"
    "vs-valt.html (an A100 with 400 GB/s of NVLink)"
)


def _q(value: float, source: str) -> Quoted:
    return Quoted(value=value, source=source)


_GEN4_MIXED = 2 * 18.56e9
# Both directions at once moved 37.1 GB/s where each alone moved 26.0 and 25.0.
_MIXED_SHARE = _GEN4_MIXED / 51e9
_GEN3 = "https://github.com/mpicbg-scicomp/gearshifft/pull/82 (P100, pinned, near socket)"
_GEN5 = f"{_NETWORK}, nvbandwidth on H200"
_GEN5_MIXED = (
    "derived: the sum of what each direction moved against the other, 52.75 and 34.47 GB/s, https://github.com/"
    "liguodongiot/llm-action/blob/main/ai-infra/%E7%BD%91%E7%BB%9C/nvbandwidth.md (H800)"
)
# The upper end of what was found: a prediction should not be too good.
_COPY_CALL = _q(7e-6, "https://arxiv.org/abs/2602.21548, section 5.2 (5 to 7 us a cudaMemcpyAsync)")


def bus_mixed(read: Quoted, write: Quoted) -> Quoted:
    """Both directions of a bus at once where nobody measured them: as PCIe 4.0, 0.728 of their sum."""
    return Quoted(
        value=(read.value + write.value) * _MIXED_SHARE,
        source="assumption: 0.728 of both directions' sum, as measured on PCIe 4.0",
    )


def _bus(name: str, read: Quoted, write: Quoted, mixed: Quoted | None = None) -> Duplex:
    both = mixed or bus_mixed(read, write)
    return Duplex(name=name, read=read, write=write, mixed=both, latency_seconds=_COPY_CALL)


PCIE_GEN3 = _bus("pcie-gen3-x16", _q(12.15e9, _GEN3), _q(12.89e9, _GEN3))
PCIE_GEN4 = _bus(
    "pcie-gen4-x16",
    _q(26.0e9, _NVBANDWIDTH),
    _q(25.0e9, "https://github.com/NVIDIA/nvbandwidth/issues/53 (A100)"),
    _q(_GEN4_MIXED, f"derived: twice the measured direction, 18.56 GB/s, of {_NVBANDWIDTH}"),
)
PCIE_GEN5 = _bus("pcie-gen5-x16", _q(55.43e9, _GEN5), _q(55.06e9, _GEN5), _q(52.75e9 + 34.47e9, _GEN5_MIXED))


def _eight_lanes(link: Duplex) -> Duplex:
    return dataclasses.replace(link.scaled(0.5, "half the lanes"), name=link.name.replace("x16", "x8"))


HOST_LINKS: tuple[Duplex, ...] = (
    PCIE_GEN3,
    PCIE_GEN4,
    PCIE_GEN5,
    _eight_lanes(PCIE_GEN4),
    _eight_lanes(PCIE_GEN5),
)

_NVLINK_3_PEER = _q(276.3e9, f"{_NVBANDWIDTH} (device to device)")
_NVLINK_3_RING = _q(234.89e9, f"{_NETWORK}, all-reduce of 16 GiB on 8 A100")

INTERCONNECTS: tuple[Interconnect, ...] = (
    Interconnect(
        name="nvlink-3",
        peer_bytes_per_second=_NVLINK_3_PEER,
        collective_bytes_per_second=_NVLINK_3_RING,
    ),
    Interconnect(
        name="nvlink-3-a800",
        peer_bytes_per_second=_NVLINK_3_PEER.scaled(400 / 600, f"400/600 ({_A800})"),
        collective_bytes_per_second=_NVLINK_3_RING.scaled(400 / 600, f"400/600 ({_A800})"),
    ),
    Interconnect(
        name="nvlink-4",
        peer_bytes_per_second=_q(396.4e9, f"{_NETWORK}, nvbandwidth on H200"),
        collective_bytes_per_second=_q(
            361.4e9, f"{_NETWORK}, all-gather of 16 GiB on 8 H200, the slowest collective (no SHARP)"
        ),
    ),
    Interconnect(
        name="infinity-fabric-mi300x",
        peer_bytes_per_second=_q(47.671e9, f"{_NETWORK}, all-reduce of 4 GiB on 2 MI300X: one link"),
        collective_bytes_per_second=_q(312.912e9, f"{_NETWORK}, all-reduce of 4 GiB on 8 MI300X"),
    ),
    Interconnect(
        name="infiniband-hdr",
        peer_bytes_per_second=_q(20e9, "assumption: 0.8 of 200 Gbit/s, as collectives reach elsewhere"),
        collective_bytes_per_second=_q(20e9, "assumption: 0.8 of 200 Gbit/s, one adapter per GPU"),
    ),
    Interconnect(
        name="infiniband-ndr",
        peer_bytes_per_second=_q(40e9, "assumption: 0.8 of 400 Gbit/s, as collectives reach elsewhere"),
        collective_bytes_per_second=_q(40e9, "assumption: 0.8 of 400 Gbit/s, one adapter per GPU"),
    ),
)

# Bytes per second that one channel sustains, by its kind.
_STREAM = (
    "assumption: 0.8 of the channel's peak (JEDEC JESD79-{}: {} MT/s x 8 bytes), as STREAM commonly reaches"
)
DRAM_CHANNELS: dict[str, Quoted] = {
    f"ddr{generation}-{rate}": _q(0.8 * rate * 8e6, _STREAM.format(generation, rate))
    for generation, rates in ((4, (2666, 2933, 3200)), (5, (4800, 5600, 6400)))
    for rate in rates
}

_CXL = (
    "https://www.tomshardware.com/news/micron-unveils-128gb-256gb-cxl-2-expansion-modules (CZ120, 2:1 reads)"
)
CXL_DEVICES: tuple[Duplex, ...] = (
    Duplex(
        name="cxl-2-x8",
        read=PCIE_GEN5.read.scaled(0.5, "half (x8; a CXL 2.0 card runs over PCIe 5.0)"),
        write=PCIE_GEN5.write.scaled(0.5, "half (x8; a CXL 2.0 card runs over PCIe 5.0)"),
        mixed=_q(36e9, _CXL),
        latency_seconds=_q(
            0.5e-6,
            "assumption: five times DRAM's 0.1 us; three cards were measured to take 2 to 5 times as long "
            "(https://arxiv.org/abs/2405.14209)",
        ),
    ),
)


_DISK_READ = _q(
    150e-6,
    "assumption: as a Micron 9200, whose data sheet has 92 to 150 us for reads at queue depth 1 "
    "(https://vdocument.in/9200-nvme-ssds-2-steady-state-as-defined-by-snia-solid-state-storage-performance.html)",
)


def _disk(name: str, read: float, write: float, source: str) -> Duplex:
    reads, writes = _q(read, source), _q(write, source)
    both = time_shared(reads, writes)
    return Duplex(name=name, read=reads, write=writes, mixed=both, latency_seconds=_DISK_READ)


DISKS: tuple[Duplex, ...] = (
    _disk(
        "nvme-gen3",
        3.5e9,
        2.3e9,
        "https://www.pugetsystems.com/parts/Hard-Drive/Samsung-970-Pro-512GB-M-2-SSD-12735/ (sequential)",
    ),
    _disk(
        "nvme-gen4",
        6.5e9,
        3.5e9,
        "https://heise.de/-4720224 (Samsung PM9A3, U.2, sequential)",
    ),
    _disk(
        "nvme-gen5",
        13e9,
        6.6e9,
        "https://www.clubic.com/pro/entreprises/samsung/"
        "actualite-400254-samsung-annonce-un-ssd-pci-5-0-atteignant-les-13-go-s-en-lecture-sequentielle.html "
        "(Samsung PM1743)",
    ),
)


def host_link(name: str) -> Duplex:
    """The host link called ``name`` (``pcie-gen4-x16``). Raises ValueError with the known names."""
    return find("host link", name, HOST_LINKS)


def interconnect(name: str) -> Interconnect:
    """The interconnect called ``name`` (``nvlink-4``). Raises ValueError with the known names."""
    return find("interconnect", name, INTERCONNECTS)
