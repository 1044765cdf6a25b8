"""Transfers in pieces, each checked in one place.

A piece (4 to 8 MiB) is one request. Workers are plain threads: the system calls, the copy and the checksum
all let other threads run, and a handful of them saturates one disk. Whatever a target answers, short counts
and errors alike, is judged in ``transfer`` and nowhere else.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
import xxhash

from memtrain.offload.errors import CorruptExtentError, OffloadError, TierIOError
from memtrain.offload.targets import Target, view_at
from memtrain.planner.actions import Tier

_log = logging.getLogger(__name__)

_RETRIES = 1000  # of EAGAIN and of calls that move less than a block; about ten seconds in all
_RETRY_SECONDS = 0.01
_EXIT_SECONDS = 5.0  # that the exit of an interpreter waits for workers

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free space or choose another swap directory",
    errno.EDQUOT: "the disk quota is used up: raise it or choose another swap directory",
    errno.EFBIG: "the file may not grow so large: raise the file size limit (ulimit -f)",
    errno.EIO: "the device failed: check it (dmesg), then resume from the last checkpoint",
}


class Direction(Enum):
    """Which way bytes move, as seen from the tier."""

    READ = "read"
    WRITE = "write"


@dataclass(slots=True, kw_only=True, eq=False)
class IORequest:
    """One piece to move, and what became of it.

    ``done`` is called exactly once, in a worker, after ``checksum`` or ``error`` is set; it must not raise.
    """

    direction: Direction
    target: Target
    offset: int
    """In the target."""
    buffer: torch.Tensor | None
    """1-D uint8; keeps the memory while bytes move. None before ``done`` is called: whoever then gives the
    memory back must not find it kept by a worker that has yet to leave."""
    tensor_name: str
    tier: Tier
    seed: int
    expected: int | None = None
    """Checksum that a read must find."""
    done: Callable[[IORequest], None]
    checksum: int | None = None
    error: OffloadError | None = None
    reread: bool = False
    """The first read failed, or found other bytes; the second did not."""
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        assert self.buffer is not None
        self.nbytes = self.buffer.numel()

    @property
    def where(self) -> str:
        """For messages."""
        what = f"{self.direction.value} of tensor {self.tensor_name}"
        return f"{what} on {self.tier.value} at offset {self.offset}"


def transfer(request: IORequest) -> None:
    """Move every byte of the request and compute, or check, its checksum.

    Raises:
        TierIOError: the target refused, or ended short; a read twice.
        CorruptExtentError: a read found other bytes than were written, twice.
    """
    assert request.buffer is not None
    address, nbytes = request.buffer.data_ptr(), request.nbytes
    if request.direction is Direction.WRITE:
        # Before the bytes leave, so that what changes on the way is noticed when they come back.
        request.checksum = xxhash.xxh3_64_intdigest(view_at(address, nbytes), request.seed)
        _move(request, request.target.write, address, nbytes)
        return
    try:
        _read(request, address, nbytes)
    except OffloadError as first:
        # The fault may be of the moment, or of the way to memory. A read destroys nothing, a write might.
        _read(request, address, nbytes)
        request.reread = True
        _log.warning("%s; a second read found what was written", first)


def _read(request: IORequest, address: int, nbytes: int) -> None:
    _move(request, request.target.read, address, nbytes)
    request.checksum = xxhash.xxh3_64_intdigest(view_at(address, nbytes), request.seed)
    if request.checksum != request.expected:
        raise CorruptExtentError(
            f"{request.where}: the {nbytes} bytes read are not the bytes written (checksum "
            f"{request.checksum:016x}, expected {request.expected or 0:016x}). The device or the memory is "
            "faulty: resume from the last checkpoint"
        )


def _move(request: IORequest, step: Callable[[int, int, int], int], address: int, nbytes: int) -> None:
    moved = retries = 0
    while moved < nbytes:
        try:
            count = step(address + moved, nbytes - moved, request.offset + moved)
        except (BlockingIOError, InterruptedError) as error:
            retries += 1
            if retries > _RETRIES:
                raise _io_error(request, error.errno, f"still refused after {_RETRIES} attempts") from error
            time.sleep(_RETRY_SECONDS)
            continue
        except OSError as error:
            raise _io_error(request, error.errno, os.strerror(error.errno or 0)) from error
        if count <= 0:
            raise _io_error(
                request, None, f"ended after {moved} of {nbytes} bytes: the file is shorter than it was"
            )
        end = moved + count
        if end >= nbytes:
            return
        # Resume at a block: what was moved of a broken block is moved again.
        end -= end % request.target.alignment
        retries = retries + 1 if end == moved else 0
        if retries > _RETRIES:
            raise _io_error(request, None, f"ended again and again after {moved} of {nbytes} bytes")
        moved = end


def _io_error(request: IORequest, number: int | None, what: str) -> TierIOError:
    name = f" [{errno.errorcode.get(number, number)}]" if number is not None else ""
    remedy = _REMEDIES.get(number or 0, "check the device and the swap directory")
    return TierIOError(f"{request.where} failed{name}: {what}; {remedy}", number)


def perform(request: IORequest) -> None:
    """Transfer and report: the request's ``done`` is called whatever happens."""
    try:
        transfer(request)
    except OffloadError as error:
        request.error = error
    except BaseException as error:  # a waiter must hear of it, whatever it is
        request.error = OffloadError(f"{request.where} failed: {error!r}")
        request.error.__cause__ = error
    _report(request)


def _report(request: IORequest) -> None:
    request.buffer = None
    request.done(request)


class IOBackend(Protocol):
    """Carries out requests; each direction starts them in the order of submission."""

    def submit(self, request: IORequest) -> None:
        """Take the request; ``request.done`` is called when it is finished. Never waits."""

    def close(self) -> None:
        """Finish what runs, fail what has not begun, and end the workers. May be called twice."""


_working: weakref.WeakSet[ThreadPoolBackend] = weakref.WeakSet()
"""Backends whose workers run."""


@atexit.register
def _leave() -> None:
    for backend in list(_working):
        backend.leave()


class ThreadPoolBackend:
    """Threads that serve one queue per direction, the direction with fewer pieces under way first."""

    def __init__(self, threads: int = 4, name: str = "memtrain-io", *, join_seconds: float = 300.0) -> None:
        if threads < 1:
            raise ValueError(f"threads must be >= 1, got {threads}")
        self._queues: dict[Direction, deque[IORequest]] = {d: deque() for d in Direction}
        self._running = dict.fromkeys(Direction, 0)
        self._wake = threading.Condition()
        self._closed = False
        self._join_seconds = join_seconds
        self._pid = os.getpid()
        # Daemons: an interpreter that exits without close() does not wait long for a stalled disk.
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{i}", daemon=True) for i in range(threads)
        ]
        _working.add(self)
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self.close()
            raise OffloadError(
                f"only {len(self._threads)} of {threads} I/O threads could be started ({error}): raise the "
                f"limits on processes (ulimit -u) and memory (ulimit -v)"
            ) from error

    def submit(self, request: IORequest) -> None:
        with self._wake:
            if not self._closed:
                self._queues[request.direction].append(request)
                self._wake.notify()
                return
        _fail_closed(request)

    def close(self) -> None:
        _working.discard(self)
        if stuck := self._end(self._join_seconds):
            raise TierIOError(
                f"{', '.join(stuck)} did not end within {self._join_seconds:.0f} s: the device hangs (dmesg)"
            )

    def leave(self) -> None:
        """The interpreter exits: end the workers, which must not be found at work by its finalization."""
        if os.getpid() == self._pid:
            self._end(_EXIT_SECONDS)

    def _end(self, seconds: float) -> list[str]:
        """Names of the workers that are still at work after ``seconds``."""
        with self._wake:
            self._closed = True
            dropped = [request for queue in self._queues.values() for request in queue]
            for queue in self._queues.values():
                queue.clear()
            self._wake.notify_all()
        for request in dropped:
            _fail_closed(request)
        deadline = time.monotonic() + seconds
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in others if thread.is_alive()]

    def _serve(self) -> None:
        while (request := self._next()) is not None:
            try:
                perform(request)
            finally:
                with self._wake:
                    self._running[request.direction] -= 1
            del request  # or an idle worker would keep the last target and its ticket alive

    def _next(self) -> IORequest | None:
        with self._wake:
            while True:
                waiting = [d for d in Direction if self._queues[d]]
                if waiting:
                    direction = min(waiting, key=self._running.__getitem__)
                    self._running[direction] += 1
                    return self._queues[direction].popleft()
                if self._closed:
                    return None
                self._wake.wait()


def _fail_closed(request: IORequest) -> None:
    request.error = OffloadError(f"{request.where} was given up: the store is closed")
    _report(request)


class Gate:
    """For tests: calls stop at it until it is opened, and ``reached`` is set when one has come."""

    def __init__(self) -> None:
        self.reached, self._opened = threading.Event(), threading.Event()

    def open(self) -> None:
        self._opened.set()

    def go_through(self) -> None:
        """Raises:
        AssertionError: nobody has opened it for a minute. No OSError, which a tier would take for its own.
        """
        self.reached.set()
        if not self._opened.wait(60):
            raise AssertionError("the gate was never opened")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What goes wrong with one request."""

    delay_seconds: float = 0.0
    gate: Gate | None = None
    """A call stops at it before anything else happens."""
    times: int = 1 << 30
    """How many calls go wrong before the target does what it should again."""
    error: int | None = None
    """An errno that a call raises."""
    short_bytes: int | None = None
    """A call moves only this many bytes; 0 is an end of file."""
    flip_bit: int | None = None
    """This bit of the bytes is wrong: on the tier after a write, in memory after a read."""
    drop: bool = False
    """A write that reports success and changes nothing."""
    stale: Mapping[int, bytes] = field(default_factory=dict)
    """A read finds these bytes at these offsets of the target."""


class FaultyBackend:
    """For tests: an inner backend whose nth submitted request (from 0) suffers ``plan[n]``.

    With ``reorder`` > 1, requests are held until so many have come (or ``hold_seconds`` have passed) and
    passed on in shuffled order, by ``seed``.
    """

    def __init__(
        self,
        inner: IOBackend,
        plan: Mapping[int, Fault] | None = None,
        *,
        reorder: int = 1,
        seed: int = 0,
        hold_seconds: float = 0.01,
    ) -> None:
        self.inner = inner
        self.plan = dict(plan or {})
        self.submitted = 0
        self._reorder = reorder
        self._hold_seconds = hold_seconds
        self._random = random.Random(seed)
        self._held: list[IORequest] = []
        self._lock = threading.Lock()

    def submit(self, request: IORequest) -> None:
        with self._lock:
            fault = self.plan.get(self.submitted)
            self.submitted += 1
            if fault is not None:
                request.target = FaultyTarget(request.target, fault)
            self._held.append(request)
            full = len(self._held) >= self._reorder
            first = len(self._held) == 1
        if full:
            self._pass_on()
        elif first:
            timer = threading.Timer(self._hold_seconds, self._pass_on)
            timer.daemon = True
            timer.start()

    def close(self) -> None:
        self._pass_on()
        self.inner.close()

    def _pass_on(self) -> None:
        with self._lock:
            held, self._held = self._held, []
            self._random.shuffle(held)
        for request in held:
            self.inner.submit(request)


class FaultyTarget:
    """For tests: a target of one request, which suffers ``fault``."""

    def __init__(self, inner: Target, fault: Fault) -> None:
        self._inner = inner
        self._fault = fault
        self._calls = 0
        self.alignment = inner.alignment

    def read(self, address: int, nbytes: int, offset: int) -> int:
        count = self._before(nbytes)
        got = self._inner.read(address, count, offset) if count else 0
        if self._wrong and offset in self._fault.stale:
            old = self._fault.stale[offset][:got]
            view_at(address, len(old))[:] = old
        self._flip(address, got)
        return got

    def write(self, address: int, nbytes: int, offset: int) -> int:
        count = self._before(nbytes)
        if (self._wrong and self._fault.drop) or not count:
            return count
        with self._flipped(address, count):
            return self._inner.write(address, count, offset)

    @property
    def _wrong(self) -> bool:
        return self._calls <= self._fault.times

    def _before(self, nbytes: int) -> int:
        self._calls += 1
        if self._fault.gate is not None:
            self._fault.gate.go_through()
        time.sleep(self._fault.delay_seconds)
        if not self._wrong:
            return nbytes
        if self._fault.error is not None:
            raise OSError(self._fault.error, os.strerror(self._fault.error))
        return nbytes if self._fault.short_bytes is None else min(nbytes, self._fault.short_bytes)

    def _flip(self, address: int, nbytes: int) -> None:
        bit = self._fault.flip_bit
        if self._wrong and bit is not None and bit // 8 < nbytes:
            view_at(address + bit // 8, 1)[0] ^= 1 << bit % 8

    @contextlib.contextmanager
    def _flipped(self, address: int, nbytes: int) -> Iterator[None]:
        self._flip(address, nbytes)
        try:
            yield
        finally:
            self._flip(address, nbytes)
