"""A plan of four layers and a head, written down by hand."""

from __future__ import annotations

from memtrain.planner.ranges.model import DEVICE
from memtrain.planner.ranges.plan import BlockPlan, Held, Range, RangePlan


def ranges(tensor: str, *parts: tuple[str, int]) -> tuple[Range, ...]:
    found, start = [], 0
    for action, count in parts:
        found.append(Range(tensor=tensor, start=start, stop=start + count, action=action))
        start += count
    return tuple(found)


def held(**places: dict[str, int]) -> tuple[Held, ...]:
    return tuple(
        Held(state=state, update="cpu-ahead", place=place, pieces=pieces)
        for state, where in places.items()
        for place, pieces in where.items()
    )


def plan(*blocks: BlockPlan) -> RangePlan:
    return RangePlan(
        status="gap",
        step_seconds=1.0,
        lower_bound_seconds=1.0,
        gap=0.0,
        solver="hand",
        blocks=blocks,
        events=(),
        parts=(),
        peaks=(),
        moved_bytes=0,
    )


def layer(index: int, swapped: int) -> BlockPlan:
    """X leaves; of O's 16 chunks 9 are computed again, some leave and the rest stays."""
    return BlockPlan(
        name=f"model.layers.{index}",
        ranges=(
            *ranges("X", ("swap:host", 16)),
            *ranges("A", ("swap:host", 16)),
            *ranges("O", ("recompute", 9), ("swap:nvme", swapped), ("keep", 7 - swapped)),
        ),
        updates=(("cpu-ahead", 4),),
        held=held(weights={DEVICE: 4}, gradients={"host": 4}, optimizer={"host": 3, "nvme": 1}),
    )


LAST = BlockPlan(
    name="model.layers.3",
    ranges=(*ranges("X", ("slot", 16)), *ranges("A", ("slot", 16)), *ranges("O", ("keep", 16))),
    updates=(("device-in-backward", 4),),
    held=held(weights={DEVICE: 4}, optimizer={DEVICE: 4}),
)
HEAD = BlockPlan(name="epilogue", ranges=(), updates=(("device-in-backward", 4),), held=LAST.held)
FOUR = plan(layer(0, 3), layer(1, 5), layer(2, 3), LAST, HEAD)
