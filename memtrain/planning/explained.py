"""``--explain BLOCK`` as text: what every other choice would cost there."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from memtrain.planner.explain import ActionCost, ClassReport, Explanation, Neighbour, StateReport
from memtrain.planner.units import format_gib
from memtrain.planpage.words import action_text, seconds_text, share_text


def show_explanation(found: Explanation, out: Console) -> None:
    """The block, what binds, and a table for each class of tensors."""
    out.print()
    out.print(f"why {found.block} is planned as it is")
    forward, backward = seconds_text(found.forward_seconds), seconds_text(found.backward_seconds)
    waits = [f"{seconds_text(idle)} before {way}" for way, idle in found.waits if idle > 0]
    waited = ", ".join(waits) or "for nothing"
    out.print(f"  forward {forward}, backward {backward}; the device waits {waited}")
    busy = ", ".join(f"{resource} {share_text(share)}" for resource, share in found.busy)
    out.print(f"  busy, of the step: {busy}")
    binding = [
        f"{full.place} ({format_gib(full.size_bytes, 2)} of {format_gib(full.capacity_bytes, 2)}, "
        f"{full.position})"
        for full in found.binding
    ]
    out.print(f"  full: {', '.join(binding) or 'no place; time alone decides'}")
    for report in found.classes:
        _class(report, out)
    for state in found.states:
        _state(state, out)


def _class(report: ClassReport, out: Console) -> None:
    planned = ", ".join(
        f"{action_text(action)} {chunks}/{report.chunks}" for action, chunks in report.planned
    )
    out.print(f"  {report.tensor}, {format_gib(report.total_bytes, 3)}, planned: {planned}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("    action", no_wrap=True)
    for name in ("on the device", "arithmetic", "transfers", "one chunk more", "all chunks"):
        table.add_column(name, no_wrap=True)
    changes: dict[str, list[Neighbour]] = defaultdict(list)
    for neighbour in report.neighbours:
        changes[neighbour.action_after].append(neighbour)
    for cost in report.costs:
        table.add_row(*_row(report, cost, changes[cost.action]))
    out.print(table)


def _state(report: StateReport, out: Console) -> None:
    planned = ", ".join(f"{place} {pieces}" for place, pieces in report.planned)
    size = format_gib(report.piece_bytes * sum(pieces for _, pieces in report.planned), 3)
    out.print(f"  {report.state}, {size} updated {report.update}, pieces planned: {planned}")
    for change in report.neighbours:
        out.print(
            f"    {change.chunks} from {change.action_before} to {change.action_after}: {_change(change)}"
        )


def _row(report: ClassReport, cost: ActionCost, changes: list[Neighbour]) -> tuple[str, ...]:
    transfers = ", ".join(f"{queue} {seconds_text(seconds)}" for queue, seconds in cost.transfer_seconds)
    one = [n for n in changes if n.chunks == 1]
    rest = [n for n in changes if n.chunks > 1 and n.chunks == dict(report.planned)[n.action_before]]
    return (
        f"    {action_text(cost.action)}",
        format_gib(cost.device_bytes),
        seconds_text(cost.arithmetic_seconds) if cost.arithmetic_seconds else "-",
        transfers or "-",
        _change(min(one, key=_rank)) if one else "-",
        _change(min(rest, key=_rank)) if rest else "-",
    )


def _rank(change: Neighbour) -> tuple[bool, float]:
    return bool(change.broken), change.added_seconds


def _change(change: Neighbour) -> str:
    added = "step unchanged"
    if abs(change.added_seconds) >= 1e-9:
        sign = "+" if change.added_seconds > 0 else "-"
        added = f"step {sign}{seconds_text(abs(change.added_seconds))}"
    if not change.broken:
        return added
    row, lacking = max(change.broken, key=lambda item: item[1])
    missing = f"{lacking:.4g}" if row == "error budget" else format_gib(int(lacking))
    return f"{added}, but {row} lacks {missing}"
