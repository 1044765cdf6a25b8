"""Whole counts from the relaxation at once: what rounding one block takes away, the next blocks give back.

Error diffusion (Floyd and Steinberg 1976 do it to pictures): blocks are rounded in order, and each count's
rounding error is carried to the same count of the next block. Sums over any run of blocks, which is what
memory rows and queues see, then stay within a unit or so of the relaxation's, however many blocks there are.
It takes milliseconds where a dive takes seconds, and what it loses falls with the size of a unit: of a step
of llama-3-70b on 8 A800 5 % with state in 8 pieces a block, 1.2 % with 32, 0.3 % with 64, 0.2 % with 128.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from memtrain.planner.ranges.formulate import Decisions, Formulated
from memtrain.planner.ranges.highs import Found, Solver
from memtrain.planner.ranges.program import limit_of

TRIES = 12
"""Roundings, each with less room than the one before: one to five fit the families of
benchmarks/plan_solver.py, at 10 to 50 ms each."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Counts of one block that add up: to ``total``, or to the count of the variable ``total_of``."""

    names: tuple[Hashable, ...]
    """The same in every block."""
    variables: tuple[int, ...]
    total: int = 0
    total_of: int | None = None


def diffused(formulated: Formulated, values: Sequence[float]) -> Decisions:
    """Whole counts near the fractional ``values`` (by variable); every group of counts adds up as it must.

    Memory rows may be exceeded by some units.
    """
    error: dict[Hashable, float] = {}
    counts: dict[int, int] = {}
    for group in _groups(formulated):
        total = group.total if group.total_of is None else counts[group.total_of]
        pairs = list(zip(group.names, group.variables, strict=True))
        wanted = [values[variable] + error.get(name, 0.0) for name, variable in pairs]
        for (name, variable), count in zip(pairs, rounded_to(wanted, total), strict=True):
            counts[variable] = count
            error[name] = error.get(name, 0.0) + values[variable] - count
    return formulated.decisions(counts)


def fitting(formulated: Formulated, solver: Solver, vertex: Found, deadline: float) -> Decisions | None:
    """Whole counts near the relaxation ``vertex`` of ``solver`` that fit, or None where none were found.

    Where a rounding exceeds a place or the error budget, the relaxation is solved again with that much less
    room everywhere in the place: one that is too full at one position would be at another, were that one
    alone to get less. A place that is exceeded again gets twice as much less each time, for a rounding may
    stay the same until the room has shrunk by the bytes of a chunk. Limits are given back in the end.
    """
    now, found = vertex, None
    times: Counter[str] = Counter()
    for _ in range(TRIES):
        decisions = diffused(formulated, now.values)
        over = formulated.excess(decisions)
        if not over:
            found = decisions
            break
        worst: dict[str, float] = {}
        for row, amount in over.items():
            worst[limit_of(row)] = max(amount, worst.get(limit_of(row), 0.0))
        for name in solver.program.limits:
            if limit_of(name) in worst:
                solver.tighten(name, worst[limit_of(name)] * 2 ** times[limit_of(name)])
        times.update(worst.keys())
        now = solver.relaxed(deadline - time.monotonic())
        if not now.solved:
            break
    solver.loosen()
    return found


def rounded_to(wanted: Sequence[float], total: int) -> list[int]:
    """Counts of at least 0 that add up to ``total``, as near to ``wanted`` as whole numbers come."""
    counts = [max(0, math.floor(value + 1e-9)) for value in wanted]
    indices = range(len(counts))
    while sum(counts) < total:
        counts[max(indices, key=lambda i: wanted[i] - counts[i])] += 1
    while sum(counts) > total:
        counts[min((i for i in indices if counts[i]), key=lambda i: wanted[i] - counts[i])] -= 1
    return counts


def _groups(formulated: Formulated) -> Iterator[_Group]:
    """Block by block: ways to update, places of each class of state under each, then classes of tensors."""
    states = formulated.states
    for index, block in enumerate(formulated.problem.blocks):
        updated = states.updated[index]
        if updated:
            labels = tuple(("update", update.label) for update in updated)
            yield _Group(labels, tuple(updated.values()), total=block.pieces)
        placed: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for placement, variable in states.placed[index].items():
            key = placement.state.name, placement.update.label
            placed.setdefault(key, []).append((placement.place, variable))
        ways = {update.label: variable for update, variable in updated.items()}
        for (state, way), places in placed.items():
            names = tuple(("state", state, way, place) for place, _ in places)
            yield _Group(names, tuple(variable for _, variable in places), total_of=ways[way])
        for tensor, chosen in zip(block.classes, formulated.choices.counts[index], strict=True):
            actions = tuple(("tensor", tensor.name, action.label) for action in chosen)
            yield _Group(actions, tuple(chosen.values()), total=tensor.chunks)
