"""Of the faults that offloading must stand, how many are noticed, how many outlived, how many pass unseen?

    python benchmarks/faults.py

The faults are the 24 rows of ``tests/offload/faults/rows.py``, and their scenarios the tests named there:
they are run, one injection each. A row in which something must be said counts as *detected*, one in which the
work must go on as *survived*. An injection whose test fails counts as silent, whatever the reason, and as a
hang if there was no end in time. What cannot be injected here (no root, no loop devices) is *not run*.

Beside that: 500 random schedules of operations, delays, reorderings and failures
(``tests/offload/faults/test_schedules.py``), runs that are killed at a random moment (``kill_resume.py``, 200
in its own right), and what DeepSpeed's swapped optimizer does under the faults that it can be given
(``_faults_deepspeed.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from _harness import BENCHMARKS, ROOT, BenchmarkError, publish, run_child, table

sys.path.insert(0, str(ROOT))  # the tests are not installed

from tests.offload.faults.rows import NOTICED, TESTS, faults

SUITE = ROOT / "tests" / "offload"
SCHEDULES = "tests/offload/faults/test_schedules.py"
DEADLINE = re.compile(r"TimeoutError: no end after|timed out after")
"""What the deadline of a test says, and that of a process which it has started."""
TESTS_SECONDS = 1800.0
KILLS_SECONDS = 900.0


@dataclass(frozen=True, kw_only=True)
class Injection:
    """One run of one test."""

    test: str
    """``path::function``, the path as of the repository."""
    name: str
    """With its parameters."""
    outcome: str
    """``passed``, ``failed``, ``hang`` or ``not run``."""
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a row of the table came to."""

    number: int
    fault: str
    required: str
    injections: tuple[Injection, ...]

    def count(self, *outcomes: str) -> int:
        """The injections with one of these outcomes."""
        return sum(injection.outcome in outcomes for injection in self.injections)

    @property
    def outcome(self) -> str:
        if self.count("failed", "hang"):
            return "FAILED"
        if not self.count("passed"):
            return "not run"
        return "detected" if self.number in NOTICED else "survived"


def path_of(test: str) -> str:
    """A test of the table, named as of the repository."""
    file, _, function = test.partition("::")
    return f"{(SUITE / file).resolve().relative_to(ROOT)}::{function}"


def run_tests(names: Iterable[str], schedules: int, workers: int) -> list[Injection]:
    """Run the tests and read what became of each. Raises BenchmarkError where they end without a result."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers),
            "--dist", "loadfile", "--no-loadscope-reorder", f"--junitxml={results}", *sorted(names),
        ]  # fmt: skip
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "MEMTRAIN_SCHEDULES": str(schedules)}, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=TESTS_SECONDS)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise BenchmarkError(f"the tests have not ended in {TESTS_SECONDS:.0f} s: a hang") from error
        if not results.exists():
            raise BenchmarkError(f"the tests gave no results:\n{said[-2000:]}")
        return read_results(results.read_text())


def read_results(text: str) -> list[Injection]:
    """The test cases of a file in JUnit's format."""
    found = []
    for case in ElementTree.fromstring(text).iter("testcase"):
        where, name = case.attrib["classname"].split("."), case.attrib["name"]
        module = next(n for n in range(len(where), 0, -1) if where[n - 1].startswith("test_"))
        test = "::".join(["/".join(where[:module]) + ".py", *where[module:], name.split("[")[0]])
        bad = [element for element in case if element.tag in ("failure", "error")]
        message = " ".join(element.attrib.get("message", "") for element in bad or case)
        if bad:
            outcome = "hang" if DEADLINE.search(message) else "failed"
        else:
            outcome = "not run" if any(element.tag == "skipped" for element in case) else "passed"
        found.append(Injection(test=test, name=name, outcome=outcome, message=message))
    return found


def rows_of(injections: Sequence[Injection]) -> list[Row]:
    """The table, filled in. Raises BenchmarkError where a test of it was not even collected."""
    rows = []
    for number, (fault, required) in faults().items():
        tests = {path_of(test) for test in TESTS[number]}
        mine = tuple(injection for injection in injections if injection.test in tests)
        if missing := tests - {injection.test for injection in mine}:
            raise BenchmarkError(f"row {number}: there is no result of {', '.join(sorted(missing))}")
        rows.append(Row(number=number, fault=fault, required=required, injections=mine))
    return rows


def run_kills(kills: int, swap: str) -> dict[str, Any]:
    """``kill_resume.py``, which ends with an error where a run was not taken up bit for bit."""
    command = [sys.executable, str(BENCHMARKS / "kill_resume.py"), "--kills", str(kills), "--directory", swap]
    run = run_child(command, environment={"PYTHONPATH": str(ROOT)}, timeout_seconds=KILLS_SECONDS)
    return dict(run.require())


def summarize(
    rows: Sequence[Row],
    schedules: Sequence[Injection],
    number: int,
    kills: dict[str, Any],
    peer: Sequence[Any],
) -> dict[str, Any]:
    """The JSON line."""
    injections = {injection for row in rows for injection in row.injections}
    outcomes = Counter(injection.outcome for injection in (*injections, *schedules))
    noticed = {i for row in rows if row.number in NOTICED for i in row.injections if i.outcome == "passed"}
    done = [injection for injection in injections if injection.outcome != "not run"]
    summary: dict[str, Any] = {
        "rows": len(rows),
        "rows_whole": sum(row.outcome in ("detected", "survived") for row in rows),
        "injected": len(done),
        "detected": len(noticed),
        "survived": sum(injection.outcome == "passed" for injection in done) - len(noticed),
        "silent": outcomes["failed"] + kills.get("faults", 0),
        "hangs": outcomes["hang"],
        "not_run": outcomes["not run"],
        "schedules": number if all(each.outcome == "passed" for each in schedules) else 0,
        "kills": kills.get("killed", 0),
    }
    if peer:
        came = Counter(result.outcome for result in peer)
        summary["deepspeed"] = {"injected": len(peer) - came.pop("not run", 0), **came}
    return summary


def describe(rows: Sequence[Row], peer: Sequence[Any]) -> str:
    """The tables."""
    text = table(
        ("row", "fault", "required", "injected", "memtrain"),
        [
            (row.number, row.fault, row.required, row.count("passed", "failed", "hang"), row.outcome)
            for row in rows
        ],
    )
    for row in rows:
        for injection in row.injections:
            if injection.outcome != "passed":
                text += (
                    f"\nrow {row.number}, {injection.name}: {injection.outcome}: {injection.message[:200]}"
                )
    if peer:
        ours = {row.number: row.outcome for row in rows}
        text += "\n\nDeepSpeed 0.19.8, ZeRO stage 3, optimizer on NVMe:\n" + table(
            ("row", "fault", "memtrain", "DeepSpeed", "how it shows"),
            [(each.row, each.fault, ours[each.row], each.outcome, each.detail) for each in peer],
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=500, help="random schedules")
    parser.add_argument("--kills", type=int, default=50, help="runs that are killed at a random moment")
    parser.add_argument("--workers", type=int, default=2, help="processes that run the tests")
    parser.add_argument("--swap", default="/var/tmp", help="directory on a local disk")
    parser.add_argument("--without-deepspeed", action="store_true")
    parser.add_argument("--dry", action="store_true", help="keep nothing in benchmarks/results")
    options = parser.parse_args()
    peer = []
    if not options.without_deepspeed:
        from _faults_deepspeed import run_cases

        peer = run_cases(options.swap, lambda line: print(line, flush=True))
    began = time.monotonic()
    names = {path_of(test) for tests in TESTS.values() for test in tests}
    injections = run_tests({*names, SCHEDULES}, options.schedules, options.workers)
    print(f"{len(injections)} tests in {time.monotonic() - began:.0f} s", flush=True)
    rows = rows_of(injections)
    schedules = [injection for injection in injections if injection.test.startswith(SCHEDULES)]
    kills = run_kills(options.kills, options.swap)
    summary = summarize(rows, schedules, options.schedules, kills, peer)
    text = describe(rows, peer)
    text += f"\n\n{summary['schedules']} random schedules: right bytes or a typed error; "
    text += f"{kills['readable_and_bit_equal']} of {kills['killed']} killed runs went on bit for bit"
    if options.dry:
        print(text, json.dumps(summary), sep="\n")
    else:
        details = {"injections": [asdict(i) for row in rows for i in row.injections], "kills": kills}
        details["deepspeed"] = [asdict(result) for result in peer]
        publish("faults", text=text, summary=summary, details=details)
    if summary["silent"] or summary["hangs"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
