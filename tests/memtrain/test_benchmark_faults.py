"""The count of faults: detected, survived, silent, hangs and not run, from results written by hand."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.offload.faults.rows import TESTS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("faults")


def passed_in_all_rows(faults: ModuleType) -> list[Any]:
    names = {faults.path_of(test) for tests in TESTS.values() for test in tests}
    return [faults.Injection(test=name, name=name.partition("::")[2], outcome="passed") for name in names]


def test_results_are_read_from_junit(faults: ModuleType) -> None:
    text = """<testsuites><testsuite>
      <testcase classname="tests.offload.test_io" name="test_a[one-2]" />
      <testcase classname="tests.offload.faults.test_stalls" name="test_b">
        <failure message="TimeoutError: no end after 120 s">trace</failure></testcase>
      <testcase classname="tests.offload.faults.test_full_disks" name="test_c">
        <skipped message="needs root" /></testcase>
      <testcase classname="tests.offload.faults.test_schedules.TestStore" name="runTest">
        <error message="assert 1 == 2" /></testcase>
    </testsuite></testsuites>"""
    found = faults.read_results(text)
    assert [(each.test, each.name, each.outcome) for each in found] == [
        ("tests/offload/test_io.py::test_a", "test_a[one-2]", "passed"),
        ("tests/offload/faults/test_stalls.py::test_b", "test_b", "hang"),
        ("tests/offload/faults/test_full_disks.py::test_c", "test_c", "not run"),
        ("tests/offload/faults/test_schedules.py::TestStore::runTest", "runTest", "failed"),
    ]
    assert found[2].message == "needs root"


def test_a_row_is_as_good_as_its_worst_injection(faults: ModuleType) -> None:
    results = passed_in_all_rows(faults)
    assert [row.outcome for row in faults.rows_of(results)[:7]] == ["detected"] * 5 + ["survived"] * 2
    index = next(
        n for n, each in enumerate(results) if each.test.endswith("::test_no_locked_memory_is_needed")
    )
    for outcome, row in (("failed", "FAILED"), ("hang", "FAILED"), ("not run", "survived")):
        results[index] = faults.Injection(test=results[index].test, name="x", outcome=outcome)
        assert faults.rows_of(results)[21].outcome == row
    with pytest.raises(faults.BenchmarkError, match=r"row 22: there is no result of .*test_no_locked_memory"):
        faults.rows_of(results[:index] + results[index + 1 :])


def test_what_counts_as_what(faults: ModuleType) -> None:
    results = passed_in_all_rows(faults)
    results[0] = faults.Injection(test=results[0].test, name="a", outcome="failed")
    results[1] = faults.Injection(test=results[1].test, name="b", outcome="hang")
    results[2] = faults.Injection(test=results[2].test, name="c", outcome="not run")
    schedules = [faults.Injection(test="s", name="s", outcome="passed")]
    peer = [SimpleNamespace(outcome=outcome) for outcome in ("silently wrong", "hang", "hang", "not run")]
    summary = faults.summarize(faults.rows_of(results), schedules, 500, {"killed": 50, "faults": 1}, peer)
    assert summary["injected"] == len(results) - 1
    assert summary["detected"] + summary["survived"] == len(results) - 3
    assert (summary["silent"], summary["hangs"], summary["not_run"]) == (2, 1, 1)
    assert (summary["schedules"], summary["kills"]) == (500, 50)
    assert summary["deepspeed"] == {"injected": 3, "silently wrong": 1, "hang": 2}
    failing = [faults.Injection(test="s", name="s", outcome="failed")]
    assert faults.summarize(faults.rows_of(results), failing, 500, {}, [])["schedules"] == 0
