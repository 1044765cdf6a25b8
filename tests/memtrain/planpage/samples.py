"""Plans with round numbers for the page's tests, made without a solver."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

from memtrain.planner.compose import Fact
from memtrain.planner.forecast import BillLine
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import Codec, Problem
from memtrain.planner.ranges.plan import RangePlan, make_plan
from memtrain.planpage import Alternative, PageInput
from tests.planner.ranges.small import block, hop, place, problem, states, tensors

GIB = 1 << 30
Thing = TypeVar("Thing")
INT8 = Codec(
    name="int8",
    ratio=0.5,
    compress_bytes_per_second=1e12,
    decompress_bytes_per_second=1e12,
    error=1.0,
    places=("host",),
)


def chain(count: int = 8, *, chunks: int = 4, prefix: str = "layers.", capacity: int = 400) -> Problem:
    """Blocks of X (a GiB a chunk), A (a GiB) and O (4 GiB), with host and NVMe at 10 GiB/s, one slot."""
    bus = hop("pcie", 10.0 * GIB)
    sizes = tensors(chunks, x=GIB, a=GIB, o=4 * GIB, again=tuple(float(c) for c in range(1, chunks + 1)))
    held = states(("device",), ("host",), ("host",), sizes=(GIB, GIB, 6 * GIB))
    return problem(
        count,
        capacity * GIB,
        place("host", 400 * GIB, bus, cpu_bytes_per_second=50.0 * GIB),
        place("nvme", 4000 * GIB, bus, hop("disk", 5.0 * GIB)),
        blocks=tuple(block(i, name=f"{prefix}{i}", classes=sizes, states=held) for i in range(count)),
        staging="host",
        codecs=(INT8,),
        error_budget=1.0,
    )


def decided(one: Problem, **fields: Any) -> RangePlan:
    """X to the host; of A half of the chunks recomputed, half kept; of O half compressed, half to NVMe.

    The last block, which nothing leaves, keeps what others send. The CPU updates.
    """
    formulated = formulate(one)
    counts: dict[int, int] = {}
    for row, classes in zip(formulated.choices.counts, (b.classes for b in one.blocks), strict=True):
        for tensor, chosen, (first, second) in zip(
            classes,
            row,
            (("swap:host",) * 2, ("recompute", "keep"), ("compress:int8", "swap:nvme")),
            strict=True,
        ):
            by_label = {action.label: variable for action, variable in chosen.items()}
            for label, count in ((first, tensor.chunks // 2), (second, tensor.chunks - tensor.chunks // 2)):
                variable = by_label.get(label, by_label["keep"])
                counts[variable] = counts.get(variable, 0) + count
    for updated, placed in zip(formulated.states.updated, formulated.states.placed, strict=True):
        counts |= {variable: 1 for update, variable in updated.items() if update.label == "cpu-ahead"}
        counts |= {
            variable: 1
            for where, variable in placed.items()
            if where.update.label == "cpu-ahead" and where.place in ("host", where.state.places[0])
        }
    proved = {"status": "gap", "lower_bound_seconds": 50.0, "gap": 0.05, "solver": "by hand"}
    return make_plan(formulated, formulated.decisions(counts), **(proved | fields))


def page_of(one: Problem, plan: RangePlan, **changes: Any) -> PageInput:
    """With figures that are found again in the text."""
    fields: dict[str, Any] = {
        "title": "a model on a machine",
        "problem": one,
        "plan": plan,
        "step_seconds": plan.step_seconds,
        "unlimited_seconds": plan.step_seconds / 1.25,
        "tokens_per_second": 12_345.6,
        "mfu": 0.4321,
        "bill": (
            BillLine(category="saved tensors", place="device", size_bytes=3 * GIB),
            BillLine(category="weights", place="device", size_bytes=2 * GIB),
            BillLine(category="optimizer state", place="host", size_bytes=48 * GIB),
        ),
        "sources": (
            Fact(name="bus: read", value=25e9, unit="bytes/s", source="https://example.org/bus (peak)"),
            Fact(name="model: layers", value=math.nan, unit="", source="config.json"),
        ),
        "ablation": (
            Alternative(name="keep all", step_seconds=math.inf, why_not="device short by 3.000 GiB"),
            Alternative(name="recompute all", step_seconds=plan.step_seconds * 1.1),
        ),
        "command": "torchrun --standalone -m memtrain.train <recipe> && echo",
    }
    return PageInput(**(fields | changes))


def sample(**changes: Any) -> PageInput:
    """Eight blocks."""
    one = chain()
    return page_of(one, decided(one), **changes)


def changed(thing: Thing, **fields: Any) -> Thing:
    """The plan, or a part of it, with other fields."""
    return dataclasses.replace(thing, **fields)  # type: ignore[type-var]
