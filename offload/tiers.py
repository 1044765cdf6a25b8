"""The stores of the tiers: a file on a local disk, and host or CXL memory."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
import weakref
from collections.abc import Iterator

from memtrain.offload import manifest
from memtrain.offload.errors import OffloadError, SwapDirectoryError
from memtrain.offload.extents import Extent
from memtrain.offload.io import IOBackend, ThreadPoolBackend
from memtrain.offload.rundir import ARENA, RunDirectory, enable_direct, open_arena, reap_dead_runs
from memtrain.offload.slab import Slab
from memtrain.offload.store import PIECE_BYTES, STALL_SECONDS, Statistics, Store, Ticket, wait_all
from memtrain.offload.targets import BLOCK_BYTES, FileTarget, MemoryTarget
from memtrain.planner.actions import Tier
from memtrain.planner.memory_place import MemoryPlace

__all__ = ["MemoryStore", "NvmeStore", "Statistics", "Store", "Ticket", "wait_all"]

THREADS = 4


class NvmeStore(Store):
    """An arena file in a private directory of a local disk, its space reserved at the start, direct I/O.

    Args:
        directory: the swap directory, which must exist. capacity_bytes: rounded down to 4096. run_id: name
        of the run's directory; random without it. resumable: keep file and directory after ``close``; a
        later store with the same ``run_id`` reopens them. threads, piece_bytes: see the measurement in
        docs/format.md. backend: in place of the thread pool, for tests. direct: ``require``, or
        ``allow_buffered`` to fall back to the page cache where direct I/O is refused. stall_seconds:
        without one finished piece for so long, a waiter gets an error.

    Raises:
        SwapDirectoryError: the directory cannot serve; says why and what to do.
        TierFullError: the disk has less room than ``capacity_bytes``.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        capacity_bytes: int,
        run_id: str | None = None,
        resumable: bool = False,
        threads: int = THREADS,
        piece_bytes: int = PIECE_BYTES,
        backend: IOBackend | None = None,
        *,
        direct: str = "require",
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        if direct not in ("require", "allow_buffered"):
            raise ValueError(f"direct must be 'require' or 'allow_buffered', got {direct!r}")
        capacity_bytes -= capacity_bytes % BLOCK_BYTES
        with _set_up(directory), contextlib.ExitStack() as undo:
            run = RunDirectory(directory, run_id, resumable=resumable)
            undo.callback(run.close)
            reap_dead_runs(run.parent)
            descriptor, refusal = _open(run, capacity_bytes, direct)
            undo.callback(os.close, descriptor)
            self.direct = refusal is None
            if refusal is not None:
                warnings.warn(f"{refusal}. That was allowed: it goes through the page cache", stacklevel=2)
            saved = manifest.load(run, capacity_bytes) if run.reopened else ("", [])
            if not resumable:
                run.unlink(ARENA)
            super().__init__(
                tier=Tier.NVME,
                capacity_bytes=capacity_bytes,
                target=FileTarget(descriptor, direct=self.direct),
                backend=backend or ThreadPoolBackend(threads, f"memtrain-nvme-{run.run_id}"),
                piece_bytes=piece_bytes,
                stall_seconds=stall_seconds,
            )
            self.run = run
            self._descriptor = descriptor
            self._adopt(*saved)
            # The directory goes also at interpreter exit, when nobody called close(). The descriptor does
            # not: a worker may still be writing, and the number could be another file's by then.
            self._remove_directory = weakref.finalize(self, run.close)
            self._close_file = weakref.finalize(self, _close_in, self._pid, descriptor)
            self._close_file.atexit = False
            undo.pop_all()

    def extents(self) -> dict[str, Extent]:
        """The living extents by tensor name: after reopening a run, those that it saved."""
        with self._changed:
            return {extent.name: extent for extent in self._extents}

    def save(self) -> None:
        """Make a resumable store's contents durable. Raises OffloadError where it is not resumable, or
        busy.
        """
        with self._changed:
            self._check_open()
            if not self.run.resumable:
                raise OffloadError("only a store made with resumable=True can be saved")
            if self._pending:
                raise OffloadError(
                    f"{len(self._pending)} extents are being moved: wait for their tickets, then save"
                )
            self._save()

    def close(self) -> None:
        was_open = not self._closed
        super().close()
        if os.getpid() == self._pid:
            if was_open and self.run.resumable:
                self._save()
            self._close_file()
            self._remove_directory()

    def _save(self) -> None:
        manifest.save(self.run, self._descriptor, self._id, self.capacity_bytes, self._extents)

    def _adopt(self, store_id: str, extents: list[Extent]) -> None:
        self._id = store_id or self._id
        for extent in extents:
            self._space.take(extent.arena_offset, extent.reserved_bytes)
            self._extents.add(extent)
        self._peak_used_bytes = self.used_bytes


class MemoryStore(Store):
    """Host or CXL memory behind the same interface: a slab, and threads that copy.

    Args:
        tier: ``Tier.HOST`` or ``Tier.CXL``. capacity_bytes: rounded down to 4096; taken from the kernel as
        it is first written, or at once where there is a place. place: where the memory must lie; required for
        ``Tier.CXL``. Over several nodes in turn (interleave) each extent of more than a few pages is striped
        over all of them, which is what a long transfer wants.

    Raises:
        PlacementError: the place does not exist or did not take the pages.
    """

    def __init__(
        self,
        tier: Tier,
        capacity_bytes: int,
        place: MemoryPlace | None = None,
        *,
        threads: int = 2,
        piece_bytes: int = PIECE_BYTES,
        backend: IOBackend | None = None,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        if tier not in (Tier.HOST, Tier.CXL):
            raise ValueError(f"a memory store serves host or cxl, got {tier.value}")
        if tier is Tier.CXL and place is None:
            raise ValueError("the cxl tier needs a place: its memory-only node, or a dax device")
        capacity_bytes -= capacity_bytes % BLOCK_BYTES
        self.slab = Slab(capacity_bytes, place)
        super().__init__(
            tier=tier,
            capacity_bytes=capacity_bytes,
            target=MemoryTarget(self.slab.address),
            backend=backend or ThreadPoolBackend(threads, f"memtrain-{tier.value}"),
            piece_bytes=piece_bytes,
            stall_seconds=stall_seconds,
        )

    def close(self) -> None:
        super().close()
        if os.getpid() == self._pid:
            self.slab.close()


@contextlib.contextmanager
def _set_up(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever else the operating system refuses, too few descriptors or a full disk, is of the directory."""
    try:
        yield
    except OSError as error:
        raise SwapDirectoryError(
            f"no run can be set up in swap directory {directory}: {error.strerror or error} "
            f"[{errno.errorcode.get(error.errno or 0, error.errno)}]"
        ) from error


def _open(run: RunDirectory, capacity_bytes: int, direct: str) -> tuple[int, OffloadError | None]:
    """The arena's descriptor, and why it is not used with direct I/O."""
    if run.reopened:
        descriptor = manifest.open_saved_arena(run, capacity_bytes)
    else:
        descriptor = open_arena(run, capacity_bytes, direct=False)
    try:
        enable_direct(descriptor, str(run.parent), new=not run.reopened)
    except OffloadError as error:
        if direct == "require":
            os.close(descriptor)
            raise
        return descriptor, error
    return descriptor, None


def _close_in(pid: int, descriptor: int) -> None:
    if os.getpid() == pid:
        os.close(descriptor)
