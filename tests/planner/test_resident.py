"""The kernel's figures: parsed by hand-written input, and seen to move with real memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from memtrain.planner import resident

STATUS = """Name:\tpython
VmPeak:\t  900 kB
VmHWM:\t  512 kB
VmRSS:\t  384 kB
RssAnon:\t  256 kB
RssFile:\t  128 kB
Threads:\t1
"""
BIG = 64 << 20


def test_fields_are_bytes(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(STATUS)
    assert resident.read(status) == resident.Resident(
        total_bytes=393_216, peak_bytes=524_288, anonymous_bytes=262_144, file_bytes=131_072
    )


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(STATUS.replace("RssAnon", "Other"))
    with pytest.raises(ValueError, match="RssAnon"):
        resident.read(status)


def test_memory_that_is_touched_is_resident_and_leaves_its_mark_in_the_peak() -> None:
    before = resident.rss_bytes()
    block = bytearray(BIG)
    ctypes.memset((ctypes.c_char * BIG).from_buffer(block), 1, BIG)
    assert resident.rss_bytes() - before > 0.9 * BIG
    del block
    resident.trim()
    assert resident.rss_bytes() - before < 0.5 * BIG
    assert resident.peak_bytes() - before > 0.9 * BIG


def test_reset_starts_the_peak_again() -> None:
    block = bytearray(BIG)
    ctypes.memset((ctypes.c_char * BIG).from_buffer(block), 1, BIG)
    del block
    resident.trim()
    high = resident.peak_bytes()
    if not resident.reset_peak():
        pytest.skip("this kernel does not let a process reset its peak")
    assert resident.peak_bytes() < high - 0.5 * BIG


def test_a_reset_that_is_not_permitted_says_so(tmp_path: Path) -> None:
    assert resident.reset_peak(tmp_path) is False


SMAPS = """\
1000-5000 r-xp 00000000 08:01 11 /lib/libclean.so
Size:                 16 kB
Rss:                  12 kB
Anonymous:             0 kB
VmFlags: rd ex
5000-6000 rw-p 00004000 08:01 11 /lib/libclean.so
Rss:                   4 kB
Anonymous:             0 kB
7000-9000 r-xp 00000000 08:01 12 /lib/libpatched.so
Rss:                   8 kB
Anonymous:             4 kB
9000-a000 r-xp 00000000 08:01 13 /lib/libabsent.so
Rss:                   0 kB
Anonymous:             0 kB
b000-c000 r-xp 00000000 00:00 0 [vdso]
Rss:                   4 kB
Anonymous:             0 kB
d000-e000 r-xp 00000000 00:00 0
Rss:                   4 kB
Anonymous:             0 kB
"""


def test_only_clean_code_of_files_is_found(tmp_path: Path) -> None:
    (tmp_path / "smaps").write_text(SMAPS)
    assert resident.clean_code(tmp_path / "smaps") == [(0x1000, 0x5000, 12 * 1024)]
    assert resident.clean_code(tmp_path / "missing") == []


def test_library_pages_come_back_when_they_are_used() -> None:
    import math

    before = resident.read().file_bytes
    dropped = resident.drop_library_pages()
    assert dropped > 0
    assert resident.read().file_bytes < before
    assert math.cos(0.0) == 1.0
    assert resident.drop_library_pages() <= before
