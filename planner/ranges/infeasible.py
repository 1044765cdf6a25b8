"""When nothing fits: the smallest plan, the limits that hold it back, and what single changes would help."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from memtrain.planner.ranges.formulate import Decisions, Formulated, formulate
from memtrain.planner.ranges.highs import Solver
from memtrain.planner.ranges.model import DEVICE, Codec, Problem
from memtrain.planner.ranges.plan import Binding, Relaxation
from memtrain.planner.ranges.program import build, limit_of, rounded
from memtrain.planner.ranges.smaller import fewer_sequences, shortened
from memtrain.planner.ranges.terms import Row, Unit

PROGRAM_SECONDS = 5.0
"""For one program of least shortage; most take less than one."""
SHORTAGE_GAP = 1e-3
"""Of the bytes that are missing, which are told to a hundredth of a GiB. With state in 64 pieces, Llama-3-8B
and 70B on a GPU too small, it is reached in 0.05 to 1 s; 1e-4 is not reached in 5 s, and what is found until
then is smaller by less than a thousandth of the shortage, or no smaller."""
SHORT = 1e-6
"""Of the device: the solver's tolerance, below which a shortage is none."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """The least by which some limits must grow together, and the plan that then fits."""

    missing: dict[str, int]
    """Bytes by limit."""
    decisions: Decisions
    binding: tuple[Binding, ...]


def limits(formulated: Formulated) -> tuple[str, ...]:
    """What can be too small: the device, the places, and what may be written to them."""
    return tuple(dict.fromkeys(limit_of(row.name) for row in _byte_rows(formulated)))


def least_shortage(formulated: Formulated, growing: str | Sequence[str]) -> Shortage | None:
    """The least bytes by which the limit ``growing`` alone, or these together, must grow.

    None when no growth helps, or none was found in ``PROGRAM_SECONDS``.
    """
    solver = Solver(build(formulated, shortage_of=growing))
    deadline = time.monotonic() + PROGRAM_SECONDS
    if not solver.relaxed(PROGRAM_SECONDS, anew=True).solved:
        return None
    return _in_whole_numbers(formulated, solver, growing, deadline)


def _in_whole_numbers(
    formulated: Formulated, solver: Solver, growing: str | Sequence[str], deadline: float
) -> Shortage | None:
    """The same, from the relaxation that ``solver`` holds."""
    names = solver.binding()
    found = solver.solve(deadline - time.monotonic(), SHORTAGE_GAP)
    if not found.solved:
        return None
    decisions = rounded(formulated, found.values)
    missing = dict.fromkeys((growing,) if isinstance(growing, str) else growing, 0)
    rows = {row.name: row for row in _byte_rows(formulated)}
    for name, over in formulated.excess(decisions).items():
        limit = limit_of(name)
        if name not in rows or limit not in missing:
            return None
        missing[limit] = max(missing[limit], int(over))
    x = formulated.form.complete(decisions)
    return Shortage(missing, decisions, tuple(_binding(rows[name], x) for name in names))


def _byte_rows(formulated: Formulated) -> Iterator[Row]:
    return (row for row in formulated.form.rows if row.unit is Unit.BYTES)


def _binding(row: Row, x: Sequence[float]) -> Binding:
    position, _, place = row.name.rpartition(" on ")
    return Binding(
        limit=place,
        position=position or "step",
        size_bytes=int(row.expression.value(x)),
        limit_bytes=int(row.limit),
    )


def smallest(formulated: Formulated) -> Shortage | None:
    """The plan that needs the least more of the device or, where none does, the least more of all limits."""
    return least_shortage(formulated, DEVICE) or least_shortage(formulated, limits(formulated))


def relaxations(problem: Problem, offered: tuple[Codec, ...], deadline: float) -> Iterator[Relaxation]:
    """Single changes that make ``problem`` possible: bytes, the fewest first; codecs; sequences; tokens.

    Args:
        problem: in which nothing fits.
        offered: codecs that the user has not allowed, and might.
        deadline: monotonic time after which no further change is looked at.
    """
    formulated = formulate(problem)
    short = []
    for name in limits(formulated):
        answer = least_shortage(formulated, name) if time.monotonic() < deadline else None
        if answer is not None:
            short.append(Relaxation(what=name, missing_bytes=answer.missing[name]))
    yield from sorted(short, key=lambda r: r.missing_bytes)
    for codec in offered:
        if time.monotonic() < deadline and fits(_with_codec(problem, codec)):
            yield Relaxation(what=f"codec {codec.name}")
    batch = _largest(problem.sequences, lambda n: fewer_sequences(problem, n), deadline)
    if batch:
        yield Relaxation(what="batch", share=batch / problem.sequences)
    chunks = max((t.chunks for b in problem.blocks for t in b.classes), default=1)
    left = _largest(chunks, lambda n: shortened(problem, n, chunks), deadline)
    if left:
        yield Relaxation(what="sequence", share=left / chunks)


def _with_codec(problem: Problem, codec: Codec) -> Problem:
    """Allowed for everything that may be compressed."""
    known = {p.name for p in problem.machine.places}
    allowed = replace(codec, places=tuple(p for p in codec.places if p in known))
    budget = max(codec.error, problem.error_budget)
    return replace(problem, codecs=(*problem.codecs, allowed), error_budget=budget)


def fits(problem: Problem) -> bool:
    """Whether any decisions were found that fit; where even the relaxation is short, none is looked for."""
    formulated = formulate(problem)
    solver = Solver(build(formulated, shortage_of=DEVICE))
    deadline = time.monotonic() + PROGRAM_SECONDS
    vertex = solver.relaxed(PROGRAM_SECONDS, anew=True)
    short = SHORT * problem.machine.device_capacity_bytes / solver.program.byte_scale
    if not vertex.solved or vertex.bound > short:
        return False
    answer = _in_whole_numbers(formulated, solver, DEVICE, deadline)
    return answer is not None and answer.missing[DEVICE] == 0


def _largest(most: int, smaller: Callable[[int], Problem], deadline: float) -> int:
    """The largest number below ``most`` whose problem fits; 0 when not even that of 1 does."""
    low, high = 0, most
    while high - low > 1 and time.monotonic() < deadline:
        middle = (low + high) // 2
        if fits(smaller(middle)):
            low = middle
        else:
            high = middle
    return low
