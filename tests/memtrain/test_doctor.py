from __future__ import annotations

from pathlib import Path

import pytest

from memtrain.cli.doctor import examine
from memtrain.offload import numa
from memtrain.offload.dax import DaxDevice
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Link, Machine
from memtrain.planner.units import GiB, MiB


def test_a_usable_swap_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = examine(tmp_path, measure=False)
    told = " ".join(capsys.readouterr().out.split())
    for word in ("torch", "NUMA nodes", "control group", "file system", "direct I/O", "locked memory limit"):
        assert word in told
    if code == 0:  # the tests' directory may lie on tmpfs
        assert "nothing stands in the way" in told
    else:
        assert "in the way: swap directory" in told


def test_the_measured_bandwidth_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if examine(tmp_path, measure=False) != 0:
        pytest.skip("the tests' directory takes no direct I/O")
    asked = []

    def measured(directory: Path, *, refresh: bool) -> Machine:
        asked.append((directory, refresh))
        link = Link(
            tier=Tier.NVME,
            read_bytes_per_second=1.5e9,
            write_bytes_per_second=2.25e9,
            mixed_bytes_per_second=2.5e9,
            source="measured now",
        )
        return Machine(name="m", device="cpu", cores=1, dram_copy_bytes_per_second=1e9, links=(link,))

    monkeypatch.setattr("memtrain.offload.measure.measure_machine", measured)
    assert examine(tmp_path, measure=True) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "1.50 GB/s read, 2.25 GB/s write, 2.50 GB/s both at once (measured now)" in told
    assert asked == [(tmp_path, True)]


def test_memory_of_the_cxl_tier_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examine(tmp_path, measure=False)
    assert "the tier cannot be used here" in " ".join(capsys.readouterr().out.split())
    device = DaxDevice(path="/dev/dax0.0", size_bytes=2 * GiB, align_bytes=2 * MiB, node=3)
    monkeypatch.setattr("memtrain.offload.dax.dax_devices", lambda: (device,))
    monkeypatch.setattr(numa, "online_nodes", lambda: (0, 1))
    monkeypatch.setattr(numa, "memory_only_nodes", lambda: (1,))
    monkeypatch.setattr(numa, "node_bytes", lambda node: 5 * GiB)
    monkeypatch.setattr(numa, "supports", lambda mode: mode is not numa.Mode.WEIGHTED_INTERLEAVE)
    examine(tmp_path, measure=False)
    told = " ".join(capsys.readouterr().out.split())
    assert "NUMA node 1 memory only, 5.000 GiB free: usable as cxl" in told
    assert "/dev/dax0.0 2.000 GiB beside node 3, in units of 2097152: usable as cxl" in told
    assert "memory policies preferred, bind, interleave, preferred_many" in told
    assert "the tier cannot be used here" not in told


def test_a_missing_swap_directory_stands_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert examine(tmp_path / "none", measure=True) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "in the way: swap directory: swap directory" in told
    assert "does not exist: create it" in told
    assert "now, no nvme" in told
