"""The answer for programs: one JSON document, or one CSV table. Every key of a quantity carries its unit."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from memtrain.planner.actions import MicroBatchOrder
from memtrain.planner.forecast import Forecast
from memtrain.planner.ranges.plan import TIME_DIGITS
from memtrain.planning.answer import AblationRow, Answer, Point
from memtrain.planning.sweep_table import usage_text
from memtrain.planning.terminal import relaxation_text
from memtrain.planning.usage import class_shares
from memtrain.planpage.fold import Alike, fold_activations, fold_states

ANSWER_VERSION = 1


def answer_json(answer: Answer) -> str:
    """The whole answer."""
    forecast = answer.forecast
    document = {
        "version": ANSWER_VERSION,
        "exit_code": answer.exit_code,
        "request": _plain(answer.request),
        **_numbers(forecast),
        "micro_batch_order": (forecast.job.micro_batch_order or MicroBatchOrder.HORIZONTAL).value,
        "places": [
            {
                "place": place.name,
                "peak_bytes": place.peak_bytes,
                "capacity_bytes": place.capacity_bytes,
                "margin_bytes": place.margin_bytes,
            }
            for place in forecast.places
        ],
        "bill": _plain(forecast.bill),
        "certificate": {
            "status": forecast.plan.status,
            "lower_bound_seconds": forecast.plan.lower_bound_seconds,
            "gap_ratio": forecast.plan.gap,
            "solver": forecast.plan.solver,
            "solver_seconds": forecast.plan.provenance.get("seconds"),
            "plan_hash": forecast.plan.digest,
            "problem_hash": forecast.plan.problem_digest,
        },
        "classes": _plain(class_shares(forecast.plan, forecast.problem)),
        "saved_tensors": _folded(fold_activations(forecast.plan)),
        "state": _folded(fold_states(forecast.plan)),
        "blocks": _plain(forecast.plan.blocks),
        "binding": _plain(forecast.plan.binding),
        "relaxations": [
            {**_plain(one), "text": relaxation_text(one, answer.request.work)}
            for one in forecast.plan.relaxations
        ],
        "run": [_plain(target) for target in answer.targets],
        "run_refused": list(answer.refused),
        "ablation": [_ablation_row(row) for row in answer.ablation],
        "explanation": _plain(answer.explanation),
        "what_fits": _reach(answer),
        "notes": list(answer.notes),
        "sources": _plain(forecast.sources),
        "answer_seconds": answer.seconds,
    }
    return json.dumps(document, allow_nan=False)


def sweep_json(points: Sequence[Point]) -> str:
    """The points of a sweep."""
    rows = [{**_row(point), "usage": _plain(point.usage)} for point in points]
    return json.dumps({"version": ANSWER_VERSION, "points": rows}, allow_nan=False)


def answer_csv(answer: Answer) -> str:
    """The ablation where it was asked for, and otherwise one line with the answers."""
    if answer.ablation:
        return _csv([_ablation_row(row) for row in answer.ablation])
    work = answer.request.work
    point = Point(
        sequence=work.sequence, micro_batch=work.micro_batch, forecast=answer.forecast, usage=answer.usage
    )
    return sweep_csv([point])


def sweep_csv(points: Sequence[Point]) -> str:
    """A line for each point."""
    return _csv([_row(point) for point in points])


def _numbers(forecast: Forecast) -> dict[str, Any]:
    """None where nothing fits, for there is no such step."""
    fits = forecast.fits
    return {
        "fits": fits,
        "step_seconds": forecast.step_seconds if fits else None,
        "unlimited_step_seconds": forecast.unlimited_seconds,
        "slowdown_ratio": forecast.slowdown if fits else None,
        "tokens_per_second": forecast.tokens_per_second if fits else None,
        "tokens_per_step": forecast.job.tokens_per_step,
        "mfu_ratio": forecast.mfu if fits else None,
    }


def _row(point: Point) -> dict[str, Any]:
    row: dict[str, Any] = {"sequence_tokens": point.sequence, "micro_batch_sequences": point.micro_batch}
    if point.forecast is None:
        return {**row, "fits": None, "problem": point.problem}
    margins = {f"{place.name}_margin_bytes": place.margin_bytes for place in point.forecast.places}
    return {
        **row,
        **_numbers(point.forecast),
        "gap_ratio": point.forecast.plan.gap,
        "status": point.forecast.plan.status,
        **margins,
        "off_the_device": usage_text(point.usage) if point.usage else None,
        "problem": "",
    }


def _ablation_row(row: AblationRow) -> dict[str, Any]:
    return {"rule": row.name, "step_seconds": row.step_seconds}


def _reach(answer: Answer) -> dict[str, Any] | None:
    if answer.reach is None:
        return None
    unit = "tokens" if answer.axis == "seq" else "sequences"
    return {
        "axis": answer.axis,
        f"largest_{unit}": answer.reach.largest,
        f"smallest_too_large_{unit}": answer.reach.smallest_too_large,
        f"unit_{unit}": answer.reach.unit,
        "tried": [{unit: value, "fits": fits} for value, fits in answer.reach.tried],
    }


def _folded(lines: Sequence[Alike]) -> list[dict[str, Any]]:
    return [{"blocks": line.blocks, "block_count": line.count, "text": line.text} for line in lines]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A number that is not whole has as many digits as a plan's seconds, in every line of every column."""
    return f"{value:.{TIME_DIGITS}f}" if isinstance(value, float) else value


def _plain(value: Any) -> Any:
    """Records as dictionaries; what JSON has no number for as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
