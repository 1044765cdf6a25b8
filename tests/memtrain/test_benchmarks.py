"""The benchmark harness: bisection, children and their last line, hard limits."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MiB = 1 << 20


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_harness")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_bisect_finds_the_threshold_within_the_ratio(harness: ModuleType) -> None:
    tried: list[int] = []

    def finishes(size: int) -> bool:
        tried.append(size)
        return size >= 1000

    passed, failed = harness.bisect_smallest(finishes, low=500, high=2000, ratio=1.05)
    assert failed < 1000 <= passed
    assert passed <= failed * 1.05
    # 2000/500 = 4 is halved on a logarithmic scale until it is below 1.05: five times, after both ends.
    assert tried == [2000, 500, 1000, 707, 841, 917, 958]
    assert (passed, failed) == (1000, 958)


def test_bisect_does_not_believe_its_bracket(harness: ModuleType) -> None:
    passed, failed = harness.bisect_smallest(lambda size: size >= 5000, low=500, high=1000)
    assert failed < 5000 <= passed <= failed * 1.05
    passed, failed = harness.bisect_smallest(lambda size: size >= 60, low=500, high=1000)
    assert failed < 60 <= passed
    # Near 60 a step of one is less than 5 %.
    assert passed <= failed * 1.05


def test_bisect_gives_up_at_the_ceiling(harness: ModuleType) -> None:
    tried: list[int] = []

    def never(size: int) -> bool:
        tried.append(size)
        return False

    with pytest.raises(harness.BenchmarkError, match=r"does not finish even in 4\.0 GiB"):
        harness.bisect_smallest(never, low=1 << 30, high=3 << 30, ceiling=4 << 30)
    assert tried == [3 << 30, 4 << 30]


@pytest.mark.parametrize(("low", "high", "ratio"), [(0, 10, 1.05), (10, 10, 1.05), (1, 10, 1.0)])
def test_bisect_refuses_a_senseless_bracket(harness: ModuleType, low: int, high: int, ratio: float) -> None:
    with pytest.raises(ValueError, match="need 0 < low < high"):
        harness.bisect_smallest(lambda _: True, low=low, high=high, ratio=ratio)


def test_the_last_json_object_counts(harness: ModuleType) -> None:
    text = 'step 0\n{"a": 1}\n{"a": 2}\n{broken\n[3]\nbye\n'
    assert harness.last_json_line(text) == {"a": 2}
    with pytest.raises(ValueError, match="no line of the output is a JSON object"):
        harness.last_json_line("step 0\n[1, 2]\n")


def test_command_line_of_a_child(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("MEMTRAIN_MODEL", str(tmp_path))
    command = harness.train_command(
        "plain", sequence=256, micro_batches=2, budget=None, fast=True, slow=False
    )
    assert command[2:] == [
        *(
            "--engine",
            "plain",
            "--model",
            str(tmp_path),
            "--sequence",
            "256",
            "--micro-batches",
            "2",
            "--fast",
        )
    ]
    with pytest.raises(ValueError, match="engine must be one of plain, checkpointing, deepspeed, memtrain"):
        harness.train_command("magic")
    monkeypatch.setenv("MEMTRAIN_MODEL", str(tmp_path / "absent"))
    with pytest.raises(harness.BenchmarkError, match="run `make data`"):
        harness.train_command("plain")


def test_a_table_lines_up(harness: ModuleType) -> None:
    assert harness.table(("a", "long name"), [("xyz", 1)]) == "a    long name\n---  ---------\nxyz  1"


@pytest.fixture
def grouped(harness: ModuleType) -> ModuleType:
    limit = importlib.import_module("_limit")
    try:
        with limit.memory_limit(None):
            pass
    except limit.NoHardLimitError as error:
        pytest.skip(str(error))
    return harness


def test_a_child_reports_and_is_counted(grouped: ModuleType) -> None:
    run = grouped.run_child(python("b = bytearray(64 << 20); print('{\"losses\": [1.5]}')"))
    assert run.finished
    assert run.require() == {"losses": [1.5]}
    assert run.cgroup_peak_bytes is None or run.cgroup_peak_bytes >= 64 * MiB


def test_the_kernel_kills_what_takes_more(grouped: ModuleType) -> None:
    code = "b = bytearray(256 << 20); print('{\"losses\": []}')"
    run = grouped.run_child(python(code), limit_bytes=96 * MiB)
    assert run.outcome == "killed"
    with pytest.raises(grouped.BenchmarkError, match="killed"):
        run.require()
    assert grouped.run_child(python(code), limit_bytes=512 * MiB).finished


def test_how_children_end(grouped: ModuleType) -> None:
    line = json.dumps({"shortfall_bytes": 5})
    infeasible = grouped.run_child(python(f"import sys; print('{line}'); sys.exit(2)"))
    assert (infeasible.outcome, infeasible.report) == ("infeasible", {"shortfall_bytes": 5})
    # argparse leaves with 2 as well, and that is a mistake of ours, not an answer of the planner.
    assert grouped.run_child(python("import sys; sys.exit(2)")).outcome == "failed"
    raised = grouped.run_child(python("raise SystemExit('out of luck')"))
    assert raised.outcome == "failed"
    assert "out of luck" in raised.log_tail
    assert grouped.run_child(python("import time; time.sleep(60)"), timeout_seconds=0.5).outcome == "timeout"
    with pytest.raises(grouped.BenchmarkError, match="no line of the output is a JSON object"):
        grouped.run_child(python("print('done')"))


def test_a_row_of_cold_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plan_cold = importlib.import_module("plan_cold")
    fits = {"solver_seconds": 2.0, "gap": 0.00123, "status": "optimal", "exit_code": 0}
    runs = [
        {**fits, "seconds": 9.0},
        {**fits, "seconds": 12.0, "solver_seconds": 5.04},
        {**fits, "seconds": 8.0},
    ]
    assert plan_cold.row("warm", "context 8", runs) == [
        "context 8",
        "warm",
        "9.0",
        "8.0 to 12.0",
        "5.0",
        "0.123",
        "optimal",
        0,
    ]
    none = [{"seconds": 3.0, "solver_seconds": 1.0, "gap": None, "status": "infeasible", "exit_code": 2}]
    assert plan_cold.row("cold", "infeasible", none)[5:] == ["-", "infeasible", 2]


def test_a_cold_answer_with_the_wrong_exit_code_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    plan_cold = importlib.import_module("plan_cold")
    with pytest.raises(
        plan_cold.BenchmarkError, match=r"memtrain plan .* exited with 1, not 0: error: MODEL is"
    ):
        plan_cold.run_plan("", ("--gpu", "h100"), 0)
