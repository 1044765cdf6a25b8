"""Peak memory of training Llama-like models of 8, 16, 32 and 64 equal blocks whose weights are streamed.

    python benchmarks/constant_memory.py                   # seven minutes on two idle cores
    python benchmarks/constant_memory.py --blocks 2 4      # for trying; nothing is published

Every model is built straight to the disk and trained for three steps with AdamW, bf16 weights and fp32
masters, in a process and a memory group of its own with the same hard limit, and the same budget: the least
in which the deepest of them can be trained. In a larger one each takes what makes its step faster, such as
larger shards, and peaks tell of that and not of depth. Weights, gradients and optimizer state of every block
are on the disk, activations swapped. What may grow with depth is small: norms and their state, a few objects
for each block, and the blocks' boundaries in the swap queue. Equal blocks are not cut into tiles. ``growth``
is the peak of the deepest over that of the shallowest, less one; 0.03 is allowed.

Beside them SmolLM2-135M, streamed, at sequence length 1024 under a hard limit of 0.8 GiB: what leaves memory
there, and what stays, is the planner's choice.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from _harness import (
    BenchmarkError,
    ChildRun,
    GiB,
    MiB,
    child_environment,
    child_files,
    evict,
    model_directory,
    publish,
    run_child,
    table,
)

BLOCKS = (8, 16, 32, 64)
TOO_SMALL_BYTES = 448 * MiB
"""Hardly more than the libraries: no plan can fit, and the answer names the shortfall."""
UNLIKE_THE_NEXT = 64
"""Part of the least budget by which another process may need more: of its libraries other pages are there."""
RESERVE_BYTES = 64 * MiB
"""Of the limit, which the page cache of files that are read takes."""
SMOLLM2_LIMIT_BYTES = int(0.8 * GiB)
SMOLLM2_SEQUENCE = 1024
SMOLLM2_RESERVE_BYTES = 24 * MiB
"""As the other benchmarks of this model leave to the kernel."""
TIMEOUT_SECONDS = 900.0
CHILD = Path(__file__).with_name("_streamed_child.py")


def run(
    swap: str, budget_bytes: int, reserve_bytes: int, *options: str, outcome: str = "finished"
) -> ChildRun:
    """One model, with libraries and weights cold. Raises BenchmarkError where it ends otherwise."""
    command = [sys.executable, str(CHILD), *options, "--swap", swap]
    command += ["--budget", str(budget_bytes)]
    evict(child_files("memtrain"))
    found = run_child(
        command,
        limit_bytes=budget_bytes + reserve_bytes,
        environment=child_environment("memtrain"),
        timeout_seconds=TIMEOUT_SECONDS,
    )
    if found.outcome != outcome:
        raise BenchmarkError(f"{' '.join(options)}: {found.outcome}\n{dict(found.report)}\n{found.log_tail}")
    return found


def least_budget_bytes(swap: str, blocks: int) -> int:
    """In which so many blocks can be trained, by the planner's own account."""
    options = ("--blocks", str(blocks))
    found = run(swap, TOO_SMALL_BYTES, TOO_SMALL_BYTES, *options, outcome="infeasible")  # twice the budget
    least = TOO_SMALL_BYTES + int(found.report["shortfall_bytes"])
    return least + least // UNLIKE_THE_NEXT


def row(name: object, found: ChildRun) -> tuple[str, ...]:
    """Of the table."""
    report = found.report
    group = "" if found.cgroup_peak_bytes is None else f"{found.cgroup_peak_bytes / MiB:.1f}"
    sizes = (report[key] / MiB for key in ("weight_bytes", "state_bytes"))
    peaks = (report[key] / MiB for key in ("peak_bytes", "predicted_peak_bytes", "built_peak_bytes"))
    return (
        str(name),
        *(f"{size:.0f}" for size in sizes),
        *(f"{peak:.1f}" for peak in peaks),
        group,
        f"{report['step_seconds']:.2f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", nargs="*", type=int, default=list(BLOCKS))
    parser.add_argument("--without-smollm2", action="store_true")
    parser.add_argument("--swap", default="/var/tmp", help="directory on a local disk with 12 GiB free")
    args = parser.parse_args()
    found: dict[int, ChildRun] = {}
    smollm2: ChildRun | None = None
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as swap:
        budget = least_budget_bytes(swap, max(args.blocks)) if args.blocks else 0
        for blocks in args.blocks:
            found[blocks] = run(swap, budget, RESERVE_BYTES, "--blocks", str(blocks))
        if not args.without_smollm2:
            options = ("--model", str(model_directory()), "--sequence", str(SMOLLM2_SEQUENCE))
            smollm2 = run(swap, SMOLLM2_LIMIT_BYTES - SMOLLM2_RESERVE_BYTES, SMOLLM2_RESERVE_BYTES, *options)
    rows = [row(f"{blocks} blocks", one) for blocks, one in found.items()]
    summary: dict[str, Any] = {}
    if found:
        peaks = [found[blocks].report["peak_bytes"] for blocks in sorted(found)]
        summary |= {"growth": round(peaks[-1] / peaks[0] - 1, 4), "budget_bytes": budget}
    if smollm2 is not None:
        rows.append(row("SmolLM2-135M", smollm2))
        summary |= {
            "smollm2_limit_bytes": SMOLLM2_LIMIT_BYTES,
            "smollm2_peak_bytes": smollm2.report["peak_bytes"],
        }
    header = (
        "model", "weights (MiB)", "state (MiB)", "peak (MiB)", "predicted", "of building", "of the group",
        "step (s)",
    )  # fmt: skip
    text = table(header, rows)
    if tuple(args.blocks) != BLOCKS or smollm2 is None:
        print(text, summary, sep="\n")
        return
    details = {str(name): dict(one.report) for name, one in {**found, "smollm2": smollm2}.items()}
    publish("constant_memory", text=text, summary=summary, details=details)


if __name__ == "__main__":
    main()
