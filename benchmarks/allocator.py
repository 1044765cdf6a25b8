"""Does an allocator with a plan beat those without? SmolLM2-135M, bf16, sequence 1024, forward and backward.

    sh scripts/setup_allocators.sh       # once: jemalloc and tcmalloc
    python benchmarks/allocator.py       # about ten minutes on two idle cores

Every contender is a process of its own, rounds of all of them are repeated in alternating order, and ratios
are taken inside a round. All must have the same losses and gradients, bit for bit.

- vs_jemalloc_time: seconds a step with the planned allocator over those with jemalloc, the faster of its two
  settings in the round; median over rounds.
- peak_over_load: bytes of the arena over the most bytes of its blocks alive at once. Requests below a page
are in
  neither (0.02 % of the bytes here).
- page_faults_per_step: median over the planned allocator's steps, of the whole process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _harness import BENCHMARKS, ROOT, BenchmarkError, GiB, model_directory, publish, run_child, spread, table

PLANNED = "planned"
JEMALLOC = ("jemalloc, huge pages", "jemalloc, huge pages, keeps all")
LIBRARIES = Path("/usr/lib")


def library(name: str) -> str:
    """The path of a shared library of the system's. Raises BenchmarkError."""
    found = sorted(LIBRARIES.glob(f"*/{name}")) + sorted(LIBRARIES.glob(name))
    if not found:
        raise BenchmarkError(f"{name} is missing below {LIBRARIES}: run scripts/setup_allocators.sh")
    return str(found[0])


def contenders() -> dict[str, dict[str, str]]:
    """The environment of each."""
    from memtrain.malloc import mimalloc_library, tuned_environment

    jemalloc = {"LD_PRELOAD": library("libjemalloc.so.2")}
    keeps = "dirty_decay_ms:-1,muzzy_decay_ms:-1"
    heap = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736"
    return {
        PLANNED: {},
        "glibc": {},
        "glibc, huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        "glibc without mmap": {"GLIBC_TUNABLES": heap},
        "glibc without mmap, huge pages": {"GLIBC_TUNABLES": f"{heap}:glibc.malloc.hugetlb=1"},
        JEMALLOC[0]: {**jemalloc, "MALLOC_CONF": "thp:always"},
        JEMALLOC[1]: {**jemalloc, "MALLOC_CONF": f"thp:always,{keeps}"},
        "tcmalloc": {"LD_PRELOAD": library("libtcmalloc_minimal.so.4")},
        "mimalloc as memtrain's trainer": tuned_environment({}, mimalloc_library()) or {},
    }


def measure(name: str, environment: Mapping[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """One child's report."""
    command = [sys.executable, str(BENCHMARKS / "_allocator_child.py"), "--model", str(model_directory())]
    command += ["--sequence", str(args.sequence), "--steps", str(args.steps)]
    common = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    run = run_child(
        [*command, *(["--planned"] if name == PLANNED else [])], environment={**common, **environment}
    )
    report = dict(run.require())
    for field in ("seconds", "cpu_seconds", "page_faults"):
        report[field] = statistics.median(step[field] for step in report["steps"])
    print(
        f"{name}: {report['seconds']:.2f} s a step, {report['page_faults']:.0f} page faults, "
        f"peak {report['peak_bytes'] / GiB:.3f} GiB",
        flush=True,
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="contenders beside planned and jemalloc")
    args = parser.parse_args()
    environments = contenders()
    if args.only:
        environments = {n: environments[n] for n in environments if n in (PLANNED, *JEMALLOC, *args.only)}
    rounds: list[dict[str, dict[str, Any]]] = []
    for index in range(args.rounds):
        # The order alternates, so that none always finds the machine as another left it.
        order = list(environments)[:: -1 if index % 2 else 1]
        rounds.append({name: measure(name, environments[name], args) for name in order})
    digests = {name: {r[name]["digest"] for r in rounds} for name in environments}
    if len(set().union(*digests.values())) != 1:
        raise BenchmarkError(f"losses or gradients differ: {digests}")
    arenas = [r[PLANNED] for r in rounds]
    if any(a["deviations"] or a["arena"]["planned_steps"] < args.steps for a in arenas):
        raise BenchmarkError(f"not every step went as planned: {arenas}")
    ratios = spread([r[PLANNED]["seconds"] / min(r[j]["seconds"] for j in JEMALLOC) for r in rounds])
    arena = arenas[0]["arena"]
    summary = {
        "vs_jemalloc_time": round(ratios["median"], 3),
        "peak_over_load": round(arena["arena_bytes"] / arena["load_bytes"], 5),
        "page_faults_per_step": statistics.median(step["page_faults"] for r in arenas for step in r["steps"]),
    }
    text = table(
        ("allocator", "step min (s)", "median", "max", "CPU s a step", "page faults a step", "VmHWM (GiB)"),
        [_row(name, [r[name] for r in rounds]) for name in environments],
    )
    text += (
        f"\nplanned over the faster jemalloc: {ratios['median']:.3f} (from {ratios['min']:.3f} to "
        f"{ratios['max']:.3f} over {args.rounds} rounds)"
        f"\narena {arena['arena_bytes'] / GiB:.4f} GiB for {arena['planned_requests']} requests; alive at "
        f"once at most {arena['load_bytes'] / GiB:.4f} GiB"
        f"\nlosses and gradients equal bit for bit in {len(environments) * args.rounds} processes"
    )
    publish("allocator", text=text, summary=summary, details={"rounds": rounds, "ratios": ratios})


def _row(name: str, reports: list[dict[str, Any]]) -> tuple[object, ...]:
    seconds = spread([step["seconds"] for r in reports for step in r["steps"]])
    return (
        name,
        *(f"{seconds[key]:.2f}" for key in ("min", "median", "max")),
        f"{statistics.median(r['cpu_seconds'] for r in reports):.2f}",
        f"{statistics.median(r['page_faults'] for r in reports):.0f}",
        f"{max(r['peak_bytes'] for r in reports) / GiB:.3f}",
    )


if __name__ == "__main__":
    main()
