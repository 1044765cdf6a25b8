"""The formulation as a mixed-integer program in PuLP: events as variables, queues as rows.

With queues first in, first out, an event is the maximum of a few sums; the objective pushes events down, so
that maxima need no binaries. A step of several parts is their sum. Minimised is the step, then the bytes
moved: together they weigh less than ``TIE_BREAK`` of the arithmetic, so that they decide between equal steps
only.

Bytes are scaled for the solver's tolerances. What it returns is rounded to integers and judged in whole
bytes by the simulator, never believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pulp

from memtrain.planner.ranges.formulate import Formulated
from memtrain.planner.ranges.terms import Formulation, Linear, Maximum, Prefix, Row, Sum, Unit

TIE_BREAK = 1e-6
"""All bytes that could be moved count as much as this part of the arithmetic: below any gap asked for."""
SCALED_CAPACITY = 4096.0
"""The device's capacity in the solver's unit of bytes; its tolerance of 1e-6 is 2e-10 of the capacity."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A row that says how much of something there is."""

    constraint: pulp.LpConstraint
    scale: float
    """Bytes, or parts of the error budget, per unit of the solver's row."""
    unit: Unit


@dataclass(slots=True)
class Program:
    """A PuLP problem whose variables stand in the formulation's order, followed by the events."""

    problem: pulp.LpProblem
    variables: list[pulp.LpVariable]
    step: pulp.LpVariable
    tie_break_seconds: float
    """Upper bound of what the bytes moved add to the objective."""
    byte_scale: float
    """Bytes per unit of the solver's byte variables."""
    limits: dict[str, Limit] = field(default_factory=dict)
    """Of bytes and of the error budget, by their name in the formulation."""


def build(formulated: Formulated, *, shortage_of: str | Sequence[str] | None = None) -> Program:
    """The program of least step time.

    Args:
        formulated: what is decided.
        shortage_of: instead, the program of the least bytes by which this limit must grow (``limit_of``), or
            these must together; ``step`` is those bytes, and events are left out.
    """
    form = formulated.form
    byte_scale = max(1.0, formulated.problem.machine.device_capacity_bytes / SCALED_CAPACITY)
    problem = pulp.LpProblem("ranges", pulp.LpMinimize)
    variables = [
        problem.add_variable(f"x{i}", v.low, v.high, cat=pulp.LpInteger if v.integer else pulp.LpContinuous)
        for i, v in enumerate(form.variables)
    ]
    step = problem.add_variable("step", 0)
    program = Program(problem, variables, step, 0.0, byte_scale)
    growing = (shortage_of,) if isinstance(shortage_of, str) else tuple(shortage_of or ())
    alone = len(growing) == 1
    more = {name: step if alone else problem.add_variable(f"more{i}", 0) for i, name in enumerate(growing)}
    _rows(program, form, more)
    if not growing:
        _events(program, form)
        most = _most(form, form.moved_bytes)
        weight = TIE_BREAK * formulated.problem.compute_seconds / most if most else 0.0
        program.tie_break_seconds = weight * most
        problem.setObjective(step + _expression(program, form, form.moved_bytes, weight))
    else:
        if not alone:
            problem.addConstraint(step - pulp.lpSum(more.values()) == 0)
        problem.setObjective(step + 0)
    return program


def limit_of(row: str) -> str:
    """What must grow where the row of this name is too full: a place, or ``bytes written to`` a place."""
    return row.rpartition(" on ")[2]


def _most(form: Formulation, expression: Linear) -> float:
    """An upper bound of ``expression`` over bounded variables."""
    return sum(c * (form.variables[v].high or 0) for v, c in expression.terms.items() if c > 0)


def _expression(
    program: Program, form: Formulation, expression: Linear, times: float
) -> pulp.LpAffineExpression:
    """In the solver's units: byte variables are scaled, so that their coefficients grow by the scale."""
    pairs = [
        (
            program.variables[v],
            c * times * (program.byte_scale if form.variables[v].unit is Unit.BYTES else 1.0),
        )
        for v, c in expression.terms.items()
    ]
    return pulp.LpAffineExpression(pairs, constant=expression.constant * times)


def _rows(program: Program, form: Formulation, more: Mapping[str, pulp.LpVariable]) -> None:
    scale = 1.0 / program.byte_scale

    def add(row: Row) -> None:
        factor = scale if row.unit is Unit.BYTES else 1.0
        left = _expression(program, form, row.expression, factor)
        if row.unit is Unit.BYTES and limit_of(row.name) in more:
            left = left - more[limit_of(row.name)]
        limit = row.limit * factor
        constraint = left == limit if row.equal else left <= limit
        program.problem.addConstraint(constraint)
        if row.name and row.unit is not Unit.COUNT and not row.equal:
            program.limits[row.name] = Limit(constraint, 1.0 / factor, row.unit)

    for item in form.derived:
        if isinstance(item, Sum):
            total = Linear().plus(item.expression).add(item.variable, -1)
            add(Row("", total, 0, Unit.BYTES, equal=True))
        elif isinstance(item, Maximum):
            for expression in item.expressions:
                add(Row("", Linear().plus(expression).add(item.variable, -1), 0, Unit.BYTES))
        elif isinstance(item, Prefix):
            total = Linear().add(item.count, -1)
            for share in item.variables:
                total.add(share, 1)
            add(Row("", total, 0, Unit.COUNT, equal=True))
    for row in form.rows:
        add(row)


def _events(program: Program, form: Formulation) -> None:
    """One variable per job, its end since its part began; and one per part, where there are several."""
    ends: list[pulp.LpVariable] = []
    step = pulp.LpAffineExpression()
    several = len(form.parts) > 1
    for number, (part, jobs) in enumerate(form.part_jobs()):
        last: dict[str, int] = {}
        for index in jobs:
            job = form.jobs[index]
            end = program.problem.add_variable(f"e{index}", 0)
            ends.append(end)
            before = set(job.after)
            if job.resource in last:
                before.add(last[job.resource])
            seconds = _expression(program, form, job.seconds, 1.0)
            if not before:
                program.problem.addConstraint(end - seconds >= 0)
            for other in sorted(before):
                program.problem.addConstraint(end - ends[other] - seconds >= 0)
            last[job.resource] = index
        whole = program.problem.add_variable(f"p{number}", 0) if several else program.step * (1 / part.times)
        for index in last.values():
            program.problem.addConstraint(whole - ends[index] >= 0)
        if several:
            step += whole * part.times
    if several:
        program.problem.addConstraint(program.step - step >= 0)


def rounded(formulated: Formulated, values: Sequence[float]) -> tuple[int, ...]:
    """Decisions from the solver's values of the formulation's variables."""
    return tuple(round(values[i]) for i in formulated.form.integers)
