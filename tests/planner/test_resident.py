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
