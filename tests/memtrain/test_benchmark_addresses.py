"""The benchmark of addresses: its instances, its methods, and a quick run to the JSON line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from memtrain.planner.buffers import Buffer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("_harness"), "RESULTS", tmp_path)
    return importlib.import_module("addresses")


@pytest.mark.parametrize(("width", "height"), [(1 << 20, 1 << 20), (12, 40)])
def test_the_pieces_fill_the_rectangle(addresses: ModuleType, width: int, height: int) -> None:
    buffers = addresses.cut_rectangle(30, 1, width, height)
    assert len(buffers) == len({b.name for b in buffers}) == 30
    assert sum((b.end - b.start) * b.size for b in buffers) == width * height
    for moment in range(0, width, width // 12):
        assert sum(b.size for b in buffers if b.start <= moment < b.end) == height


def test_big_m_and_greedy_by_hand(addresses: ModuleType) -> None:
    # a and c lie at 0 after one another, b on both.
    buffers = [Buffer("a", 0, 2, 3), Buffer("b", 1, 3, 1), Buffer("c", 2, 4, 3)]
    assert addresses.by_size(buffers, best_fit=False) == 4
    assert addresses.big_m(buffers, 10) == 4


def test_a_quick_run_ends_with_its_json_line(
    addresses: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    addresses.main(["--quick", "--coarse"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["zero_slack_solved"], summary["of"]) == (4, 4)
    assert (summary["large_solved"], summary["minimalloc_solved"]) == (2, None)
    assert summary["coarse_solved"] == {"8": 2, "12": 2, "16": 2}
    assert summary["step_fragmentation"] <= 0.005
    (kept,) = tmp_path.glob("addresses_*.json")
    assert json.loads(kept.read_text())["summary"] == summary


def test_a_missing_minimalloc_file_is_named(addresses: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(addresses.BenchmarkError, match=r"A\.1048576\.csv is missing"):
        addresses.main(["--quick", "--minimalloc", str(tmp_path)])
