"""The ring of chunks through which gradients leave for a tier and come back.

Where the device has memory of its own a chunk is copied to its slot first, and written from there when the
copy is over; on the way back it is added up in a mirror in the device's memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.offload.device import Device, Event
from memtrain.offload.errors import UnsupportedGradientOperation
from memtrain.offload.gradient_home import Chunk, OffloadedGradient, Ticket
from memtrain.offload.overlaid_slab import OverlaidSlab
from memtrain.offload.slab import HighWater, Ring, Slot


@dataclass(slots=True, eq=False)
class _Leaving:
    """A chunk on its way from the device to its slot."""

    home: OffloadedGradient
    chunk: Chunk
    slot: Slot
    copy: Event
    source: Tensor
    version: int

    def submit(self) -> Ticket:
        """The copy is over: write the slot."""
        self.copy.synchronize()
        if self.source._version != self.version:
            raise UnsupportedGradientOperation(
                f"the gradient of {self.home.name} was changed in place while it was leaving the device: "
                f"change it in a hook of the tensor before it is accumulated, or keep this unit's gradients "
                f"on the device"
            )
        return self.home.store.write(
            self.home.extent, self.slot.buffer[: self.chunk.nbytes], self.chunk.offset
        )


@dataclass(slots=True, eq=False)
class _Coming:
    """A chunk on its way back."""

    chunk: Chunk
    slot: Slot
    ticket: Ticket | None
    """None for a gradient that is all zeros."""
    work: Tensor | None = None
    """The chunk where the arithmetic is, 1-D, typed."""
    copy: Event | None = None

    def arrive(self, device: Device, dtype: torch.dtype) -> None:
        """Wait for the read, and let the bytes start for the device."""
        if self.work is not None:
            return
        if self.ticket is not None:
            self.ticket.wait()
        staged = _bytes(self.slot, self.chunk, dtype)
        if device.shares_memory:
            self.work = staged.view(dtype)
        else:
            mirror = device.empty(staged.numel())
            if self.ticket is not None:
                self.copy = device.copy_in(staged, mirror)
            self.work = mirror.view(dtype)

    def release(self) -> None:
        """Give the slot back, when nothing uses it any more."""
        settle(self.ticket)
        try:
            if self.copy is not None:
                self.copy.synchronize()
        finally:
            self.slot.release(after=[] if self.ticket is None else [self.ticket])


class GradientRing:
    """``slots`` chunks of ``slot_bytes`` under way at once, to and from ``device``; in ``overlaid`` where the
    plan has them share its memory."""

    def __init__(
        self, slots: int, slot_bytes: int, device: Device, overlaid: OverlaidSlab | None = None
    ) -> None:
        self._device = device
        self._slots = slots
        offsets = None if overlaid is None else overlaid.gradient_ring_offsets
        if overlaid is None or offsets is None:
            self._ring = Ring(slots, slot_bytes, device=device)
        else:
            is_taken = overlaid.let(offsets[0], slots * slot_bytes, self._in_use, self._give_way)
            self._ring = Ring(slots, slot_bytes, slab=overlaid.slab, offsets=offsets, is_taken=is_taken)
        self._leaving: deque[_Leaving] = deque()
        self._in_flight: deque[tuple[Slot, Ticket]] = deque()
        self._ahead: dict[OffloadedGradient, deque[_Coming]] = {}
        """Reads begun for gradients that are expected next, the soonest first."""

    @property
    def size_bytes(self) -> int:
        """What the ring occupies."""
        return self._ring.size_bytes

    def high_water(self) -> HighWater:
        """What was used of the slots so far."""
        return self._ring.high_water("gradient")

    def _in_use(self) -> bool:
        return self._ring.in_use()

    def _give_way(self) -> bool:
        """Let go of all slots; whether they are free."""
        self.drain()
        for home in list(self._ahead):
            self.forget(home)
        return not self._in_use()

    def send(self, home: OffloadedGradient, flat: Tensor) -> None:
        """Start writing a gradient (1-D, contiguous).

        Its memory is free when this returns; where the device's is separate, when the next gradient is sent
        at the latest: so never more than two are there because of the ring.
        """
        self.forget(home)
        self.submit(patient=True)
        for chunk in home.chunks:
            slot = self._slot()
            part = flat[chunk.start : chunk.stop]
            try:
                staged = _bytes(slot, chunk, flat.dtype)
                if self._device.shares_memory:
                    staged.view(flat.dtype).copy_(part)
                    ticket = home.store.write(home.extent, slot.buffer[: chunk.nbytes], chunk.offset)
                    self._in_flight.append((slot, ticket))
                else:
                    copy = self._device.copy_out(part, staged)
                    self._leaving.append(_Leaving(home, chunk, slot, copy, flat, flat._version))
            except BaseException:
                slot.release()
                raise
            self.submit(patient=False)

    def submit(self, *, patient: bool) -> None:
        """Give the store the chunks that have left the device; ``patient``: all of them."""
        while self._leaving and (patient or self._leaving[0].copy.done()):
            self._submit_oldest()

    def submit_all_of(self, home: OffloadedGradient) -> None:
        """Before its bytes are read: the store waits only for writes that it has been given.

        Not for what was queued since: on a GPU the host would stand still for a copy of a moment ago.
        """
        while any(leaving.home is home for leaving in self._leaving):
            self._submit_oldest()

    def _submit_oldest(self) -> None:
        leaving = self._leaving.popleft()
        try:
            ticket = leaving.submit()
        except BaseException:
            leaving.slot.release()
            raise
        self._in_flight.append((leaving.slot, ticket))

    def expect(self, homes: list[OffloadedGradient]) -> None:
        """Read these ahead, the soonest first, into half of the slots at most, and forget all others: a
        gradient that was expected and did not come would hold its slots for ever."""
        for home in [home for home in self._ahead if home not in homes]:
            self.forget(home)
        for home in homes:
            self._read_ahead(home)

    def _read_ahead(self, home: OffloadedGradient) -> None:
        room = self._slots // 2 - sum(map(len, self._ahead.values()))
        if home in self._ahead or home.value.zero or room < 1:
            return
        self.submit_all_of(home)
        for chunk in home.chunks[:room]:
            self._retire_done()
            slot = self._ring.try_acquire()
            if slot is None:
                return
            # One by one: where a later one fails, these are still to be used or forgotten.
            self._ahead.setdefault(home, deque()).append(self._read(home, chunk, slot))

    def forget(self, home: OffloadedGradient) -> None:
        """Its bytes are to be replaced, or not asked for: what was read ahead of them is worth nothing."""
        _release(self._ahead.pop(home, ()))

    def stream(self, home: OffloadedGradient) -> Iterator[tuple[Chunk, Tensor]]:
        """The gradient's chunks in order, scaled, on the device; each is valid until the next is asked for.
        Reads run ahead by as many slots as are free."""
        self.submit_all_of(home)
        value, dtype = home.value, home.parameter.dtype
        coming = self._ahead.pop(home, deque())
        waiting = deque(home.chunks[len(coming) :])
        try:
            while waiting or coming:
                while waiting and (slot := self._reading_slot(needed=not coming)) is not None:
                    chunk = waiting.popleft()
                    coming.append(_Coming(chunk, slot, None) if value.zero else self._read(home, chunk, slot))
                head = coming[0]
                head.arrive(self._device, dtype)
                for other in coming:
                    if other.ticket is None or other.ticket.done():
                        other.arrive(self._device, dtype)
                if head.copy is not None:
                    head.copy.wait()
                assert head.work is not None
                if value.zero:
                    head.work.zero_()
                value.apply(head.work)
                yield head.chunk, head.work
                coming.popleft().release()
        finally:
            _release(coming)

    def _read(self, home: OffloadedGradient, chunk: Chunk, slot: Slot) -> _Coming:
        try:
            ticket = home.store.read(home.extent, slot.buffer[: chunk.nbytes], chunk.offset)
        except BaseException:
            slot.release()
            raise
        return _Coming(chunk, slot, ticket)

    def _reading_slot(self, *, needed: bool) -> Slot | None:
        """A slot to read into: one that is free, or where one is ``needed``, at any price."""
        self._retire_done()
        return self._slot() if needed else self._ring.try_acquire()

    def _retire_done(self) -> None:
        while self._in_flight and self._in_flight[0][1].done():
            self._retire()

    def _slot(self) -> Slot:
        """A slot at any price: waits for a write, else gives up the last of what was read ahead."""
        slot = self._ring.try_acquire()
        while slot is None:
            self.submit(patient=not self._in_flight)
            if self._in_flight:
                self._retire()
            elif self._ahead:
                self.forget(next(reversed(self._ahead)))
            else:
                return self._ring.acquire()  # says who holds them all
            slot = self._ring.try_acquire()
        return slot

    def _retire(self) -> None:
        slot, ticket = self._in_flight.popleft()
        try:
            ticket.wait()
        finally:
            slot.release(after=[ticket])

    def drain(self) -> None:
        """Wait until every chunk is on its tier. Raises what went wrong."""
        self.submit(patient=True)
        while self._in_flight:
            self._retire()

    def close(self) -> None:
        """Give the memory back once nothing uses it any more, whatever became of the transfers."""
        with ExitStack() as stack:
            stack.callback(self._ring.close)
            for _, ticket in self._in_flight:
                stack.callback(settle, ticket)
            for leaving in self._leaving:
                stack.callback(leaving.copy.synchronize)
            for coming in self._ahead.values():
                stack.callback(_release, coming)
        self._in_flight.clear()
        self._leaving.clear()
        self._ahead.clear()


def _bytes(slot: Slot, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    slot.note_used(chunk.nbytes)
    return slot.buffer[: (chunk.stop - chunk.start) * dtype.itemsize]


def _release(coming: Iterable[_Coming]) -> None:
    """All of them, also where the device fails for one."""
    with ExitStack() as stack:
        for one in coming:
            stack.callback(one.release)


def settle(ticket: Ticket | None) -> None:
    """Wait for a transfer whose outcome no longer matters: another error is on its way already."""
    if ticket is not None:
        try:
            ticket.wait()
        except Exception:
            return
