"""How good the planner's answers are, how soon, and what each freedom is worth: the solver and the ablation.

    python benchmarks/plan_solver.py            # about two minutes on two cores
    python benchmarks/plan_solver.py --quick    # a smoke test

Five families of 80 blocks x 16 chunks x 3 classes x 7 actions x 4 tiers, and one of 126 x 64
(``_plan_instances``: synthetic rates, no GPU timing). Each is solved to a gap of 0.1 % within 10 s, and once
more by the fallback without the whole program, to 0.4 % within 4 s. Every plan goes through the independent
checker. The baselines run through the same simulator.

- worst_gap: the greatest proven ``(step - lower bound) / step`` of the full solves.
- worst_seconds: the longest of them, wall clock, the solver's process included.
- worst_vs_best_baseline: the greatest ratio of our step to the best baseline's; above 1 we lost.
- worst_fallback_gap, worst_fallback_seconds: the same for the fallback.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

from _harness import BenchmarkError, publish, table
from _plan_instances import FAMILIES, problem

from memtrain.planner.ranges.baselines import Baseline, baselines
from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.solve import SolveOptions, solve

FULL = SolveOptions(gap=1e-3, seconds=10.0)
FALLBACK = SolveOptions(gap=4e-3, seconds=4.0, whole=False)


def timed(one: Problem, options: SolveOptions) -> dict[str, Any]:
    """Solve, check, and say what came of it. Raises BenchmarkError when the checker finds a fault."""
    began = time.monotonic()
    plan = solve(one, options)
    seconds = time.monotonic() - began
    faults = check(plan, one)
    if faults or plan.status == "infeasible":
        raise BenchmarkError(f"{plan.status}: {faults[:3]}")
    return {
        "status": plan.status,
        "step_seconds": plan.step_seconds,
        "gap": plan.gap,
        "seconds": seconds,
        "solver": plan.solver,
        "phases": plan.provenance["phases"],
        "digest": plan.digest,
    }


def measure(one: Problem) -> dict[str, Any]:
    """Full solve, fallback and every baseline of one instance."""
    formulated = formulate(one)
    rows: tuple[Baseline, ...] = baselines(formulated)
    return {
        "compute_seconds": one.compute_seconds,
        "integers": len(formulated.form.integers),
        "rows": len(formulated.form.rows),
        "full": timed(one, FULL),
        "fallback": timed(one, FALLBACK),
        "baselines": {row.name: row.step_seconds for row in rows},
    }


def overhead(seconds: float, compute_seconds: float) -> str:
    """Of the arithmetic, in percent; a dash where nothing fits."""
    return f"{100 * (seconds / compute_seconds - 1):.3f}" if math.isfinite(seconds) else "-"


def main() -> None:
    """Solve all families and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small instance of each family")
    quick = parser.parse_args().quick
    found = {}
    for name, arguments in FAMILIES.items():
        small = {"layers": 8, "chunks": 4, "device": 12.0, "host": 8.0, "cxl": 4.0} if quick else {}
        found[name] = measure(problem(**(arguments | small)))
        print(f"{name}: {found[name]['full']['phases']}", flush=True)
    text = table(
        ["instance", "integers", "gap %", "seconds", "fallback gap %", "seconds"],
        [
            [
                name,
                row["integers"],
                f"{100 * row['full']['gap']:.4f}",
                f"{row['full']['seconds']:.2f}",
                f"{100 * row['fallback']['gap']:.4f}",
                f"{row['fallback']['seconds']:.2f}",
            ]
            for name, row in found.items()
        ],
    )
    rules = list(next(iter(found.values()))["baselines"])
    text += "\n\nStep time above pure arithmetic, percent (- : nothing fits)\n" + table(
        ["instance", "memtrain", *rules],
        [
            [
                name,
                overhead(row["full"]["step_seconds"], row["compute_seconds"]),
                *(overhead(row["baselines"][rule], row["compute_seconds"]) for rule in rules),
            ]
            for name, row in found.items()
        ],
    )
    ratios = [row["full"]["step_seconds"] / min(row["baselines"].values()) for row in found.values()]
    summary = {
        "worst_gap": max(row["full"]["gap"] for row in found.values()),
        "worst_seconds": max(row["full"]["seconds"] for row in found.values()),
        "worst_vs_best_baseline": max(ratios),
        "worst_fallback_gap": max(row["fallback"]["gap"] for row in found.values()),
        "worst_fallback_seconds": max(row["fallback"]["seconds"] for row in found.values()),
    }
    if quick:
        print(text)
        print(json.dumps(summary))
    else:
        publish("plan_solver", text=text, summary=summary, details=found)


if __name__ == "__main__":
    main()
