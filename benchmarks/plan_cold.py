"""How soon does `memtrain plan` answer for a model of 70 B parameters, started cold?

    python benchmarks/plan_cold.py                    # three rounds, a minute and a half
    python benchmarks/plan_cold.py --drop-caches      # as root: each round once more with an empty page cache
    python benchmarks/plan_cold.py --quick            # a smoke test: one round of a small model

The real command line, each time in a fresh process: the interpreter starts, torch and transformers are
loaded, the model is traced on fake tensors, the program is solved and checked, the answer printed as JSON.
Nothing is shared with earlier processes but the page cache; with --drop-caches that is emptied before each
run of a second set, so that every library is read from the disk again, and the two sets are told apart.
Rounds run through all variants in turn. At most 15 s on two cores are asked for.

- worst_seconds: the longest of all runs, wall clock from the start of the process to its end.
- runs: how many there were.
- worst_gap: the greatest proven ``(step - lower bound) / step`` of those that fit.
- page_cache: ``warm``, or ``warm and cold``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _harness import ROOT, BenchmarkError, last_json_line, publish, spread, table

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
START = "from memtrain.cli import main; main()"
"""What the installed command does, from this checkout."""
LIMIT_SECONDS = 15.0
TIMEOUT_SECONDS = 120.0
ONE_HOST = ("--gpu", "a800-80g", "--gpus", "8", "--dram", "1TiB", "--nvme", "4TB@6GB/s")
VARIANTS: dict[str, tuple[tuple[str, ...], int]] = {
    "context 8": ((*ONE_HOST, "--seq", "8k", "--cp", "8"), 0),
    "ZeRO-3 on 8": ((*ONE_HOST, "--seq", "4k"), 0),
    "infeasible": (("--gpu", "rtx-4090", "--dram", "64GiB", "--seq", "8k"), 2),
}
"""Options, and the exit code that belongs to them: 0 it fits, 2 nothing fits."""


def run_plan(model: str, options: tuple[str, ...], wanted: int) -> dict[str, Any]:
    """One cold answer.

    Raises:
        BenchmarkError: another exit code than ``wanted``, or no answer at all.
    """
    command = [sys.executable, "-c", START, "plan", model, *options, "--json"]
    said = f"memtrain plan {model} {' '.join(options)}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, check=False, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"{said}: no answer after {error.timeout:g} s") from error
    seconds = time.perf_counter() - began
    if done.returncode != wanted:
        raise BenchmarkError(f"{said} exited with {done.returncode}, not {wanted}: {done.stderr[-500:]}")
    answer = last_json_line(done.stdout)
    certificate = answer["certificate"]
    return {
        "seconds": seconds,
        "exit_code": done.returncode,
        "status": certificate["status"],
        "gap": certificate["gap_ratio"] if answer["fits"] else None,
        "step_seconds": answer["step_seconds"],
        "solver_seconds": certificate["solver_seconds"],
        "answer_seconds": answer["answer_seconds"],
        "plan_hash": certificate["plan_hash"],
    }


def drop_caches() -> None:
    """Empty the page cache. Raises BenchmarkError where that is not allowed."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n")
    except OSError as error:
        raise BenchmarkError(
            f"{DROP_CACHES}: {error.strerror}; run as root, or without --drop-caches"
        ) from error


def measure(model: str, rounds: int, *, cold: bool) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs by page cache and variant, in interleaved rounds; one that is thrown away warms the cache."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    first, *_ = VARIANTS.values()
    run_plan(model, *first)
    for cache in ("warm", "cold") if cold else ("warm",):
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
        for _ in range(rounds):
            for name, (options, wanted) in VARIANTS.items():
                if cache == "cold":
                    drop_caches()
                runs[name].append(run_plan(model, options, wanted))
        found[cache] = runs
    return found


def row(cache: str, name: str, runs: list[dict[str, Any]]) -> list[object]:
    """Of the table."""
    seconds = spread([run["seconds"] for run in runs])
    gaps = [run["gap"] for run in runs if run["gap"] is not None]
    return [
        name,
        cache,
        f"{seconds['median']:.1f}",
        f"{seconds['min']:.1f} to {seconds['max']:.1f}",
        f"{max(run['solver_seconds'] for run in runs):.1f}",
        f"{100 * max(gaps):.3f}" if gaps else "-",
        ", ".join(sorted({run["status"] for run in runs})),
        runs[0]["exit_code"],
    ]


def main() -> None:
    """Run all variants and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drop-caches", action="store_true", help="also with an empty page cache (root)")
    parser.add_argument("--quick", action="store_true", help="one round of llama-3-8b; publishes nothing")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    model, rounds = ("llama-3-8b", 1) if arguments.quick else ("llama-3-70b", arguments.rounds)
    found = measure(model, rounds, cold=arguments.drop_caches)
    rows = [row(cache, name, runs) for cache, named in found.items() for name, runs in named.items()]
    every = [run for named in found.values() for runs in named.values() for run in runs]
    summary = {
        "worst_seconds": max(run["seconds"] for run in every),
        "runs": len(every),
        "worst_gap": max((run["gap"] for run in every if run["gap"] is not None), default=math.nan),
        "page_cache": " and ".join(found),
    }
    text = f"memtrain plan {model}, fresh processes, {rounds} rounds; asked for: {LIMIT_SECONDS:g} s\n"
    text += table(
        ["variant", "page cache", "median s", "spread s", "solver s", "gap %", "status", "exit"], rows
    )
    if arguments.quick:
        print(text)
        print(json.dumps(summary))
    else:
        publish("plan_cold", text=text, summary=summary, details=found)


if __name__ == "__main__":
    main()
