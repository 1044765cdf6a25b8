"""Numbers with their units, and decisions in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from memtrain.planner.ranges.model import Problem, TensorClass
from memtrain.planner.ranges.plan import BlockPlan, Range
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


_SCALED = {"bytes": (GiB, "GiB"), "bytes/s": (1e9, "GB/s"), "FLOP/s": (1e12, "TFLOP/s")}


def quantity_text(value: float, unit: str) -> str:
    """A number of any unit, in the size that people read it; empty for one that is no number."""
    if math.isnan(value):
        return ""
    factor, name = _SCALED.get(unit, (1, unit))
    return f"{value / factor:,.6g} {name}".rstrip()


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


def resource_text(resource: str) -> str:
    """``write:pcie`` -> ``write pcie``."""
    return resource.replace(":", " ", 1)


def class_names(problem: Problem) -> list[str]:
    """Every tensor class of any block, in the order of first mention."""
    return list(dict.fromkeys(tensor.name for block in problem.blocks for tensor in block.classes))


def class_text(decided: BlockPlan, tensor: TensorClass | None) -> str:
    """What happens to a class of a block: ``recompute 9/16, swap to host 7/16``, ``keep`` for all of it."""
    if tensor is None:
        return "-"
    parts = [range_text(part, tensor.chunks) for part in decided.ranges if part.tensor == tensor.name]
    return ", ".join(parts) or "-"


def range_text(part: Range, chunks: int) -> str:
    """``swap to host 7/16``, or ``keep`` for all chunks."""
    count, text = part.stop - part.start, action_text(part.action)
    return text if count == chunks else f"{text} {count}/{chunks}"


def brief_texts(part: Range, chunks: int) -> tuple[str, ...]:
    """For ever less room: ``swap to host 7/16``, ``host 7/16``, ``7/16``."""
    _, *where = part.action.split(":")
    count = part.stop - part.start
    short = ", ".join(where) or action_text(part.action)
    return (
        range_text(part, chunks),
        short if count == chunks else f"{short} {count}/{chunks}",
        f"{count}/{chunks}",
    )


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
    rows: list[tuple[str, ...]] = []
    for block, decided in zip(problem.blocks, blocks, strict=True):
        tensors = {tensor.name: tensor for tensor in block.classes}
        cells = [class_text(decided, tensors.get(name)) for name in classes]
        cells += [held_text(decided, name, block.pieces) for name in states]
        cells += [updates_text(decided, block.pieces)] if states else []
        rows.append(tuple(cells))
    alike, start = [], 0
    for said, group in groupby(rows):
        count = len(list(group))
        alike.append(Alike(indices=range(start, start + count), cells=said))
        start += count
    return [*classes, *states, *(["update"] if states else [])], alike


def names_text(names: Sequence[str]) -> str:
    """``layers.2``, or ``layers.2 to layers.77 (76)``."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
