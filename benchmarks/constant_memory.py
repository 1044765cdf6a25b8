"""Peak memory of training Llama-like models of 8, 16, 32 and 64 equal blocks whose weights are streamed.

    python benchmarks/constant_memory.py                   # a quarter of an hour on two cores
    python benchmarks/constant_memory.py --blocks 2 4      # for trying; nothing is published

Every model is built straight to the disk and trained for three steps with AdamW, bf16 weights and fp32
masters, in a process and a memory group of its own with the same hard limit, and the same budget: weights,
gradients and optimizer state of every block on the disk, activations swapped. What may grow with depth is
small: norms and their state, a few objects for each block, and the blocks' boundaries in the swap queue.
``growth`` is the peak of the deepest over that of the shallowest, less one; 0.03 is allowed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from _harness import BenchmarkError, ChildRun, MiB, child_environment, publish, run_child, table

BLOCKS = (8, 16, 32, 64)
LIMIT_BYTES = 900 * MiB
RESERVE_BYTES = 64 * MiB
"""Of the limit, which the page cache of files that are read takes."""
TIMEOUT_SECONDS = 900.0
CHILD = Path(__file__).with_name("_streamed_child.py")


def run(blocks: int, swap: str) -> ChildRun:
    """One model. Raises BenchmarkError where it does not finish within the limit."""
    command = [sys.executable, str(CHILD), "--blocks", str(blocks), "--swap", swap]
    command += ["--budget", str(LIMIT_BYTES - RESERVE_BYTES)]
    found = run_child(
        command,
        limit_bytes=LIMIT_BYTES,
        environment=child_environment("memtrain"),
        timeout_seconds=TIMEOUT_SECONDS,
    )
    if not found.finished:
        raise BenchmarkError(f"{blocks} blocks: {found.outcome}\n{found.log_tail}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", nargs="+", type=int, default=list(BLOCKS))
    parser.add_argument("--swap", default="/var/tmp", help="directory on a local disk")
    args = parser.parse_args()
    reports: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as swap:
        for blocks in args.blocks:
            reports[blocks] = dict(run(blocks, swap).report)
    rows = [
        (
            blocks,
            f"{report['weight_bytes'] / MiB:.0f}",
            f"{report['state_bytes'] / MiB:.0f}",
            f"{report['peak_bytes'] / MiB:.1f}",
            f"{report['built_peak_bytes'] / MiB:.1f}",
            f"{report['step_seconds']:.2f}",
        )
        for blocks, report in reports.items()
    ]
    header = ("blocks", "weights (MiB)", "state (MiB)", "peak (MiB)", "of building (MiB)", "step (s)")
    peaks = [reports[blocks]["peak_bytes"] for blocks in sorted(reports)]
    growth = round(peaks[-1] / peaks[0] - 1, 4)
    text = f"{table(header, rows)}\ngrowth: {growth:+.2%}"
    if tuple(args.blocks) != BLOCKS:
        print(text)
        return
    publish("constant_memory", text=text, summary={"growth": growth}, details=reports)


if __name__ == "__main__":
    main()
