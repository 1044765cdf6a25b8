"""The simulator's slots: taken in turn, and filled ahead of their turn where an update is done in backward.

What the executor reads ahead in a backward pass is state whose gradients stay in memory: as many shards as
there are slots, in the order in which units will be updated, up to the first unit whose gradients come from a
tier.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class Slots:
    """Slots taken in turn; each remembers the jobs after which it is free."""

    count: int
    free_after: list[tuple[int, ...]] = field(default_factory=list)
    taken: int = 0

    def __post_init__(self) -> None:
        self.free_after = [() for _ in range(self.count)]

    def take(self) -> tuple[int, tuple[int, ...]]:
        """The next slot and the jobs that must be over before it may be filled."""
        slot = self.taken % self.count
        self.taken += 1
        return slot, self.free_after[slot]


@dataclass(frozen=True, slots=True)
class Read:
    """Of one shard: queue, amount for the queue, bytes that move."""

    resource: str
    amount: float
    moved: float


class Add(Protocol):
    """Puts a job into a queue; its index."""

    def __call__(
        self, name: str, resource: str, amount: float, after: tuple[int, ...] = (), moved: float | None = None
    ) -> int: ...


class ReadAhead:
    """Shards of state that are read before their unit's turn, in one backward pass.

    Args:
        units: in the order of updates, name and reads, one a shard; None for a unit that is not read ahead.
        slots: of the update ring.
        add: where jobs go.
    """

    def __init__(self, units: Sequence[tuple[str, list[Read] | None]], slots: Slots, add: Add) -> None:
        self._slots, self._add = slots, add
        self._coming: deque[tuple[str, Read | None]] = deque()
        """None: whatever is behind it waits until that unit has been updated."""
        for name, reads in units:
            self._coming.extend([(name, None)] if reads is None else ((name, read) for read in reads))
        self._there: deque[tuple[str, int, int]] = deque()
        """Unit, slot and job of reads that nothing has used yet."""
        self._begin: tuple[int, ...] = ()

    def begin(self, after: tuple[int, ...]) -> None:
        """The pass has begun with these jobs: the first slots are filled."""
        self._begin = after
        self.go_on()

    def go_on(self) -> None:
        """Fill what has become free."""
        while self._coming and len(self._there) < self._slots.count:
            name, read = self._coming[0]
            if read is None:
                return
            self._coming.popleft()
            slot, free = self._slots.take()
            job = self._add(
                f"read update {name}", read.resource, read.amount, (*free, *self._begin), read.moved
            )
            self._there.append((name, slot, job))

    def take(self, unit: str) -> tuple[int, tuple[int, ...]] | None:
        """The unit's next shard: its slot, and the job that reads it. None where it is not read ahead."""
        if self._there and self._there[0][0] == unit:
            _, slot, job = self._there.popleft()
            return slot, (job,)
        return None

    def done(self, unit: str) -> None:
        """The unit has been updated: what waited for that may be read."""
        if self._coming and self._coming[0] == (unit, None):
            self._coming.popleft()
        self.go_on()
