"""The swap directory of one run: private, locked, and gone when the run is.

A run makes a directory of its own inside the swap directory, named after the process (pid, start time,
boot), with a lock that the kernel drops when the process dies. Two runs never see each other's files; what
a killed run left is removed by the next one, but only where its death is certain.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any

from memtrain.offload.errors import SwapDirectoryError, TierFullError
from memtrain.offload.targets import BLOCK_BYTES
from memtrain.planner.units import format_gib

PREFIX = "memtrain-swap-"
ARENA = "arena"
LOCK = "lock"
_MEMORY_FILESYSTEMS = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
_NAME = re.compile(re.escape(PREFIX) + r"[A-Za-z0-9._-]+")
_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FRESH = re.compile(r"(?P<pid>\d+)-(?P<start>\d+)-(?P<boot>[0-9a-f]{8})-[0-9a-f]{8}")
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class RunDirectory:
    """A locked 0700 directory below ``directory``; made, or with ``reopen`` found again.

    Args:
        directory: the swap directory, which must exist.
        run_id: names the directory; a fresh random name without it.
        resumable: the directory outlives the process, for a later one to reopen by ``run_id``.

    Raises:
        SwapDirectoryError: missing, not a directory, not writable, in memory, or the run's directory is in
        use,
            is a symbolic link, or belongs to somebody else.
    """

    def __init__(
        self, directory: str | os.PathLike[str], run_id: str | None = None, *, resumable: bool = False
    ) -> None:
        self.parent = check_swap_directory(directory)
        self.resumable = resumable
        self.run_id = run_id if run_id is not None else _fresh_id()
        if not _RUN_ID.fullmatch(self.run_id):
            raise SwapDirectoryError(
                f"run id {run_id!r} must be 1 to 64 letters, digits, dots, dashes or underscores"
            )
        self.path = self.parent / f"{PREFIX}{self.run_id}"
        self._pid = os.getpid()
        with contextlib.ExitStack() as undo:
            self.reopened = not self._make()
            if not self.reopened:
                undo.callback(_remove_tree, self.path)
            self.descriptor = _open_private(self.path)
            undo.callback(os.close, self.descriptor)
            self._lock = self._take_lock()
            undo.pop_all()

    def create(self, name: str) -> int:
        """A new file, 0600, opened to read and write; a planted file or link of that name is refused."""
        try:
            return os.open(name, _NEW_FILE, 0o600, dir_fd=self.descriptor)
        except OSError as error:
            raise SwapDirectoryError(f"cannot create {self.path / name}: {error.strerror}") from error

    def unlink(self, name: str) -> None:
        """Remove the name; whoever has the file open keeps it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def close(self) -> None:
        """Unlock, and remove the directory unless it is resumable. Does nothing in a forked child."""
        if os.getpid() != self._pid or self.descriptor < 0:
            return
        if not self.resumable:
            _remove_tree(self.path)
        os.close(self.descriptor)
        os.close(self._lock)
        self.descriptor = self._lock = -1

    def _make(self) -> bool:
        try:
            os.mkdir(self.path, 0o700)
            return True
        except FileExistsError:
            if self.resumable:
                return False
            raise SwapDirectoryError(f"{self.path} exists already; choose another run id or none") from None
        except OSError as error:
            raise SwapDirectoryError(f"cannot create {self.path}: {error.strerror}") from error

    def _take_lock(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(LOCK, flags, 0o600, dir_fd=self.descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise SwapDirectoryError(f"{self.path} is in use by another process") from error
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({**_this_process(), "resumable": self.resumable}).encode(), 0)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor


def check_swap_directory(directory: str | os.PathLike[str]) -> Path:
    """The directory's real path, if it can hold a run's files at all. Raises SwapDirectoryError."""
    path = Path(os.path.realpath(directory))
    if not path.exists():
        raise SwapDirectoryError(f"swap directory {directory} does not exist: create it, or name another one")
    if not path.is_dir():
        raise SwapDirectoryError(f"swap directory {directory} is not a directory")
    kind = filesystem_type(path)
    if kind in _MEMORY_FILESYSTEMS:
        raise SwapDirectoryError(
            f"swap directory {directory} is on {kind}, which is memory: swapping there frees nothing. "
            "Name a directory on a local disk"
        )
    if os.statvfs(path).f_flag & os.ST_RDONLY or not os.access(path, os.W_OK | os.X_OK):
        raise SwapDirectoryError(
            f"swap directory {directory} is not writable: change its owner or mode, or name another"
        )
    return path


def filesystem_type(path: str | os.PathLike[str]) -> str:
    """``ext4``, ``xfs``, ``tmpfs`` and so on; ``unknown`` where the kernel does not say."""
    real = Path(os.path.realpath(path))
    best, kind = -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, source = line.partition(" - ")
        mount = Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m.group(1), 8)), fields.split()[4]))
        # The longest mount point wins, and of equals the later one, which lies on top.
        if real.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), source.split()[0]
    return kind


def open_arena(run: RunDirectory, capacity_bytes: int, *, direct: bool) -> int:
    """Create the arena file, reserve all of its space, and open it for direct I/O where ``direct``.

    Raises:
        TierFullError: the disk has not so much room.
        SwapDirectoryError: no space can be reserved, or no direct I/O.
    """
    space = os.fstatvfs(run.descriptor)
    free = space.f_bavail * space.f_frsize
    if capacity_bytes > free:
        raise TierFullError(_full(run, capacity_bytes, free))
    descriptor = run.create(ARENA)
    try:
        try:
            os.posix_fallocate(descriptor, 0, max(capacity_bytes, BLOCK_BYTES))
        except OSError as error:
            raise SwapDirectoryError(
                f"{_full(run, capacity_bytes, free)} (reserving failed: {error.strerror})"
            ) from error
        if direct:
            enable_direct(descriptor, str(run.parent))
        return descriptor
    except BaseException:
        os.close(descriptor)
        run.unlink(ARENA)
        raise


def enable_direct(descriptor: int, where: str, *, new: bool = True) -> None:
    """Switch an open file to direct I/O, and prove it by a write and a read of its first block.

    What the file system promises is not enough: some accept the flag and refuse the first write. The block
    gets random bytes in a new file, and what it holds already in another.

    Raises:
        SwapDirectoryError: the file system refuses, or wants blocks of more than 4096 bytes.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        sent, found = mmap.mmap(-1, BLOCK_BYTES), mmap.mmap(-1, BLOCK_BYTES)
        if new:
            sent.write(secrets.token_bytes(BLOCK_BYTES))
        else:
            os.preadv(descriptor, [sent], 0)
        counts = os.pwritev(descriptor, [sent], 0), os.preadv(descriptor, [found], 0)
        problem = (
            ""
            if counts == (BLOCK_BYTES, BLOCK_BYTES) and sent[:] == found[:]
            else "it reads other bytes than written"
        )
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        fcntl.fcntl(
            descriptor, fcntl.F_SETFL, flags
        )  # whoever falls back to the page cache goes on with this file
        raise SwapDirectoryError(
            f"swap directory {where} cannot do direct I/O in blocks of {BLOCK_BYTES} bytes ({problem}): "
            "name a directory on a local ext4, xfs or btrfs disk, or allow buffered I/O "
            "(direct='allow_buffered'), which is slower"
        )


def reap_dead_runs(directory: str | os.PathLike[str]) -> list[Path]:
    """Remove what runs that are provably dead left in the swap directory; resumable runs stay.

    Dead is a run of this user and this machine whose lock nobody holds and whose process is gone: another
    process has its pid by now, or the machine has booted since. Everything else is left alone.

    Returns:
        The directories removed.
    """
    reaped: list[Path] = []
    for path in sorted(Path(directory).glob(f"{PREFIX}*")):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            descriptor = _open_private(path)
        except SwapDirectoryError:
            continue
        try:
            if _is_dead(descriptor, path.name):
                _remove_tree(path)
                reaped.append(path)
        finally:
            os.close(descriptor)
    return reaped


def _is_dead(directory: int, name: str) -> bool:
    try:
        lock = os.open(LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return _died_at_birth(name)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        text = os.pread(lock, 4096, 0)
        if not text:
            return _died_at_birth(name)
        owner: dict[str, Any] = json.loads(text)
    except (OSError, ValueError):
        return False
    finally:
        os.close(lock)
    here = _this_process()
    if owner.get("resumable") is not False or owner.get("machine") != here["machine"]:
        return False
    if owner.get("boot") != here["boot"]:
        return True
    return _start_time(int(owner["pid"])) != owner.get("start")


def _died_at_birth(name: str) -> bool:
    """Whether a run without a filled lock is of a process of this boot, by its name, that is gone."""
    match = _FRESH.fullmatch(name.removeprefix(PREFIX))
    if match is None or not str(_this_process()["boot"]).startswith(match["boot"]):
        return False
    return _start_time(int(match["pid"])) != int(match["start"])


def _open_private(path: Path) -> int:
    """Open a run's directory, provided that it is one, is ours, and is closed to others."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SwapDirectoryError(f"{path} is not a directory of ours: {error.strerror}. Remove it") from error
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(descriptor)
        raise SwapDirectoryError(
            f"{path} belongs to another user or is open to others. Choose another run id"
        )
    return descriptor


def _remove_tree(path: Path) -> None:
    """What is known to be there goes without a descriptor, which may be what the process has no more of."""
    for name in (LOCK, ARENA):
        with contextlib.suppress(OSError):
            os.unlink(path / name)
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return
    except OSError:
        shutil.rmtree(path)


def machine_identity() -> str:
    """What tells this machine from others that may share its disks."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return os.uname().nodename


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"pid": pid, "start": _start_time(pid), "boot": boot, "machine": machine_identity()}


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of the process, which tells a recycled pid; None where there is
    none.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _fresh_id() -> str:
    process = _this_process()
    return f"{process['pid']}-{process['start']}-{process['boot'][:8]}-{secrets.token_hex(4)}"


def _full(run: RunDirectory, need: int, free: int) -> str:
    return (
        f"swap directory {run.parent} has {format_gib(free)} ({free} bytes) free, the plan reserves "
        f"{format_gib(need)} ({need} bytes): free {max(0, need - free)} bytes, lower budget.nvme, or "
        "name another directory"
    )
