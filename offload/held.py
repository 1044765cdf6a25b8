"""Snapshots in memory that outlive the trainer: this side of ``holder``.

    with HeldSnapshots(run / "holder") as held:
        with held.folder() as folder:            # of the newest one that the trainer before left, or None
            if folder is not None:
                load_checkpoint(folder, session)
        snapshots.begin(lambda: held.publish("step-000010"), "step-000010", progress=...)

A snapshot is the files of a checkpoint, bit for bit, in memory files that are sealed when they are complete:
nobody can change them any more. The one before is held until the new one is. ``folder`` shows them as a
folder of links, so that whatever reads a checkpoint reads them.

Their pages are on nobody's resident set, but count for the machine and the control group: twice a snapshot's
bytes while one takes the place of another. ``check_room`` says beforehand whether that is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from memtrain.offload import holder
from memtrain.offload.atomic import CHUNK_BYTES, MANIFEST, CheckpointError, manifest_text
from memtrain.planner.units import format_gib

LINGER_SECONDS = 3600.0
"""How long snapshots wait for a trainer to come back: long enough for somebody to look, and no longer than a
machine can spare the memory unasked."""
_START_SECONDS = 30.0
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class HolderError(CheckpointError):
    """The process that holds snapshots cannot be started or reached, or has no room for them."""


class MemoryFolder:
    """Files of a snapshot in the making; as ``atomic.FolderWriter``, in memory."""

    def __init__(self) -> None:
        self.descriptors: dict[str, int] = {}
        self._files: dict[str, dict[str, Any]] = {}

    def open(self, name: str) -> int:
        """A new file; the caller closes the descriptor."""
        self.descriptors[name] = os.memfd_create(f"memtrain {name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return os.dup(self.descriptors[name])

    def note(self, name: str, entry: dict[str, Any]) -> None:
        """Take a file that was opened with ``open`` into the manifest."""
        self._files[name] = entry

    def write_text(self, name: str, text: str) -> None:
        """The file ``name``."""
        self._write(name, text.encode())

    def copy(self, source: Path) -> None:
        """A file from elsewhere, under its own name."""
        self._write(source.name, source.read_bytes())

    def finish(self) -> None:
        """Write the manifest, and seal everything."""
        self._write(MANIFEST, manifest_text(self._files).encode())
        for descriptor in self.descriptors.values():
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)

    def close(self) -> None:
        """Let go of the files; who was sent them keeps them."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    def _write(self, name: str, data: bytes) -> None:
        descriptor = self.open(name)
        try:
            view = memoryview(data)
            while len(view):
                view = view[os.write(descriptor, view[:CHUNK_BYTES]) :]
        finally:
            os.close(descriptor)
        self.note(name, {"size_bytes": len(data), "xxh3_64": xxhash.xxh3_64_hexdigest(data)})


class HeldSnapshots:
    """The connection to the holder of ``directory``, which is started where there is none.

    Args:
        directory: the holder's own; made, 0700, and gone when the holder is.
        linger_seconds: how long a holder that is started now waits without a trainer.

    Raises:
        HolderError: it cannot be started; or another process trains there.
    """

    def __init__(self, directory: Path | str, *, linger_seconds: float = LINGER_SECONDS) -> None:
        self.directory = Path(directory)
        self._child = 0
        """The holder's pid while it is a child of this process that has not been waited for."""
        self._names: list[str] = []
        self._connection = self._connect_or_start(linger_seconds)

    @property
    def names(self) -> list[str]:
        """Snapshots that are held, the oldest first."""
        return list(self._names)

    @contextmanager
    def publish(self, name: str, *, retire: bool = True) -> Iterator[MemoryFolder]:
        """Fill a snapshot; it is held when the block ends, and with ``retire`` the others no more.

        Raises:
            HolderError: no memory, or the holder is gone. What was held is held still, or has gone with it.
        """
        writer = MemoryFolder()
        try:
            yield writer
            writer.finish()
            for file, descriptor in writer.descriptors.items():
                self._send({"do": "file", "snapshot": name, "file": file}, [descriptor])
            count = len(writer.descriptors)
            answer = self._ask({"do": "commit", "snapshot": name, "files": count})
            if not answer["held"]:
                raise HolderError(
                    f"process {self.holder_pid} took {answer['arrived']} of the {count} files of snapshot "
                    f"{name}, and holds what it held before: raise the limit on open files (ulimit -n)"
                )
            self._names = [*(one for one in self._names if one != name), name]
            if retire:
                for old in self._names[:-1]:
                    self.drop(old)
        except OSError as error:
            raise HolderError(
                f"snapshot {name} cannot be held in memory: {error.strerror or error}. Give the machine or "
                f"the control group more memory, or take snapshots to disk",
                error.errno,
            ) from error
        finally:
            writer.close()

    def drop(self, name: str) -> None:
        """Let go of a snapshot."""
        self._ask({"do": "drop", "snapshot": name})
        self._names.remove(name)

    @contextmanager
    def folder(self, name: str | None = None) -> Iterator[Path | None]:
        """A snapshot, by default the newest, as a folder; None where there is none of that name."""
        name = name or (self._names[-1] if self._names else None)
        if name is None or name not in self._names:
            yield None
            return
        descriptors: dict[str, int] = {}
        folder = self.directory / f"{holder.FOLDERS}{os.getpid()}" / name
        try:
            self._receive(name, descriptors)
            folder.mkdir(parents=True)
            for file, descriptor in descriptors.items():
                (folder / file).symlink_to(f"/proc/self/fd/{descriptor}")
            yield folder
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)
            for descriptor in descriptors.values():
                os.close(descriptor)

    def leave(self) -> None:
        """Part from the holder, which goes on holding for a trainer to come. May be called twice."""
        self._connection.close()

    def close(self) -> None:
        """End the holder: the run is over, or what it holds is on a disk. May be called twice."""
        if self._connection.fileno() < 0:
            return
        with contextlib.suppress(HolderError):
            self._ask({"do": "end"})
        self._connection.close()
        self._await_end()

    def __enter__(self) -> HeldSnapshots:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.leave()

    # -- starting and ending ---------------------------------------------------------------------

    def _connect_or_start(self, linger_seconds: float) -> socket.socket:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            if (connection := self._connect()) is not None:
                return connection
            if not self._running():
                self._start(linger_seconds)
            if time.monotonic() > deadline:
                self._kill()
                raise HolderError(
                    f"no process that holds snapshots came up in {self.directory} within "
                    f"{_START_SECONDS:.0f} s: is it writable, and no file of another user's?"
                )
            time.sleep(0.01)

    def _start(self, linger_seconds: float) -> None:
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self.directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise HolderError(f"{self.directory} cannot be made: {error.strerror}", error.errno) from error
        nothing = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
        command = [sys.executable, "-I", str(Path(holder.__file__)), str(self.directory), str(linger_seconds)]
        self._child = os.posix_spawn(
            sys.executable, command, os.environ, setsid=True, file_actions=nothing, setsigmask=()
        )

    def _connect(self) -> socket.socket | None:
        try:
            place = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        status = os.fstat(place)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            os.close(place)
            raise HolderError(
                f"{self.directory} is not this user's alone (owner {status.st_uid}, mode "
                f"{status.st_mode & 0o777:03o}): others could take the snapshots, or give false ones. Remove "
                f"it, or name another output directory"
            )
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(f"/proc/self/fd/{place}/{holder.SOCKET}")  # however long the directory's path
            connection.settimeout(_START_SECONDS)
            greeting = json.loads(connection.recv(holder.MESSAGE_BYTES) or b"null")
        except OSError:
            connection.close()
            return None
        finally:
            os.close(place)
        if greeting is None:
            connection.close()
            return None
        if "error" in greeting:
            connection.close()
            raise HolderError(
                f"snapshots of {self.directory.parent} cannot be had: {greeting['error']}. Let it end, or "
                f"name another output directory"
            )
        self.holder_pid: int = greeting["pid"]
        self._names = greeting["snapshots"]
        return connection

    def _running(self) -> bool:
        """Whether a holder that was started here has not ended."""
        if self._child and os.waitpid(self._child, os.WNOHANG)[0] == self._child:
            self._child = 0
        return bool(self._child)

    def _kill(self) -> None:
        if self._running():
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = 0

    def _await_end(self) -> None:
        """Return when the holder has gone, whoever started it."""
        deadline = time.monotonic() + _START_SECONDS
        while self._running() or _alive(self.holder_pid):
            if time.monotonic() > deadline:
                raise HolderError(f"process {self.holder_pid} holds snapshots still: end it by hand")
            time.sleep(0.005)

    # -- talking -----------------------------------------------------------------------------------

    def _send(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        data = json.dumps(message).encode()
        try:
            if descriptors:
                socket.send_fds(self._connection, [data], descriptors)
            else:
                self._connection.send(data)
        except OSError as error:
            raise self._gone() from error

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self._send(message)
        try:
            data = self._connection.recv(holder.MESSAGE_BYTES)
        except OSError as error:
            raise self._gone() from error
        if not data:
            raise self._gone()
        answer: dict[str, Any] = json.loads(data)
        return answer

    def _receive(self, name: str, found: dict[str, int]) -> None:
        self._send({"do": "get", "snapshot": name})
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._connection, holder.MESSAGE_BYTES, 1)
            except OSError as error:
                raise self._gone() from error
            if not data:
                raise self._gone()
            answer = json.loads(data)
            if "files" in answer:
                return
            if not descriptors:
                self._connection.close()  # the rest of the answer is of no use
                raise HolderError(
                    f"snapshot {name} has more files than this process may open: raise the limit (ulimit -n)"
                )
            os.set_inheritable(descriptors[0], False)
            found[answer["file"]] = descriptors[0]

    def _gone(self) -> HolderError:
        # An answer that comes too late must not be taken for that to the next question.
        self._connection.close()
        return HolderError(
            f"process {self.holder_pid}, which held this run's snapshots in memory, is gone, and they with "
            f"it: those on disk are left. Was it killed for want of memory (dmesg)?"
        )


def _alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return bool(pid) and re.search(r"\) Z ", Path(f"/proc/{pid}/stat").read_text()) is None
    except OSError:
        return False


def check_room(snapshot_bytes: int, free_bytes: int, source: str) -> None:
    """Whether snapshots can be held: two, while one takes the place of the other.

    Args:
        free_bytes: of memory, under the tightest limit; ``source`` says which.

    Raises:
        HolderError: they cannot.
    """
    need = 2 * snapshot_bytes
    if need > free_bytes:
        raise HolderError(
            f"holding snapshots in memory takes {format_gib(need)} ({need} bytes: the last one and the "
            f"next), {format_gib(free_bytes)} are free ({source}): take snapshots to disk, or give the job "
            f"{need - free_bytes} bytes more"
        )
