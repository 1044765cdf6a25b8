"""The machine of a problem: a device, the places beside it, and the links that lead there.

Every link has a first-in-first-out queue for each direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DEVICE = "device"
"""The name of the device among the places of state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hop:
    """One copy over one link; every link has a queue for each direction."""

    link: str
    write_bytes_per_second: float
    """Away from the device."""
    read_bytes_per_second: float
    """Towards the device."""
    mixed_bytes_per_second: float | None = None
    """What both directions together move while both are in use; None where they do not slow each other. Over
    several hops of a link it is the largest of theirs. ``Machine.shares`` says how it is kept."""
    latency_seconds: float = 0.0
    """Of one copy, beside its bytes. Every chunk and every piece of state is a copy; ranges that are copied
    as a whole are faster, by a latency for each chunk but one."""

    def __post_init__(self) -> None:
        for name in ("write_bytes_per_second", "read_bytes_per_second"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"link {self.link}: {name} must be finite and > 0, got {getattr(self, name)}"
                )
        if self.mixed_bytes_per_second is not None and not 0 < self.mixed_bytes_per_second < math.inf:
            raise ValueError(
                f"link {self.link}: mixed_bytes_per_second must be finite and > 0, or None, "
                f"got {self.mixed_bytes_per_second}"
            )
        if not 0 <= self.latency_seconds < math.inf:
            raise ValueError(
                f"link {self.link}: latency_seconds must be finite and >= 0, got {self.latency_seconds}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A store of bytes beside the device: host memory, one CXL device, one NVMe directory."""

    name: str
    capacity_bytes: int
    hops: tuple[Hop, ...]
    """The way there. One hop is direct; two store and forward through slots of ``Machine.staging``."""
    cpu_bytes_per_second: float = 0.0
    """Bytes that the CPU's optimizer reads and writes here in a second; 0 where it cannot address them."""
    write_limit_bytes: int | None = None
    """Bytes that may be written here in one step (endurance of flash); None is no limit."""
    compute_seconds_per_byte: float = 0.0
    """Arithmetic that a byte written or read costs, where device and processor are the same."""

    def __post_init__(self) -> None:
        if self.name == DEVICE or not self.name:
            raise ValueError(f"a place needs a name other than {DEVICE!r}, got {self.name!r}")
        if self.capacity_bytes < 0:
            raise ValueError(f"place {self.name}: capacity_bytes must be >= 0, got {self.capacity_bytes}")
        if len(self.hops) not in (1, 2):
            raise ValueError(f"place {self.name}: one hop or two lead to a place, got {len(self.hops)}")
        if len({hop.link for hop in self.hops}) != len(self.hops):
            raise ValueError(f"place {self.name}: both hops use link {self.hops[0].link}; give each its own")
        if self.write_limit_bytes is not None and self.write_limit_bytes < 0:
            raise ValueError(
                f"place {self.name}: write_limit_bytes must be >= 0, got {self.write_limit_bytes}"
            )
        if self.cpu_bytes_per_second < 0 or self.compute_seconds_per_byte < 0:
            raise ValueError(f"place {self.name}: rates and costs must be >= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The device, what stands beside it, and the staging between them."""

    device_capacity_bytes: int
    places: tuple[Place, ...] = ()
    """From fast to slow: ranges are laid out in this order."""
    slots: int = 2
    """Staging slots of the device; each holds what one block swaps. Two are MEMO's rounding buffers."""
    staging: str | None = None
    """The place whose slots bytes pass through on a way of two hops, and where the CPU's optimizer works."""
    forwarding_slots: int = 4
    """Such slots; each holds what one block sends further."""

    def __post_init__(self) -> None:
        names = [p.name for p in self.places]
        if len(set(names)) != len(names):
            raise ValueError(f"two places share a name: {names}")
        if self.device_capacity_bytes < 0:
            raise ValueError(f"device_capacity_bytes must be >= 0, got {self.device_capacity_bytes}")
        if self.places and (self.slots < 1 or self.forwarding_slots < 1):
            raise ValueError(
                "places can be reached through slots only: slots and forwarding_slots must be >= 1"
            )
        if self.staging is not None and (
            self.staging not in names or len(self.place(self.staging).hops) != 1
        ):
            raise ValueError(f"staging must name a place one hop away, got {self.staging!r} of {names}")
        if self.staging is None and any(len(p.hops) > 1 for p in self.places):
            raise ValueError("a way of two hops needs a staging place")

    def place(self, name: str) -> Place:
        """The place called ``name``. Raises KeyError with the names that exist."""
        for place in self.places:
            if place.name == name:
                return place
        raise KeyError(f"no place {name!r}; there are {[p.name for p in self.places]}")

    def shares(self, hop: Hop) -> tuple[float, float]:
        """Bytes per second that each direction of ``hop`` may use, written and read, while both are in use.

        Queues whose speeds depend on each other are not linear. So mixed bandwidth is divided once and for
        all, in the proportion of what the directions reach alone: within the hop, and within its link for all
        hops alike. Together they never move more. One alone could be faster, at most by
        ``(write + read) / mixed``: 2 where a link moves no more both ways than one way.
        """
        hops = [h for place in self.places for h in place.hops if h.link == hop.link]
        write = max(h.write_bytes_per_second for h in hops)
        read = max(h.read_bytes_per_second for h in hops)
        of_link = _part(write, read, max(_mixed(h) for h in hops))
        own = _part(hop.write_bytes_per_second, hop.read_bytes_per_second, _mixed(hop))
        return (
            min(hop.write_bytes_per_second * own, write * of_link),
            min(hop.read_bytes_per_second * own, read * of_link),
        )

    @property
    def links(self) -> tuple[str, ...]:
        """Names of all links, in the order of their first mention."""
        return tuple(dict.fromkeys(hop.link for place in self.places for hop in place.hops))


def _mixed(hop: Hop) -> float:
    return math.inf if hop.mixed_bytes_per_second is None else hop.mixed_bytes_per_second


def _part(write: float, read: float, mixed: float) -> float:
    """Of both rates, what is left of them when they share ``mixed``."""
    return min(1.0, mixed / (write + read))
