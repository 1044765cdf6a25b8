"""A cache of staging slots: what was staged last is found again without a read.

Executors stage a group of tensors in a slot, send it to a tier, and need it again later. A slot is
handed to another group only when its write is on the tier, its read is over, and nothing aliases its
memory any more: backward reads straight from the slot, so an alias that outlives the group (a gradient
that *is* a saved tensor) must hold the slot, not be overwritten.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from memtrain.offload.device import Device, Event
from memtrain.offload.errors import OffloadError
from memtrain.offload.overlaid_slab import OverlaidSlab
from memtrain.offload.slab import HighWater, Ring, Slot


class Ticket(Protocol):
    """A transfer under way."""

    def wait(self) -> None:
        """Return when the transfer is over; raise its typed error."""
        ...

    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        ...


class Occupant(Protocol):
    """What lies in a slot."""

    sequence: int
    """Creation order. Backward runs in reverse, so the lowest is needed last."""

    def may_leave(self) -> bool:
        """Whether the bytes are (or will be, once the pending write is over) safe on a tier."""
        ...

    def leave(self) -> None:
        """Give up the slot; waits for the pending write and raises its error."""
        ...


class StagedSlot:
    """One slot of the cache, and why it may not be reused yet."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self.is_taken: Callable[[], bool] = _never
        """Whether somebody else has bytes of this memory, where it is shared (``OverlaidSlab``)."""
        self.bytes = slot.buffer.numpy()
        self._occupant: weakref.ref[Occupant] | None = None
        self.ticket: Ticket | None = None
        """The last transfer between this memory and a tier."""
        self.copies: list[Event] = []
        """Copies between this memory and the device that may still be under way."""
        self._alias: StorageWeakRef | None = None

    @property
    def occupant(self) -> Occupant | None:
        """What lies here; None when nothing does or it has died."""
        return None if self._occupant is None else self._occupant()

    def occupy(self, occupant: Occupant) -> None:
        """Hand the slot over, weakly: the graph owns the group, not the cache."""
        self._occupant = weakref.ref(occupant)

    def vacate(self) -> None:
        """The occupant gives up what lies here; a pending transfer still holds the memory."""
        self._occupant = None

    @property
    def buffer(self) -> torch.Tensor:
        """The slot's memory, uint8, page-aligned."""
        return self.slot.buffer

    def view(self, used_bytes: int) -> torch.Tensor:
        """The first ``used_bytes`` as a uint8 tensor with a storage of its own.

        Its own storage tells when the last tensor made from it has died.
        """
        view = torch.frombuffer(self.bytes, dtype=torch.uint8, count=used_bytes)
        self._alias = StorageWeakRef(view.untyped_storage())  # type: ignore[no-untyped-call]
        return view

    @property
    def aliased(self) -> bool:
        """Whether a tensor made from :meth:`view` still lives."""
        return self._alias is not None and not self._alias.expired()  # type: ignore[no-untyped-call]

    @property
    def in_use(self) -> bool:
        """Whether anything lies here, is on its way or is aliased."""
        return self.occupant is not None or self.aliased or self.busy

    def holds(self) -> bool:
        """``in_use``, as a function."""
        return self.in_use

    @property
    def copied(self) -> bool:
        """Whether every copy between this memory and the device is over."""
        return all(copy.done() for copy in self.copies)

    @property
    def busy(self) -> bool:
        """Whether ``settle`` would wait."""
        return not self.copied or (self.ticket is not None and not self.ticket.done())

    def finish_copies(self) -> None:
        """Return when the device has left the memory."""
        for copy in self.copies:
            copy.synchronize()
        self.copies.clear()

    def settle(self) -> None:
        """Wait for whatever still uses the memory. A transfer that has not ended, since waiting for it was
        interrupted or took too long, keeps the slot."""
        self.finish_copies()
        ticket = self.ticket
        if ticket is not None:
            try:
                ticket.wait()
            finally:
                if ticket.done():
                    self.ticket = None


def _never() -> bool:
    return False


class SlotCache:
    """``count`` slots of ``slot_bytes``, handed out least-soon-needed first.

    Args:
        count: slots; with one slot every block waits for its own write.
        slot_bytes: size of each, the largest group.
        name: for error messages, such as ``saved``.
        lock: the executor's, held while slots change hands.
        device: what copies to and from the slots.
        shared, offsets: where the slots lie, if not in a slab of their own.
        before_leaving: called before what lies in a slot is asked to go: another tenant's turn has come.
    """

    def __init__(
        self,
        count: int,
        slot_bytes: int,
        name: str,
        lock: threading.RLock,
        device: Device,
        *,
        shared: OverlaidSlab | None = None,
        offsets: Sequence[int] | None = None,
        before_leaving: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.slot_bytes = slot_bytes
        slab = None if shared is None else shared.slab
        self._ring = Ring(count, slot_bytes, device=device, slab=slab, offsets=offsets)
        self._slots = [StagedSlot(self._ring.acquire()) for _ in range(count)]
        if shared is not None and offsets is not None:
            for slot, offset in zip(self._slots, offsets, strict=True):
                leave = partial(self._leave, slot)
                slot.is_taken = shared.let(offset, self._ring.slot_bytes, slot.holds, leave)
        self._before_leaving = before_leaving
        self._lock = lock
        self._slots_held = 0

    def high_water(self) -> HighWater:
        """What was used of the slots so far. The cache holds them all for ever; what counts is what lay in
        them, was on its way or was aliased."""
        return dataclasses.replace(self._ring.high_water(self.name), slots_held=self._slots_held)

    @property
    def has_room(self) -> bool:
        """Whether a slot is empty and nothing aliases it."""
        return any(slot.occupant is None and not slot.aliased and not slot.is_taken() for slot in self._slots)

    @property
    def is_taken(self) -> bool:
        """Whether somebody who shares the memory has bytes of a slot that is otherwise empty."""
        return any(slot.occupant is None and not slot.aliased and slot.is_taken() for slot in self._slots)

    def _leave(self, slot: StagedSlot) -> bool:
        """Finish what is under way in ``slot``, and turn out what is safe on a tier; whether it is empty."""
        self._before_leaving()
        with self._lock:
            holder = slot.occupant
            if slot.aliased or (holder is not None and not holder.may_leave()):
                return False
            if holder is not None:
                holder.leave()
                slot.vacate()
            slot.settle()
            return True

    def take(self, occupant: Occupant) -> StagedSlot:
        """A slot for ``occupant``, waiting for writes if need be.

        Raises:
            OffloadError: every slot holds memory that is in use right now.
        """
        slot = self.try_take(occupant, patient=True)
        if slot is None and self.is_taken:
            raise OffloadError(
                f"the {self.name} staging slots lie where optimizer state is being read, which the plan has "
                "take turns with the passes: end the iteration over optimizer state (iter_state) before the "
                "forward, or plan with options.overlay off"
            )
        if slot is None:
            raise OffloadError(
                f"all {len(self._slots)} {self.name} staging slots of {self.slot_bytes} bytes are in use at "
                f"once; plan with more {self.name}_slots"
            )
        return slot

    def try_take(
        self, occupant: Occupant, *, patient: bool = False, only_later: bool = False
    ) -> StagedSlot | None:
        """A slot for ``occupant`` or None.

        Args:
            patient: wait for a transfer where that frees a slot.
            only_later: turn out only groups that are needed later than ``occupant`` (prefetch).
        """
        with self._lock:
            for slot in sorted(self._slots, key=self._reuse_order):
                if slot.aliased or slot.is_taken():
                    continue
                holder = slot.occupant
                if holder is not None and (
                    not holder.may_leave() or (only_later and holder.sequence > occupant.sequence)
                ):
                    continue
                if not patient and slot.busy:
                    continue
                if holder is not None:
                    holder.leave()
                slot.settle()
                slot.occupy(occupant)
                self._slots_held = max(self._slots_held, sum(each.in_use for each in self._slots))
                return slot
            return None

    @staticmethod
    def _reuse_order(slot: StagedSlot) -> tuple[int, int]:
        """Empty slots first, those without a pending transfer before the others; then the group that
        is needed last."""
        holder = slot.occupant
        if holder is None:
            return (1 if slot.busy else 0, 0)
        return (2, holder.sequence)

    def close(self) -> None:
        """Wait for what is under way and return the memory, also where a transfer failed."""
        with ExitStack() as stack:
            stack.callback(self._ring.close)
            for slot in self._slots:
                stack.callback(slot.settle)
        self._slots.clear()
