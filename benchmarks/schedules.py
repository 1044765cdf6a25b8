"""When to update, and in which order to run micro-batches, where weights, gradients and state are on a disk.

    python benchmarks/schedules.py --directory /var/tmp        # some ten minutes on two idle cores, 16 GB

A Llama of 12 blocks (hidden size 1024), bf16 weights, fp32 masters and moments, everything away. Two groups:

- one micro-batch a step: the update unit by unit inside ``step()``, ahead of the next forward, and in
  backward;
- four micro-batches a step: one after the other (``horizontal``), and all through a block before the next
  block's weights come (``vertical``).

All contenders of a group live side by side and take steps in turn. Their losses and their weights at the end
must be the same to the last bit. Ratios are taken turn by turn, over the first of the group; a ratio below 1
is faster. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from _harness import BENCHMARKS, ROOT, BenchmarkError, GiB, child_environment, publish, spread, table
from _turns import Contender, running, take_turns

GROUPS = {
    1: {
        "sequential": ["--schedule", "sequential"],
        "ahead": ["--schedule", "ahead"],
        "in backward": ["--schedule", "in_backward"],
    },
    4: {
        "horizontal": ["--schedule", "sequential"],
        "vertical": ["--schedule", "sequential", "--order", "vertical"],
    },
}
"""By micro-batches a step, the first one is what the others are compared with."""


def measure(micro_batches: int, args: argparse.Namespace, folder: Path) -> list[Contender]:
    """A group, taking turns. Raises BenchmarkError where not all end at the same bits."""
    environment = {**child_environment("memtrain"), "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:
        group = []
        for name, options in GROUPS[micro_batches].items():
            swap = folder / name.replace(" ", "_")
            swap.mkdir()
            command = [sys.executable, str(BENCHMARKS / "_schedule_child.py"), *options, "--swap", str(swap)]
            command += ["--blocks", str(args.blocks), "--sequence", str(args.sequence)]
            command += ["--micro-batches", str(micro_batches), "--budget", args.budget]
            group.append(stack.enter_context(running(name, command, environment)))
        take_turns(group, args.rounds)
    digests = {contender.name: contender.report.pop("digest") for contender in group}
    if len(set(digests.values())) != 1:
        raise BenchmarkError(f"losses or weights differ: {digests}")
    return group


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", default="/var/tmp", help="on the disk that is to be used")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", default="2GiB", help="of each process")
    args = parser.parse_args()

    rows: list[list[str]] = []
    runs: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"bit_equal": True}
    for micro_batches in GROUPS:
        with tempfile.TemporaryDirectory(dir=args.directory) as folder:
            group = measure(micro_batches, args, Path(folder))
        for contender in group:
            turns = zip(contender.steps, group[0].steps, strict=True)
            ratio = spread([a["seconds"] / b["seconds"] for a, b in turns])
            seconds = statistics.median(step["seconds"] for step in contender.steps)
            moved = statistics.median(step["disk_bytes"] for step in contender.steps)
            report = contender.report
            rows.append(
                [
                    f"{micro_batches}",
                    contender.name,
                    f"{seconds:.2f}",
                    f"{report['predicted_step_seconds']:.2f}",
                    f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})",
                    f"{moved / 1e9:.2f}",
                    f"{report['peak_bytes'] / GiB:.3f}",
                    f"{report['predicted_peak_bytes'] / GiB:.3f}",
                ]
            )
            summary[contender.name.replace(" ", "_")] = round(ratio["median"], 3)
            runs.append(
                {
                    "micro_batches": micro_batches,
                    "name": contender.name,
                    "ratio": ratio,
                    "steps": contender.steps,
                    **report,
                }
            )
    header = (
        "micro-batches",
        "schedule",
        "s/step",
        "predicted",
        "over the first",
        "GB",
        "peak GiB",
        "predicted",
    )
    publish("schedules", text=table(header, rows), summary=summary, details={**vars(args), "runs": runs})


if __name__ == "__main__":
    main()
