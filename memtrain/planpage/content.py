"""What a page is drawn from: a plan, its problem, and what was said about both."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memtrain.planner.compose import Fact
from memtrain.planner.forecast import BillLine, Forecast
from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.plan import RangePlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """A row of the ablation: what another rule reaches in the same simulator."""

    name: str
    step_seconds: float
    """As ``PageInput.step_seconds``; inf where nothing of the rule fits."""
    why_not: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageInput:
    """All that a page says; it adds no number of its own, except sums and ratios of these."""

    title: str
    """Model and machine."""
    problem: Problem
    plan: RangePlan
    step_seconds: float
    """Of the whole job; the plan's own is without idle time of a pipeline and messages once a step."""
    unlimited_seconds: float
    """The same with unlimited device memory."""
    tokens_per_second: float
    """Of all GPUs together."""
    mfu: float
    """Model FLOPs utilisation, 0 to 1."""
    bill: tuple[BillLine, ...]
    sources: tuple[Fact, ...] = ()
    ablation: tuple[Alternative, ...] = ()
    command: str = ""
    """What runs this plan, as text to copy."""

    def __post_init__(self) -> None:
        names = [block.name for block in self.problem.blocks]
        if names != [block.name for block in self.plan.blocks]:
            raise ValueError(
                f"the plan is of {len(self.plan.blocks)} blocks, not of the {len(names)} of the problem; "
                "give the problem that the plan was made for"
            )
        for name in ("step_seconds", "unlimited_seconds"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and > 0, got {value}")

    @classmethod
    def of(
        cls, forecast: Forecast, *, title: str, ablation: tuple[Alternative, ...] = (), command: str = ""
    ) -> PageInput:
        """The page of a forecast."""
        return cls(
            title=title,
            problem=forecast.problem,
            plan=forecast.plan,
            step_seconds=forecast.step_seconds,
            unlimited_seconds=forecast.unlimited_seconds,
            tokens_per_second=forecast.tokens_per_second,
            mfu=forecast.mfu,
            bill=forecast.bill,
            sources=forecast.sources,
            ablation=ablation,
            command=command,
        )

    @property
    def fits(self) -> bool:
        """Whether the plan stays within every limit."""
        return self.plan.status != "infeasible"
