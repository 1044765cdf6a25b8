"""The report of a run as one file that opens offline, and a picture of its memory.

    python -m memtrain.page runs/smollm2_135m_full_cpu

reads what the run wrote (summary.json, plan.json, metrics.jsonl, memory.csv, recipe.yaml) and writes
``report.html`` and, where matplotlib is installed (extra ``plots``), ``memory.png``. It runs in a process of
its own after training, so that drawing is not on the run's bill.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memtrain.charts import Chart, Series
from memtrain.endurance import written_rows
from memtrain.htmlpage import bullets, document, figure, paragraph, preformatted, sections, table
from memtrain.planner.plan import Plan
from memtrain.planner.units import GiB, format_gib
from memtrain.report import Summary, bill_rows, comparison_rows, plan_facts, wear_facts


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """What a run wrote."""

    summary: Summary
    plan: Plan
    recipe_text: str
    metrics: list[dict[str, Any]]
    seconds: list[float]
    resident_gib: list[float]

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Read a run's folder. Raises OSError or ValueError when it is not that of a finished run."""
        with (folder / "memory.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return cls(
            summary=Summary.read(folder / "summary.json"),
            plan=Plan.from_json((folder / "plan.json").read_text()),
            recipe_text=(folder / "recipe.yaml").read_text(),
            metrics=[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
            seconds=[float(row["seconds"]) for row in rows],
            resident_gib=[int(row["resident_bytes"]) / GiB for row in rows],
        )

    def memory_limits(self) -> tuple[tuple[str, float], ...]:
        """The budget and the prediction, where the picture's memory is the one they speak of."""
        if self.summary.device != "cpu":
            return ()
        return (
            (f"budget {format_gib(self.summary.budget_bytes)}", self.summary.budget_bytes / GiB),
            (
                f"predicted peak {format_gib(self.summary.predicted_peak_bytes)}",
                self.summary.predicted_peak_bytes / GiB,
            ),
        )


def render(run: RunFiles) -> str:
    """The page, with nothing that points outside it."""
    summary = run.summary
    spans = tuple((phase.name, phase.start_seconds, phase.end_seconds) for phase in summary.phases)
    memory = Chart(
        x_label="seconds",
        y_label="resident memory (GiB)",
        series=(Series(name="resident", x=run.seconds, y=run.resident_gib),),
        limits=run.memory_limits(),
        spans=spans,
        from_zero=True,
    )
    losses = [(float(line["step"]), float(line["loss"])) for line in run.metrics]
    loss = Chart(
        x_label="step",
        y_label="loss",
        series=(Series(name="training loss", x=[x for x, _ in losses], y=[y for _, y in losses]),),
    )
    parts = [
        ("Prediction and measurement", table(*comparison_rows(summary)) + _facts(summary)),
        ("Memory of the process", figure(memory.svg()) + _legend(spans)),
        ("Loss", figure(loss.svg())),
        ("Plan", table(*bill_rows(run.plan)) + bullets(plan_facts(run.plan))),
        ("Recipe", preformatted(run.recipe_text)),
    ]
    if summary.written:
        worn = table(*written_rows(summary.written)) + bullets(wear_facts(summary))
        parts.insert(-1, ("Written to the tiers", worn))
    return document(summary.name, sections(parts))


def _legend(spans: Sequence[tuple[str, float, float]]) -> str:
    return paragraph("; ".join(f"{name} {start:.1f}-{end:.1f} s" for name, start, end in spans))


def _facts(summary: Summary) -> str:
    facts = [
        f"whole process: peak {format_gib(summary.process_peak_bytes)}, "
        f"budget {format_gib(summary.budget_bytes)}",
        f"held-out loss: {summary.heldout_loss_before:.4f} before, {summary.heldout_loss_after:.4f} after",
        f"{summary.steps} steps, {summary.tokens_per_second:.0f} tokens/s",
        f"checkpoint: {summary.checkpoint}",
        *([] if summary.snapshots is None else [summary.snapshots.text()]),
    ]
    return bullets(facts)


def draw_png(run: RunFiles, path: Path) -> None:
    """Memory over time as a picture file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    for index, phase in enumerate(run.summary.phases):
        shade = "#f0f2f4" if index % 2 else "#dfe3e8"
        axes.axvspan(phase.start_seconds, phase.end_seconds, color=shade, linewidth=0)
    axes.plot(run.seconds, run.resident_gib, linewidth=1.0, label="resident memory")
    for colour, (name, value) in zip(("#cf222e", "#9a6700"), run.memory_limits(), strict=False):
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.0, label=name)
    axes.set(xlabel="seconds", ylabel="GiB", title=run.summary.name, ylim=(0, None))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """``python -m memtrain.page``."""
    parser = argparse.ArgumentParser(description="Draw the report of a run.")
    parser.add_argument("folder", type=Path, help="output directory of a finished run")
    folder = parser.parse_args(arguments).folder
    try:
        run = RunFiles.read(folder)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {folder} is not the folder of a finished run: {error}", file=sys.stderr)
        return 1
    (folder / "report.html").write_text(render(run))
    print(f"report: {folder / 'report.html'}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no memory.png: matplotlib is missing (pip install 'memtrain[plots]')")
    else:
        draw_png(run, folder / "memory.png")
        print(f"picture: {folder / 'memory.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
