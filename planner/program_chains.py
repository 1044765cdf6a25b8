"""Reads of one tier in the program: what must have come by when.

A pass needs reads in the order of its blocks, and slots bound how much of what it needs later may come
before. Each kind of traffic has slots of its own, so each makes a chain by itself, and all kinds together
make one more: the queue serves them one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pulp

from memtrain.planner.weight_choices import Expression

if TYPE_CHECKING:
    from memtrain.planner.choices import Choices


class ReadChains:
    """One tier's chains in one pass.

    Args:
        program: gets the rows.
        begin: when the pass begins.
        present: by kind of traffic, in seconds of the queue, the most that is there by then and is not read.
    """

    def __init__(self, program: Choices, begin: Expression, present: Mapping[str, Expression]) -> None:
        self._program = program
        kinds = tuple(present)
        self._sets = dict.fromkeys([*((kind,) for kind in kinds), kinds])
        self._ends = {s: begin - pulp.lpSum(present[kind] for kind in s) for s in self._sets}

    def come(
        self, kind: str, work: Expression, now: Expression | None, held: Mapping[str, Expression]
    ) -> list[pulp.LpVariable]:
        """When ``work`` has come, by each chain that it is part of.

        Args:
            kind: of traffic.
            work: seconds of the queue.
            now: a time at which no more than ``held``, by kind, of this read and of later ones has come;
                None: nothing is known of any.
            held: in seconds of the queue.
        """
        found = []
        for kinds in self._sets:
            if kind not in kinds:
                continue
            came = self._program.time(least=None)
            self._program.add(came - self._ends[kinds] - work >= 0)
            if now is not None:
                self._program.add(came >= now + work - pulp.lpSum(held[each] for each in kinds))
            self._ends[kinds] = pulp.LpAffineExpression(came)
            found.append(came)
        return found
