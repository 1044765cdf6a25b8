"""A store whose extents hold coded bytes: what waits on a tier takes less of it, and comes back bit for bit.

The arithmetic is a codec's that the caller brings (``memtrain.optim.storage.lossless``). An extent is coded
in segments of ``SEGMENT_BYTES``, each a chunk of the store beneath it, whose checksums are those of the coded
bytes. Room is reserved for the largest that a segment can become, so nothing runs out of it later: coding
saves bytes moved and written, not room.

Workers code and decode in memory of their own, outside of every lock, and wait for the tier there: with two
in each direction one codes while the other's bytes are under way.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from memtrain.offload.codec import (
    SEGMENT_BYTES,
    WORKERS,
    Codec,
    Coder,
    CodingStatistics,
    room_bytes,
    segment_room,
    segments_of,
    staging_bytes,
)
from memtrain.offload.errors import CorruptExtentError, ExtentStateError, OffloadError, TierIOError
from memtrain.offload.extents import Extent
from memtrain.offload.io import Direction
from memtrain.offload.slab import Slab
from memtrain.offload.store import Store, Ticket


@dataclass(slots=True, eq=False)
class CodedExtent:
    """The reserved place of one tensor's coded bytes; made by ``CodedStore.allocate``."""

    name: str
    nbytes: int
    """Of the tensor."""
    inner: Extent
    lengths: list[int | None]
    """Coded bytes of each segment; None before its first write."""
    codec: str
    """How: any store with this codec above the one of ``inner`` may use it, one at a time."""
    pending: list[CodedTicket] = field(default_factory=list)
    freed: bool = False


def elsewhere(extent: CodedExtent, inner: Extent) -> CodedExtent:
    """A place for the next generation of ``extent`` in ``inner``, which has as much room."""
    return CodedExtent(extent.name, extent.nbytes, inner, [None] * len(extent.lengths), extent.codec)


class CodedTicket:
    """One read or write under way, as ``store.Ticket``."""

    __slots__ = ("_event", "_left", "after", "buffer", "direction", "error", "extent", "nbytes", "segments")

    def __init__(
        self,
        direction: Direction,
        extent: CodedExtent,
        buffer: torch.Tensor,
        segments: range,
        after: tuple[CodedTicket, ...],
    ) -> None:
        self._event = threading.Event()
        self._left = len(segments)
        self.segments = segments
        """Those of the extent that are moved."""
        self.direction = direction
        self.extent = extent
        self.buffer: torch.Tensor | None = buffer
        self.nbytes = buffer.numel()
        self.after = after
        """Earlier ones that must be over before it begins."""
        self.error: OffloadError | None = None

    @property
    def what(self) -> str:
        """For messages."""
        return f"{self.direction.value} of tensor {self.extent.name} on {self.extent.inner.tier.value}"

    @property
    def plain(self) -> torch.Tensor:
        """The buffer of one that is under way."""
        assert self.buffer is not None
        return self.buffer

    def segment(self, number: int) -> torch.Tensor:
        """Where in the buffer segment ``number`` of the extent is."""
        start = (number - self.segments.start) * SEGMENT_BYTES
        return self.plain[start : start + SEGMENT_BYTES]

    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._event.is_set()

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Return when the plain bytes are where they should be.

        Raises:
            TierIOError: the tier failed, stalled, or ``timeout_seconds`` passed.
            CorruptExtentError: what was read is not what was written.
            ExtentStateError: what was to be read was never written.
        """
        if not self._event.wait(timeout_seconds):
            raise TierIOError(f"{self.what} is not finished within the time that wait() was given")
        if self.error is not None:
            raise self.error

    def settle(self) -> None:
        """Return when it is over, however it ended."""
        self._event.wait()

    def segment_done(self, error: OffloadError | None) -> bool:
        """Note the end of one segment; whether it was the last. Until then workers use the buffer."""
        self.error = self.error or error
        self._left -= 1
        return self._left == 0

    def end(self) -> None:
        """Let waiters go."""
        self.buffer, self.after = None, ()
        self._event.set()


@dataclass(slots=True)
class _Bench:
    """Where one segment at a time is coded."""

    slot: torch.Tensor
    coder: Coder
    moving: Ticket | None = None
    """What may still be using the slot, because waiting for it took too long."""

    def move(self, ticket: Ticket) -> None:
        """Wait for a transfer of the slot."""
        self.moving = ticket
        ticket.wait()

    def settle(self) -> None:
        """Return when nothing uses the slot. Raises TierIOError: the tier has stalled."""
        if self.moving is not None and not self.moving.done():
            self.moving.wait()
        self.moving = None


class CodedStore:
    """``Store`` for whole extents, and segments of them, coded. Thread-safe; closing it leaves the store
    beneath it open, and its extents to another one.

    Args:
        store: what holds the coded bytes.
        codec: how they are coded.
    """

    def __init__(self, store: Store, codec: Codec) -> None:
        self._store, self.codec = store, codec
        self.tier = store.tier
        self._slot_bytes = segment_room(codec, SEGMENT_BYTES)
        self._slab = Slab(2 * WORKERS * self._slot_bytes)
        self._slab.populate()
        slots = torch.split(self._slab.buffer, self._slot_bytes)
        self._coders = [codec.coder() for _ in slots]
        self._benches: dict[Direction, queue.SimpleQueue[_Bench]] = {}
        self._pools: dict[Direction, ThreadPoolExecutor] = {}
        for place, direction in enumerate(Direction):
            benches: queue.SimpleQueue[_Bench] = queue.SimpleQueue()
            for number in range(place * WORKERS, (place + 1) * WORKERS):
                benches.put(_Bench(slots[number], self._coders[number]))
            self._benches[direction] = benches
            name = f"memtrain-{self.tier.value}-{'decode' if direction is Direction.READ else 'encode'}"
            self._pools[direction] = ThreadPoolExecutor(WORKERS, name)
        self._lock = threading.Lock()
        self._plain = dict.fromkeys(Direction, 0)
        self._coded = dict.fromkeys(Direction, 0)
        self._seconds = dict.fromkeys(Direction, 0.0)
        self._closed = False
        self._pid = os.getpid()

    @property
    def piece_bytes(self) -> int:
        """What parts of an extent begin and end at multiples of: segments."""
        return SEGMENT_BYTES

    @property
    def staging_bytes(self) -> int:
        """Memory that coding takes: segments on their way, and the coders' own."""
        return staging_bytes(self.codec)

    def allocate(
        self, name: str, nbytes: int, *, dtype: str | None = None, shape: tuple[int, ...] | None = None
    ) -> CodedExtent:
        """As ``Store.allocate``, of the most that the tensor can become."""
        if nbytes < 0:
            raise ValueError(f"tensor {name}: nbytes must be >= 0, got {nbytes}")
        inner = self._store.allocate(name, room_bytes(self.codec, nbytes), dtype=dtype, shape=shape)
        return CodedExtent(name, nbytes, inner, [None] * len(segments_of(nbytes)), self.codec.name)

    def write(self, extent: CodedExtent, buffer: torch.Tensor, offset: int = 0) -> CodedTicket:
        """Code and move all of the tensor, or whole segments of it. Raises ExtentStateError: the extent is
        freed."""
        return self._enqueue(Direction.WRITE, extent, buffer, offset)

    @property
    def beneath(self) -> Store:
        """The store that holds the coded bytes."""
        return self._store

    def read(self, extent: CodedExtent, buffer: torch.Tensor, offset: int = 0) -> CodedTicket:
        """Move and decode all of the tensor, or whole segments of it. Raises ExtentStateError: freed, or
        never written."""
        return self._enqueue(Direction.READ, extent, buffer, offset)

    def free(self, extent: CodedExtent) -> None:
        """Give the extent's room back, when what is under way on it has ended as usual.

        Raises:
            ExtentStateError: it was freed already.
        """
        self._refuse_child()
        with self._lock:
            self._check_usable(extent)
            extent.freed = True
            if not extent.pending:
                self._store.free(extent.inner)

    def statistics(self) -> CodingStatistics:
        """Bytes and seconds so far."""
        with self._lock:
            ways: dict[str, int] = {}
            for coder in self._coders:
                for way, count in coder.ways.items():
                    name = str(getattr(way, "name", way)).lower()
                    ways[name] = ways.get(name, 0) + count
            return CodingStatistics(
                plain_bytes_read=self._plain[Direction.READ],
                coded_bytes_read=self._coded[Direction.READ],
                plain_bytes_written=self._plain[Direction.WRITE],
                coded_bytes_written=self._coded[Direction.WRITE],
                encode_seconds=self._seconds[Direction.WRITE],
                decode_seconds=self._seconds[Direction.READ],
                ways=ways,
            )

    def close(self) -> None:
        """Finish what the workers have begun, fail what they have not, give the memory back. Idempotent."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True  # segments that were not begun end with an error, one after the other
        for pool in self._pools.values():
            pool.shutdown(wait=True)
        self._slab.close()

    def _enqueue(
        self, direction: Direction, extent: CodedExtent, buffer: torch.Tensor, offset: int
    ) -> CodedTicket:
        self._refuse_child()
        self._check_buffer(direction, extent, buffer, offset)
        first = offset // SEGMENT_BYTES
        segments = range(first, first + len(segments_of(buffer.numel())))
        move = self._write_segment if direction is Direction.WRITE else self._read_segment
        with self._lock:
            self._check_open()
            self._check_usable(extent)
            writes = direction is Direction.WRITE
            after = tuple(t for t in extent.pending if writes or t.direction is Direction.WRITE)
            if not writes and not after and None in extent.lengths[first : segments.stop]:
                raise ExtentStateError(
                    f"tensor {extent.name} on {self.tier.value} cannot be read: the extent was never written"
                )
            ticket = CodedTicket(direction, extent, buffer, segments, after)
            extent.pending.append(ticket)
            for number in segments:
                self._pools[direction].submit(self._run, move, ticket, number)
        return ticket

    def _run(self, move: Callable[[CodedTicket, int, _Bench], int], ticket: CodedTicket, number: int) -> None:
        """One segment, in a worker. Waiting for earlier operations cannot last for ever: queues hold them in
        order, so the earliest unfinished one always has a worker."""
        coded, error = 0, None
        benches = self._benches[ticket.direction]
        try:
            for earlier in ticket.after:
                earlier.settle()
            if ticket.direction is Direction.WRITE:
                # What was there must not be read beside new segments, whatever fails from here on.
                ticket.extent.lengths[number] = None
            if self._closed:
                raise OffloadError(f"{ticket.what} was given up: the store is closed")
            bench = benches.get()
            try:
                bench.settle()
                coded = move(ticket, number, bench)
            finally:
                benches.put(bench)
        except OffloadError as failure:
            error = failure
        except Exception as failure:  # a codec's own fault must not leave a waiter for ever
            error = OffloadError(f"{ticket.what}: the codec {self.codec.name} failed: {failure!r}")
            error.__cause__ = failure
        self._finish(ticket, coded, error)

    def _write_segment(self, ticket: CodedTicket, number: int, bench: _Bench) -> int:
        extent, plain = ticket.extent, ticket.segment(number)
        began = time.thread_time()
        coded = bench.coder.encode(plain, bench.slot)
        self._worked(ticket.direction, began)
        place = number * self._slot_bytes
        # What was there before may have been longer, and a write replaces whole chunks.
        self._store.discard(extent.inner, place, segment_room(self.codec, plain.numel()))
        extent.lengths[number] = coded
        bench.move(self._store.write(extent.inner, bench.slot[:coded], place))
        return coded

    def _read_segment(self, ticket: CodedTicket, number: int, bench: _Bench) -> int:
        extent = ticket.extent
        coded, place = extent.lengths[number], number * self._slot_bytes
        if coded is None:
            raise ExtentStateError(f"{ticket.what}: it was never written, or its last write failed")
        bench.move(self._store.read(extent.inner, bench.slot[:coded], place))
        began = time.thread_time()
        try:
            bench.coder.decode(bench.slot[:coded], ticket.segment(number))
        except ValueError as error:
            where = extent.inner.arena_offset + place
            raise CorruptExtentError(
                f"{ticket.what} at offset {where}: its bytes are those that were written, but not what the "
                f"codec {self.codec.name} makes ({error}). Memory failed while they were coded: resume from "
                f"the last checkpoint"
            ) from error
        self._worked(ticket.direction, began)
        return coded

    def _worked(self, direction: Direction, began: float) -> None:
        with self._lock:
            self._seconds[direction] += time.thread_time() - began

    def _finish(self, ticket: CodedTicket, coded: int, error: OffloadError | None) -> None:
        extent, direction = ticket.extent, ticket.direction
        with self._lock:
            self._coded[direction] += coded
            if not ticket.segment_done(error):
                return
            if ticket.error is None:
                self._plain[direction] += ticket.nbytes
            extent.pending.remove(ticket)
            if extent.freed and not extent.pending:
                self._store.free(extent.inner)
        ticket.end()

    def _check_buffer(
        self, direction: Direction, extent: CodedExtent, buffer: torch.Tensor, offset: int
    ) -> None:
        what = f"tensor {extent.name} on {self.tier.value}"
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous() or buffer.is_cuda:
            raise ValueError(
                f"{what}: a buffer is a contiguous 1-D uint8 tensor in host memory, got {buffer.dtype} of "
                f"shape {tuple(buffer.shape)} on {buffer.device}"
            )
        end = offset + buffer.numel()
        whole = offset == 0 and end == extent.nbytes
        cut = offset % SEGMENT_BYTES or (end % SEGMENT_BYTES and end != extent.nbytes) or end > extent.nbytes
        if not whole and (cut or offset < 0 or end <= offset):
            verb = "written" if direction is Direction.WRITE else "read"
            raise ValueError(
                f"{what} is coded: it is {verb} whole, all {extent.nbytes} bytes from 0, or in segments of "
                f"{SEGMENT_BYTES} bytes, got {buffer.numel()} at {offset}"
            )

    def _check_usable(self, extent: CodedExtent) -> None:
        if extent.freed:
            raise ExtentStateError(f"tensor {extent.name} on {self.tier.value}: its extent was freed")

    def _refuse_child(self) -> None:
        """Before any lock: in a forked child it may be held by a thread that exists only in the parent."""
        if os.getpid() != self._pid:
            raise OffloadError(
                f"the coded {self.tier.value} store belongs to process {self._pid}; a forked child may not "
                f"use it"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise OffloadError(f"the coded {self.tier.value} store is closed")
