"""What a plan predicts against what is measured, at five budgets from the least feasible to unlimited.

    python benchmarks/plan_accuracy.py            # about twelve minutes on two idle cores

SmolLM2-135M, sequence length 1024, accumulation 2. The least budget is the planner's own answer to one that
cannot work (what it has, plus the shortfall it names). Each budget is run in a fresh process. Then every
block is forced into each way of computing a part of it again, where memory is no limit.

- worst_peak_error: the greatest ``|predicted - measured| / measured`` of the training steps' VmHWM.
- worst_time_error: the same for the median step.
- over_budget: how many of the runs were ever above their budget, from the start of the process to its end,
  loading, profiling and planning included.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from _harness import BenchmarkError, GiB, MiB, child_environment, publish, run_child, table, train_command

SEQUENCE = 1024
MICRO_BATCHES = 2
STEPS = 6
IMPOSSIBLE_BYTES = 128 * MiB
"""Less than the libraries: no plan can fit, and the answer names the shortfall."""
ATTEMPTS = 4
HALF = SEQUENCE // 2
FORCED: dict[str, dict[str, str | int | None]] = {
    "nearly free": {"action": "recompute_nearly_free", "saved_tier": "device", "input_tier": "device"},
    "half, others kept": {"action": "recompute", "recomputed_tokens": HALF, "rest_tier": "device"},
    "half, others swapped": {"action": "recompute", "recomputed_tokens": HALF, "rest_tier": "nvme"},
    "half of attention": {
        "action": "recompute_except_attention",
        "attention_tokens": HALF,
        "recomputed_tokens": None,
        "saved_tier": "device",
    },
}
"""What every block is forced into, where a plan would use it for some at most."""


def run(budget_bytes: int, swap: str, steps: int = STEPS, block: Mapping[str, Any] | None = None) -> Any:
    """Train in a fresh process under ``budget_bytes``, with every block forced into ``block``."""
    force = json.dumps({"block": dict(block)} if block else {})
    options: dict[str, Any] = {
        "sequence": SEQUENCE,
        "micro_batches": MICRO_BATCHES,
        "steps": steps,
        "force": force,
    }
    options["no_exact_only"] = block is not None  # a prefix need not be bit-equal to be predicted
    command = train_command("memtrain", budget=budget_bytes, swap=swap, **options)
    return run_child(command, environment=child_environment("memtrain"))


def least_budget(swap: str) -> int:
    """What the planner's answer to an impossible budget names: the least that it needs and a hundredth, for
    what the process holds beside its tensors differs by some MiB from run to run.

    Raises:
        BenchmarkError: a budget raised so is still refused after a few rounds.
    """
    budget = IMPOSSIBLE_BYTES
    for _ in range(ATTEMPTS):
        answer = run(budget, swap, steps=1)
        if answer.outcome != "infeasible":
            answer.require()
            return budget
        shortfall = answer.report["shortfall_bytes"]
        print(f"{budget / GiB:.3f} GiB cannot work: {shortfall / GiB:.3f} GiB short", flush=True)
        need = budget + shortfall
        budget = -(-(need + need // 100) // MiB) * MiB
    raise BenchmarkError(
        f"{budget / GiB:.3f} GiB, the planner's own answer, is refused after {ATTEMPTS} rounds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--swap", default="/var/tmp", help="directory on a local disk")
    args = parser.parse_args()
    unlimited = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as swap:
        least = least_budget(swap)
        reports = {unlimited: dict(run(unlimited, swap).require())}
        # Between the least and what an unlimited plan takes: above that all budgets give one plan.
        most = reports[unlimited]["predicted_peak_bytes"]
        for quarter in range(4):
            budget = least + (most - least) * quarter // 4
            reports[budget] = dict(run(budget, swap).require())
        forced = {name: dict(run(unlimited, swap, block=block).require()) for name, block in FORCED.items()}
    rows, peak_errors, time_errors = [], [], []
    named = [(f"{budget / GiB:.3f}", report) for budget, report in sorted(reports.items())]
    runs = [*named, *forced.items()]
    for name, report in runs:
        peak_errors.append(report["predicted_peak_bytes"] / report["training_peak_bytes"] - 1)
        time_errors.append(report["predicted_step_seconds"] / report["step_seconds"] - 1)
        rows.append(
            (
                name,
                f"{report['predicted_peak_bytes'] / GiB:.3f}",
                f"{report['training_peak_bytes'] / GiB:.3f}",
                f"{peak_errors[-1]:+.1%}",
                f"{report['predicted_step_seconds']:.2f}",
                f"{report['step_seconds']:.2f}",
                f"{time_errors[-1]:+.1%}",
                ", ".join(f"{count} {action}" for action, count in report["actions"].items()),
            )
        )
    peak, step = ("peak predicted", "measured", "error"), ("step predicted (s)", "measured", "error")
    header = ("budget (GiB), or forced", *peak, *step, "blocks")
    summary = {
        "worst_peak_error": round(max(abs(error) for error in peak_errors), 4),
        "worst_time_error": round(max(abs(error) for error in time_errors), 4),
        "over_budget": sum(report["peak_bytes"] > report["budget_bytes"] for _, report in runs),
    }
    details = [{"case": name, "report": report} for name, report in runs]
    publish("plan_accuracy", text=table(header, rows), summary=summary, details=details)


if __name__ == "__main__":
    main()
