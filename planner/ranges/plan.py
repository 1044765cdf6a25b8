"""The answer: per block and class contiguous ranges of chunks with an action each, per block places of state.

A plan is canonical JSON with a hash: the same inputs and the same decisions give the same bytes. How long the
search took, and what its phases reached, is provenance: written beside the plan, never hashed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from memtrain.planner.canonical import plain, read_signed_plan, short_digest, signed_plan
from memtrain.planner.ranges.formulate import Decisions, Formulated
from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.simulate import Event, PartTime, Peak, simulate

PLAN_VERSION = 2
TIME_DIGITS = 9
"""Of seconds in the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Chunks ``start`` to ``stop`` (exclusive) of one class share an action."""

    tensor: str
    start: int
    stop: int
    action: str
    """As ``choices.Action.label``: ``keep``, ``swap:PLACE``, ``compress-swap:CODEC:PLACE`` ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Pieces of one class of state, under one way to update, in one place between steps."""

    state: str
    update: str
    """``device-ahead``, ``cpu-in-backward`` ..."""
    place: str
    pieces: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlan:
    """All that is decided about one block."""

    name: str
    ranges: tuple[Range, ...]
    """Class by class, from the first chunk to the last."""
    updates: tuple[tuple[str, int], ...] = ()
    """Pieces by way to update."""
    held: tuple[Held, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """A limit that holds the smallest plan back: were it a little wider, less would be missing."""

    limit: str
    """``device``, a place, or ``bytes written to`` a place."""
    position: str
    """``forward layers.3``, ``backward layers.3`` or ``step``."""
    size_bytes: int
    """What the smallest plan puts there."""
    limit_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Relaxation:
    """One change that alone makes an impossible problem possible."""

    what: str
    """``device``, a place, ``bytes written to`` a place, ``codec NAME``, ``batch`` or ``sequence``."""
    missing_bytes: int = 0
    """More of a limit: how many bytes."""
    share: float = 1.0
    """Of the batch or the sequence, the largest that fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RangePlan:
    """Decisions, the predicted step, and what is proved about it."""

    status: str
    """``optimal`` (within the wanted gap), ``gap`` (proved, but above it), ``heuristic`` (nothing proved) or
    ``infeasible`` (the plan is that of the smallest device memory or, where no device is large enough, that
    which exceeds all limits together by the least)."""
    step_seconds: float
    lower_bound_seconds: float
    gap: float
    """``(step - lower bound) / step``."""
    solver: str
    blocks: tuple[BlockPlan, ...]
    events: tuple[Event, ...]
    """Of every part once."""
    parts: tuple[PartTime, ...]
    """Their sum, each as often as it takes place, is the step."""
    peaks: tuple[Peak, ...]
    moved_bytes: int
    relaxations: tuple[Relaxation, ...] = ()
    """Infeasible only, the cheapest first."""
    binding: tuple[Binding, ...] = ()
    """Infeasible only: the limits that conflict, in the plan that needs the least more."""
    problem_digest: str = ""
    version: int = PLAN_VERSION
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)
    """``seconds`` and ``phases`` of the search."""

    @property
    def digest(self) -> str:
        """Hash of all but the provenance."""
        return short_digest(self._hashed())

    def to_json(self) -> str:
        """The canonical document."""
        return signed_plan(self, self._hashed())

    @classmethod
    def from_json(cls, text: str) -> RangePlan:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: not a plan, another version, unknown keys, or a hash that does not match.
        """
        return read_signed_plan(text, PLAN_VERSION, _plan_of)

    def _hashed(self) -> dict[str, Any]:
        return {
            f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "provenance"
        }


def _plan_of(data: dict[str, Any]) -> RangePlan:
    data["blocks"] = tuple(
        BlockPlan(
            name=one["name"],
            ranges=tuple(Range(**r) for r in one["ranges"]),
            updates=tuple((label, count) for label, count in one["updates"]),
            held=tuple(Held(**h) for h in one["held"]),
        )
        for one in data["blocks"]
    )
    for name, kind in (
        ("events", Event),
        ("parts", PartTime),
        ("peaks", Peak),
        ("relaxations", Relaxation),
        ("binding", Binding),
    ):
        data[name] = tuple(kind(**item) for item in data[name])
    return RangePlan(**data)


def problem_digest(problem: Problem) -> str:
    """Hash of the problem's canonical form."""
    return short_digest(plain(problem))


def blocks_of(formulated: Formulated, decisions: Decisions) -> tuple[BlockPlan, ...]:
    """Counts realised as contiguous ranges: actions follow each other as ``choices.actions`` lists them."""
    x = formulated.form.complete(decisions)
    found = []
    for index, block in enumerate(formulated.problem.blocks):
        ranges = []
        for tensor, chosen in zip(block.classes, formulated.choices.counts[index], strict=True):
            start = 0
            for action, variable in chosen.items():
                count = int(x[variable])
                if count:
                    ranges.append(
                        Range(tensor=tensor.name, start=start, stop=start + count, action=action.label)
                    )
                    start += count
        updated = formulated.states.updated[index]
        placed = formulated.states.placed[index]
        found.append(
            BlockPlan(
                name=block.name,
                ranges=tuple(ranges),
                updates=tuple((u.label, int(x[v])) for u, v in updated.items() if x[v]),
                held=tuple(
                    Held(state=p.state.name, update=p.update.label, place=p.place, pieces=int(x[v]))
                    for p, v in placed.items()
                    if x[v]
                ),
            )
        )
    return tuple(found)


def make_plan(formulated: Formulated, decisions: Decisions, **fields: Any) -> RangePlan:
    """The plan of ``decisions``: simulated, with ``fields`` of ``RangePlan`` for what is proved."""
    timeline = simulate(formulated, decisions)
    return RangePlan(
        step_seconds=round(timeline.step_seconds, TIME_DIGITS),
        blocks=blocks_of(formulated, decisions),
        events=tuple(_rounded(event) for event in timeline.events),
        parts=tuple(_rounded(part) for part in timeline.parts),
        peaks=timeline.peaks,
        moved_bytes=timeline.moved_bytes,
        problem_digest=problem_digest(formulated.problem),
        **fields,
    )


Timed = TypeVar("Timed", Event, PartTime)


def _rounded(one: Timed) -> Timed:
    return dataclasses.replace(
        one,
        start_seconds=round(one.start_seconds, TIME_DIGITS),
        end_seconds=round(one.end_seconds, TIME_DIGITS),
    )
