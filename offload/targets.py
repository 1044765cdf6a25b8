"""What the pieces of a transfer are moved to and from: a file, or memory.

A target moves bytes at an address and says how many it moved, as ``pread`` and ``pwrite`` do; whoever calls
checks the count (``io.transfer``, in one place).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from typing import Protocol

BLOCK_BYTES = 4096
"""Offsets, addresses and lengths of direct I/O are multiples of this; probed before use."""

_view_at = ctypes.pythonapi.PyMemoryView_FromMemory
_view_at.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_view_at.restype = ctypes.py_object
_WRITABLE = 0x200  # PyBUF_WRITE


def view_at(address: int, nbytes: int) -> memoryview:
    """A writable view of raw memory. The caller keeps the memory alive."""
    view: memoryview = _view_at(address, nbytes, _WRITABLE)
    return view


class Target(Protocol):
    """A place of a tier's bytes."""

    alignment: int
    """Offsets are multiples of this, and a short transfer resumes at one."""

    def read(self, address: int, nbytes: int, offset: int) -> int:
        """Move bytes from ``offset`` to memory; how many of ``nbytes`` arrived. Raises OSError."""

    def write(self, address: int, nbytes: int, offset: int) -> int:
        """Move bytes from memory to ``offset``; how many of ``nbytes`` left. Raises OSError."""


class FileTarget:
    """An open file, with direct I/O or, where the caller asked for it, through the page cache.

    A length that is no multiple of a block is completed by a page of the target's own, in the same system
    call:
    memory after the caller's bytes is neither read nor written.
    """

    alignment = BLOCK_BYTES

    def __init__(self, descriptor: int, *, direct: bool) -> None:
        self.descriptor = descriptor
        self.direct = direct
        self._local = threading.local()
        self._syncing = threading.Lock()
        self._failed_syncs = 0

    def read(self, address: int, nbytes: int, offset: int) -> int:
        whole = nbytes - nbytes % BLOCK_BYTES
        tail = self._tail_page() if whole < nbytes else None
        got = os.preadv(self.descriptor, self._vectors(address, whole, tail), offset)
        if tail is not None and got > whole:
            count = min(got, nbytes) - whole
            view_at(address + whole, count)[:] = memoryview(tail)[:count]
        self._drop_cache(offset, nbytes)
        return min(got, nbytes)

    def write(self, address: int, nbytes: int, offset: int) -> int:
        whole = nbytes - nbytes % BLOCK_BYTES
        tail = self._tail_page() if whole < nbytes else None
        if tail is not None:
            count = nbytes - whole
            tail[:] = bytes(view_at(address + whole, count)) + bytes(BLOCK_BYTES - count)
        failed_before = self._failed_syncs
        put = os.pwritev(self.descriptor, self._vectors(address, whole, tail), offset)
        if not self.direct:
            self._sync(failed_before)  # or dirty pages would pile up beyond every budget
        self._drop_cache(offset, nbytes)
        return min(put, nbytes)

    def _sync(self, failed_before: int) -> None:
        """The kernel says once that pages could not be written, to whoever asks first, whoever wrote them:
        it is said to everybody here whose pages may have been among them."""
        with self._syncing:
            if self._failed_syncs != failed_before:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            try:
                os.fdatasync(self.descriptor)
            except OSError:
                self._failed_syncs += 1
                raise

    def _vectors(self, address: int, whole: int, tail: mmap.mmap | None) -> list[memoryview | mmap.mmap]:
        vectors: list[memoryview | mmap.mmap] = [view_at(address, whole)] if whole else []
        return vectors if tail is None else [*vectors, tail]

    def _tail_page(self) -> mmap.mmap:
        page: mmap.mmap | None = getattr(self._local, "page", None)
        if page is None:
            page = self._local.page = mmap.mmap(-1, BLOCK_BYTES)
        return page

    def _drop_cache(self, offset: int, nbytes: int) -> None:
        if not self.direct:
            os.posix_fadvise(self.descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


class MemoryTarget:
    """Memory that begins at ``address``; the caller keeps it alive."""

    alignment = 1

    def __init__(self, address: int) -> None:
        self.address = address

    def read(self, address: int, nbytes: int, offset: int) -> int:
        # Lets other threads run, as torch's copy_ would, but without an OpenMP team per calling thread.
        ctypes.memmove(address, self.address + offset, nbytes)
        return nbytes

    def write(self, address: int, nbytes: int, offset: int) -> int:
        ctypes.memmove(self.address + offset, address, nbytes)
        return nbytes
