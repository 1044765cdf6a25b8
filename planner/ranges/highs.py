"""HiGHS behind PuLP: the model is PuLP's, bound and values are read from HiGHS itself.

PuLP reports a solver that its clock stopped as optimal, so its status is not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
import pulp

from memtrain.planner.ranges.program import Program
from memtrain.planner.ranges.terms import Unit

SEED = 1
THREADS = 1
"""More threads make the search depend on their timing; the second core is the caller's."""
BOUND_TOLERANCE = 1e-6
"""HiGHS proves within its tolerances: this part of a bound is given away."""
FEASIBILITY_TOLERANCE = 1e-6
"""HiGHS's own, of a row of a mixed-integer program."""
DUAL_TOLERANCE = 1e-7
"""HiGHS's own, of a linear program."""
FEASIBLE = 2
"""``kSolutionStatusFeasible``."""

Bounds = Mapping[int, tuple[float, float]]
"""Least and greatest value by variable of the formulation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one run of HiGHS ended with."""

    status: str
    """HiGHS's own word: ``Optimal``, ``Infeasible``, ``Time limit reached`` ..."""
    bound: float
    """Nothing within the run's bounds is smaller; 0 or less when nothing is proved, inf where nothing is."""
    objective: float
    """Of the best solution; inf when none was found."""
    values: tuple[float, ...]
    """By variable of the formulation; empty when none was found."""

    @property
    def solved(self) -> bool:
        """Whether a solution was found."""
        return math.isfinite(self.objective)


class Solver:
    """A program loaded into HiGHS, to be solved in turns: relaxed, with some variables held, as a whole."""

    def __init__(self, program: Program) -> None:
        self.program = program
        front = pulp.HiGHS(msg=False, threads=THREADS, random_seed=SEED)
        front.createAndConfigureSolver(program.problem)
        front.buildSolverModel(program.problem)
        self._highs: Any = program.problem.solverModel
        loaded = {v.name for v in program.problem.variables()}
        # A variable that no row mentions has no column: it is 0.
        self._columns = [v.index if v.name in loaded else None for v in program.variables]
        self.integers = tuple(
            number
            for number, (v, column) in enumerate(zip(program.variables, self._columns, strict=True))
            if v.cat == pulp.LpInteger and column is not None
        )
        """Integer variables that have a column."""
        self._lowered: dict[str, float] = {}

    def relaxed(self, seconds: float, *, anew: bool = False) -> Found:
        """The linear relaxation, within the bounds that are set.

        ``anew``: by the interior point method and a crossover to a vertex, for the first time: of 80 blocks
        with state 0.7 s where the simplex method takes 2.4. From a vertex at hand, simplex is the faster.
        """
        self._highs.setOptionValue("solve_relaxation", True)
        self._highs.setOptionValue("solver", "ipm" if anew else "choose")
        found = self._run(seconds)
        self._highs.setOptionValue("solver", "choose")
        self._highs.setOptionValue("solve_relaxation", False)
        # A relaxation that was not solved to its end proves nothing.
        bound = found.objective if found.status == "Optimal" else found.bound
        return Found(
            status=found.status,
            bound=bound - abs(bound) * BOUND_TOLERANCE if math.isfinite(bound) else bound,
            objective=found.objective,
            values=found.values,
        )

    def solve(self, seconds: float, gap: float, start: Mapping[int, int] | None = None) -> Found:
        """The program within the bounds that are set, from the solution ``start`` if there is one."""
        if start:
            columns = [self._columns[number] for number in self.integers]
            values = [start.get(number, 0) for number in self.integers]
            self._highs.setSolution(
                len(columns), np.array(columns, dtype=np.int32), np.array(values, dtype=np.float64)
            )
        self._highs.setOptionValue("mip_rel_gap", gap)
        found = self._run(seconds)
        if math.isinf(found.bound):
            return found
        bound = self._highs.getInfo().mip_dual_bound
        return Found(
            status=found.status,
            bound=bound - abs(bound) * BOUND_TOLERANCE if math.isfinite(bound) else -math.inf,
            objective=found.objective,
            values=found.values,
        )

    def hold(self, bounds: Bounds) -> None:
        """Set bounds of integer variables, all others as they were."""
        pairs = [(self._columns[v], b) for v, b in bounds.items() if self._columns[v] is not None]
        columns = np.array([column for column, _ in pairs], dtype=np.int32)
        low = np.array([b[0] for _, b in pairs], dtype=np.float64)
        high = np.array([b[1] for _, b in pairs], dtype=np.float64)
        self._highs.changeColsBounds(len(columns), columns, low, high)

    def tighten(self, name: str, amount: float) -> None:
        """Lower a limit by ``amount`` bytes or errors, and by what the solver's tolerance hides."""
        limit = self.program.limits[name]
        lowered = amount / limit.scale + 2 * FEASIBILITY_TOLERANCE
        self._lowered[name] = self._lowered.get(name, 0.0) + lowered
        row = limit.constraint
        self._highs.changeRowBounds(row.index, -highspy.kHighsInf, row.getUb() - self._lowered[name])

    def binding(self) -> tuple[str, ...]:
        """Rows of bytes that hold the last relaxation back: with a little more room it would be better."""
        duals = self._highs.getSolution().row_dual
        return tuple(
            name
            for name, limit in self.program.limits.items()
            if limit.unit is Unit.BYTES and abs(duals[limit.constraint.index]) > DUAL_TOLERANCE
        )

    def loosen(self) -> None:
        """Give every row its own limit back."""
        for name in self._lowered:
            row = self.program.limits[name].constraint
            self._highs.changeRowBounds(row.index, -highspy.kHighsInf, row.getUb())
        self._lowered.clear()

    def release(self) -> None:
        """Give all integer variables their own bounds back."""
        own = self.program.variables
        self.hold({n: (own[n].lowBound, own[n].upBound) for n in self.integers})

    def around(self, values: Sequence[float], numbers: Sequence[int]) -> Bounds:
        """Floor and ceiling of ``values`` for the integer variables ``numbers``."""
        return {n: (math.floor(values[n] + 1e-6), math.ceil(values[n] - 1e-6)) for n in numbers}

    def _run(self, seconds: float) -> Found:
        highs = self._highs
        highs.setOptionValue("time_limit", max(0.01, seconds))
        highs.run()
        status = highs.modelStatusToString(highs.getModelStatus())
        if status == "Infeasible":
            return Found(status=status, bound=math.inf, objective=math.inf, values=())
        info = highs.getInfo()
        if info.primal_solution_status != FEASIBLE:
            return Found(status=status, bound=0.0, objective=math.inf, values=())
        solution = highs.getSolution().col_value
        return Found(
            status=status,
            bound=0.0,
            objective=info.objective_function_value,
            values=tuple(solution[c] if c is not None else 0.0 for c in self._columns),
        )
