"""Read shard k+1, step shard k, write shard k-1: the slots of the streamed optimizer.

With three slots one is always being read, one stepped and one written. A slot is given to the next shard only
when its write has been waited for, so a failed write surfaces while the new bytes are still in the slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from memtrain.offload.gradient_home import Ticket
from memtrain.offload.gradient_ring import settle
from memtrain.offload.shards import Shard
from memtrain.offload.slab import Ring, Slot


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """What is done with a shard in a slot."""

    read: Callable[[Shard, Tensor], list[Ticket]]
    """Start reading the shard into the buffer (uint8)."""
    step: Callable[[Shard, Tensor | None], None]
    """Update the shard; None for one that needs no slot."""
    write: Callable[[Shard, Tensor], Ticket | None]
    """Start writing it back; None when nothing of it lives on a tier."""
    needs_slot: Callable[[Shard], bool]


class ShardPipeline:
    """Runs shards through a ring of slots, in whatever order they are asked for.

    Args:
        ring: None where no shard needs a slot.
        stages: the work.
    """

    def __init__(self, ring: Ring | None, stages: Stages) -> None:
        self._ring = ring
        self._stages = stages
        self._reading: dict[Shard, tuple[Slot, list[Ticket]]] = {}
        self._writing: deque[tuple[Slot, Ticket]] = deque()

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Start reading shards as far as slots are free without waiting long, in order."""
        for shard in shards:
            if shard in self._reading or not self._stages.needs_slot(shard):
                continue
            slot = self._spare()
            if slot is None:
                return
            self._read(shard, slot)

    def run(self, shards: list[Shard], following: list[Shard]) -> None:
        """Update ``shards``; read ahead into ``following``. Returns with the last writes still under way."""
        order = [*shards, *following]
        for position, shard in enumerate(shards):
            if not self._stages.needs_slot(shard):
                self._stages.step(shard, None)
                continue
            if shard not in self._reading:
                self._read(shard, self._claim())
            slot, tickets = self._reading.pop(shard)
            try:
                # What is read next overlaps with this shard's arithmetic.
                self.prefetch(order[position + 1 : position + 3])
                while tickets:
                    tickets.pop(0).wait()
                self._stages.step(shard, slot.buffer)
                ticket = self._stages.write(shard, slot.buffer)
            except BaseException:
                for ticket in tickets:
                    settle(ticket)
                slot.release()
                raise
            if ticket is None:
                slot.release()
            else:
                self._writing.append((slot, ticket))

    def drain(self) -> None:
        """Wait for every write. Raises what went wrong."""
        while self._writing:
            self._retire()

    def abandon(self) -> None:
        """After a failure: wait for every transfer, whatever its outcome, and free the slots."""
        for slot, tickets in [*self._reading.values(), *((slot, [ticket]) for slot, ticket in self._writing)]:
            for ticket in tickets:
                settle(ticket)
            slot.release()
        self._reading.clear()
        self._writing.clear()

    def borrow(self) -> Slot:
        """A slot for other use; the caller releases it."""
        return self._claim()

    def _read(self, shard: Shard, slot: Slot) -> None:
        try:
            self._reading[shard] = (slot, self._stages.read(shard, slot.buffer))
        except BaseException:
            slot.release()
            raise

    def _spare(self) -> Slot | None:
        """A slot for reading ahead: a free one, or that of the last write but one."""
        assert self._ring is not None
        slot = self._ring.try_acquire()
        if slot is None and (len(self._writing) > 1 or (self._writing and self._writing[0][1].done())):
            self._retire()
            slot = self._ring.try_acquire()
        return slot

    def _claim(self) -> Slot:
        """A slot at any price: waits for a write, else gives up something read ahead."""
        assert self._ring is not None
        slot = self._ring.try_acquire()
        if slot is None and self._writing:
            self._retire()
            slot = self._ring.try_acquire()
        if slot is None and self._reading:
            unlucky, tickets = self._reading.pop(next(reversed(self._reading)))
            for ticket in tickets:
                settle(ticket)
            unlucky.release()
            slot = self._ring.try_acquire()
        return slot if slot is not None else self._ring.acquire()

    def _retire(self) -> None:
        slot, ticket = self._writing.popleft()
        try:
            ticket.wait()
        finally:
            slot.release()
