"""The smallest hard memory limit under which five training steps of SmolLM2-135M finish.

    python benchmarks/smallest_memory.py                     # half an hour on two cores
    python benchmarks/smallest_memory.py --engines memtrain  # one engine; nothing is published

Plain PyTorch, gradient checkpointing, DeepSpeed ZeRO-3 with NVMe, and memtrain train the same thing at
sequence length 1024, each in a memory group of its own that the kernel enforces, libraries and page cache
included. The limit is bisected to 5 %: a child that is killed, that says its budget cannot work, or that
thrashes beyond ten minutes has not finished. memtrain's budget is the limit less ``RESERVE_BYTES``.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from _harness import (
    ENGINES,
    RESERVE_BYTES,
    ChildRun,
    GiB,
    bisect_smallest,
    child_environment,
    child_files,
    evict,
    publish,
    run_child,
    table,
    train_command,
)

SEQUENCE = 1024
STEPS = 5
TIMEOUT_SECONDS = 600.0
# Where the search starts, in GiB; a wrong guess costs trials, not correctness.
BRACKETS = {
    "plain": (3.2, 4.2),
    "checkpointing": (2.6, 3.4),
    "deepspeed": (2.3, 3.0),
    "memtrain": (0.85, 1.15),
}


def trial(engine: str, limit_bytes: int, swap: str, environment: dict[str, str]) -> ChildRun:
    """Five steps under ``limit_bytes``, with libraries and weights cold."""
    budget = limit_bytes - RESERVE_BYTES if engine == "memtrain" else None
    command = train_command(engine, sequence=SEQUENCE, steps=STEPS, budget=budget, swap=swap)
    evict(child_files(engine))
    return run_child(
        command, limit_bytes=limit_bytes, environment=environment, timeout_seconds=TIMEOUT_SECONDS
    )


def smallest(engine: str, swap: str, environment: dict[str, str]) -> dict[str, Any]:
    """Bisect ``engine``; every trial is kept."""
    trials = []

    def finishes(limit_bytes: int) -> bool:
        run = trial(engine, limit_bytes, swap, environment)
        trials.append(
            {
                "limit_bytes": limit_bytes,
                "outcome": run.outcome,
                "wall_seconds": run.wall_seconds,
                "report": dict(run.report),
                "log_tail": "" if run.finished else run.log_tail[-600:],
            }
        )
        print(f"{engine}: {limit_bytes / GiB:.3f} GiB {run.outcome} in {run.wall_seconds:.0f} s", flush=True)
        if run.outcome == "failed":
            print(run.log_tail, flush=True)
        return run.finished

    low, high = (round(bound * GiB) for bound in BRACKETS[engine])
    passed, failed = bisect_smallest(finishes, low=low, high=high)
    report = next(t["report"] for t in trials if t["limit_bytes"] == passed)
    return {
        "smallest_bytes": passed,
        "largest_failed_bytes": failed,
        "report": report,
        "trials": trials,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--swap", default="/var/tmp", help="directory on a local disk")
    parser.add_argument(
        "--mimalloc",
        action="store_true",
        help="the peers get memtrain's allocator too; nothing is published",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as swap:
        results = {
            engine: smallest(engine, swap, child_environment(engine, mimalloc=args.mimalloc))
            for engine in args.engines
        }
    rows = []
    for engine, result in results.items():
        report = result["report"]
        rows.append(
            (
                engine,
                f"{result['smallest_bytes'] / GiB:.3f}",
                f"{result['largest_failed_bytes'] / GiB:.3f}",
                f"{report['peak_bytes'] / GiB:.3f}",
                f"{report['step_seconds']:.2f}",
                f"{report['losses'][-1]:.4f}",
            )
        )
    header = ("engine", "finishes in (GiB)", "not in (GiB)", "VmHWM (GiB)", "step (s)", "last loss")
    text = table(header, rows)
    if set(args.engines) != set(ENGINES) or args.mimalloc:
        print(text)
        return
    ours = results["memtrain"]["smallest_bytes"]
    text += "\n" + "\n".join(
        f"memtrain / {engine}: {ours / results[engine]['smallest_bytes']:.2f}" for engine in ENGINES[:-1]
    )
    summary = {f"{engine}_bytes": results[engine]["smallest_bytes"] for engine in reversed(ENGINES)}
    publish("smallest_memory", text=text, summary=summary, details=results)


if __name__ == "__main__":
    main()
