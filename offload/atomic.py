"""A folder that appears whole or not at all.

Files are written into ``<folder>.tmp-<random>`` beside the folder, each flushed to the disk; then a manifest
of their sizes and checksums, then the folder takes its name in one rename. Whoever is killed on the way
leaves the old folder as it was, and a temporary one whose lock has died with it: the next writer removes
that.

Bytes pass through the page cache, where a memory cgroup counts them; they are dropped from it as soon as they
are on the disk, so that the cache holds a window of a file at most.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from memtrain.offload.errors import OffloadError

MANIFEST = "manifest.json"
CHUNK_BYTES = 8 << 20
"""One write or read; the size that saturates the disks measured for the tiers."""
_WINDOW_BYTES = 32 << 20
"""Of a file in the page cache. Waiting for the disk more often costs bandwidth, less often memory."""
_TEMPORARY = re.compile(r".+\.tmp-[0-9a-f]{16}")
_NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class CheckpointError(OffloadError):
    """A checkpoint cannot be written or read; what was complete before is untouched.

    Attributes:
        errno: the operating system's number, or None where it was not asked.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class CorruptCheckpointError(CheckpointError):
    """A file of a checkpoint is not what was written."""


class FileWriter:
    """A file of a folder in the making. Errors of the operating system are left to the folder."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | _NEW_FILE, 0o644)
        self._digest = xxhash.xxh3_64()
        self.size_bytes = self._settled_bytes = 0

    def write(self, data: Any) -> None:
        """Append ``data``, anything with a buffer of bytes."""
        view = memoryview(data)
        while len(view):
            if not (count := os.write(self._descriptor, view[:CHUNK_BYTES])):
                raise OSError(errno.EIO, "nothing could be written")
            self._digest.update(view[:count])
            self.size_bytes += count
            view = view[count:]
            if self.size_bytes - self._settled_bytes >= _WINDOW_BYTES:
                self._settle()

    def close(self) -> dict[str, Any]:
        """Make the file durable; its entry of the manifest."""
        try:
            os.fsync(self._descriptor)
            self._settle()
        finally:
            self.abandon()
        return {"size_bytes": self.size_bytes, "xxh3_64": self._digest.hexdigest()}

    def abandon(self) -> None:
        """Close without a promise. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _settle(self) -> None:
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._settled_bytes = self.size_bytes


class FolderWriter:
    """Files of one folder in the making; see ``publish``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create(self, name: str) -> Iterator[FileWriter]:
        """Write the file ``name``."""
        writer = FileWriter(self.path / name)
        try:
            yield writer
            self._files[name] = writer.close()
        finally:
            writer.abandon()

    def open(self, name: str) -> int:
        """A new file, to read and write at any place; ``note`` it when it is durable."""
        return os.open(self.path / name, os.O_RDWR | _NEW_FILE, 0o644)

    def note(self, name: str, entry: dict[str, Any]) -> None:
        """Take a file that was opened with ``open`` into the manifest."""
        self._files[name] = entry

    def write_text(self, name: str, text: str) -> None:
        """The file ``name``, from memory."""
        with self.create(name) as file:
            file.write(text.encode())

    def copy(self, source: Path) -> None:
        """A file from elsewhere, under its own name."""
        with source.open("rb") as incoming, self.create(source.name) as file:
            while chunk := incoming.read(CHUNK_BYTES):
                file.write(chunk)

    def finish(self) -> None:
        """Write the manifest, and make the folder's entries durable."""
        self.write_text(MANIFEST, manifest_text(self._files))
        _sync_directory(self.path)


def manifest_text(files: dict[str, dict[str, Any]]) -> str:
    """Of a folder with ``files``: their sizes and checksums, and a checksum of these."""
    text = json.dumps(files, sort_keys=True)
    manifest = {"files": files, "xxh3_64": xxhash.xxh3_64_hexdigest(text.encode())}
    return json.dumps(manifest, indent=1, sort_keys=True)


@contextmanager
def publish(folder: Path) -> Iterator[FolderWriter]:
    """Write a folder; it is there, whole and durable, when the block ends, and takes the place of an older
    one.

    Raises:
        CheckpointError: the operating system refused. The temporary files are removed, an older folder is
        untouched.
    """
    temporary, lock = Path(), -1
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        temporary, lock = _make_temporary(folder)
        writer = FolderWriter(temporary)
        yield writer
        writer.finish()
        _date_after_others(temporary)
        if folder.exists():
            _exchange(temporary, folder)
        else:
            os.rename(temporary, folder)
        _sync_directory(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoint {folder}: {error.strerror or error} ({_remedy(folder, error)}). "
            f"What was complete before is untouched",
            error.errno,
        ) from error
    finally:
        if lock >= 0:
            shutil.rmtree(temporary, ignore_errors=True)  # after the rename: nothing, or the folder replaced
            os.close(lock)


def remove_leftovers(parent: Path) -> list[Path]:
    """Remove temporary folders in ``parent`` whose writers are dead; those removed."""
    removed = []
    for path in sorted(parent.glob("*.tmp-*")):
        if not _TEMPORARY.fullmatch(path.name) or (lock := _lock(path)) is None:
            continue
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
        removed.append(path)
    return removed


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file of a folder that was published.

    Raises:
        CheckpointError: there is no manifest: not a checkpoint.
        CorruptCheckpointError: the manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder} is no complete checkpoint: {path.name} cannot be read ({error.strerror}). "
            f"Choose another folder",
            error.errno,
        ) from error
    try:
        manifest = json.loads(text)
        files: dict[str, dict[str, Any]] = manifest["files"]
        intact = xxhash.xxh3_64_hexdigest(json.dumps(files, sort_keys=True).encode()) == manifest["xxh3_64"]
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CorruptCheckpointError(f"{path} is damaged: take another checkpoint, or a copy of this one")
    return files


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` was published and every file still has its size. Contents are not read."""
    if _TEMPORARY.fullmatch(folder.name):
        return False
    try:
        files = read_manifest(folder)
        return all((folder / name).stat().st_size == entry["size_bytes"] for name, entry in files.items())
    except (CheckpointError, OSError):
        return False


def verify(folder: Path) -> dict[str, dict[str, Any]]:
    """Read every file of a folder and compare it with the manifest, which is returned.

    Raises:
        CorruptCheckpointError: names every file that is missing, cut or changed.
    """
    files = read_manifest(folder)
    faults = [fault for name, entry in files.items() if (fault := _fault(folder / name, entry))]
    if faults:
        raise CorruptCheckpointError(
            f"checkpoint {folder} is damaged: {'; '.join(faults)}. "
            f"Take another checkpoint, or a copy of this one"
        )
    return files


def _fault(path: Path, entry: dict[str, Any]) -> str | None:
    digest, size_bytes = xxhash.xxh3_64(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size_bytes += count
                os.posix_fadvise(file.fileno(), 0, size_bytes, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    if size_bytes != entry["size_bytes"]:
        return f"{path.name} has {size_bytes} bytes, {entry['size_bytes']} were written"
    return (
        None
        if digest.hexdigest() == entry["xxh3_64"]
        else f"{path.name} has another checksum than was written"
    )


def _make_temporary(folder: Path) -> tuple[Path, int]:
    """A new locked folder. Between making and locking another writer may take it for a dead one's: then
    anew."""
    while True:
        path = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(8)}")
        path.mkdir()
        lock = _lock(path)
        if lock is not None and path.exists():
            return path, lock
        if lock is not None:
            os.close(lock)


def _lock(path: Path) -> int | None:
    """Lock a folder for as long as this process lives, or None if somebody else holds it, or it has gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _exchange(one: Path, other: Path) -> None:
    """Let two folders swap names in one step, as rename cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _date_after_others(folder: Path) -> None:
    """What is written last is dated last, although the clock may have been set back since."""
    latest = 0
    for other in folder.parent.glob(f"*/{MANIFEST}"):
        with suppress(FileNotFoundError):  # another writer's, which is being replaced
            latest = max(latest, other.stat().st_mtime_ns if other.parent != folder else 0)
    descriptor = os.open(folder / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_mtime_ns <= latest:
            os.utime(descriptor, ns=(latest + 1, latest + 1))
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remedy(folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        space = os.statvfs(folder.parent)
        return (
            f"{space.f_bavail * space.f_frsize} bytes are free there: free space or choose another directory"
        )
    if error.errno == errno.EFBIG:
        return "raise the file size limit, ulimit -f"
    if error.errno in (errno.EINVAL, errno.ENOSYS) and folder.exists():
        return "this file system cannot replace a folder in one step: save under a new name"
    return "choose a directory that can be written to"
