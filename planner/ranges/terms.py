"""Linear expressions over decisions, and what a plan is made of in their terms.

One description serves the solver, which sees variables, and the simulator, which sees numbers. Coefficients
of bytes are ``int``, so that an evaluation in numbers is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum


class Unit(Enum):
    """Of a variable or a row; the solver scales bytes."""

    COUNT = "count"
    BYTES = "bytes"
    RATIO = "ratio"


class Linear:
    """``constant + sum(coefficient * variable)``; variables by number."""

    __slots__ = ("constant", "terms")

    def __init__(self, constant: float = 0) -> None:
        self.constant = constant
        self.terms: dict[int, float] = {}

    def add(self, variable: int, coefficient: float) -> Linear:
        """Add a term, in place."""
        if coefficient:
            self.terms[variable] = self.terms.get(variable, 0) + coefficient
        return self

    def plus(self, other: Linear, times: float = 1) -> Linear:
        """Add another expression, in place."""
        self.constant += other.constant * times
        for variable, coefficient in other.terms.items():
            self.add(variable, coefficient * times)
        return self

    def value(self, x: Sequence[float]) -> float:
        """With numbers for the variables."""
        total = self.constant
        for variable, coefficient in self.terms.items():
            total += coefficient * x[variable]
        return total


@dataclass(slots=True)
class Load:
    """What lies in one place, or goes there: bytes, and the chunks or pieces that they are."""

    size: Linear = field(default_factory=Linear)
    copies: Linear = field(default_factory=Linear)
    """Every chunk and every piece is copied by itself."""

    def add(self, variable: int, each_bytes: int) -> Load:
        """``variable`` chunks or pieces of ``each_bytes``, in place."""
        if each_bytes:
            self.size.add(variable, each_bytes)
            self.copies.add(variable, 1)
        return self

    def plus(self, other: Load) -> Load:
        """Add another load, in place."""
        self.size.plus(other.size)
        self.copies.plus(other.copies)
        return self


Loads = dict[str, Load]
"""By place."""


def together(*parts: Loads) -> Loads:
    """All of them, place by place."""
    total: Loads = {}
    for part in parts:
        for place, load in part.items():
            total.setdefault(place, Load()).plus(load)
    return total


def all_bytes(loads: Loads) -> Linear:
    """In all places together."""
    total = Linear()
    for load in loads.values():
        total.plus(load.size)
    return total


@dataclass(slots=True)
class Variable:
    """A decision (an integer), or something that follows from decisions."""

    name: str
    low: float
    high: float | None
    unit: Unit
    integer: bool


@dataclass(slots=True)
class Row:
    """``expression <= limit``, or ``==`` where ``equal``."""

    name: str
    expression: Linear
    limit: float
    unit: Unit
    equal: bool = False


@dataclass(slots=True)
class Sum:
    """A variable that is an expression over earlier ones: keeps rows of running totals short."""

    variable: int
    expression: Linear


@dataclass(slots=True)
class Maximum:
    """A variable that is the largest of some expressions, and at least 0: the size of a slot."""

    variable: int
    expressions: list[Linear]


@dataclass(slots=True)
class Prefix:
    """Shares in 0..1, filled in order until they add up to ``count``: costs that rise chunk by chunk."""

    variables: list[int]
    count: int


@dataclass(slots=True)
class Job:
    """Something one resource does, in the order in which its jobs are listed."""

    name: str
    resource: str
    seconds: Linear
    after: tuple[int, ...]
    """Jobs of its part, all listed earlier, that must be over before it starts."""


@dataclass(frozen=True, slots=True)
class Part:
    """Jobs that begin when all queues are empty; the step goes through them ``times`` times."""

    name: str
    """``step``, or which forward or backward passes of its micro-batches."""
    times: int
    first_job: int


@dataclass(slots=True)
class Position:
    """What lies in one place at one point of the step."""

    name: str
    """``forward layers.3``, ``backward layers.3``, or ``step`` where it does not change."""
    place: str
    expression: Linear
    capacity_bytes: int


@dataclass(slots=True)
class Formulation:
    """Variables, rows, jobs, parts and positions of one problem."""

    variables: list[Variable] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    derived: list[Sum | Maximum | Prefix] = field(default_factory=list)
    """In an order in which each needs only what stands before it."""
    jobs: list[Job] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    """Of the step: at least one before the first job."""
    positions: list[Position] = field(default_factory=list)
    moved_bytes: Linear = field(default_factory=Linear)

    def variable(
        self,
        name: str,
        high: float | None = None,
        *,
        unit: Unit = Unit.COUNT,
        integer: bool = False,
    ) -> int:
        """A new variable of at least 0; its number."""
        self.variables.append(Variable(name, 0, high, unit, integer))
        return len(self.variables) - 1

    def begin(self, name: str, times: int) -> None:
        """A part of the step, to which jobs belong from now on."""
        self.parts.append(Part(name, times, len(self.jobs)))

    def job(self, name: str, resource: str, seconds: Linear, after: Iterable[int] = ()) -> int:
        """A new job of the last part; its number. What an earlier part did is over when a part begins."""
        first = self.parts[-1].first_job
        waited = tuple(dict.fromkeys(other for other in after if other >= first))
        self.jobs.append(Job(name, resource, seconds, waited))
        return len(self.jobs) - 1

    def part_jobs(self) -> Iterator[tuple[Part, range]]:
        """Every part with the numbers of its jobs."""
        ends = [part.first_job for part in self.parts[1:]] + [len(self.jobs)]
        for part, end in zip(self.parts, ends, strict=True):
            yield part, range(part.first_job, end)

    def running_sum(self, name: str, expression: Linear) -> Linear:
        """A variable that equals ``expression`` (bytes), as an expression of its own."""
        variable = self.variable(name, unit=Unit.BYTES)
        self.derived.append(Sum(variable, expression))
        return Linear().add(variable, 1)

    def maximum(self, name: str, expressions: Iterable[Linear]) -> Linear:
        """A variable that is the largest of ``expressions`` (bytes); 0 where there are none."""
        wanted = [e for e in expressions if e.terms or e.constant]
        if not wanted:
            return Linear()
        variable = self.variable(name, unit=Unit.BYTES)
        self.derived.append(Maximum(variable, wanted))
        return Linear().add(variable, 1)

    def complete(self, decisions: Sequence[int]) -> list[float]:
        """Numbers for all variables from those of the integers, in the order of the integers."""
        x: list[float] = [0] * len(self.variables)
        for variable, value in zip(self.integers, decisions, strict=True):
            x[variable] = value
        for item in self.derived:
            if isinstance(item, Sum):
                x[item.variable] = item.expression.value(x)
            elif isinstance(item, Maximum):
                x[item.variable] = max(0, *(e.value(x) for e in item.expressions))
            else:
                for place, variable in enumerate(item.variables):
                    x[variable] = min(1, max(0, x[item.count] - place))
        return x

    @property
    def integers(self) -> list[int]:
        """Numbers of the integer variables: what is decided."""
        return [i for i, v in enumerate(self.variables) if v.integer]
