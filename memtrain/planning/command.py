"""The command itself: compute everything, then print, then write files; an error leaves no file behind."""

from __future__ import annotations

import sys
from pathlib import Path

from memtrain.planning import machine_readable, sweep_table, terminal
from memtrain.planning.answer import Answer, Point, answer, exit_code, sweep_of
from memtrain.planning.jobs import Jobs
from memtrain.planning.request import Outputs, PlanError, PlanRequest, Questions, Sweep
from memtrain.runfiles import replace_text


def run(request: PlanRequest, questions: Questions, outputs: Outputs) -> int:
    """Answer, and the exit code.

    Raises:
        PlanError: the question cannot be answered, or a file cannot be written.
    """
    jobs = Jobs(request)
    if questions.sweep is not None:
        return _sweep(jobs, questions.sweep, outputs)
    found = answer(
        jobs,
        with_ablation=questions.ablation,
        block=questions.explain,
        what_fits=questions.what_fits,
    )
    files = _files(found, outputs)
    if outputs.json:
        print(machine_readable.answer_json(found))
    elif outputs.csv:
        print(machine_readable.answer_csv(found), end="")
    else:
        terminal.show(found, terminal.console(), sources=questions.sources)
    for path, text in files.items():
        _write(path, text)
    if outputs.emit is not None and not found.targets:
        why = "no tool can run this plan" if found.forecast.fits else "nothing fits"
        print(f"not written: {outputs.emit}, for {why}", file=sys.stderr)
    return found.exit_code


def _files(found: Answer, outputs: Outputs) -> dict[Path, str]:
    """Everything that is to be written, by path. Raises PlanError for what a user may have edited."""
    files: dict[Path, str] = {}
    if outputs.plan is not None:
        files[outputs.plan] = found.forecast.plan.to_json() + "\n"
    if outputs.html is not None:
        from memtrain.planning.page import answer_html

        files[outputs.html] = answer_html(found)
    if outputs.emit is not None:
        for target in found.targets:
            path = outputs.emit / target.filename
            if path.exists():
                raise PlanError(f"--emit: {path} is there already; move it, or name another folder")
            files[path] = target.text
    return files


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}; choose a file that can be written") from error
    print(f"written: {path}", file=sys.stderr)


def _sweep(jobs: Jobs, sweep: Sweep, outputs: Outputs) -> int:
    def tell(point: Point) -> None:
        if sys.stderr.isatty():
            print(f"{point.sequence} tokens x {point.micro_batch} done", file=sys.stderr)

    points = sweep_of(jobs, sweep, tell)
    if outputs.json:
        print(machine_readable.sweep_json(points))
    elif outputs.csv:
        print(machine_readable.sweep_csv(points), end="")
    else:
        sweep_table.show_sweep(points, terminal.console())
    if outputs.html is not None:
        from memtrain.planning.frontier import sweep_html

        _write(outputs.html, sweep_html(jobs.request, sweep.axis, points))
    codes = [exit_code(point.forecast) for point in points if point.forecast is not None]
    if not codes:
        raise PlanError(f"no point of the sweep could be planned; the first: {points[0].problem}")
    return min(codes, key=(0, 3, 2).index)
