"""Numbers with their units, and decisions in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from memtrain.planner.ranges.model import Problem, TensorClass
from memtrain.planner.ranges.plan import BlockPlan
from memtrain.planner.units import GiB


def seconds_text(seconds: float) -> str:
    """Four digits or so: ``123.4 s``, ``1.234 s``, ``12.3 ms``, ``45.6 µs``."""
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.1f} s" if seconds >= 100 else f"{seconds:.3f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def share_text(share: float) -> str:
    """``12.3 %``."""
    return f"{share * 100:.1f} %"


def gap_text(gap: float) -> str:
    """``0.084 %``: gaps are small."""
    return f"{gap * 100:.3f} %"


def gib_cell(size_bytes: int) -> str:
    """Of a table whose head says GiB; ``-`` for nothing."""
    return f"{size_bytes / GiB:.3f}" if size_bytes else "-"


def action_text(label: str) -> str:
    """``compress-swap:int8:host`` -> ``compress (int8), swap to host``."""
    kind, *rest = label.split(":")
    if kind == "swap":
        return f"swap to {rest[0]}"
    if kind == "compress":
        return f"compress ({rest[0]})"
    if kind == "compress-swap":
        return f"compress ({rest[0]}), swap to {rest[1]}"
    return "stay in slot" if kind == "slot" else kind


def class_names(problem: Problem) -> list[str]:
    """Every tensor class of any block, in the order of first mention."""
    return list(dict.fromkeys(tensor.name for block in problem.blocks for tensor in block.classes))


def class_text(decided: BlockPlan, tensor: TensorClass | None) -> str:
    """What happens to a class of a block: ``recompute 9/16, swap to host 7/16``, ``keep`` for all of it."""
    if tensor is None:
        return "-"
    parts = [
        action_text(part.action)
        if part.stop - part.start == tensor.chunks
        else f"{action_text(part.action)} {part.stop - part.start}/{tensor.chunks}"
        for part in decided.ranges
        if part.tensor == tensor.name
    ]
    return ", ".join(parts) or "-"


def held_text(decided: BlockPlan, state: str, pieces: int) -> str:
    """Where one class of a block's state lies: ``host 3/4, nvme 1/4``, or ``device`` for all of it."""
    counts: dict[str, int] = {}
    for entry in decided.held:
        if entry.state == state:
            counts[entry.place] = counts.get(entry.place, 0) + entry.pieces
    return _shares(counts, pieces)


def updates_text(decided: BlockPlan, pieces: int) -> str:
    """How a block is updated: ``cpu-ahead``, or ``cpu-ahead 3/4, device-ahead 1/4``."""
    return _shares(dict(decided.updates), pieces)


def _shares(counts: dict[str, int], of: int) -> str:
    parts = [name if count == of else f"{name} {count}/{of}" for name, count in counts.items()]
    return ", ".join(parts) or "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Alike:
    """Blocks that follow each other and of which the same is said."""

    indices: range
    cells: tuple[str, ...]


def folded_rows(problem: Problem, blocks: Sequence[BlockPlan]) -> tuple[list[str], list[Alike]]:
    """Head (after the block's name) and rows of the table of decisions, equal neighbours as one row."""
    classes = class_names(problem)
    states = list(dict.fromkeys(state.name for block in problem.blocks for state in block.states))
    rows = []
    for block, decided in zip(problem.blocks, blocks, strict=True):
        tensors = {tensor.name: tensor for tensor in block.classes}
        cells = [class_text(decided, tensors.get(name)) for name in classes]
        cells += [held_text(decided, name, block.pieces) for name in states]
        rows.append((*cells, *([updates_text(decided, block.pieces)] if states else [])))
    alike, start = [], 0
    for cells, group in groupby(rows):
        count = len(list(group))
        alike.append(Alike(indices=range(start, start + count), cells=cells))
        start += count
    return [*classes, *states, *(["update"] if states else [])], alike


def names_text(names: Sequence[str]) -> str:
    """``layers.2``, or ``layers.2 to layers.77 (76)``."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
