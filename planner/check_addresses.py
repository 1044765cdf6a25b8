"""The independent checker of addresses: may these buffers lie where they are said to lie?

It shares nothing with what made the addresses but the word ``Buffer``, and walks through time once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from memtrain.planner.buffers import Buffer


class AddressRule(str, Enum):
    """What addresses must obey."""

    UNIQUE = "every name once"
    MISSING = "every buffer has an address"
    UNKNOWN = "no address without a buffer"
    NEGATIVE = "no address below zero"
    ALIGNMENT = "every address is a multiple of the alignment"
    CAPACITY = "nothing above the capacity"
    OVERLAP = "no two that live at once share a byte"


@dataclass(frozen=True, kw_only=True, slots=True)
class AddressFault:
    """A rule that does not hold, the buffers that break it, and the numbers."""

    rule: AddressRule
    buffers: tuple[str, ...]
    detail: str


def check_addresses(
    buffers: Sequence[Buffer],
    offsets: Mapping[str, int],
    *,
    capacity: int | None = None,
    alignment: int = 1,
) -> tuple[AddressFault, ...]:
    """Everything that is wrong with ``offsets`` (bytes by name); empty when they may be used.

    Of buffers that collide, each is named with one that it collides with. Collisions are looked for among the
    buffers that have an address, once names are unique.
    """
    twice = [name for name, count in Counter(b.name for b in buffers).items() if count > 1]
    if twice:
        return tuple(_fault(AddressRule.UNIQUE, (name,), "stands for several buffers") for name in twice)
    return (*_single(buffers, offsets, capacity, alignment), *_collisions(buffers, offsets))


def _fault(rule: AddressRule, names: tuple[str, ...], detail: str) -> AddressFault:
    return AddressFault(rule=rule, buffers=names, detail=f"{' and '.join(names)}: {detail}")


def _single(
    buffers: Sequence[Buffer], offsets: Mapping[str, int], capacity: int | None, alignment: int
) -> Iterator[AddressFault]:
    for name in sorted(offsets.keys() - {b.name for b in buffers}):
        yield _fault(AddressRule.UNKNOWN, (name,), f"address {offsets[name]} belongs to no buffer")
    for b in buffers:
        offset = offsets.get(b.name)
        if offset is None:
            yield _fault(AddressRule.MISSING, (b.name,), f"{b.size} bytes have no address")
            continue
        if offset < 0:
            yield _fault(AddressRule.NEGATIVE, (b.name,), f"lies at {offset}")
        if offset % alignment:
            yield _fault(AddressRule.ALIGNMENT, (b.name,), f"lies at {offset}, no multiple of {alignment}")
        if capacity is not None and offset + b.size > capacity:
            yield _fault(
                AddressRule.CAPACITY,
                (b.name,),
                f"ends at {offset + b.size}, {offset + b.size - capacity} bytes above {capacity}",
            )


def _collisions(buffers: Sequence[Buffer], offsets: Mapping[str, int]) -> Iterator[AddressFault]:
    """Walk through time with the live buffers sorted by address: a newcomer can only touch its neighbours."""
    placed = {b.name: b for b in buffers if b.name in offsets}
    births = sorted(placed.values(), key=lambda b: (b.start, b.name))
    deaths = sorted(placed.values(), key=lambda b: (b.end, b.name))
    live: list[tuple[int, str]] = []
    ended = 0
    for b in births:
        while deaths[ended].end <= b.start:
            old = (offsets[deaths[ended].name], deaths[ended].name)
            at = bisect_left(live, old)
            if at < len(live) and live[at] == old:  # Those that collided were not let in.
                del live[at]
            ended += 1
        offset = offsets[b.name]
        at = bisect_left(live, (offset, b.name))
        for _, name in live[max(0, at - 1) : at + 1]:
            other, low = placed[name], offsets[name]
            if low < offset + b.size and offset < low + other.size:
                yield _fault(
                    AddressRule.OVERLAP,
                    (name, b.name),
                    f"[{low}, {low + other.size}) and [{offset}, {offset + b.size}) share bytes "
                    f"in moments {max(other.start, b.start)} to {min(other.end, b.end) - 1}",
                )
                break
        else:
            insort(live, (offset, b.name))
