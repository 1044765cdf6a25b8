"""What the kernel says this process occupies, now and at its peak, and giving freed memory back.

All figures are of ``/proc/self/status`` in bytes. Peak is ``VmHWM``, which the kernel updates when pages are
mapped: no sampling thread can miss it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SMAPS = Path("/proc/self/smaps")
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 4, 14, 15  # mman.h
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # malloc.h
_HEAP_BLOCK_BYTES = 256 << 10  # 64 KiB to 1 MiB were tried: same peak within 1 %, fewer mappings than 64 KiB


Span = tuple[int, int]
"""First address of a mapping, and the first behind it."""


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
    dropped = 0
    for start, stop, resident_bytes in clean_code(smaps):
        if _advise((start, stop), _MADV_DONTNEED):
            dropped += resident_bytes
    return dropped


def clean_code(smaps: Path = _SMAPS) -> list[tuple[int, int, int]]:
    """(start, stop, resident bytes) of each mapping of file code that has no page of its own."""
    return [
        (each.start, each.stop, each.sizes["Rss"])
        for each in _mappings(smaps)
        if each.permissions == "r-xp" and each.path.startswith("/") and each.sizes.get("Rss")
        if each.sizes.get("Anonymous") == 0
    ]


def avoid_huge_pages(smaps: Path = _SMAPS) -> list[Span]:
    """Have what is touched from now on of anonymous memory take pages of 4 KiB, not of 2 MiB.

    An allocator may ask for huge pages (mimalloc does), and the kernel gives as many as it has at hand. Then
    each block of some MiB takes up to 2 MiB more than it is large: 65 MiB were seen where 42 were asked for,
    and 45 of a kernel that had none left. What is resident stays as it is.

    Returns:
        Where this was changed, for ``allow_huge_pages``; none where the kernel does not tell or refuses.
    """
    spans = [(each.start, each.stop) for each in _mappings(smaps) if each.asks_for_huge_pages]
    return [span for span in spans if _advise(span, _MADV_NOHUGEPAGE)]


def allow_huge_pages(spans: Iterable[Span]) -> None:
    """Take ``avoid_huge_pages`` back, where the mappings are still there."""
    for span in spans:
        _advise(span, _MADV_HUGEPAGE)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mapping:
    """An entry of ``/proc/self/smaps``."""

    start: int
    stop: int
    permissions: str
    path: str
    """Empty where it is of no file and has no name."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes, by the kernel's name."""
    flags: set[str] = field(default_factory=set)

    @property
    def asks_for_huge_pages(self) -> bool:
        """Whether it is anonymous memory, for which somebody has advised them."""
        anonymous = not self.path or self.path.startswith("[anon")
        return anonymous and self.permissions == "rw-p" and "hg" in self.flags


def _mappings(smaps: Path) -> list[_Mapping]:
    """None where the kernel does not tell."""
    try:
        lines = smaps.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found: list[_Mapping] = []
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):  # "7f00-7f20 r-xp offset device inode path"
            start, stop = (int(part, 16) for part in words[0].split("-"))
            path = words[5] if len(words) > 5 else ""
            found.append(_Mapping(start=start, stop=stop, permissions=words[1], path=path))
        elif words[0] == "VmFlags:":
            found[-1].flags.update(words[1:])
        elif words[-1] == "kB":
            found[-1].sizes[words[0][:-1]] = int(words[1]) * 1024
    return found


def _advise(span: Span, advice: int) -> bool:
    madvise = _c_function("madvise")
    if madvise is None:
        return False
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start, stop = span
    return bool(madvise(start, stop - start, advice) == 0)


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
