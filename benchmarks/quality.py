"""Do the small optimizers train as well as AdamW, at equal tokens? A Llama from scratch, SmolLM2 continued.

    .venv/bin/python benchmarks/quality.py --minutes 60

Every method trains the same weights on the same tokens (``_quality_child.py``). Its learning rate is the best
with seed 0 of three, and of halves or doubles of them while the best lies at an end; seeds 1 and 2 then run
with it. Methods are compared with AdamW seed by seed. A run is
one line of ``results/quality_runs.jsonl`` and never done twice while its settings stay: the benchmark goes on
where it was stopped, two runs at a time, each on one thread (all is arithmetic; times are not claimed).

``told_apart`` names the methods that all seeds put on one side of AdamW, by more in the median than AdamW's
own seeds lie apart; of all others nothing can be said at this scale. The order of GaLore with kept and with
rotated moments is a unit problem (``tests/optim``), where it shows by orders of magnitude.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from _harness import BENCHMARKS, RESULTS, ROOT, BenchmarkError, last_json_line, publish, table

SEEDS = (0, 1, 2)
WIDENINGS = 2
"""How often a grid of rates is widened at most."""
RUNS = RESULTS / "quality_runs.jsonl"
TASKS = ("scratch", "continue")
MiB = 1 << 20


@dataclass(frozen=True, order=True)
class Run:
    """What a run is a function of, but for ``settings_digest``."""

    task: str
    method: str
    lr: float
    seed: int


def settings_digest() -> str:
    """Of the code that decides what a run is: one of another digest is no answer to the same question."""
    files = (BENCHMARKS / "_quality_child.py", BENCHMARKS / "_quality_methods.py")
    trees = [ast.dump(ast.parse(file.read_text())) for file in files]  # without comments
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:16]


def finished(digest: str) -> dict[Run, dict[str, Any]]:
    """Runs on disk of this digest."""
    found = {}
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    for line in map(json.loads, lines):
        if line["settings_digest"] == digest:
            found[Run(line["task"], line["method"], line["lr"], line["seed"])] = line
    return found


def methods() -> dict[str, tuple[float, ...]]:
    """Learning rates by method; asked of the module in this process, which imports torch for it."""
    from _quality_methods import METHODS

    return {name: method.rates for name, method in METHODS.items()}


def rate_search(
    task: str, method: str, rates: tuple[float, ...], done: dict[Run, Any]
) -> tuple[float | None, list[Run]]:
    """The best rate of seed 0, once it lies between two others; until then None and what to run."""
    tried = sorted(rates)
    for _ in range(WIDENINGS + 1):
        runs = [Run(task, method, lr, SEEDS[0]) for lr in tried]
        if todo := [run for run in runs if run not in done]:
            return None, todo
        best = min(runs, key=lambda run: done[run]["heldout_nats"]).lr
        if best == tried[0]:
            tried.insert(0, best / 2)
        elif best == tried[-1]:
            tried.append(best * 2)
        else:
            break
    return best, []


def missing(tasks: tuple[str, ...], done: dict[Run, Any]) -> Iterator[Run]:
    """What can be run next: rates with seed 0 until one is the best, then the other seeds with it."""
    for task in tasks:
        for method, rates in methods().items():
            best, todo = rate_search(task, method, rates, done)
            if best is not None:
                todo = [Run(task, method, best, seed) for seed in SEEDS]
            yield from (run for run in todo if run not in done)


def execute(run: Run, digest: str) -> dict[str, Any]:
    """One child. Raises BenchmarkError with what it last said."""
    command = [sys.executable, str(BENCHMARKS / "_quality_child.py"), "--task", run.task]
    command += ["--method", run.method, "--lr", repr(run.lr), "--seed", str(run.seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if child.returncode:
        raise BenchmarkError(f"{run}: exit code {child.returncode}; it last said:\n{child.stderr[-2000:]}")
    report = last_json_line(child.stdout)
    return {**run.__dict__, "settings_digest": digest, **report}


def go_on(tasks: tuple[str, ...], minutes: float, digest: str, workers: int) -> None:
    """Run what is missing until time is up; what has begun is ended."""
    end = time.monotonic() + 60 * minutes
    with ThreadPoolExecutor(workers) as pool:
        while time.monotonic() < end:
            todo = list(missing(tasks, finished(digest)))[:workers]
            if not todo:
                return
            for report in pool.map(lambda run: execute(run, digest), todo):
                with RUNS.open("a") as file:
                    file.write(json.dumps(report) + "\n")
                shown = {
                    key: report[key] for key in ("task", "method", "lr", "seed", "heldout_nats", "seconds")
                }
                print(json.dumps(shown), file=sys.stderr, flush=True)


def compare(task: str, done: dict[Run, Any]) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and what can be told apart from AdamW."""
    by_seed: dict[str, list[float]] = {}
    rates: dict[str, float] = {}
    for method, tried in methods().items():
        best, _ = rate_search(task, method, tried, done)
        runs = [Run(task, method, best, seed) for seed in SEEDS if best is not None]
        if runs and all(run in done for run in runs):
            by_seed[method], rates[method] = [done[run]["heldout_nats"] for run in runs], runs[0].lr
    rows, apart = [], []
    base = by_seed.get("adamw")
    noise = max(base) - min(base) if base else float("inf")
    for method, values in by_seed.items():
        differences = [value - other for value, other in zip(values, base or values, strict=True)]
        middle = statistics.median(differences)
        one_side = all(d > 0 for d in differences) or all(d < 0 for d in differences)
        if base and one_side and abs(middle) > noise:
            apart.append(f"{task}: {method} {'behind' if middle > 0 else 'ahead of'} adamw")
        state = done[Run(task, method, rates[method], SEEDS[0])]["state_bytes"]
        rows.append(
            [
                task,
                method,
                f"{rates[method]:g}",
                " ".join(f"{value:.3f}" for value in values),
                f"{statistics.median(values):.3f}",
                f"{middle:+.3f}" if base else "-",
                f"{state / MiB:.1f}",
            ]
        )
    return rows, apart


def main() -> None:
    """Go on, then publish what there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="0 publishes what there is")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    asked = parser.parse_args()
    for corpus, make in (("shakespeare", "python scripts/fetch_prose.py"), ("torch-sources", "make data")):
        if not (ROOT / "data/corpora" / corpus).is_dir():
            raise SystemExit(f"no data/corpora/{corpus}: run `{make}`")
    digest = settings_digest()
    go_on(tuple(asked.tasks), asked.minutes, digest, asked.workers)
    done = finished(digest)
    rows, apart = [], []
    for task in TASKS:
        found, told = compare(task, done)
        rows += found
        apart += told
    header = ["task", "method", "lr", "nats/token by seed", "median", "vs adamw", "state MiB"]
    left = len(list(missing(TASKS, done)))
    summary = {"runs": len(done), "compared": len(rows), "missing_now": left, "told_apart": apart}
    publish("quality", text=table(header, rows), summary=summary, details=list(done.values()))


if __name__ == "__main__":
    main()
