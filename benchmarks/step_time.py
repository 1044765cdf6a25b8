"""Tokens per second: memtrain in 1.2 GiB against plain PyTorch unlimited, and against DeepSpeed on NVMe.

    python benchmarks/step_time.py                # about a quarter of an hour on two idle cores

The runs of a round follow one another, rounds are repeated, and ratios are taken inside a round: what slows
the machine for a while slows both sides. memtrain runs under a hard limit of 1.2 GiB, the others under none.

- vs_unlimited: sequence 1024, accumulation 2, memtrain's tokens/s over plain PyTorch's, whichever is faster
  in the round: with glibc's heap and huge pages, or with mimalloc, the allocator that memtrain uses.
- vs_deepspeed: sequence 256, no accumulation, memtrain's tokens/s over those of DeepSpeed ZeRO-3 with NVMe.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

from _harness import (
    RESERVE_BYTES,
    GiB,
    child_environment,
    publish,
    run_child,
    spread,
    table,
    train_command,
)

LIMIT_BYTES = round(1.2 * GiB)
MIMALLOC = " with mimalloc"
PEERS = {"vs_unlimited": ("plain", "plain" + MIMALLOC), "vs_deepspeed": ("deepspeed",)}
COMPARISONS = {
    "vs_unlimited": {"sequence": 1024, "micro_batches": 2, "steps": 6},
    "vs_deepspeed": {"sequence": 256, "micro_batches": 1, "steps": 10},
}


def measure(name: str, swap: str, **options: Any) -> dict[str, Any]:
    """One child's report, with its CPU seconds."""
    engine = name.removesuffix(MIMALLOC)
    ours = engine == "memtrain"
    budget = LIMIT_BYTES - RESERVE_BYTES if ours else None
    run = run_child(
        train_command(engine, budget=budget, swap=swap, **options),
        limit_bytes=LIMIT_BYTES if ours else None,
        environment=child_environment(engine, mimalloc=name.endswith(MIMALLOC)),
    )
    report = dict(run.require())
    print(
        f"{name}, sequence {options['sequence']}: {report['step_seconds']:.2f} s a step, "
        f"{report['tokens_per_second']:.0f} tokens/s, peak {report['peak_bytes'] / GiB:.3f} GiB",
        flush=True,
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--swap", default="/var/tmp", help="directory on a local disk")
    args = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as swap:
        for index in range(args.rounds):
            for name, comparison in COMPARISONS.items():
                # The order alternates, so that neither side always finds the machine as the other left it.
                order = [*PEERS[name], "memtrain"]
                turned = order[::-1] if index % 2 else order
                reports = {engine: measure(engine, swap, **comparison) for engine in turned}
                fastest = max(reports[peer]["tokens_per_second"] for peer in PEERS[name])
                ratio = reports["memtrain"]["tokens_per_second"] / fastest
                rounds.append({"round": index, "comparison": name, "ratio": ratio, "reports": reports})
    summary: dict[str, float] = {}
    rows = []
    spreads = {}
    for name, comparison in COMPARISONS.items():
        of_name = [entry for entry in rounds if entry["comparison"] == name]
        spreads[name] = spread([entry["ratio"] for entry in of_name])
        summary[name] = round(spreads[name]["median"], 3)
        for engine in ("memtrain", *PEERS[name]):
            reports_of = [entry["reports"][engine] for entry in of_name]
            steps = spread([report["step_seconds"] for report in reports_of])
            rows.append(
                (
                    name,
                    engine,
                    comparison["sequence"],
                    comparison["micro_batches"],
                    *(f"{steps[key]:.2f}" for key in ("min", "median", "max")),
                    f"{statistics.median(r['tokens_per_second'] for r in reports_of):.0f}",
                    f"{max(r['peak_bytes'] for r in reports_of) / GiB:.3f}",
                    f"{statistics.median(r['cpu_seconds'] for r in reports_of):.0f}",
                )
            )
    header = (
        "comparison",
        "engine",
        "sequence",
        "accumulation",
        "step min (s)",
        "median",
        "max",
        "tokens/s",
        "VmHWM (GiB)",
        "CPU s, whole run",
    )
    text = table(header, rows) + "".join(
        f"\n{name}: {s['median']:.3f} (from {s['min']:.3f} to {s['max']:.3f} over {args.rounds} rounds)"
        for name, s in spreads.items()
    )
    publish("step_time", text=text, summary=summary, details={"rounds": rounds, "spread": spreads})


if __name__ == "__main__":
    main()
