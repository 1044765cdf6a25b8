"""What the kernel says this process occupies, now and at its peak, and giving freed memory back.

All figures are of ``/proc/self/status`` in bytes. Peak is ``VmHWM``, which the kernel updates when pages are
mapped: no sampling thread can miss it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SMAPS = Path("/proc/self/smaps")
_MADV_DONTNEED = 4  # mman.h
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # malloc.h
_HEAP_BLOCK_BYTES = 256 << 10  # 64 KiB to 1 MiB were tried: same peak within 1 %, fewer mappings than 64 KiB


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """One reading of the process's memory, bytes."""

    total_bytes: int
    """VmRSS: anonymous, file-backed and shared."""
    peak_bytes: int
    """VmHWM: the largest VmRSS since the start or the last reset."""
    anonymous_bytes: int
    """RssAnon: heap, stacks, anonymous maps."""
    file_bytes: int
    """RssFile: pages of mapped files, such as libraries and memory-mapped weights; the kernel may drop
    them, yet they count in VmRSS while they are there."""


def read(status: Path = _STATUS) -> Resident:
    """Read the kernel's figures now.

    Raises:
        OSError: no ``/proc`` (not Linux).
        ValueError: a field is missing.
    """
    fields: dict[str, int] = {}
    for line in status.read_text().splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            fields[name] = int(rest[:-3]) * 1024
    try:
        return Resident(
            total_bytes=fields["VmRSS"],
            peak_bytes=fields["VmHWM"],
            anonymous_bytes=fields["RssAnon"],
            file_bytes=fields["RssFile"],
        )
    except KeyError as error:
        raise ValueError(f"{status} has no field {error.args[0]}: the kernel is older than 4.5") from error


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return read().total_bytes


def peak_bytes() -> int:
    """Largest resident memory of this process since it started, or since ``reset_peak`` returned True."""
    return read().peak_bytes


def reset_peak(clear_refs: Path = _CLEAR_REFS) -> bool:
    """Let the peak start again from what is resident now.

    Returns:
        False where the kernel or the sandbox does not permit it; the peak then goes on counting from
        the start of the process, and a caller must not present it as the peak of a part.
    """
    try:
        clear_refs.write_text("5")
    except OSError:
        return False
    return True


def trim() -> bool:
    """Ask the allocator to give freed memory back to the kernel.

    Returns:
        True if it was asked, or gave any back where it says so; False if not, or if it cannot (musl, macOS).
    """
    collect = _c_function("mi_collect")
    if collect is not None:
        collect(True)
        return True
    malloc_trim = _c_function("malloc_trim")
    return malloc_trim is not None and bool(malloc_trim(ctypes.c_size_t(0)))


def drop_library_pages(smaps: Path = _SMAPS) -> int:
    """Unmap the program code of libraries: what is used again comes back from the page cache by itself.

    Loading maps far more of a library than a training step runs: of torch and its companions 125 MiB, of
    which a step brings back 60, in microseconds. Only mappings without a page of their own are touched, so
    that code that was patched in memory stays as it is.

    Returns:
        Bytes that were resident in those mappings; 0 where the kernel does not tell or refuses.
    """
    madvise = _c_function("madvise")
    if madvise is None:
        return 0
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    dropped = 0
    for start, stop, resident_bytes in clean_code(smaps):
        if madvise(start, stop - start, _MADV_DONTNEED) == 0:
            dropped += resident_bytes
    return dropped


def clean_code(smaps: Path = _SMAPS) -> list[tuple[int, int, int]]:
    """(start, stop, resident bytes) of each mapping of file code that has no page of its own."""
    try:
        lines = smaps.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found: list[tuple[int, int, int]] = []
    start = stop = resident_bytes = 0
    code = False
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):  # "7f00-7f20 r-xp offset device inode path"
            code = words[1] == "r-xp" and len(words) > 5 and words[5].startswith("/")
            start, stop = (int(part, 16) for part in words[0].split("-"))
        elif code and words[0] == "Rss:":
            resident_bytes = int(words[1]) * 1024
        elif code and words[0] == "Anonymous:" and words[1] == "0" and resident_bytes:
            found.append((start, stop, resident_bytes))
    return found


def limit_heap() -> bool:
    """Make glibc serve every larger block by ``mmap`` and return it when it is freed, from now on.

    Its heap otherwise keeps what was freed, in pieces that the next request of the same size does not fit: a
    process grew to 1.6 GiB of which 1.17 were alive. The price is a page fault for every 4 KiB of every
    temporary. Other allocators are left alone.

    Returns:
        True when glibc was limited.
    """
    mallopt = _c_function("mallopt")
    if (
        mallopt is None
        or _c_function("mi_collect") is not None
        or _c_function("gnu_get_libc_version") is None
    ):
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _HEAP_BLOCK_BYTES) and mallopt(_M_TRIM_THRESHOLD, 2 * _HEAP_BLOCK_BYTES)
    )


def _c_function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):
        return None
