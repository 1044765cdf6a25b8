"""The machine a plan is made for: tiers with capacity, links with bandwidth, each number with its source."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from memtrain.planner.actions import Tier
from memtrain.planner.canonical import canonical_json, check_version, plain, reading, short_digest
from memtrain.planner.memory_place import MemoryPlace, parse_place
from memtrain.planner.units import parse_bytes

MACHINE_VERSION = 2
"""Raised where something that was there before is meant otherwise. A field that came later and is None where
nothing was measured needs no other: an older file is read as what it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateCodec:
    """Optimizer state, or weights, coded on the way to a tier: measured through both, in plain bytes."""

    name: str
    ratio: float
    """Coded bytes by plain ones, of a sample like AdamW's fp32 moments, or like the model's weights. A run's
    report says its own."""
    read_bytes_per_second: float
    write_bytes_per_second: float
    cpu_seconds_per_byte: float
    """Processor time of one byte one way: coding, checksum, system call."""
    segment_bytes: int
    """What is coded at a time; on the tier it takes one page more than its own at most."""
    staging_bytes: int
    """Memory that coding takes, where the rings are."""

    def __post_init__(self) -> None:
        for name in ("ratio", "read_bytes_per_second", "write_bytes_per_second", "segment_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"codec {self.name}: {name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """The way between the device and one tier."""

    tier: Tier
    read_bytes_per_second: float
    """Tier to device, nothing else moving."""
    write_bytes_per_second: float
    """Device to tier, nothing else moving."""
    mixed_bytes_per_second: float
    """Sum of both directions while both are busy."""
    cpu_seconds_per_byte: float = 0.0
    """Processor time that moving one byte costs (copy, checksum, system call): taken from the
    arithmetic where device and processor are the same."""
    latency_seconds: float = 0.0
    source: str = "given"
    """``preset: ...``, ``measured 2026-11-22``, or ``given``."""
    state_codec: StateCodec | None = None
    """How optimizer state is coded that goes there; None: it is not."""
    weight_codec: StateCodec | None = None
    """How weights may be coded that live there; a plan says whether they are (``plan.Staging``)."""

    def __post_init__(self) -> None:
        for name in ("read_bytes_per_second", "write_bytes_per_second", "mixed_bytes_per_second"):
            if getattr(self, name) <= 0:
                raise ValueError(f"link to {self.tier.value}: {name} must be > 0, got {getattr(self, name)}")

    def state_load(self, size_bytes: float, *, read: bool) -> float:
        """Bytes of other traffic that occupy the link as long as so many of optimizer state."""
        return self.load(size_bytes, self.state_codec, read=read)

    def load(self, size_bytes: float, codec: StateCodec | None, *, read: bool) -> float:
        """The same of bytes that go through ``codec``, or as they are."""
        if codec is None:
            return size_bytes
        if read:
            return size_bytes * self.read_bytes_per_second / codec.read_bytes_per_second
        return size_bytes * self.write_bytes_per_second / codec.write_bytes_per_second

    @property
    def state_ratio(self) -> float:
        """Bytes that move for one of optimizer state."""
        return 1.0 if self.state_codec is None else self.state_codec.ratio

    @property
    def state_cpu_seconds_per_byte(self) -> float:
        """Processor time that one byte of optimizer state costs one way."""
        return (
            self.cpu_seconds_per_byte if self.state_codec is None else self.state_codec.cpu_seconds_per_byte
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Links by tier, and what computes."""

    name: str
    device: str
    """``cpu`` or ``cuda:0``."""
    cores: int
    dram_copy_bytes_per_second: float
    links: tuple[Link, ...]
    """One per tier that exists beside the device. On a CPU-only machine without a memory-only NUMA
    node that is ``nvme`` alone."""
    arithmetic_slowdown: float = 1.0
    """How many times as long a part takes in a step as alone, which is how it is profiled: forward, backward,
    recompute, what stands around the blocks, update. ``measure_machine`` sets it on a CPU (docs/log.md)."""
    source: str = "given"
    version: int = MACHINE_VERSION

    def __post_init__(self) -> None:
        # Written so that what is no number is refused too.
        if not 1.0 <= self.arithmetic_slowdown < math.inf:
            raise ValueError(
                f"machine {self.name}: arithmetic_slowdown must be finite and at least 1 (as long in a step "
                f"as alone), got {self.arithmetic_slowdown}"
            )

    @property
    def on_cpu(self) -> bool:
        """Whether the device is the processor: transfers cost arithmetic, and what stays lives in slabs."""
        return self.device.startswith("cpu")

    def link(self, tier: Tier) -> Link:
        """The link to ``tier``. Raises KeyError with the tiers that exist."""
        for link in self.links:
            if link.tier is tier:
                return link
        tiers = [link.tier.value for link in self.links]
        raise KeyError(f"machine {self.name} has no tier {tier.value}; it has {tiers}")

    def to_json(self) -> str:
        """Canonical JSON."""
        return canonical_json(plain(self))

    @classmethod
    def from_json(cls, text: str) -> Machine:
        """Read what ``to_json`` wrote. Raises ValueError on another version or unknown keys."""
        with reading("a machine"):
            data: dict[str, Any] = json.loads(text)
            check_version(data, MACHINE_VERSION, "machine")
            data["links"] = tuple(map(_read_link, data["links"]))
            return cls(**data)

    @property
    def digest(self) -> str:
        """Hash of the canonical form."""
        return short_digest(plain(self))


def _read_link(data: dict[str, Any]) -> Link:
    codecs = {name: data.get(name) for name in ("state_codec", "weight_codec")}
    read = {name: StateCodec(**codec) for name, codec in codecs.items() if codec is not None}
    return Link(**{**data, "tier": Tier(data["tier"]), **read})


class BudgetError(ValueError):
    """The budget gives bytes in a tier that the machine does not have; names the tier and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Bytes that the job may use in each tier: a promise, not a hint.

    ``Budget(device="1.2GiB", nvme="/mnt/fast:40GiB")``. On a CPU-only machine ``device`` is the whole
    process, libraries included. Beside a GPU ``host`` covers what is sent there and all staging.
    ``nvme`` is ``DIRECTORY:SIZE``; without it nothing goes to disk. ``cxl`` is ``PLACE:SIZE``: a
    memory-only NUMA node, several, a policy and nodes, or a dax device (``memory_place``). ``1:64GiB``,
    ``weighted_interleave:1,2:128GiB``, ``/dev/dax0.0:64GiB``. ``host`` may have a place too.
    """

    device: str | int
    host: str | int = 0
    cxl: str | None = None
    nvme: str | None = None

    def __post_init__(self) -> None:
        if self.device_bytes <= 0:
            raise ValueError(f"budget.device must be > 0, got {self.device!r}")
        _ = (self.nvme_bytes, self.host_bytes, self.host_place, self.cxl_bytes, self.cxl_place)

    @property
    def device_bytes(self) -> int:
        """Bytes of the device."""
        return parse_bytes(self.device)

    @property
    def host_bytes(self) -> int:
        """Bytes of DRAM beside the device; 0 on a CPU-only machine, where DRAM is the device."""
        return parse_bytes(self.host) if self._host_text is None else _split("host", self._host_text)[1]

    @property
    def host_place(self) -> MemoryPlace | None:
        """Where the host tier lies; None leaves that to the kernel."""
        return None if self._host_text is None else _place("host", self._host_text)

    @property
    def _host_text(self) -> str | None:
        return self.host if isinstance(self.host, str) and ":" in self.host else None

    @property
    def nvme_directory(self) -> str | None:
        """The swap directory, or None."""
        return None if self.nvme is None else _split("nvme", self.nvme)[0]

    @property
    def nvme_bytes(self) -> int:
        """Bytes of the swap directory; 0 without one."""
        return 0 if self.nvme is None else _split("nvme", self.nvme)[1]

    @property
    def cxl_place(self) -> MemoryPlace | None:
        """Where the CXL memory lies, or None."""
        return None if self.cxl is None else _place("cxl", self.cxl)

    @property
    def cxl_bytes(self) -> int:
        """Bytes of CXL memory; 0 without any."""
        return 0 if self.cxl is None else _split("cxl", self.cxl)[1]

    def capacity(self, tier: Tier) -> int:
        """Bytes allowed in ``tier``."""
        return {
            Tier.DEVICE: self.device_bytes,
            Tier.HOST: self.host_bytes,
            Tier.CXL: self.cxl_bytes,
            Tier.NVME: self.nvme_bytes,
        }[tier]


def _split(field: str, text: str) -> tuple[str, int]:
    where, colon, size = text.rpartition(":")
    if not colon or not where:
        example = "/mnt/fast:40GiB" if field == "nvme" else "1:64GiB"
        raise ValueError(f"budget.{field} must be WHERE:SIZE such as {example!r}, got {text!r}")
    return where, parse_bytes(size)


def _place(field: str, text: str) -> MemoryPlace:
    try:
        return parse_place(_split(field, text)[0])
    except ValueError as error:
        raise ValueError(f"budget.{field} {text!r}: {error}") from error
