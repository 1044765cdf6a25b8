"""The answer as text: answers first, then bytes by category and place, actions, certificate, what to run.

Plain where the output is no terminal: the same characters at any width of the window, nothing coloured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from memtrain.planner.actions import MicroBatchOrder
from memtrain.planner.forecast import Forecast
from memtrain.planner.ranges.plan import Relaxation
from memtrain.planner.ranges.profile_bytes import CATEGORIES
from memtrain.planner.units import GiB, format_gib
from memtrain.planning.answer import Answer
from memtrain.planning.request import PlanRequest, Work
from memtrain.planning.usage import class_shares
from memtrain.planpage.fold import Alike, fold_activations, fold_states
from memtrain.planpage.words import gap_text, gib_cell, seconds_text, share_text

_PLAIN_WIDTH = 4096
"""Columns where nobody looks: no line is folded, so that tools can cut and grep it."""
SOME = 0.005
"""A share below it would be printed as 0 %."""
_MOST_STRETCHES = 5
"""Of block numbers in a line of the folded table."""
_MOST_LINES = 8
"""Of the folded table; more say less than the file of the plan."""


class _Console(Console):
    """One whose tables leave no blanks at the ends of lines where nobody looks at them."""

    def print(self, *objects: Any, **options: Any) -> None:
        if self.is_terminal or not any(isinstance(one, Table) for one in objects):
            super().print(*objects, **options)
            return
        with self.capture() as captured:
            super().print(*objects, **options)
        for line in captured.get().splitlines():
            super().print(line.rstrip())


def console() -> Console:
    """On standard output."""
    found = _Console(highlight=False, markup=False, emoji=False)
    return (
        found
        if found.is_terminal
        else _Console(highlight=False, markup=False, emoji=False, width=_PLAIN_WIDTH, color_system=None)
    )


def show(answer: Answer, out: Console, *, sources: bool) -> None:
    """Everything that was asked for, in the order in which a user asks."""
    _headline(answer, out)
    if answer.reach is not None:
        _reach(answer, out)
    if not answer.forecast.fits:
        _shortage(answer.forecast, answer.request.work, out)
    _bill(answer.forecast, out)
    _actions(answer.forecast, out)
    _certificate(answer.forecast, out)
    if answer.ablation:
        _ablation(answer, out)
    if answer.explanation is not None:
        from memtrain.planning.explained import show_explanation

        show_explanation(answer.explanation, out)
    if answer.forecast.fits:
        _targets(answer, out)
    _section("notes", out)
    for note in answer.notes:
        out.print(f"  {note}")
    if sources:
        _sources(answer.forecast, out)


def title(request: PlanRequest) -> str:
    """Model, size, GPUs, degrees."""
    work = request.work
    batch = f"{work.sequence} tokens x {work.micro_batch}"
    batch += f" x {work.accumulate} micro-batches" if work.accumulate > 1 else ""
    return f"{work.model}, {batch}, {setting(request)}"


def setting(request: PlanRequest) -> str:
    """Optimizer, dtype, GPUs, degrees: what a sweep leaves as it is."""
    work, hardware, degrees = request.work, request.hardware, request.degrees
    gpus = f"{request.gpus} x {hardware.gpu}" if request.gpus > 1 else hardware.gpu
    named = {
        "data": degrees.data,
        "tensor": degrees.tensor,
        "context": degrees.context,
        "pipeline": degrees.pipeline,
        "expert": degrees.expert,
    }
    split = [f"{name} {value}" for name, value in named.items() if value > 1]
    split += [f"ZeRO stage {degrees.zero_stage}"] if degrees.replicas > 1 else []
    divided = f" ({', '.join(split)})" if split else ""
    return f"{work.optimizer.value}, {work.dtype}, on {gpus}{divided}"


def _headline(answer: Answer, out: Console) -> None:
    forecast = answer.forecast
    out.print(title(answer.request))
    if forecast.job.micro_batch_order is MicroBatchOrder.VERTICAL:
        out.print("  in vertical order: all micro-batches pass a block before the next block's weights come")
    device = forecast.places[0]
    limit = format_gib(device.capacity_bytes, 2)
    if not forecast.fits:
        out.print(f"DOES NOT FIT: what is below is the plan of the least device memory, {limit} is the limit")
        return
    out.print(f"FITS: {format_gib(device.margin_bytes, 2)} of {limit} left on each GPU")
    if forecast.job.degrees.pipeline > 1:
        stage = f"{forecast.job.stage + 1} of {forecast.job.degrees.pipeline}"
        out.print(f"  below is pipeline stage {stage}: of the first and the last the one that decides")
    table = _grid()
    slower = share_text(forecast.slowdown - 1)
    unlimited = seconds_text(forecast.unlimited_seconds)
    table.add_row("  slowdown", f"{slower} against unlimited device memory ({unlimited} a step)")
    table.add_row("  step time", seconds_text(forecast.step_seconds))
    tokens = forecast.job.tokens_per_step
    table.add_row("  tokens/s", f"{forecast.tokens_per_second:,.0f} on all GPUs, {tokens:,} tokens a step")
    table.add_row("  MFU", share_text(forecast.mfu))
    out.print(table)


def _reach(answer: Answer, out: Console) -> None:
    reach = answer.reach
    assert reach is not None
    what = "longest sequence" if answer.axis == "seq" else "largest micro-batch"
    unit = " tokens" if answer.axis == "seq" else ""
    if reach.largest == 0:
        out.print(f"  {what}: not even {reach.unit}{unit} fits")
    elif reach.smallest_too_large is None:
        out.print(f"  {what}: {reach.largest}{unit}, the largest that was tried")
    else:
        out.print(
            f"  {what}: {reach.largest}{unit}; {reach.smallest_too_large} does not fit "
            f"(multiples of {reach.unit}, {len(reach.tried)} sizes tried)"
        )


def _shortage(forecast: Forecast, work: Work, out: Console) -> None:
    for place in forecast.places:
        if place.margin_bytes < 0:
            out.print(
                f"  {place.name}: {format_gib(-place.margin_bytes, 2)} ({-place.margin_bytes:,} bytes) short"
            )
    for one in forecast.plan.binding:
        size, limit = format_gib(one.size_bytes, 2), format_gib(one.limit_bytes, 2)
        out.print(f"  what binds: {one.limit}, {one.position}: {size} of {limit}")
    lines = [relaxation_text(one, work) for one in forecast.plan.relaxations]
    out.print(
        "  each of these alone is enough:" if lines else "  no single change was found that makes it fit"
    )
    for line in lines:
        out.print(f"    {line}")
    if len(forecast.places) == 1:
        out.print("  nothing can leave the device: describe memory beside it with --dram, --nvme or --cxl")


def relaxation_text(one: Relaxation, work: Work) -> str:
    """``device: 1.80 GiB more``."""
    if one.missing_bytes:
        return f"{one.what}: {format_gib(one.missing_bytes, 2)} ({one.missing_bytes:,} bytes) more"
    if one.what == "sequence":
        return f"a sequence of {int(one.share * work.sequence)} tokens"
    if one.what == "batch":
        return f"a micro-batch of {round(one.share * work.micro_batch)}"
    return f"{one.what}, which is lossy: --allow-lossy {one.what.removeprefix('codec ')}"


def _bill(forecast: Forecast, out: Console) -> None:
    _section("bytes, in GiB, of each place at its fullest", out)
    places = [place.name for place in forecast.places]
    sizes = {(line.category, line.place): line.size_bytes for line in forecast.bill}
    table = new_table("  category", *places)
    for category in CATEGORIES:
        row = [sizes.get((category, place), 0) for place in places]
        if any(row):
            table.add_row(f"  {category}", *(gib_cell(size) for size in row))
    table.add_row("  peak", *(gib_cell(place.peak_bytes) for place in forecast.places))
    table.add_row("  limit", *(gib_cell(place.capacity_bytes) for place in forecast.places))
    table.add_row("  margin", *(f"{place.margin_bytes / GiB:.3f}" for place in forecast.places))
    out.print(table)


def _actions(forecast: Forecast, out: Console) -> None:
    shares = class_shares(forecast.plan, forecast.problem)
    if shares:
        _section("what all blocks save for backward", out)
        table = new_table("  class", "GiB")
        table.add_column("of it", no_wrap=True)
        for one in shares:
            acted = [(words, size / max(1, one.size_bytes)) for words, size in one.actions]
            acted = sorted((one for one in acted if one[1] >= SOME), key=lambda one: -one[1])
            text = ", ".join(f"{words} {share:.0%}" for words, share in acted)
            table.add_row(f"  {one.tensor}", gib_cell(one.size_bytes), text)
        out.print(table)
    _lines("block by block", fold_activations(forecast.plan), out)
    _lines("weights, gradients, optimizer state", fold_states(forecast.plan), out)


def _lines(heading: str, lines: Sequence[Alike], out: Console) -> None:
    if not lines:
        return
    _section(heading, out)
    for line in lines[:_MOST_LINES]:
        out.print(f"  {_shortened(line)}: {line.text}")
    if len(lines) > _MOST_LINES:
        out.print(f"  and {len(lines) - _MOST_LINES} more ways; -o plan.json and --json have every block")


def _shortened(line: Alike) -> str:
    """``44 blocks (layers 1, 5-6 ... 76-77)`` where there are many stretches of blocks."""
    stretches = line.blocks.split(", ")
    if len(stretches) <= _MOST_STRETCHES:
        return line.blocks
    return f"{line.count} blocks ({', '.join(stretches[:2])} ... {stretches[-1]})"


def certificate_text(forecast: Forecast) -> str:
    """What is proved of the plan."""
    plan = forecast.plan
    if plan.status == "infeasible":
        return "proved: no plan of this job fits"
    if plan.status == "heuristic":
        return (
            f"not proved: the search ended after {plan.provenance.get('seconds', 0)} s without a bound; "
            "give --seconds more"
        )
    bound = f"proved: no plan of this job is more than {gap_text(plan.gap)} faster"
    found = plan.provenance.get("seconds", 0)
    return f"{bound} (status {plan.status}, by {plan.solver}, {found} s)"


def _certificate(forecast: Forecast, out: Console) -> None:
    _section("certificate", out)
    out.print(f"  {certificate_text(forecast)}")
    out.print("  bytes, queues and dependencies were checked by other code than the search's")
    out.print(f"  plan {forecast.plan.digest}, problem {forecast.plan.problem_digest}")


def _ablation(answer: Answer, out: Console) -> None:
    _section("the same job under other rules, which place the state of all blocks alike", out)
    step = answer.forecast.step_seconds
    table = new_table("  rule", "step", "against this plan")
    for row in answer.ablation:
        if row.step_seconds is None:
            table.add_row(f"  {row.name}", "does not fit", "")
        else:
            table.add_row(
                f"  {row.name}",
                seconds_text(row.step_seconds),
                f"{(row.step_seconds / step - 1) * 100:+.2f} %",
            )
    out.print(table)


def _targets(answer: Answer, out: Console) -> None:
    _section("to run it (--emit DIRECTORY writes the files)", out)
    for target in answer.targets:
        out.print(f"  {target.tool}, {target.filename}: {target.command}")
        for note in target.notes:
            out.print(f"    {note}")
    for why in answer.refused:
        out.print(f"  {why}")


def _sources(forecast: Forecast, out: Console) -> None:
    _section("sources", out)
    for fact in forecast.sources:
        value = "" if math.isnan(fact.value) else f" {fact.value:,.6g} {fact.unit}"
        out.print(f"  {fact.name}:{value}: {fact.source}")


def _section(heading: str, out: Console) -> None:
    out.print()
    out.print(heading)


def _grid() -> Table:
    return Table.grid(padding=(0, 2))


def new_table(first: str, *others: str) -> Table:
    """A table without lines: ``first`` is the column of names, ``others`` are columns of numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
