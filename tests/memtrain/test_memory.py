from __future__ import annotations

import time
from pathlib import Path

import pytest

from memtrain import memory
from memtrain.memory import MemorySampler, PeakMeter, cgroup_limit, machine_memory
from memtrain.planner import resident

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_version_2_takes_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    proc, sysfs = tmp_path / "proc", tmp_path / "cg"
    write(proc, {"self/cgroup": "0::/slice/job"})
    write(
        sysfs,
        {
            "slice/job/memory.max": "max",
            "slice/job/memory.current": "5",
            "slice/memory.max": str(2 * GIB),
            "slice/memory.current": str(GIB // 2),
            "memory.max": str(8 * GIB),
            "memory.current": str(GIB),
        },
    )
    limit = cgroup_limit(proc, sysfs)
    assert limit is not None
    assert (limit.limit_bytes, limit.used_bytes) == (2_147_483_648, 536_870_912)
    assert limit.free_bytes == 1_610_612_736
    assert limit.source == str(sysfs / "slice/memory.max")


def test_version_1_is_under_its_controller(tmp_path: Path) -> None:
    proc, sysfs = tmp_path / "proc", tmp_path / "cg"
    write(proc, {"self/cgroup": "9:name=systemd:/\n5:cpu,memory:/a/b\n0::/"})
    write(
        sysfs / "memory",
        {
            "a/b/memory.limit_in_bytes": str(3 * GIB),
            "a/b/memory.usage_in_bytes": "7",
            "memory.limit_in_bytes": "9223372036854771712",
            "memory.usage_in_bytes": "8",
        },
    )
    limit = cgroup_limit(proc, sysfs)
    assert limit is not None
    assert (limit.limit_bytes, limit.used_bytes) == (3 * GIB, 7)


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    proc, sysfs = tmp_path / "proc", tmp_path / "cg"
    write(proc, {"self/cgroup": "4:memory:/docker/0123"})
    write(sysfs / "memory", {"memory.limit_in_bytes": str(GIB), "memory.usage_in_bytes": "1"})
    limit = cgroup_limit(proc, sysfs)
    assert limit is not None
    assert limit.limit_bytes == GIB


def test_no_limit_is_none(tmp_path: Path) -> None:
    proc, sysfs = tmp_path / "proc", tmp_path / "cg"
    assert cgroup_limit(proc, sysfs) is None  # no control groups at all
    write(proc, {"self/cgroup": "4:memory:/\n0::/"})
    write(sysfs / "memory", {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "8"})
    write(sysfs, {"memory.max": "max", "memory.current": "8"})
    assert cgroup_limit(proc, sysfs) is None


def test_an_overdrawn_group_has_nothing_free() -> None:
    assert memory.MemoryLimit(limit_bytes=5, used_bytes=9, source="x").free_bytes == 0


def test_the_machine_counts_what_is_available(tmp_path: Path) -> None:
    write(tmp_path, {"meminfo": "MemTotal:       1000 kB\nMemFree: 10 kB\nMemAvailable:    400 kB"})
    machine = machine_memory(tmp_path)
    assert machine.limit_bytes == 1_024_000
    assert machine.free_bytes == 409_600


def test_this_machine_can_be_read() -> None:
    assert 0 < machine_memory().free_bytes <= machine_memory().limit_bytes


def test_the_sampler_notes_start_end_and_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "rss_bytes", lambda: 123)
    with MemorySampler(period_seconds=0.002) as sampler:
        time.sleep(0.05)
    assert len(sampler.seconds) == len(sampler.resident_bytes) >= 4
    assert set(sampler.resident_bytes) == {123}
    assert list(sampler.seconds) == sorted(sampler.seconds)
    count = len(sampler.seconds)
    time.sleep(0.01)
    assert len(sampler.seconds) == count  # the thread is gone


def test_a_sampler_needs_a_period() -> None:
    with pytest.raises(ValueError, match="period_seconds must be > 0, got 0"):
        MemorySampler(period_seconds=0)


def test_the_whole_peak_survives_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = {"peak": 700, "now": 300}

    def reset_peak() -> bool:
        mark["peak"] = mark["now"]
        return True

    monkeypatch.setattr(resident, "peak_bytes", lambda: mark["peak"])
    monkeypatch.setattr(resident, "reset_peak", reset_peak)
    meter = PeakMeter()
    meter.start_phase()
    assert meter.phase_bytes() == 300
    mark["peak"] = 450
    assert (meter.phase_bytes(), meter.whole_bytes()) == (450, 700)
    meter.start_phase()
    mark["peak"] = 900
    assert (meter.phase_bytes(), meter.whole_bytes()) == (900, 900)
