"""A problem as a formulation: decisions, jobs and positions, put together once for solver and simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memtrain.planner.ranges.choices import Choices
from memtrain.planner.ranges.ledger import Ledger
from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.schedule import schedule
from memtrain.planner.ranges.states import States
from memtrain.planner.ranges.terms import Formulation, Unit

Decisions = tuple[int, ...]
"""Counts of all integer variables of a formulation, in their order."""


@dataclass(frozen=True, slots=True)
class Formulated:
    """A problem with its formulation, and the variables by what they count."""

    problem: Problem
    form: Formulation
    choices: Choices
    states: States

    def decisions(self, counts: dict[int, int]) -> Decisions:
        """Decisions from the non-zero counts by variable."""
        return tuple(counts.get(variable, 0) for variable in self.form.integers)

    def excess(self, decisions: Sequence[int]) -> dict[str, float]:
        """Broken rows of ``decisions`` with what they lack: empty when everything fits."""
        x = self.form.complete(decisions)
        broken: dict[str, float] = {}
        for row in self.form.rows:
            value = row.expression.value(x)
            over = abs(value - row.limit) if row.equal else value - row.limit
            # Bytes and counts are exact; an error is a sum of fractions.
            if over > (1e-9 if row.unit is Unit.RATIO else 0):
                broken[row.name] = over
        return broken


def formulate(problem: Problem) -> Formulated:
    """Everything that can be decided, and what it costs.

    Raises:
        ValueError: a block has state that no allowed update can handle.
    """
    form = Formulation()
    choices, states = Choices(problem, form), States(problem, form)
    for block, updated in zip(problem.blocks, states.updated, strict=True):
        if block.states and not updated:
            raise ValueError(
                f"block {block.name}: none of the updates {[u.label for u in problem.updates]} can be done "
                f"in {problem.micro_batches} micro-batches with the places that its state may have; allow "
                "another update (several micro-batches need one ahead) or another place"
            )
    schedule(form, choices, states)
    Ledger(form, choices, states)
    return Formulated(problem, form, choices, states)
