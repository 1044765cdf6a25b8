"""The language in which tiers are described: ``2x4TB@6GB/s,5GB/s`` is two disks, striped.

    [PLACE:][COUNTx]SIZE[@RATES]    RATES = read[,write[,both at once]] or the name of a preset

``PLACE`` is the swap directory of ``nvme`` and the ``memory_place`` of ``cxl``. One rate stands for both
directions. Size and rates are those of one device; several are used side by side, so both grow with the
count. For ``dram`` the part behind ``@`` is one rate, or channels such as ``8xddr5-4800``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from memtrain.planner.hardware import GIVEN, Duplex, Quoted, find, suggest, time_shared
from memtrain.planner.links import DRAM_CHANNELS
from memtrain.planner.units import parse_size

_PATTERN = re.compile(
    r"^(?:(?P<place>[^@]*):)?(?:(?P<count>\d+)\s*x\s*)?(?P<size>[^:@]+)(?:@(?P<rates>[^@]+))?$"
)
_EXAMPLES = {
    "dram": "'1TiB', '1TiB@200GB/s' or '1TiB@8xddr5-4800'",
    "cxl": "'256GiB', '256GiB@20GB/s' or '1:2x128GiB@20GB/s'",
    "nvme": "'4TB', '4TB@6GB/s,5GB/s', '2x4TB@nvme-gen5' or '/mnt/fast:4TB'",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TierSpec:
    """What one flag says of a tier: all its devices together."""

    place: str | None
    count: int
    size_bytes: int
    rates: str | None
    """As written behind ``@``, of one device; None where nothing stands there."""


def parse_tier(flag: str, text: str) -> TierSpec:
    """Read the value of ``--dram``, ``--cxl`` or ``--nvme``; ``flag`` is its name without the dashes.

    Raises:
        ValueError: naming the value, what is wrong with it and how to write it.
    """
    match = _PATTERN.match(text.strip())
    if match is None:
        raise ValueError(f"cannot read --{flag} {text!r}: write it as {_EXAMPLES[flag]}")
    try:
        size = parse_size(match["size"])
    except ValueError as error:
        raise ValueError(f"--{flag} {text!r}: {error}, as in {_EXAMPLES[flag]}") from error
    count = int(match["count"] or 1)
    if size * count == 0:
        raise ValueError(f"--{flag} {text!r} has no bytes: give a size above 0, or leave --{flag} out")
    if flag == "dram" and match["place"]:
        raise ValueError(
            f"--dram {text!r}: memory has no place {match['place']!r}; write {_EXAMPLES['dram']}"
        )
    return TierSpec(place=match["place"] or None, count=count, size_bytes=size * count, rates=match["rates"])


def parse_rate(flag: str, text: str) -> Quoted:
    """Read ``6GB/s`` as bytes per second, given by the user. Raises ValueError naming the value."""
    amount, slash, unit = text.strip().rpartition("/")
    if not slash or unit.strip() != "s":
        raise ValueError(f"{flag}: cannot read {text!r} as a rate: write a size and '/s', such as '6GB/s'")
    try:
        value = parse_size(amount, unit="GB/s")
    except ValueError as error:
        raise ValueError(f"{flag}: cannot read {text!r} as a rate: {error}") from error
    if value == 0:
        raise ValueError(f"{flag}: a rate must be above 0, got {text!r}")
    return Quoted(value=value, source=GIVEN)


def parse_duplex(
    flag: str,
    text: str,
    presets: tuple[Duplex, ...],
    mixed_of: Callable[[Quoted, Quoted], Quoted] = time_shared,
) -> Duplex:
    """Read ``read[,write[,mixed]]`` or a preset's name; without a third rate ``mixed_of`` gives it.

    Given rates keep the latency of the presets' kind.

    Raises:
        ValueError: naming the value and what may be written.
    """
    if "/" not in text:
        return find(f"{flag} preset", text, presets)
    rates = [parse_rate(flag, part) for part in text.split(",")]
    if len(rates) > 3:
        raise ValueError(
            f"{flag} {text!r} has {len(rates)} rates; at most 3 are read: read,write,both at once"
        )
    read, write = rates[0], rates[min(1, len(rates) - 1)]
    mixed = rates[2] if len(rates) == 3 else mixed_of(read, write)
    latency = presets[0].latency_seconds
    return Duplex(name=GIVEN, read=read, write=write, mixed=mixed, latency_seconds=latency)


def parse_channels(text: str) -> Quoted:
    """Read what stands behind ``dram``'s ``@``: a rate, or ``COUNTxKIND`` channels.

    Raises:
        ValueError: naming the value and the kinds that are known.
    """
    if "/" in text:
        return parse_rate("--dram", text)
    count, cross, kind = text.strip().lower().partition("x")
    if not cross or not count.isdigit() or int(count) == 0 or kind not in DRAM_CHANNELS:
        raise ValueError(
            f"--dram: cannot read {text!r} as bandwidth: write a rate such as '200GB/s' or channels such as "
            f"'8xddr5-4800'; {suggest(kind, list(DRAM_CHANNELS))}"
        )
    return DRAM_CHANNELS[kind].scaled(int(count), f"{count} channels")
