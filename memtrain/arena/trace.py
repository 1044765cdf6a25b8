"""From what a step asked for to addresses.

Time is counted in requests: a block is born at the index of its request and has died when that many requests
had been made. So a plan does not depend on the order of deaths between two requests, which reference counts
and other threads decide.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memtrain.planner.addresses import pack
from memtrain.planner.buffers import Buffer

ELSEWHERE = -1
"""As a death: the block outlived the step. As an offset: the arena has no place for the request."""
ALIGNMENT_BYTES = 64
"""Of every address: a cache line, and what torch's own CPU allocator promises its vector code."""


def numbers(values: Iterable[int]) -> array[int]:
    """In 8 bytes each: a step may have a hundred thousand."""
    return values if isinstance(values, array) else array("q", values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """The requests of one step, in order.

    Raises:
        ValueError: not one death a request, or a block that dies before its request was made.
    """

    sizes: Sequence[int]
    """Bytes of each."""
    deaths: Sequence[int]
    """Of each, the number of requests that had been made when it died; ELSEWHERE if it outlived the step."""

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.deaths):
            raise ValueError(f"{len(self.sizes)} requests have {len(self.deaths)} deaths: give each its own")
        for index, death in enumerate(self.deaths):
            if death != ELSEWHERE and not index < death <= len(self.sizes):
                raise ValueError(
                    f"request {index} of {len(self.sizes)} dies at {death}: deaths are counted in requests, "
                    f"from {index + 1} on, or {ELSEWHERE}"
                )

    def is_like(self, other: Trace) -> bool:
        """Whether the other step asked for the same bytes in the same order."""
        return numbers(self.sizes) == numbers(other.sizes)

    def joined(self, other: Trace) -> Trace:
        """Of two steps that are alike: every block lives as long as in either."""
        deaths = (
            ELSEWHERE if ELSEWHERE in pair else max(pair)
            for pair in zip(self.deaths, other.deaths, strict=True)
        )
        return Trace(sizes=self.sizes, deaths=numbers(deaths))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """Where each request of a step goes."""

    sizes: array[int]
    """Bytes of each request."""
    offsets: array[int]
    """Of each, its address in the arena; ELSEWHERE for what outlives the step."""
    height_bytes: int
    """Where the highest block ends; sizes are rounded up to ALIGNMENT_BYTES there."""
    load_bytes: int
    """The most bytes of planned requests alive at once, as they were asked for, not rounded."""

    @property
    def planned_requests(self) -> int:
        """Requests that have an address."""
        return len(self.offsets) - self.offsets.count(ELSEWHERE)

    @property
    def outliving_bytes(self) -> int:
        """Bytes of the requests that go elsewhere because they outlive the step."""
        return sum(size for size, offset in zip(self.sizes, self.offsets, strict=True) if offset == ELSEWHERE)


def plan_step(trace: Trace, *, time_limit_seconds: float, alignment_bytes: int = ALIGNMENT_BYTES) -> StepPlan:
    """Addresses for everything that dies within the step.

    Args:
        time_limit_seconds: for ``planner.addresses.pack``.
        alignment_bytes: of every address.
    """
    buffers = [
        Buffer(str(index), index, death, size)
        for index, (size, death) in enumerate(zip(trace.sizes, trace.deaths, strict=True))
        if death != ELSEWHERE
    ]
    packing = pack(buffers, time_limit_seconds=time_limit_seconds, alignment=alignment_bytes)
    return StepPlan(
        sizes=numbers(trace.sizes),
        offsets=numbers(packing.offsets.get(str(index), ELSEWHERE) for index in range(len(trace.sizes))),
        height_bytes=packing.height,
        load_bytes=_load(buffers),
    )


def _load(buffers: Sequence[Buffer]) -> int:
    """The most bytes alive at once."""
    changes = sorted(
        [(b.start, b.size) for b in buffers] + [(b.end, -b.size) for b in buffers]
    )  # At one moment the dead leave first: their changes are negative.
    most = alive = 0
    for _, change in changes:
        alive += change
        most = max(most, alive)
    return most
