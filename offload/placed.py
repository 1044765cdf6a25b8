"""Files whose bytes arrive in any order, and are read back before anybody may rely on them.

A snapshot that is written while training goes on takes what is about to be overwritten first, so it cannot
write a file from its beginning to its end. The room is reserved at once: a disk that is too full says so
before anything has been written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from memtrain.offload.atomic import CorruptCheckpointError

WINDOW_BYTES = 8 << 20
"""Written and not yet on the disk, over all files of a snapshot: what of it a memory cgroup counts."""


class SnapshotWriter(Protocol):
    """A folder in the making: ``atomic.FolderWriter`` on a disk, ``held.MemoryFolder`` in memory."""

    def open(self, name: str) -> int: ...
    def note(self, name: str, entry: dict[str, Any]) -> None: ...
    def write_text(self, name: str, text: str) -> None: ...
    def copy(self, source: Path) -> None: ...


class PlacedFile:
    """A file of known size. Errors of the operating system are left to the folder it belongs to.

    Args:
        descriptor: of an empty file, open to read and write; closed by ``close`` and ``abandon``.
        size_bytes: reserved now.
    """

    def __init__(self, name: str, descriptor: int, size_bytes: int) -> None:
        self.name, self.size_bytes = name, size_bytes
        self._descriptor = descriptor
        self._parts: dict[int, tuple[int, int]] = {}
        """By offset: length and checksum, as they were in memory."""
        self.unsettled_bytes = 0
        try:
            if size_bytes:
                os.posix_fallocate(descriptor, 0, size_bytes)
        except BaseException:
            self.abandon()
            raise

    def write(self, data: Any, offset: int) -> None:
        """Put ``data``, anything with a buffer of bytes, to its place. Each place is written once."""
        view = memoryview(data)
        if not len(view):
            return
        self._parts[offset] = len(view), xxhash.xxh3_64_intdigest(view)
        while len(view):
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count
            self.unsettled_bytes += count

    def settle(self) -> None:
        """Wait for the disk, and let go of the page cache."""
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self.unsettled_bytes = 0

    def close(self, buffer: memoryview) -> dict[str, Any]:
        """Make the file durable, read it back, and compare; its entry of the manifest.

        Args:
            buffer: what it is read into, part by part.

        Raises:
            CorruptCheckpointError: the file does not hold what was written.
        """
        try:
            os.fsync(self._descriptor)
            self.settle()
            return {"size_bytes": self.size_bytes, "xxh3_64": self._read_back(buffer)}
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without a promise. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _read_back(self, buffer: memoryview) -> str:
        whole, position = xxhash.xxh3_64(), 0
        for offset, (nbytes, expected) in sorted(self._parts.items()):
            self._refuse_gap(position, offset)
            part, end = xxhash.xxh3_64(), offset + nbytes
            while position < end:
                count = os.preadv(self._descriptor, [buffer[: end - position]], position)
                if not count:
                    raise CorruptCheckpointError(f"{self.name} ends at byte {position} of {self.size_bytes}")
                part.update(buffer[:count])
                whole.update(buffer[:count])
                position += count
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
            if part.intdigest() != expected:
                raise CorruptCheckpointError(
                    f"{self.name} holds other bytes at {offset}..{end} than were written: the disk or memory "
                    f"failed (dmesg); what was complete before is untouched"
                )
        self._refuse_gap(position, self.size_bytes)
        return whole.hexdigest()

    def _refuse_gap(self, position: int, offset: int) -> None:
        """What is sealed was written, every byte of it once."""
        if position != offset:
            raise CorruptCheckpointError(
                f"{self.name} was not written between {position} and {offset}, a fault of memtrain's: "
                f"report it, please; what was complete before is untouched"
            )


def settle_window(files: Iterable[PlacedFile]) -> None:
    """Wait for the disk when more than ``WINDOW_BYTES`` of ``files`` are on their way."""
    waiting = [file for file in files if file.unsettled_bytes]
    if sum(file.unsettled_bytes for file in waiting) >= WINDOW_BYTES:
        for file in waiting:
            file.settle()


def byte_views(tensor: Tensor, chunk_bytes: int) -> Iterable[tuple[int, Any]]:
    """``(offset, bytes)`` of a tensor's elements in order, from wherever it is; what is contiguous in main
    memory is not copied."""
    flat = tensor.detach().contiguous().view(-1)
    step = max(1, chunk_bytes // flat.dtype.itemsize)
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].cpu()
        yield start * flat.dtype.itemsize, part.view(torch.uint8).numpy()
