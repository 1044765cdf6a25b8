"""What the executors see of a tier, the same for memory and for disk: tickets, order, checks.

A write is published, with the next generation, when every byte of it is on the tier; a read is verified
before ``wait()`` returns. Each direction starts its operations in the order they were given. An operation
that touches bytes which an earlier one is still moving waits for that one by itself; since it only ever
waits for earlier ones, the earliest unfinished operation can always go on.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

import torch

from memtrain.offload.contents import Content
from memtrain.offload.errors import ExtentStateError, OffloadError, TierFullError, TierIOError
from memtrain.offload.extents import Chunk, Extent, FreeList, pieces, reserved
from memtrain.offload.io import Direction, IOBackend, IORequest
from memtrain.offload.store_meter import Statistics, StoreMeter
from memtrain.offload.targets import BLOCK_BYTES, Target
from memtrain.offload.tickets import Ticket, Waitable, check_buffer, wait_all
from memtrain.planner.actions import Tier
from memtrain.planner.units import MiB, format_gib

__all__ = [
    "PIECE_BYTES",
    "REPORT_SECONDS",
    "STALL_SECONDS",
    "Statistics",
    "Store",
    "Ticket",
    "Waitable",
    "wait_all",
]

Cut = tuple[int, int, int, int, tuple[int, ...] | None]
"""A chunk to move: offset, generation, piece_bytes, nbytes, checksums to expect of a read."""

_log = logging.getLogger(__name__)

PIECE_BYTES = 4 * MiB
STALL_SECONDS = 300.0
"""Without one finished piece for so long, a waiter gets an error: slow disks pause for seconds, not for
minutes.
"""
REPORT_SECONDS = 30.0
"""Somebody who waits for so long says so in the log, and what the tier has moved meanwhile; then again."""


class Store:
    """A tier's bytes: extents in an arena behind an I/O backend. Use ``NvmeStore`` or ``MemoryStore``.

    Thread-safe. A buffer belongs to the store from ``write`` or ``read`` until ``wait()`` has returned.
    """

    def __init__(
        self,
        *,
        tier: Tier,
        capacity_bytes: int,
        target: Target,
        backend: IOBackend,
        piece_bytes: int,
        stall_seconds: float,
    ) -> None:
        if piece_bytes <= 0 or piece_bytes % BLOCK_BYTES:
            backend.close()
            raise ValueError(f"piece_bytes must be a positive multiple of {BLOCK_BYTES}, got {piece_bytes}")
        self.tier = tier
        self.capacity_bytes = capacity_bytes
        self.alignment = BLOCK_BYTES
        self.piece_bytes = piece_bytes
        self.stall_seconds = stall_seconds
        self._id = secrets.token_hex(8)
        self._target = target
        self._backend = backend
        self._space = FreeList(capacity_bytes)
        self._extents: set[Extent] = set()
        self._peak_used_bytes = 0
        self._queues: dict[Direction, deque[Ticket]] = {d: deque() for d in Direction}
        self._pending: dict[Extent, list[Ticket]] = {}
        self._meter = StoreMeter()
        self._progress_at = self._reported_at = time.monotonic()
        self._reported_bytes = 0
        self._changed = threading.Condition(threading.RLock())
        self._closed = False
        self._pid = os.getpid()
        self.neighbours: Mapping[Tier, Store] = {}
        """The other tiers of the budget: what may have room where this has none."""

    @property
    def used_bytes(self) -> int:
        """Bytes reserved by extents."""
        return self.capacity_bytes - self._space.free_bytes

    def allocate(
        self, name: str, nbytes: int, *, dtype: str | None = None, shape: tuple[int, ...] | None = None
    ) -> Extent:
        """Reserve room for ``nbytes`` of tensor ``name`` (rounded up to 4096 on the tier).

        Raises:
            TierFullError: no room, or none in one run.
            TierIOError: room that was freed is still being written or read, and the tier has stalled.
        """
        if nbytes < 0:
            raise ValueError(f"tensor {name}: nbytes must be >= 0, got {nbytes}")
        self._refuse_child()
        size = reserved(nbytes, self.alignment)
        with self._changed:
            self._check_open()
            while (offset := self._space.allocate(size)) is None:
                # An extent that was freed with a transfer under way gives its room back when that ends.
                if not any(extent.freed for extent in self._pending):
                    raise TierFullError(self._no_room(name, size))
                self._changed.wait(self._until_stall(f"room for tensor {name} on {self.tier.value}"))
            self._peak_used_bytes = max(self._peak_used_bytes, self.used_bytes)
        extent = Extent(
            name=name,
            tier=self.tier,
            store_id=self._id,
            arena_offset=offset,
            nbytes=nbytes,
            reserved_bytes=size,
            dtype=dtype,
            shape=shape,
        )
        with self._changed:
            self._extents.add(extent)
        return extent

    def write(self, extent: Extent, buffer: torch.Tensor, offset: int = 0) -> Ticket:
        """Move ``buffer`` (1-D uint8, page-aligned start) to byte ``offset`` of ``extent``, a multiple of
        4096.

        What one write moves is a chunk; a later write replaces whole chunks.

        Raises:
            ExtentStateError: the extent is freed or another store's, or a boundary would cut a chunk.
        """
        return self._enqueue(Direction.WRITE, extent, buffer, offset)

    def read(self, extent: Extent, buffer: torch.Tensor, offset: int = 0) -> Ticket:
        """Move ``buffer.numel()`` bytes from ``offset`` of ``extent`` to ``buffer``: whole chunks, as
        written.

        Raises:
            ExtentStateError: freed, another store's, never written, or a boundary cuts a chunk. Where a
            write of the
                extent is still under way, ``wait()`` raises it.
        """
        return self._enqueue(Direction.READ, extent, buffer, offset)

    def discard(self, extent: Extent, offset: int, nbytes: int) -> None:
        """Forget what was written to a range, so that a shorter write may take its place.

        Raises:
            ExtentStateError: the extent is freed or another store's, bytes of the range are being moved, or a
                boundary cuts a chunk.
        """
        self._refuse_child()
        with self._changed:
            self._check_usable(extent)
            for ticket in self._pending.get(extent, ()):
                if ticket.offset < offset + nbytes and offset < ticket.offset + ticket.nbytes:
                    raise ExtentStateError(f"{ticket._describe()} is under way: wait for it, then discard")
            extent.check_replaceable(offset, nbytes)
            extent.retract(offset, nbytes)

    def free(self, extent: Extent) -> None:
        """Give the extent's room back, when what is under way on it has ended as usual.

        Raises:
            ExtentStateError: it was freed already, or is another store's.
        """
        self._refuse_child()
        with self._changed:
            self._check_usable(extent)
            extent.freed = True
            self._extents.discard(extent)
            if extent not in self._pending:
                self._release(extent)

    def carve(self, room: Extent, offset: int, like: Extent) -> Extent:
        """A place for what is in ``like``, ``offset`` bytes into ``room``, whose owner keeps book of it.

        Generations go on from those that the room has seen: a write that is lost leaves nothing that would
        pass for it.
        """
        extent = Extent(
            name=like.name,
            tier=self.tier,
            store_id=self._id,
            arena_offset=room.arena_offset + offset,
            nbytes=like.nbytes,
            reserved_bytes=like.reserved_bytes,
            dtype=like.dtype,
            shape=like.shape,
        )
        with self._changed:
            self._check_usable(room)
            extent.next_generation = room.next_generation
            self._extents.add(extent)
        return extent

    def retire(self, room: Extent, extent: Extent) -> bool:
        """End an extent that was carved out of ``room``. False, and nothing is done, while bytes of it are
        being moved."""
        with self._changed:
            if extent in self._pending:
                return False
            self._check_usable(extent)
            extent.freed = True
            self._extents.discard(extent)
            room.next_generation = max(room.next_generation, extent.next_generation)
            return True

    def dissolve(self, room: Extent, runs: Iterable[tuple[int, int]]) -> None:
        """Give back ``runs`` of ``room``, offsets and lengths; what was carved out of the rest stays, and is
        freed by itself."""
        with self._changed:
            self._check_usable(room)
            room.freed = True
            self._extents.discard(room)
            for offset, nbytes in runs:
                self._space.free(room.arena_offset + offset, nbytes)
            self._changed.notify_all()

    def statistics(self) -> Statistics:
        """Bytes and seconds so far."""
        with self._changed:
            return self._meter.statistics(used_bytes=self.used_bytes, peak_used_bytes=self._peak_used_bytes)

    def written_bytes(self) -> dict[Content, int]:
        """What the store was given to write so far, by what it is of."""
        with self._changed:
            return dict(self._meter.written_bytes)

    def close(self) -> None:
        """Finish what the workers are moving, fail what has not begun, give the tier's room back.
        Idempotent.
        """
        if os.getpid() != self._pid:
            return
        with self._changed:
            if self._closed:
                return
            self._closed = True
            never_begun = [ticket for queue in self._queues.values() for ticket in queue]
            for queue in self._queues.values():
                queue.clear()
            for ticket in never_begun:
                self._finish(ticket, OffloadError(f"{ticket._describe()} was given up: the store is closed"))
        self._backend.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enqueue(self, direction: Direction, extent: Extent, buffer: torch.Tensor, offset: int) -> Ticket:
        check_buffer(self.tier, extent, buffer, offset)
        self._refuse_child()
        ticket = Ticket(self, direction, extent, buffer, offset)
        with self._changed:
            self._check_open()
            self._check_usable(extent)
            pending = self._pending.get(extent, ())
            ticket._waits_for = {other for other in pending if ticket._conflicts(other)}
            if not ticket._waits_for:
                self._check_chunks(ticket)
            if not any(self._pending.values()):
                self._progress_at = time.monotonic()
            self._pending.setdefault(extent, []).append(ticket)
            self._meter.begin(direction, extent.name, ticket.nbytes)
            self._queues[direction].append(ticket)
            self._pump()
        return ticket

    def _pump(self) -> None:
        """Start every operation that heads its direction's queue and waits for nothing."""
        moved = True
        while moved:
            moved = False
            for queue in self._queues.values():
                if queue and not queue[0]._waits_for:
                    self._start(queue.popleft())
                    moved = True

    def _start(self, ticket: Ticket) -> None:
        extent, buffer = ticket.extent, ticket.buffer
        assert buffer is not None
        try:
            self._check_chunks(ticket)
        except OffloadError as error:
            self._finish(ticket, error)
            return
        requests: list[IORequest] = []
        if ticket.direction is Direction.WRITE:
            ticket.generation = extent.next_generation
            extent.next_generation += 1
            extent.retract(ticket.offset, ticket.nbytes)
            cuts: list[Cut] = [(ticket.offset, ticket.generation, self.piece_bytes, ticket.nbytes, None)]
        else:
            covering = extent.covering(ticket.offset, ticket.nbytes)
            cuts = [(c.offset, c.generation, c.piece_bytes, c.nbytes, c.checksums) for c in covering]
        for start, generation, piece_bytes, nbytes, checksums in cuts:
            for index, (piece, length) in enumerate(pieces(nbytes, piece_bytes)):
                at = start + piece
                requests.append(
                    IORequest(
                        direction=ticket.direction,
                        target=self._target,
                        offset=extent.arena_offset + at,
                        buffer=buffer[at - ticket.offset : at - ticket.offset + length],
                        tensor_name=extent.name,
                        tier=self.tier,
                        seed=extent.seed(generation, at),
                        expected=None if checksums is None else checksums[index],
                        done=self._on_piece(ticket, len(requests)),
                    )
                )
        ticket._left = len(requests)
        ticket._checksums = [0] * len(requests)
        if not requests:
            self._finish(ticket, None)
        for request in requests:
            self._backend.submit(request)

    def _on_piece(self, ticket: Ticket, index: int) -> Callable[[IORequest], None]:
        def done(request: IORequest) -> None:
            with self._changed:
                self._progress_at = time.monotonic()
                if ticket._error is None:
                    ticket._error = request.error
                if request.error is None:
                    self._meter.note_piece(request)
                    ticket._checksums[index] = request.checksum or 0
                ticket._left -= 1
                # The last piece ends the operation, also a failed one: until then workers use its buffer.
                if ticket._left == 0:
                    self._finish(ticket, ticket._error)
                    self._pump()

        return done

    def _finish(self, ticket: Ticket, error: OffloadError | None) -> None:
        extent, direction = ticket.extent, ticket.direction
        if direction is Direction.WRITE:
            if error is None:
                extent.publish(
                    Chunk(
                        ticket.offset,
                        ticket.nbytes,
                        ticket.generation,
                        self.piece_bytes,
                        tuple(ticket._checksums),
                    )
                )
            elif ticket.generation:
                extent.failures[ticket.offset] = error
        pending = self._pending[extent]
        pending.remove(ticket)
        for other in pending:
            other._waits_for.discard(ticket)
        if not pending:
            del self._pending[extent]
            if extent.freed:
                self._release(extent)
        self._meter.end(direction)
        ticket._error = error
        ticket.buffer = None
        ticket._event.set()
        self._changed.notify_all()

    def _release(self, extent: Extent) -> None:
        self._space.free(extent.arena_offset, extent.reserved_bytes)
        self._changed.notify_all()

    def _patience(self, ticket: Ticket, began: float, deadline: float | None) -> float:
        """How long a waiter may sleep before it looks again. Raises TierIOError when it has waited too
        long.
        """
        if ticket.done():
            return 0.0
        self._refuse_child()
        now = time.monotonic()
        what = ticket._describe()
        if deadline is not None and now >= deadline:
            raise TierIOError(f"{what} is not finished within the time that wait() was given")
        pause = self._until_stall(what)
        self._report(what, began, now)
        pause = min(pause, REPORT_SECONDS)
        return max(0.0, pause if deadline is None else min(pause, deadline - now))

    def _until_stall(self, what: str) -> float:
        """Seconds until the tier counts as stalled. Raises TierIOError where it does already."""
        stalled = time.monotonic() - self._progress_at
        if stalled >= self.stall_seconds:
            raise TierIOError(f"{what}: the tier has moved nothing for {stalled:.0f} s. Check it (dmesg)")
        return self.stall_seconds - stalled

    def _report(self, what: str, began: float, now: float) -> None:
        """Say in the log that ``what`` takes long, whoever waits, once in ``REPORT_SECONDS``."""
        with self._changed:
            since = max(began, self._reported_at)
            if now - since < REPORT_SECONDS:
                return
            moved_bytes = sum(self._meter.moved_bytes.values()) - self._reported_bytes
            self._reported_at, self._reported_bytes = now, self._reported_bytes + moved_bytes
            under_way = sum(map(len, self._pending.values()))
        _log.warning(
            "%s has been waited for %.0f s: %s moved since the last report, %d transfers under way, last "
            "progress %.0f s ago (an error after %.0f)",
            what,
            now - began,
            format_gib(moved_bytes),
            under_way,
            now - self._progress_at,
            self.stall_seconds,
        )

    def _check_chunks(self, ticket: Ticket) -> None:
        if ticket.direction is Direction.WRITE:
            ticket.extent.check_replaceable(ticket.offset, ticket.nbytes)
        else:
            ticket.extent.covering(ticket.offset, ticket.nbytes)

    def _check_usable(self, extent: Extent) -> None:
        if extent.store_id != self._id:
            raise ExtentStateError(
                f"tensor {extent.name}: its extent belongs to another store, not to this {self.tier.value}"
            )
        if extent.freed:
            raise ExtentStateError(f"tensor {extent.name} on {self.tier.value}: its extent was freed")

    def _refuse_child(self) -> None:
        """Before any lock: in a forked child it may be held by a thread that exists only in the parent."""
        if os.getpid() != self._pid:
            raise OffloadError(
                f"the {self.tier.value} store belongs to process {self._pid}; a forked child may not use it"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise OffloadError(f"the {self.tier.value} store is closed")

    def _no_room(self, name: str, need: int) -> str:
        free, largest = self._space.free_bytes, self._space.largest_bytes
        scattered = f" (the longest run is {largest} bytes)" if free >= need else ""
        others = [(s.tier, s._space.largest_bytes) for s in self.neighbours.values() if not s._closed]
        room = [f"{size} bytes on {tier.value}" for tier, size in others if size >= need]
        return (
            f"tensor {name} needs {need} bytes on {self.tier.value}, {free} of {self.capacity_bytes} bytes "
            f"are free{scattered}: raise budget.{self.tier.value} by at least {need - largest} bytes"
            + (f", or plan it elsewhere (PlannerOptions.force): there are {', '.join(room)}" if room else "")
        )
