"""What one block saves for its backward pass, while the plan has it elsewhere.

A group has a slot of a staging cache, and on a tier an extent; it lives as long as the graph that needs it.
The executor (``activations.py``) decides when it is sent and fetched.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from memtrain.offload.device import Event
from memtrain.offload.errors import OffloadError, PlanMismatchError
from memtrain.offload.staging import SlotCache, StagedSlot, Ticket
from memtrain.offload.token_rows import memory_order
from memtrain.offload.unmoved import Unmoved
from memtrain.planner.actions import Tier

if TYPE_CHECKING:
    from memtrain.offload.activations import ActivationExecutor

_ALIGNMENT = 64  # bytes; a cache line, and a multiple of every dtype's size


@dataclass(slots=True)
class SavedTensor:
    """What autograd holds instead of a tensor that was moved: where its storage lies, and its view of it."""

    group: SavedGroup
    offset_bytes: int
    storage_bytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    storage_offset: int


class SavedGroup:
    """The tensors of one block in one forward pass that share a slot and an extent."""

    def __init__(
        self,
        executor: ActivationExecutor,
        cache: SlotCache,
        name: str,
        tier: Tier,
        shared: frozenset[int] = frozenset(),
    ) -> None:
        self.name = name
        self._shared = shared
        self.tier = tier
        self.sequence = executor.next_sequence()
        self.cache = cache
        self._executor = executor
        self._lock = executor.lock
        self._placed: dict[tuple[int, ...], tuple[int, StorageWeakRef]] = {}
        self._used_bytes = 0
        self._tensor_bytes = 0
        """Of those, without the alignment between tensors."""
        self._sealed = False
        self._abandoned = False
        self._extent: Any = None
        self._write: Ticket | None = None
        self._read: Ticket | None = None
        self._restored: weakref.ref[torch.Tensor] | None = None
        self._sources: list[Unmoved] = []
        """What the device is still copying out: kept, and looked at when it is over."""
        self._ahead: torch.Tensor | None = None
        """Where the bytes are on the device, before backward has asked for them."""
        self._arrival: Event | None = None
        """The copy that brings them."""
        self._owner: torch.cuda.Stream | None = None
        """The stream whose memory they are in."""
        self.holding: list[torch.Tensor] = []
        """The bytes in memory, while the executor holds them for the block's next node. The list is the
        group's own, so that it can be emptied by ``__del__``, which must not look at another group's."""
        self._slot: StagedSlot | None = cache.take(self)
        executor.register(self)

    # forward ----------------------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> SavedTensor | Unmoved:
        """Copy ``tensor``'s storage into the slot, once, and return what stands for the tensor."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._shared or not self._executor.movable(tensor):
            return Unmoved.of(tensor)
        size = tensor.element_size()
        span = size * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))
        if storage.nbytes() <= 2 * span:
            source, key = (
                torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage),
                (storage._cdata,),
            )
            stride, start = tensor.stride(), tensor.storage_offset()
        else:  # a small window of a large storage: the window alone
            source = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            key = (storage._cdata, tensor.storage_offset(), size, *tensor.shape, *tensor.stride())
            stride, start = torch.empty(tensor.shape, device="meta").stride(), 0
        key = (*key, tensor._version)
        with self._lock:
            placed = self._placed.get(key)
            if placed is None:
                # The weak reference keeps the storage's identity from being given to another one.
                placed = self._place(source), StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._placed[key] = placed
                if not self._executor.device.shares_memory:
                    self._sources.append(Unmoved.of(tensor))
        return SavedTensor(self, placed[0], source.numel(), tensor.dtype, tensor.shape, stride, int(start))

    def pack_alone(self, tensor: torch.Tensor) -> SavedTensor | Unmoved:
        """Copy ``tensor``'s own entries into the slot, whatever storage they lie in, and return what stands
        for the tensor: with its dimensions in the same order in memory, and nothing between them."""
        if not self._executor.movable(tensor):
            return copied(tensor)
        order = memory_order(tensor)
        dense = tensor.detach().permute(order).contiguous()
        with self._lock:
            offset = self._place(dense.view(-1).view(torch.uint8))
            if not self._executor.device.shares_memory:
                self._sources.append(Unmoved.of(dense))
        strides = dict(zip(order, dense.stride(), strict=True))
        stride = tuple(strides[dim] for dim in range(tensor.dim()))
        return SavedTensor(self, offset, dense.nbytes, tensor.dtype, tensor.shape, stride, 0)

    def _place(self, source: torch.Tensor) -> int:
        assert self._slot is not None
        offset = self._used_bytes
        end = offset + source.numel()
        if end > self.cache.slot_bytes:
            raise PlanMismatchError(
                f"{self.name}: the tensors saved for backward take more than the {self.cache.slot_bytes} "
                f"bytes that the plan reserved for a block: call prepare with the largest batch that will be "
                f"used, and inside the same torch.autocast as the forward passes, if they run under one"
            )
        self._slot.copies.append(self._executor.device.copy_out(source, self._slot.buffer[offset:end]))
        self._used_bytes = -(-end // _ALIGNMENT) * _ALIGNMENT
        self._tensor_bytes += source.numel()
        return offset

    def seal(self) -> None:
        """Forward of the block is over: send the slot on its way."""
        with self._lock:
            self._placed.clear()
            self._sealed = True
            if self._slot is not None:
                self._slot.slot.note_used(self._used_bytes)
        self._executor.submit_ready()

    def try_submit(self, *, patient: bool = False) -> bool:
        """Queue the write once the device's copies into the slot are done. True when queued (or empty)."""
        with self._lock:
            if not self._sealed or self._slot is None or self._write is not None or self._used_bytes == 0:
                return self._sealed
            if self.tier is Tier.DEVICE:
                return True
            if not patient and not self._slot.copied:
                return False
            self._finish_copies()
            self._extent = self._executor.reserve(self.tier, self.name, self._used_bytes)
            store = self._executor.store(self.tier)
            self._write = store.write(self._extent, self._slot.buffer[: self._used_bytes])
            self._slot.ticket = self._write
            self._executor.changed_bytes[self.tier] += self._tensor_bytes
            return True

    def _finish_copies(self) -> None:
        """Return when the device has read everything. Raises SavedTensorModifiedError where something was
        changed in place before that: the bytes may be of before or after."""
        assert self._slot is not None
        self._slot.finish_copies()
        sources, self._sources = self._sources, []
        for source in sources:
            source.get()

    @property
    def has_extent(self) -> bool:
        """Whether the group holds room on its tier."""
        return self._extent is not None

    # the slot cache's view --------------------------------------------------------------------

    def may_leave(self) -> bool:
        """Only a sealed group that has a tier to go to and that no backward pass is reading in the slot."""
        if self.tier is Tier.DEVICE:
            return False
        read_in_place = self._executor.device.shares_memory and self._base() is not None
        return self._sealed and not read_in_place

    def leave(self) -> None:
        """Give up the slot; raises the error of the write, while the bytes are still in memory."""
        with self._lock:
            self.try_submit(patient=True)
            if self._write is not None:
                self._write.wait()
            self._slot = None
            self._read = None

    # backward ---------------------------------------------------------------------------------

    def prefetch(self) -> bool:
        """Start reading if the bytes are not in memory. False when no slot is free for them."""
        with self._lock:
            if self._slot is not None or self._used_bytes == 0:
                return True
            slot = self.cache.try_take(self, only_later=True)
            if slot is None:
                return False
            self._start_read(slot)
            return True

    def _start_read(self, slot: StagedSlot) -> None:
        self._slot = slot
        self._read = self._executor.store(self.tier).read(self._extent, slot.buffer[: self._used_bytes])
        slot.ticket = self._read

    def come_ahead(self) -> None:
        """Start the copy to the device if the bytes are in the slot: backward will ask for them next."""
        with self._lock:
            wanted = self._sealed and self._used_bytes and self._ahead is None and self._base() is None
            if wanted and self._slot is not None and self._slot.copied and _over(self._read):
                self._ahead = self._fetch()

    def _base(self) -> torch.Tensor | None:
        return None if self._restored is None else self._restored()

    def _fetch(self) -> torch.Tensor:
        """The bytes where the arithmetic is: the slot itself, or a copy that may still be arriving."""
        if self._slot is None:
            self._start_read(self.cache.take(self))
        assert self._slot is not None
        if self._read is not None:
            self._read.wait()
        self._finish_copies()
        device = self._executor.device
        if device.shares_memory:
            return self._slot.view(self._used_bytes)
        mirror = device.empty(self._used_bytes)
        self._owner = _stream(mirror)
        self._arrival = device.copy_in(self._slot.buffer[: self._used_bytes], mirror)
        self._slot.copies.append(self._arrival)
        return mirror

    def unpack(self, saved: SavedTensor) -> torch.Tensor:
        """The tensor as it was: same bytes, dtype, shape, stride, and storage shared with its siblings."""
        base = self._restore()
        size = saved.dtype.itemsize
        start = (base.storage_offset() + saved.offset_bytes) // size + saved.storage_offset
        whole = base[: base.numel() // size * size].view(saved.dtype)
        return torch.as_strided(whole, saved.shape, saved.stride, start)

    def _restore(self) -> torch.Tensor:
        if self._abandoned:
            raise OffloadError(
                f"{self.name}: backward was called after the session was closed, and what it needs is gone"
            )
        with self._lock:
            base = self._base()
            if base is None:
                self._executor.release_held()
                base, self._ahead = self._ahead if self._ahead is not None else self._fetch(), None
                self._restored = weakref.ref(base)
            if self._arrival is not None:
                self._arrival.wait()  # each time: nodes of one block may run on different streams
                here = _stream(base)
                if here is not None and here != self._owner:
                    # The allocator would give the memory back when its owner is done, which need not be us.
                    base.record_stream(here)
            self._executor.hold(self, base)
        return base

    def abandon(self) -> None:
        """The executor is being removed: what is saved is lost to a graph that still wants it."""
        with self._lock:
            self._hand_over()
            if self._slot is not None:
                self._slot.vacate()
            self._slot, self._extent, self._write, self._read = None, None, None, None
            self._ahead, self._arrival = None, None
            self._sources.clear()
            self._sealed = self._abandoned = True

    def __del__(self) -> None:
        # The graph is done with the block (or was dropped): the slot and the extent go back.
        if hasattr(self, "_slot"):  # otherwise it was never made
            self.holding.clear()
            self._hand_over()

    def _hand_over(self) -> None:
        tickets = [ticket for ticket in (self._write, self._read) if ticket is not None]
        self._executor.retire(self.sequence, self.tier, self._extent, tickets)


@contextlib.contextmanager
def abandoned_on_error(groups: Sequence[SavedGroup]) -> Iterator[None]:
    """A forward that raises has no backward: its slots go back, although the exception keeps frames alive."""
    try:
        yield
    except BaseException:
        for group in groups:
            group.abandon()
        raise


def _stream(tensor: torch.Tensor) -> torch.cuda.Stream | None:
    """What the work that this thread gives the tensor's device from now on runs on; None on a CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def _over(ticket: Ticket | None) -> bool:
    return ticket is None or ticket.done()


def copied(tensor: torch.Tensor) -> Unmoved:
    """A copy of ``tensor`` that stays on the device: by reference it would keep its whole storage there."""
    return Unmoved.of(tensor.detach().clone())


def pack_alone_into(group: SavedGroup | None) -> Callable[[torch.Tensor], Any]:
    """How parts of tensors are stored in ``group``; copied on the device where there is none."""
    return copied if group is None else group.pack_alone


def pack_into(group: SavedGroup | None) -> Callable[[torch.Tensor], Any] | None:
    """How autograd hands its tensors to ``group``; None where they stay as they are."""
    return None if group is None else group.pack


def unpack(saved: SavedTensor | Unmoved) -> torch.Tensor:
    """The tensor that ``saved`` stands for, wherever its bytes are."""
    return saved.group.unpack(saved) if isinstance(saved, SavedTensor) else saved.get()
