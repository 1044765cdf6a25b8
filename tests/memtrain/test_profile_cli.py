from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memtrain.cli import main
from memtrain.offload import measure
from memtrain.offload.errors import SwapDirectoryError
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Machine
from memtrain.planner.memory_place import MemoryPlace
from tests.planner.toys import make_machine


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``measure_machine`` was asked for; the machine is a toy with 1 GiB/s each way."""
    calls: list[dict[str, Any]] = []

    def fake(directory: Path | None, **options: Any) -> Machine:
        calls.append({"directory": directory, **options})
        return make_machine(*([Tier.NVME] if directory else [Tier.CXL]), dram_copy_bytes_per_second=5e9)

    monkeypatch.setattr(measure, "measure_machine", fake)
    return calls


def test_the_machine_is_measured_anew_and_written(
    measured: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "machine.json"
    assert run_cli("profile", "--swap", str(tmp_path), "-o", str(output)) == 0
    assert measured == [{"directory": tmp_path, "device": "cpu", "cxl": None, "refresh": True}]
    assert Machine.from_json(output.read_text()) == make_machine(Tier.NVME, dram_copy_bytes_per_second=5e9)
    told = " ".join(capsys.readouterr().out.split())
    assert "memory, one copy 5.00 GB/s" in told
    assert "nvme 1.07 GB/s 1.07 GB/s 2.15 GB/s" in told
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]


def test_json_prints_the_machine_alone(
    measured: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("profile", "--json", "--device", "cuda:1", "--cxl", "2") == 0
    assert measured[0]["device"] == "cuda:1"
    assert measured[0]["cxl"] == MemoryPlace(nodes=(2,))
    assert json.loads(capsys.readouterr().out)["dram_copy_bytes_per_second"] == 5e9


def test_mistakes_are_told_before_anything_is_measured(
    measured: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("profile", "--device", "gpu") == 1
    assert "--device 'gpu' is not known: use cpu, cuda or cuda:N" in capsys.readouterr().err
    assert run_cli("profile", "-o", str(tmp_path / "none" / "m.json")) == 1
    assert "does not exist; create it first" in capsys.readouterr().err
    assert measured == []


def test_a_directory_that_cannot_serve_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(directory: Path, **options: Any) -> Machine:
        raise SwapDirectoryError(f"swap directory {directory} is on tmpfs: choose a disk")

    monkeypatch.setattr(measure, "measure_machine", refuse)
    output = tmp_path / "machine.json"
    assert run_cli("profile", "--swap", str(tmp_path), "-o", str(output)) == 1
    assert f"error: swap directory {tmp_path} is on tmpfs: choose a disk" in capsys.readouterr().err
    assert not output.exists()


def test_an_output_that_is_a_folder_is_refused_and_nothing_is_left(
    measured: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    assert run_cli("profile", "-o", str(folder)) == 1
    assert "choose a file that can be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_without_a_disk_this_machine_is_measured_for_real(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run_cli("profile", "--json") == 0
    machine = Machine.from_json(capsys.readouterr().out)
    assert machine.source.startswith("measured 20")
    assert machine.links == ()
    assert machine.dram_copy_bytes_per_second > 1e8
