"""From a program to decisions and a bound: relaxation, dive, neighbourhood, and the whole if time is left.

1. The linear relaxation gives the bound; its vertex has a few fractional counts per block. ``diffuse`` rounds
   all of it at once, a good plan after milliseconds.
2. The dive rounds block after block and solves the relaxation again after each, so that later blocks make up
   for what rounding cost earlier ones (relax-and-fix). In a block coarse chunks come first and fine ones make
   up for them; of three roundings the cheapest is held. That took the gap of the hardest family of
   benchmarks/plan_solver.py from 0.37 to 0.06 %. Where every rounding of a class is infeasible it is left
   open; a small program over what is open ends the dive.
3. The neighbourhood: every integer between floor and ceiling of the relaxation (RENS).
4. The whole program, from the best decisions, until the gap is reached or time is up.

Everything found is judged by the simulator in whole bytes; where the solver's tolerances let a solution slip
over a limit, the limit is lowered by as much for what is tried next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from memtrain.planner.ranges.diffuse import fitting
from memtrain.planner.ranges.formulate import Decisions, Formulated
from memtrain.planner.ranges.highs import Found, Solver
from memtrain.planner.ranges.program import build, rounded
from memtrain.planner.ranges.simulate import step_seconds

OPEN_BLOCKS = 8
"""Blocks that the dive leaves to its closing program."""
BATCH_BLOCKS = 8
"""Rounded at once where that is cheap; a relaxation takes 5 to 30 ms, and a dive would need one per class."""
CHEAP_SHARE = 0.1
"""Of the gap, what all roundings together may cost that are held without comparing. At 0.5 a dive is a third
faster, and one of six families missed the gap of 0.1 % both ways and needed the whole program."""
CLOSING_SECONDS = 1.0
"""For the program over what a dive leaves open; with eight blocks it takes 0.1 to 0.3 s."""
REOPENED_BLOCKS = (0, 8, 24)
"""Where the program over what is open has no solution, as many more blocks are opened again."""
ROUNDINGS = 3
"""Tried per class; where none is feasible the class is left open."""

Group = tuple[tuple[int, ...], int | None]
"""Counts that add up, and to what; None where that is decided by an earlier group."""


@dataclass(slots=True)
class Answer:
    """What was found and proved."""

    bound_seconds: float = 0.0
    """No decisions take less; inf when none fit."""
    decisions: Decisions = ()
    """The best."""
    step_seconds: float = math.inf
    """inf when none were found."""
    phases: list[str] = field(default_factory=list)
    """What each phase reached, for the record."""


class Search:
    """One problem, its best decisions and its bound."""

    def __init__(
        self,
        formulated: Formulated,
        start: Decisions | None,
        gap: float,
        deadline: float,
        report: Callable[[Answer], None] | None,
    ) -> None:
        self.formulated, self.gap, self.deadline, self._report = formulated, gap, deadline, report
        self.answer = Answer()
        self.tightened = False
        self.program = build(formulated)
        self.solver = Solver(self.program)
        if start is not None:
            self.offer(start)

    def left(self) -> float:
        """Seconds until the deadline (monotonic clock)."""
        return self.deadline - time.monotonic()

    def offer(self, decisions: Decisions) -> None:
        """Take ``decisions`` if they fit and are better."""
        if self.formulated.excess(decisions):
            return
        seconds = step_seconds(self.formulated, decisions)
        if seconds < self.answer.step_seconds:
            self.answer.decisions, self.answer.step_seconds = decisions, seconds

    def done(self) -> bool:
        """Whether the gap is reached, or time is up."""
        target = self.answer.step_seconds * (1 - self.gap)
        return self.answer.bound_seconds >= target or self.left() <= 0

    def prove(self, objective: float) -> None:
        """A lower bound of the objective is one of the step, but for the tie-break."""
        bound = objective - self.program.tie_break_seconds if math.isfinite(objective) else objective
        self.answer.bound_seconds = max(self.answer.bound_seconds, bound)

    def note(self, phase: str) -> None:
        """Record and report what a phase has reached."""
        best, bound = self.answer.step_seconds, self.answer.bound_seconds
        gap = 1 - bound / best if math.isfinite(best) and best > 0 else math.inf
        self.answer.phases.append(f"{phase}: gap {gap:.6f}, {self.left():.1f} s left")
        if self._report:
            self._report(self.answer)

    def take(self, found: Found) -> None:
        """Offer what the solver found; where its tolerances let it slip over a limit, lower that limit.

        What is found from then on is rightly no bound of the problem, and not taken for one.
        """
        if not found.solved:
            return
        decisions = rounded(self.formulated, found.values)
        for name, over in self.formulated.excess(decisions).items():
            if name in self.program.limits:
                self.solver.tighten(name, over)
                self.tightened = True
        self.offer(decisions)

    def start(self) -> dict[int, int]:
        """The best decisions by variable."""
        if math.isinf(self.answer.step_seconds):
            return {}
        return dict(zip(self.formulated.form.integers, self.answer.decisions, strict=True))


def search(
    formulated: Formulated,
    start: Decisions | None,
    *,
    gap: float,
    seconds: float,
    whole: bool = True,
    report: Callable[[Answer], None] | None = None,
) -> Answer:
    """Decisions and bound.

    Args:
        formulated: what is decided.
        start: decisions to begin with, if any are known.
        gap: at which to stop, as a part of the step.
        seconds: of wall clock; HiGHS looks at its clock between steps of its own and may overrun.
        whole: whether to end with the whole program.
        report: called with the answer so far after every phase.
    """
    state = Search(formulated, start, gap, time.monotonic() + seconds, report)
    vertex = state.solver.relaxed(state.left(), anew=True)
    state.prove(vertex.bound)
    state.note("relaxation")
    if not vertex.solved or state.done():
        return state.answer
    rounded_whole = fitting(formulated, state.solver, vertex, state.deadline)
    if rounded_whole is not None:
        state.offer(rounded_whole)
    state.note("diffusion")
    for back in (False, True):
        if not state.done():
            _dive(state, vertex, back=back)
            state.note("dive back" if back else "dive")
    if not state.done():
        _near(state, vertex.values)
        state.note("neighbourhood")
    if whole and not state.done():
        state.solver.release()
        found = state.solver.solve(state.left(), gap / 2, state.start())
        if not state.tightened:
            state.prove(found.bound)
        state.take(found)
        state.note(f"whole ({found.status})")
    return state.answer


def _groups(formulated: Formulated) -> list[list[Group]]:
    """By block: ways to update, places of state, then classes, coarse chunks before fine ones."""
    found: list[list[Group]] = []
    states = formulated.states
    for index, block in enumerate(formulated.problem.blocks):
        groups: list[Group] = []
        if states.updated[index]:
            groups.append((tuple(states.updated[index].values()), block.pieces))
        by_class: dict[tuple[str, str], list[int]] = {}
        for p, variable in states.placed[index].items():
            by_class.setdefault((p.state.name, p.update.label), []).append(variable)
        groups += [(tuple(variables), None) for variables in by_class.values()]
        pairs = zip(block.classes, formulated.choices.counts[index], strict=True)
        for tensor, chosen in sorted(pairs, key=lambda pair: -pair[0].chunk_bytes):
            groups.append((tuple(chosen.values()), tensor.chunks))
        found.append(groups)
    return found


def _dive(state: Search, vertex: Found, *, back: bool) -> None:
    """Round block after block, from the first on or ``back`` from the last; see the module's description."""
    groups = _groups(state.formulated)
    order = (groups[::-1] if back else groups)[: max(0, len(groups) - OPEN_BLOCKS)]
    # What rounding one class may cost with no look at other roundings: all together a small part of the gap.
    allowance = CHEAP_SHARE * state.gap * vertex.objective / max(1, sum(map(len, groups)))
    now = vertex
    for first in range(0, len(order), BATCH_BLOCKS):
        now = _round_blocks(state, now, order[first : first + BATCH_BLOCKS], allowance)
        if state.left() <= 0:
            break
    else:
        _close(state, order)
    state.solver.release()


def _close(state: Search, order: list[list[Group]]) -> None:
    """Solve over what the dive left open; while that is infeasible, over more and more of its last blocks."""
    own = state.solver.program.variables
    for more in REOPENED_BLOCKS:
        again = [
            v for block in order[len(order) - min(more, len(order)) :] for group, _ in block for v in group
        ]
        state.solver.hold({v: (own[v].lowBound, own[v].upBound) for v in again})
        found = state.solver.solve(min(CLOSING_SECONDS, state.left()), state.gap / 2)
        state.take(found)
        if found.solved or state.left() <= 0:
            return


def _round_blocks(state: Search, now: Found, blocks: list[list[Group]], allowance: float) -> Found:
    """All blocks at once if that is cheap, else in halves, and a single block group by group."""
    together = _all_at_once(state, now, [group for block in blocks for group in block], allowance)
    if together is not None:
        return together
    if len(blocks) > 1:
        half = len(blocks) // 2
        now = _round_blocks(state, now, blocks[:half], allowance)
        return _round_blocks(state, now, blocks[half:], allowance)
    for group in blocks[0]:
        now = _round(state, now, group, allowance)
    return now


def _all_at_once(state: Search, now: Found, batch: list[Group], allowance: float) -> Found | None:
    """The relaxation with the nearest rounding of a whole batch, if it is cheap enough."""
    solver = state.solver
    if any(total is None for _, total in batch):
        return None
    for variables, total in batch:
        assert total is not None
        nearest = next(_roundings([now.values[v] for v in variables], total))
        solver.hold({v: (n, n) for v, n in zip(variables, nearest, strict=True)})
    found = solver.relaxed(state.left())
    if found.objective <= now.objective + allowance * len(batch):
        return found
    own = solver.program.variables
    solver.hold({v: (own[v].lowBound, own[v].upBound) for variables, _ in batch for v in variables})
    return None


def _round(state: Search, now: Found, group: Group, allowance: float) -> Found:
    """Hold one group at the first rounding that is cheap enough, or the cheapest; what is relaxed then."""
    solver, (variables, fixed) = state.solver, group
    here = [now.values[v] for v in variables]
    total = round(sum(here)) if fixed is None else fixed
    best, held = None, solver.around(now.values, variables)
    for candidate in _roundings(here, total):
        bounds = {v: (n, n) for v, n in zip(variables, candidate, strict=True)}
        solver.hold(bounds)
        if all(abs(value - n) < 1e-6 for value, n in zip(here, candidate, strict=True)):
            return now
        found = solver.relaxed(state.left())
        if found.solved and (best is None or found.objective < best.objective):
            best, held = found, bounds
            if found.objective <= now.objective + allowance:
                return found
    solver.hold(held)
    return best or now


def _roundings(values: Sequence[float], total: int) -> Iterator[tuple[int, ...]]:
    """Integer counts next to ``values`` that add up to ``total``, the nearest first."""
    floors = [math.floor(v + 1e-6) for v in values]
    missing = total - sum(floors)
    takers = sorted(
        (i for i, v in enumerate(values) if v - floors[i] > 1e-6), key=lambda i: floors[i] - values[i]
    )
    for first in range(max(1, min(ROUNDINGS, len(takers)))):
        counts = list(floors)
        for position in range(missing):
            counts[takers[(first + position) % len(takers)]] += 1
        yield tuple(counts)


def _near(state: Search, vertex: Sequence[float]) -> None:
    """Every count between floor and ceiling of the relaxation (RENS), for a third of what time is left."""
    solver = state.solver
    solver.hold(solver.around(vertex, solver.integers))
    state.take(solver.solve(state.left() / 3, state.gap / 2))
    solver.release()
