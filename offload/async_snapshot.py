"""Checkpoints that are written while training goes on: the same files, bit for bit, as ``save_checkpoint``
would have written at that step.

    snapshots = AsyncCheckpointer(session)
    ...
    snapshots.save("run/step-000100", progress={"steps_done": 100})   # returns at once
    ...                                                               # training goes on
    snapshots.close()

What is small (counters, random generators, buffers) is noted when the snapshot is asked for. Weights and
optimizer state are copied by a thread, straight from where they lie to their place in the files; see
``copy_on_write`` for what an update does that comes first. The folder appears when every file has been read
back and found right; until then the checkpoint before it is what a restart finds.

A snapshot that fails does not stop training: its error is raised by the next ``optimizer.step()``, before
anything of that step is done (but for units that backward has updated: call ``step`` again then), or by
``wait`` or ``close``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memtrain.offload.atomic import CheckpointError, publish
from memtrain.offload.copy_on_write import CopyOnWrite
from memtrain.offload.errors import OffloadError
from memtrain.offload.optimizer_state import RecordStore
from memtrain.offload.placed import SnapshotWriter
from memtrain.offload.slab import Slab
from memtrain.offload.snapshot import Session, tables_of, weights_of
from memtrain.offload.snapshot_parts import SnapshotContents, gather, read_bytes
from memtrain.offload.snapshot_weights import weight_files
from memtrain.offload.spares import reserve_spares
from memtrain.offload.store import PIECE_BYTES
from memtrain.planner.actions import Tier

STAGING_BYTES = 2 * PIECE_BYTES
"""Memory for records on their way from a tier to the files: one piece is read while one is written."""


class SnapshotThreadError(OffloadError):
    """No thread can be started to write a snapshot; nothing of it has been done."""


class SnapshotBusyError(OffloadError):
    """A snapshot was asked for, not to wait, while another is being written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotStatistics:
    """What snapshots have cost so far."""

    completed: int = 0
    failed: int = 0
    bytes_written: int = 0
    request_seconds: float = 0.0
    """What the calls that ask for snapshots took: the pending update, what is small, and waiting for an
    earlier snapshot."""
    waited_seconds: float = 0.0
    """What updates waited for parts to be copied."""
    write_seconds: float = 0.0
    """From each request to its folder."""
    last_write_seconds: float = 0.0
    most_spares: int = 0
    """Spare extents in use at one time."""


class AsyncCheckpointer:
    """Takes checkpoints of one session. Not for several threads at once.

    Args:
        session: whose ``flush``, ``model`` and ``optimizer`` are a ``memtrain.Session``'s.
        spare_bytes: by tier, room for generations of state and of streamed weights that a snapshot still
            needs. Reserved now. Without any, an update waits until what it overwrites has been copied.

    Raises:
        TierFullError: no room for the spares.
        CheckpointError: the session has a checkpointer already, or tables that are used by rows.
    """

    def __init__(self, session: Session, *, spare_bytes: Mapping[Tier, int] | None = None) -> None:
        if tables_of(session) is not None:
            raise CheckpointError(
                "a session with tables that are used by rows (sparse_optimizer) takes no snapshots beside "
                "training: steps overwrite rows where they lie. Call save_checkpoint() between steps"
            )
        self._session = session
        self._weights = weights_of(session)
        self._records: RecordStore = session.optimizer.records
        if self._records.keeper is not None:
            raise CheckpointError("the session has a checkpointer already: close that one first")
        self._staging = Slab(self._staging_bytes())
        try:
            weights = {} if self._weights is None else self._weights.extents()
            rooms = reserve_spares(self._records.extents().values(), weights.values(), spare_bytes or {})
        except BaseException:
            self._staging.close()
            raise
        self._keeper = CopyOnWrite(rooms)
        self._keep_with(self._keeper)
        self._hook = session.optimizer.register_step_pre_hook(lambda *_: self.check())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._counts = SnapshotStatistics()

    @property
    def staging_bytes(self) -> int:
        """Memory that is held for as long as this object is open."""
        return self._staging.nbytes

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def statistics(self) -> SnapshotStatistics:
        """So far."""
        return replace(
            self._counts,
            waited_seconds=self._keeper.waited_seconds,
            most_spares=self._keeper.most_spares,
        )

    def save(
        self,
        folder: Path | str,
        *,
        progress: dict[str, Any],
        source_folder: Path | str | None = None,
        overlap: str = "wait",
        published: Callable[[], None] | None = None,
    ) -> None:
        """Begin a checkpoint of the session as it is now. Arguments as of ``save_checkpoint``.

        Args:
            overlap: what to do while another one is being written: ``wait`` for it, or ``refuse``.
            published: called when the folder is complete, by the thread that wrote it.

        Raises:
            SnapshotBusyError: another one is being written, and ``overlap`` is ``refuse``.
            SnapshotThreadError: the system gives no further thread.
            CheckpointError, OffloadError: of an earlier snapshot that failed; or something of this one cannot
                be stored.
        """
        path = Path(folder)
        self.begin(
            lambda: publish(path),
            str(path),
            progress=progress,
            source_folder=source_folder,
            overlap=overlap,
            published=published,
        )

    def begin(
        self,
        open_writer: Callable[[], AbstractContextManager[SnapshotWriter]],
        name: str,
        *,
        progress: dict[str, Any],
        source_folder: Path | str | None = None,
        overlap: str = "wait",
        published: Callable[[], None] | None = None,
    ) -> None:
        """As ``save``, into whatever ``open_writer`` opens; ``name`` is for messages."""
        if overlap not in ("wait", "refuse"):
            raise ValueError(f"overlap must be 'wait' or 'refuse', got {overlap!r}")
        began = time.perf_counter()
        if self.busy and overlap == "refuse":
            raise SnapshotBusyError(
                f"snapshot {name} was asked for while {self._name()} is being written: wait for it with "
                f"wait(), or take snapshots further apart"
            )
        self.wait()
        self._session.flush()
        if self._weights is not None:
            self._weights.flush()
        source = Path(source_folder) if source_folder is not None else None
        contents = gather(self._session, progress, source, self._staging.buffer, self._keeper.moved)
        thread = threading.Thread(
            target=self._write, args=(open_writer, contents, published, began), name=f"snapshot {name}"
        )
        self._keeper.begin(contents.parts)
        taken = time.perf_counter() - began
        self._counts = replace(self._counts, request_seconds=self._counts.request_seconds + taken)
        try:
            thread.start()
        except BaseException as error:
            self._keeper.end()  # or the next update would wait for a thread that is not there
            if not isinstance(error, RuntimeError):
                raise
            raise SnapshotThreadError(
                f"snapshot {name} was not begun: the system gives this process no further thread ({error}). "
                f"Training may go on. Raise the limit on processes (ulimit -u, pids.max of the control "
                f"group) or on memory, or write checkpoints synchronously"
            ) from error
        self._thread = thread

    def wait(self) -> None:
        """Return when no snapshot is being written. Raises what went wrong with the last one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong with the last snapshot, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Finish what is being written, give memory and spares back. Raises what went wrong with the last
        snapshot. May be called twice."""
        if self._staging.closed:
            return
        try:
            self.wait()
        finally:
            self._hook.remove()
            self._keep_with(None)
            for store, extent in self._keeper.close():
                store.free(extent)
            self._staging.close()

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(
        self,
        open_writer: Callable[[], AbstractContextManager[SnapshotWriter]],
        contents: SnapshotContents,
        published: Callable[[], None] | None,
        began: float,
    ) -> None:
        """The thread's work."""
        counts = self._counts
        try:
            with open_writer() as writer:
                contents.write(writer, self._keeper)
                self._keeper.end()  # verifying and publishing need nothing of the session
                contents.finish(writer)
            seconds = time.perf_counter() - began
            counts = replace(
                self._counts,
                completed=counts.completed + 1,
                bytes_written=counts.bytes_written + contents.size_bytes,
                write_seconds=counts.write_seconds + seconds,
                last_write_seconds=seconds,
            )
            if published is not None:
                published()
        except BaseException as error:
            self._error = error
            counts = replace(self._counts, failed=counts.failed + 1)
        finally:
            self._keeper.end()
            contents.abandon()
            self._counts = counts

    def _name(self) -> str:
        return self._thread.name if self._thread is not None else "another one"

    def _keep_with(self, keeper: CopyOnWrite | None) -> None:
        self._records.keeper = keeper
        if self._weights is not None:
            self._weights.keeper = keeper

    def _staging_bytes(self) -> int:
        """Two reads of the store that has the largest pieces."""
        weights = {} if self._weights is None else self._weights.extents()
        stores = {store for store, _ in (*self._records.extents().values(), *weights.values())}
        return max([STAGING_BYTES, *(2 * read_bytes(store) for store in stores)])


def snapshot_bytes(session: Session) -> int:
    """What a snapshot of ``session`` takes, once all parameters have state; headers and small files apart."""
    optimizer = session.optimizer
    files = weight_files(session.model, weights_of(session)).files
    total = sum(entry.size_bytes for entries in files.values() for entry in entries)
    for name, pieces in optimizer.index.pieces.items():
        for state in optimizer.layout.shards[pieces[0][0]].specs[name].tensors:
            elements = torch.Size(optimizer.records.shape(name, state)).numel()
            total += elements * state.dtype.itemsize
    return total
