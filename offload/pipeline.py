"""Read the shards ahead, step one, write those behind: the slots of the streamed optimizer.

With three slots one is being read, one stepped and one written; with more the tier has work queued while the
caller computes something else. A slot is given to the next shard only when its write has been waited for, so
a failed write surfaces while the new bytes are still in the slot.

Where the device has memory of its own a shard is stepped in a *mirror* of its slot: copied in behind the step
of the shard before it, and copied back to the slot before it is written.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from memtrain.offload.device import Device, Event
from memtrain.offload.errors import OffloadError
from memtrain.offload.gradient_home import Ticket
from memtrain.offload.gradient_ring import settle
from memtrain.offload.shards import Shard
from memtrain.offload.slab import Ring, Slot

MIRRORS = 2
"""One shard is stepped while the next arrives; the copy back of one runs beside the copy in of the next but
one."""


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
    incoming: Callable[[Shard], list[slice]]
    """Bytes of the slot that a step reads."""
    outgoing: Callable[[Shard], list[slice]]
    """Bytes of the slot that a step changes and ``write`` writes."""


@dataclass(slots=True, eq=False)
class _Load:
    """A shard in a slot, from its read to its write."""

    slot: Slot
    tickets: list[Ticket]
    mirror: Tensor | None = None
    copies: list[Event] = field(default_factory=list)
    """Between slot and mirror, still to be waited for before the slot is used otherwise."""

    @property
    def read(self) -> bool:
        """Whether the tier has delivered it."""
        return all(ticket.done() for ticket in self.tickets)

    @property
    def copied(self) -> bool:
        """Whether slot and mirror are done with each other."""
        return all(copy.done() for copy in self.copies)

    def finish_reads(self) -> None:
        """Return when the tier has delivered. What was not waited for to its end stays known."""
        while self.tickets:
            self.tickets[0].wait()
            del self.tickets[0]

    def finish_copies(self) -> None:
        """Return when slot and mirror are done with each other."""
        for copy in self.copies:
            copy.synchronize()
        self.copies.clear()

    def abandon(self) -> None:
        """Give the slot back, whatever becomes of transfers and copies."""
        for ticket in self.tickets:
            settle(ticket)
        for copy in self.copies:
            with contextlib.suppress(Exception):  # another error is on its way already
                copy.synchronize()
        self.copies.clear()
        self.slot.release(after=self.tickets)


class ShardPipeline:
    """Runs shards through a ring of slots, in whatever order they are asked for.

    Args:
        ring: None where no shard needs a slot.
        stages: the work.
        device: where shards are stepped.
    """

    def __init__(self, ring: Ring | None, stages: Stages, device: Device) -> None:
        self._ring = ring
        self._slots = 0 if ring is None else ring.count
        self._stages = stages
        self._device = device
        self._loads: dict[Shard, _Load] = {}
        self._leaving: deque[tuple[Shard, _Load]] = deque()
        self._writing: deque[tuple[Slot, Ticket]] = deque()
        count = 0 if ring is None or device.shares_memory else MIRRORS
        self._mirrors: deque[tuple[Tensor, Event | None]] = deque(
            (device.empty(ring.slot_bytes), None) for _ in range(count) if ring is not None
        )
        """Those not in use, the longest unused first, each with the copy that last read it."""

    def use(self, ring: Ring) -> None:
        """Take slots from ``ring``, of equal slots, from now on.

        Raises:
            OffloadError: shards are under way in slots of another one.
        """
        under_way = len(self._loads) + len(self._leaving) + len(self._writing)
        if ring is not self._ring and under_way:
            raise OffloadError(
                f"{under_way} shards of an update are under way: flush() before its slots move"
            )
        self._ring = ring

    def prefetch(self, shards: Iterable[Shard], *, patient: bool = False) -> None:
        """Start reading shards as far as slots are free, in order; ``patient``: also wait for the last write
        but one, where two are under way."""
        for shard in shards:
            if shard in self._loads or not self._stages.needs_slot(shard):
                continue
            slot = self._spare(patient=patient)
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
            if shard not in self._loads:
                self._read(shard, self._claim())
            load = self._loads.pop(shard)
            try:
                # What is read next overlaps with this shard's arithmetic.
                upcoming = order[position + 1 : position + 1 + self._slots]
                self.prefetch(upcoming[:1], patient=True)
                self.prefetch(upcoming[1:])
                work = self._arrive(shard, load)
                for later in order[position + 1 : position + 2]:
                    self._arrive_ahead(later)
                self._stages.step(shard, work)
                self._leave(shard, load)
            except BaseException:
                self._abandon(load)
                raise

    def drain(self) -> None:
        """Wait for every write. Raises what went wrong."""
        self._submit(patient=True)
        while self._writing:
            self._retire()

    def forget_ahead(self) -> None:
        """Give up what was read ahead and not asked for."""
        while self._loads:
            _, load = self._loads.popitem()
            self._abandon(load)

    def abandon(self) -> None:
        """After a failure: wait for every transfer, whatever its outcome, and free the slots."""
        for load in [*self._loads.values(), *(load for _, load in self._leaving)]:
            self._abandon(load)
        for slot, ticket in self._writing:
            settle(ticket)
            slot.release(after=[ticket])
        self._loads.clear()
        self._leaving.clear()
        self._writing.clear()

    def borrow(self) -> Slot:
        """A slot for other use; the caller releases it."""
        return self._claim()

    def _read(self, shard: Shard, slot: Slot) -> None:
        try:
            self._loads[shard] = _Load(slot, self._stages.read(shard, slot.buffer))
            slot.note_used(max((part.stop for part in self._stages.incoming(shard)), default=0))
        except BaseException:
            slot.release()
            raise

    # slot and mirror --------------------------------------------------------------------------

    def _arrive(self, shard: Shard, load: _Load) -> Tensor:
        """The shard's bytes where it is stepped: whatever the device is given from now on sees them."""
        load.finish_reads()
        if self._device.shares_memory:
            return load.slot.buffer
        if load.mirror is None:
            self._copy_in(shard, load)
        assert load.mirror is not None
        for copy in load.copies:
            copy.wait()
        return load.mirror

    def _arrive_ahead(self, shard: Shard) -> None:
        """Let the next shard start for the device, if it has been read and there is a mirror for it."""
        load = self._loads.get(shard)
        if load is not None and load.mirror is None and self._mirrors and load.read:
            load.finish_reads()
            self._copy_in(shard, load)

    def _copy_in(self, shard: Shard, load: _Load) -> None:
        if not self._mirrors:  # shards were asked for in another order than they were read ahead
            other = next(load for load in self._loads.values() if load.mirror is not None)
            other.finish_copies()
            self._mirrors.append((other.mirror, None))  # type: ignore[arg-type]
            other.mirror = None
        load.mirror, copied_out = self._mirrors.popleft()
        if copied_out is not None:
            copied_out.wait()
        for part in self._stages.incoming(shard):
            load.copies.append(self._device.copy_in(load.slot.buffer[part], load.mirror[part]))

    def _leave(self, shard: Shard, load: _Load) -> None:
        """Send what the step has changed on its way to the tier."""
        if load.mirror is None:
            self._write(shard, load.slot)
            return
        last = None
        for part in self._stages.outgoing(shard):
            last = self._device.copy_out(load.mirror[part], load.slot.buffer[part])
            load.copies.append(last)
        self._mirrors.append((load.mirror, last))
        load.mirror = None  # not before: after a failure it is still to be given back
        self._leaving.append((shard, load))

    def _submit(self, *, patient: bool) -> None:
        """Write the shards that have left the device; ``patient``: all of them."""
        while self._leaving and (patient or self._leaving[0][1].copied):
            shard, load = self._leaving[0]
            load.finish_copies()
            self._write(shard, load.slot)
            self._leaving.popleft()  # not before: after a failure the slot is still to be freed

    def _write(self, shard: Shard, slot: Slot) -> None:
        ticket = self._stages.write(shard, slot.buffer)
        if ticket is None:
            slot.release()
        else:
            self._writing.append((slot, ticket))

    def _abandon(self, load: _Load) -> None:
        """Give slot and mirror back, whatever becomes of the transfers."""
        load.abandon()
        if load.mirror is not None:
            self._mirrors.append((load.mirror, None))
            load.mirror = None

    # slots ------------------------------------------------------------------------------------

    def _spare(self, *, patient: bool) -> Slot | None:
        """A slot for reading ahead: a free one, or that of a write which is over or, ``patient``, the last
        but one."""
        assert self._ring is not None
        self._submit(patient=False)
        slot = self._ring.try_acquire()
        if (
            slot is None
            and self._writing
            and (self._writing[0][1].done() or (patient and len(self._writing) > 1))
        ):
            self._retire()
            slot = self._ring.try_acquire()
        return slot

    def _claim(self) -> Slot:
        """A slot at any price: waits for a write, else gives up something read ahead."""
        assert self._ring is not None
        slot = self._ring.try_acquire()
        if slot is None and (self._writing or self._leaving):
            self._submit(patient=not self._writing)
            if self._writing:
                self._retire()
            slot = self._ring.try_acquire()
        if slot is None and self._loads:
            unlucky = self._loads.pop(next(reversed(self._loads)))
            self._abandon(unlucky)
            slot = self._ring.try_acquire()
        return slot if slot is not None else self._ring.acquire()

    def _retire(self) -> None:
        slot, ticket = self._writing.popleft()
        try:
            ticket.wait()
        finally:
            slot.release(after=[ticket])
