"""What hardware can do, in quoted numbers: every value beside the place it was read.

Nothing here was measured by memtrain. A number comes from a data sheet, from somebody's published
measurement, or is an assumption that says so; one that the user gives replaces it and is marked ``given``.
The numbers stand in ``gpus.py`` and ``links.py``; ``compose.py`` makes a ``Machine`` of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

GIVEN = "given"

# Words of drivers and shops that tell no two devices apart.
_NOISE = {"nvidia", "amd", "geforce", "instinct", "tesla", "gpu", "hbm2", "hbm2e", "hbm3", "hbm3e", "oam"}
# Forms of one device, and the ones that are meant where none is named.
_FORMS, _USUAL_FORMS = {"sxm", "pcie", "x16", "x8"}, {"sxm", "x16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Quoted:
    """A number and where it comes from."""

    value: float
    source: str
    """A URL with what stands there, ``assumption: ...``, ``derived: ...`` or ``given``."""

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise ValueError(f"a quoted number must be finite and above 0, got {self.value} ({self.source})")
        if not self.source:
            raise ValueError(f"the number {self.value} has no source: say where it is from, or {GIVEN!r}")

    def scaled(self, factor: float, why: str) -> Quoted:
        """``factor`` times the number; the source says so unless the factor is 1."""
        if factor == 1:
            return self
        return Quoted(value=self.value * factor, source=f"derived: {why} of [{self.source}]")


def slower(*rates: Quoted) -> Quoted:
    """The lowest rate of a chain; the source is that of the part that limits it."""
    return min(rates, key=lambda rate: rate.value)


def time_shared(read: Quoted, write: Quoted) -> Quoted:
    """Both directions of something that does one at a time: half the bytes at each rate, 2 / (1/r + 1/w)."""
    return Quoted(
        value=2 / (1 / read.value + 1 / write.value),
        source="assumption: reads and writes take turns, half of the bytes each",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Duplex:
    """Something with two directions, seen from the device: a bus, a disk, a memory expander."""

    name: str
    read: Quoted
    """Bytes per second towards the device, nothing else moving."""
    write: Quoted
    """Bytes per second from the device, nothing else moving."""
    mixed: Quoted
    """Sum of both directions, in bytes per second, while both are busy."""
    latency_seconds: Quoted | None = None
    """What one copy costs beside its bytes; None where nothing is known of it."""

    def __post_init__(self) -> None:
        most = self.read.value + self.write.value
        if self.mixed.value > most * (1 + 1e-9):
            raise ValueError(
                f"{self.name}: both directions at once cannot move {self.mixed.value:g} bytes/s, more than "
                f"{most:g}, the sum of each alone; give a lower third rate"
            )

    def scaled(self, factor: float, why: str) -> Duplex:
        """All three rates times ``factor``; a copy's latency stays."""
        return dataclasses.replace(
            self,
            read=self.read.scaled(factor, why),
            write=self.write.scaled(factor, why),
            mixed=self.mixed.scaled(factor, why),
        )


def in_series(near: Duplex, far: Duplex) -> Duplex:
    """``far`` behind ``near``: in each direction the slower counts, both at once at most their sum, and a
    copy waits for the latency of each."""
    read, write = slower(far.read, near.read), slower(far.write, near.write)
    both = Quoted(value=read.value + write.value, source="derived: the sum of both directions alone")
    return Duplex(
        name=far.name,
        read=read,
        write=write,
        mixed=slower(far.mixed, near.mixed, both),
        latency_seconds=_one_after_the_other(near.latency_seconds, far.latency_seconds),
    )


def _one_after_the_other(near: Quoted | None, far: Quoted | None) -> Quoted | None:
    if near is None or far is None:
        return near or far
    return Quoted(
        value=near.value + far.value, source=f"derived: the sum of [{near.source}] and [{far.source}]"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Interconnect:
    """What ties GPUs together."""

    name: str
    peer_bytes_per_second: Quoted
    """One copy from one GPU to another, one way."""
    collective_bytes_per_second: Quoted
    """What each GPU sends during a ring collective (the "bus bandwidth" of collective benchmarks)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """One GPU. Peaks are dense, without structured sparsity; efficiencies are fractions of the peak."""

    name: str
    memory_bytes: Quoted
    """What programs can see, not what the box says, where somebody reported it."""
    memory_bytes_per_second: Quoted
    half_flops_per_second: Quoted
    """bf16 and fp16 with fp32 accumulation."""
    single_flops_per_second: Quoted
    """fp32 matrix products as PyTorch may run them: TF32 where there is such a thing."""
    matmul_efficiency: Quoted
    attention_forward_efficiency: Quoted
    attention_backward_efficiency: Quoted
    memory_efficiency: Quoted
    host_link: str
    """Name of a host link in the presets."""
    gpus_per_uplink: Quoted
    """GPUs behind one such link to the host, each of which has its share while all of them copy."""
    interconnect: str | None = None
    """Name of an interconnect in the presets; None where GPUs meet over the host link."""
    consumer: bool = False
    """Made for desktops and laptops, whose processors have two channels of DRAM."""

    def given(self, changes: Mapping[str, float]) -> Accelerator:
        """The same GPU with some of its numbers replaced by the user's.

        Raises:
            ValueError: there is no such number, it is not above 0, or it is an efficiency above 1.
        """
        names = list(self.numbers())
        for name, value in changes.items():
            if name not in names:
                raise ValueError(f"{self.name} has no number {name!r}; {suggest(name, names)}")
            if name.endswith("_efficiency") and value > 1:
                raise ValueError(f"{name} is a fraction of the peak, at most 1, got {value:g}: 60 % is 0.6")
        numbers: dict[str, Any] = {n: Quoted(value=value, source=GIVEN) for n, value in changes.items()}
        return dataclasses.replace(self, **numbers)

    def numbers(self) -> dict[str, Quoted]:
        """Its numbers by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Quoted)}


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Item = TypeVar("_Item", bound=_Named)


def find(kind: str, text: str, items: tuple[_Item, ...]) -> _Item:
    """The item that ``text`` names; case, separators and makers' names do not matter.

    Part of a name is enough where it fits one item only. Where several fit that differ in their form alone,
    SXM is meant rather than PCIe, and 16 lanes rather than 8. A laptop's GPU has to be called one: it is
    not its desktop namesake.

    Raises:
        ValueError: nothing fits, or several do; the nearest names are listed.
    """
    wanted = _words(text)
    fitting = [item for item in items if wanted and _fits(wanted, _words(item.name))]
    fitting = [item for item in fitting if wanted == _words(item.name)] or fitting
    if len({frozenset(_words(item.name) - _FORMS) for item in fitting}) == 1:
        fitting = [item for item in fitting if _words(item.name) & _USUAL_FORMS] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"{kind} {text!r} could be {', '.join(item.name for item in fitting)}: say which")
    raise ValueError(f"no {kind} is called {text!r}; {suggest(text.lower(), [item.name for item in items])}")


def _fits(wanted: set[str], words: set[str]) -> bool:
    return wanted <= words and ("laptop" in words) == ("laptop" in wanted)


def _words(text: str) -> set[str]:
    """``NVIDIA A100-SXM4-80GB`` -> {a100, sxm, 80gb}; ``PCIe 4.0`` -> {pcie, 4}."""
    spaced = re.sub(r"\b(rtx|nvlink|gen|pcie|nvme)(?=\d)", r"\1 ", text.lower())
    spaced = re.sub(r"\b(\d)\.0\b", r"\1", spaced)
    words = set(re.findall(r"[a-z0-9]+", spaced)) - _NOISE
    words = {"sxm" if re.fullmatch(r"sxm\d?", word) else word for word in words}
    return {f"{word}b" if re.fullmatch(r"\d+g", word) else word for word in words}


def suggest(text: str, names: list[str]) -> str:
    """``did you mean a or b? known are a, b, c``."""
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.5)
    known = f"known are {', '.join(names)}"
    return f"did you mean {' or '.join(near)}? {known}" if near else known
