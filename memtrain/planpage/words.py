"""Numbers with their units, and decisions in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.plan import Range
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


def names_text(names: Sequence[str]) -> str:
    """``layers.2``, or ``layers.2 to layers.77 (76)``."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
