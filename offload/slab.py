"""Staging memory: anonymous, page-aligned, of exactly the size asked for, and bounded.

Torch's own pinned allocator rounds every request up to a power of two; an anonymous mapping does not. Where
there is a CUDA device the mapping is registered with it (``device.py``).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import torch

from memtrain.offload import dax, placement
from memtrain.offload.errors import StagingError
from memtrain.offload.placement import HUGE_PAGE_BYTES
from memtrain.planner.memory_place import MemoryPlace
from memtrain.planner.units import round_up

if TYPE_CHECKING:
    from memtrain.offload.device import Device

PAGE_BYTES = 4096
"""Unit of every size and offset here: the page, and the block that direct I/O wants."""
_RECHECK_SECONDS = 0.5  # how often a waiting acquire looks whether the holders of the slots still live
HOLDER_SECONDS = 600.0
"""How long a ring may stand still while somebody waits for a slot: twice what a tier may take for a piece of
a transfer (``store.STALL_SECONDS``), so that one that stalls is told of first, by its own error."""

_NO_ACCESS = 0  # PROT_NONE
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK, which the mmap module has no name for
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
_not_inherited: dict[int, int] = {}
"""Bytes by address of the memory that a forked child may not touch."""


def _take_from_child() -> None:
    """The child's pages are empty, and now out of reach. The range stays taken: if it were not, as after
    MADV_DONTFORK, something else could come to lie there, to be read through a view of the slab, and unmapped
    with it."""
    libc = ctypes.CDLL(None)
    for address, nbytes in list(_not_inherited.items()):
        libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _NO_ACCESS)


os.register_at_fork(after_in_child=_take_from_child)


class _Mapping(mmap.mmap):
    """Forgotten above before its address can be another's: a weak reference dies after the memory."""

    not_inherited_at = 0

    def __del__(self, known: dict[int, int] = _not_inherited) -> None:
        known.pop(self.not_inherited_at, None)


class Transfer(Protocol):
    """What may still be using a slot's memory."""

    def done(self) -> bool: ...
    def wait(self) -> None: ...


class Slab:
    """``nbytes`` (rounded up to 4096) of anonymous memory, or of a dax device (rounded up to its alignment).

    The memory is given back when the slab is closed and the last view of it is gone: a view is never left
    pointing at nothing. A forked child does not inherit staging memory (its pages would be copied one by one
    as the parent writes on, outside every budget, and direct I/O into pages shared by a fork tears on kernels
    before 6.3): a child that touches it dies of SIGSEGV. A core dump leaves it out: it is weights and state.

    Args:
        nbytes: at least 1.
        place: take all of it there now, and check page by page that it is; a dax device is mapped, and holds
            what was last written there. Without a place pages are taken from where the kernel thinks best, as
            they are touched.
        huge_pages: ask for transparent huge pages from 2 MiB on (fewer faults at first touch).
        inherited: let a forked child read it, as it reads any other tensor; for what no direct I/O touches.

    Raises:
        PlacementError: the place does not exist, is full (NodeFullError), or the kernel refuses.
        StagingError: the kernel gives no address space (``ulimit -v``).
    """

    def __init__(
        self,
        nbytes: int,
        place: MemoryPlace | None = None,
        *,
        huge_pages: bool = True,
        inherited: bool = False,
    ) -> None:
        if nbytes < 1:
            raise ValueError(f"a slab needs nbytes >= 1, got {nbytes}")
        self.place = place
        # The tensor keeps the mapping alive; mmap.close() is never called, since torch holds no buffer
        # export and a view that is still in use would fault.
        if place is not None and place.dax is not None:
            mapping = dax.map_device(place.dax, nbytes, _Mapping)
        else:
            mapping = _anonymous(round_up(nbytes, PAGE_BYTES), huge_pages=huge_pages, inherited=inherited)
        self.nbytes = len(mapping)
        mapping.madvise(mmap.MADV_DONTDUMP)
        self._buffer: torch.Tensor | None = torch.frombuffer(mapping, dtype=torch.uint8)
        if not inherited:
            mapping.not_inherited_at = self.address
            _not_inherited[self.address] = self.nbytes
        if place is not None and place.nodes:
            try:
                placement.settle(self.address, self.nbytes, place)
            except BaseException:
                mapping.madvise(mmap.MADV_DONTNEED)  # at once: the error's traceback keeps the mapping alive
                raise

    @property
    def buffer(self) -> torch.Tensor:
        """The memory as a 1-D uint8 tensor."""
        if self._buffer is None:
            raise StagingError("the slab is closed")
        return self._buffer

    @property
    def address(self) -> int:
        """Where the memory starts: page aligned."""
        return int(self.buffer.data_ptr())

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._buffer is None

    def populate(self) -> None:
        """Take all pages of anonymous memory now, while they hold nothing yet.

        Memory that is planned, but only taken when it is first used, is for so long invisible to whoever
        looks at what is resident: what a heap has freed lay where an update's slots came to be, 89 MiB beyond
        the plan in a first step (docs/log.md).

        Raises:
            StagingError: the kernel has no memory for them.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        address, nbytes = ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes)
        if libc.madvise(address, nbytes, _POPULATE_WRITE) == 0:
            return
        reason = ctypes.get_errno()
        if reason == errno.EINVAL:  # an older kernel
            self.buffer[::PAGE_BYTES].zero_()
            return
        libc.madvise(address, nbytes, mmap.MADV_DONTNEED)  # at once: the error's traceback keeps the mapping
        self.close()
        remedy = ": lower the budget, or free memory on this machine" if reason == errno.ENOMEM else ""
        raise StagingError(f"the kernel does not give {nbytes.value} bytes ({os.strerror(reason)}){remedy}")

    def close(self) -> None:
        """Let go of the memory; views that are still in use keep it. May be called twice."""
        self._buffer = None

    def __enter__(self) -> Slab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _anonymous(nbytes: int, *, huge_pages: bool, inherited: bool) -> _Mapping:
    try:
        mapping = _Mapping(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise StagingError(
            f"the kernel gives no {nbytes} bytes of address space ({error.strerror}): raise the limit "
            f"(ulimit -v) or lower the budget"
        ) from error
    if huge_pages and nbytes >= HUGE_PAGE_BYTES:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    if not inherited:
        mapping.madvise(_WIPE_ON_FORK)
    return mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class HighWater:
    """The most that was ever used of a ring: what its slots could have been."""

    name: str
    slots: int
    slot_bytes: int
    slots_held: int
    """At once."""
    bytes_used: int
    """Of any one slot."""

    @property
    def size_bytes(self) -> int:
        """What the ring occupies."""
        return self.slots * self.slot_bytes


class Slot:
    """One slot of a ring, held until ``release``."""

    __slots__ = ("_holder", "_ring", "buffer", "index")

    def __init__(self, ring: Ring, index: int, buffer: torch.Tensor) -> None:
        self._ring = ring
        self._holder: threading.Thread | None = None
        self.index = index
        self.buffer = buffer
        """The slot's memory, 1-D uint8, page aligned."""

    def note_used(self, nbytes: int) -> None:
        """For ``Ring.high_water``: the holder uses the first ``nbytes``."""
        self._ring._note_used(nbytes)

    def release(self, after: Iterable[Transfer] = ()) -> None:
        """Give the slot back. Raises StagingError when it is not held.

        Args:
            after: transfers that may still use the memory, because waiting for them was interrupted or took
                too long. Nobody gets the slot before they are over.
        """
        self._ring._release(self, [transfer for transfer in after if not transfer.done()])


class Ring:
    """``count`` slots of ``slot_bytes`` (rounded up to 4096) in one slab, there from the start; thread-safe.

    ``acquire`` waits for a slot. Where it would wait for ever, because every slot is held by a thread
    that is dead or itself waits for a slot of this ring, it raises instead; and so it does when no slot has
    changed hands for ``HOLDER_SECONDS``, whoever holds them.

    Args:
        count, slot_bytes: how many, and of what size.
        device: one that copies to and from the slots, and wants their memory registered.
        slab, offsets: where the slots lie, in memory that others use too; None: in a slab of its own.
        is_taken: whether others have any of that memory now; no slot is then given away.
    """

    def __init__(
        self,
        count: int,
        slot_bytes: int,
        *,
        device: Device | None = None,
        slab: Slab | None = None,
        offsets: Sequence[int] | None = None,
        is_taken: Callable[[], bool] = lambda: False,
    ) -> None:
        if count < 1:
            raise ValueError(f"a ring needs count >= 1, got {count}")
        self.count = count
        self.slot_bytes = round_up(slot_bytes, PAGE_BYTES)
        self.slab = Slab(count * self.slot_bytes) if slab is None else slab
        self._is_lent = slab is not None
        if slab is None:
            self.slab.populate()
        self._is_taken = is_taken
        self._closed = False
        self._device = device
        if device is not None:
            device.register(self.slab)
        starts = offsets if offsets is not None else range(0, count * self.slot_bytes, self.slot_bytes)
        parts = [self.slab.buffer[start : start + self.slot_bytes] for start in starts]
        self._slots = [Slot(self, index, part) for index, part in enumerate(parts)]
        self._free = deque(self._slots)
        self._lingering: list[tuple[Slot, list[Transfer]]] = []
        """Released slots that a transfer still uses."""
        self._waiting: set[threading.Thread] = set()
        self._moved_at = time.monotonic()
        """When a slot was last taken or given back."""
        self._slots_held = 0
        self._bytes_used = 0
        self._changed = threading.Condition()

    @property
    def size_bytes(self) -> int:
        """What the slots occupy."""
        return self.count * self.slot_bytes

    def in_use(self) -> bool:
        """Whether any slot is held, or a transfer lingers in one. No lock: others' rings ask under theirs."""
        lingering = any(not transfer.done() for _, transfers in [*self._lingering] for transfer in transfers)
        return lingering or any(slot._holder is not None for slot in [*self._slots])

    @property
    def free_count(self) -> int:
        """Slots that nobody holds."""
        with self._changed:
            return len(self._free)

    def acquire(self, nbytes: int | None = None, timeout_seconds: float | None = None) -> Slot:
        """A free slot, waiting for one where needed.

        Args:
            nbytes: what it must hold, when the caller wants that checked.
            timeout_seconds: give up after this long.

        Raises:
            StagingError: larger than a slot, closed, timed out, or no slot can ever become free, or none has
                for ``HOLDER_SECONDS``: names the threads that hold them.
            TierIOError: the transfer that still uses the only slots left has stalled.
        """
        if nbytes is not None and nbytes > self.slot_bytes:
            raise StagingError(f"{nbytes} bytes do not fit a staging slot of {self.slot_bytes} bytes")
        me = threading.current_thread()
        began = time.monotonic()
        deadline = None if timeout_seconds is None else began + timeout_seconds
        with self._changed:
            self._waiting.add(me)
            try:
                while (slot := self._take()) is None:
                    self._refuse_hang(began)
                    pause = _RECHECK_SECONDS
                    if deadline is not None:
                        pause = min(pause, deadline - time.monotonic())
                        if pause <= 0:
                            raise StagingError(f"no staging slot became free within {timeout_seconds} s")
                    self._changed.wait(pause)
                return slot
            finally:
                self._waiting.discard(me)

    def high_water(self, name: str) -> HighWater:
        """What was used of the ring so far, under a name for people."""
        with self._changed:
            return HighWater(
                name=name,
                slots=self.count,
                slot_bytes=self.slot_bytes,
                slots_held=self._slots_held,
                bytes_used=self._bytes_used,
            )

    def try_acquire(self) -> Slot | None:
        """A free slot, or None. Raises StagingError when the ring is closed."""
        with self._changed:
            return self._take()

    def close(self) -> None:
        """Give the memory back, also where the device fails; whoever waits gets StagingError. May be called
        twice."""
        with self._changed:
            was_closed, self._closed = self._closed, True
            self._free.clear()
            self._lingering.clear()
            self._slots.clear()
            try:
                if self._device is not None and not was_closed:
                    self._device.unregister(self.slab)
            finally:
                if not self._is_lent:
                    self.slab.close()
                self._changed.notify_all()

    def _take(self) -> Slot | None:
        if self._closed:
            raise StagingError("the staging ring is closed")
        if self._is_taken():
            return None
        if not self._free:
            self._collect()
        if not self._free:
            return None
        slot = self._free.popleft()
        slot._holder = threading.current_thread()
        self._moved_at = time.monotonic()
        self._slots_held = max(self._slots_held, self.count - len(self._free))
        return slot

    def _note_used(self, nbytes: int) -> None:
        with self._changed:
            self._bytes_used = max(self._bytes_used, nbytes)

    def _release(self, slot: Slot, transfers: list[Transfer]) -> None:
        with self._changed:
            if slot._holder is None:
                raise StagingError(f"staging slot {slot.index} was released twice")
            if transfers:
                self._lingering.append((slot, transfers))
            slot._holder = None
            self._moved_at = time.monotonic()
            if not transfers and not self._closed:
                self._free.append(slot)
            self._changed.notify()

    def _collect(self) -> None:
        """Take back the slots whose transfers have ended meanwhile."""
        still: list[tuple[Slot, list[Transfer]]] = []
        for slot, transfers in self._lingering:
            if all(transfer.done() for transfer in transfers):
                self._free.append(slot)
            else:
                still.append((slot, transfers))
        self._lingering = still

    def _refuse_hang(self, began: float) -> None:
        """Nothing is free. Where nobody who holds a slot can give it back: wait for a transfer that lingers
        in one, or say that it has stalled, or that there is none."""
        if self._is_taken():
            raise StagingError(
                f"the memory of {self.count} staging slots is in use for something else, which the plan has "
                "take turns with them: end the iteration over optimizer state (iter_state), let go of graphs "
                "that were kept (retain_graph), or plan with options.overlay off"
            )
        holders = [slot._holder for slot in self._slots if slot._holder is not None]
        if any(holder.is_alive() and holder not in self._waiting for holder in holders):
            still = time.monotonic() - max(began, self._moved_at)
            if still > HOLDER_SECONDS:
                raise StagingError(
                    f"no staging slot has come back for {still:.0f} s: {self._held_by(holders)}. See where "
                    "those threads stand (py-spy dump), or use more slots"
                )
        elif self._lingering:
            self._await_lingering(holders)
        else:
            raise StagingError(
                f"all {self.count} staging slots are held by threads that wait for one more or are dead "
                f"({', '.join(sorted({holder.name for holder in holders}))}): none can become free. Release "
                "a slot first, or use more slots"
            )

    def _await_lingering(self, holders: list[threading.Thread]) -> None:
        transfers = self._lingering[0][1]
        self._changed.release()  # whoever waits beside may give up in its own time
        try:
            for transfer in transfers:
                try:
                    transfer.wait()
                except Exception as error:
                    if transfer.done():
                        continue
                    if holders:
                        error.add_note(f"No other staging slot can become free: {self._held_by(holders)}")
                    raise
        finally:
            self._changed.acquire()

    def _held_by(self, holders: list[threading.Thread]) -> str:
        """For people: who holds how many."""
        held = []
        for holder in dict.fromkeys(holders):
            waits = "waits for one more" if holder in self._waiting else "is alive"
            does = waits if holder.is_alive() else "is dead"
            held.append(f"{holders.count(holder)} by {holder.name}, which {does}")
        return f"of {self.count} are held {', '.join(held)}"
