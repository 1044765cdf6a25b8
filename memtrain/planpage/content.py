"""What a page is drawn from: a plan, its problem, and what was said about both."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memtrain.planner.compose import Fact
from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.plan import RangePlan


@dataclass(frozen=True, kw_only=True, slots=True)
class BillLine:
    """Bytes of one category in one place."""

    category: str
    place: str
    """``device`` or a place of the problem's machine."""
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternative:
    """A row of the ablation: what another rule reaches in the same simulator."""

    name: str
    step_seconds: float
    """inf where nothing of the rule fits."""
    why_not: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageInput:
    """All that a page says. It adds no number of its own, except sums and ratios of these."""

    title: str
    """Model and machine."""
    problem: Problem
    plan: RangePlan
    unlimited_seconds: float
    """Step of the same job with unlimited device memory."""
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
        for name in ("unlimited_seconds", "tokens_per_second", "mfu"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {value}")

    @property
    def fits(self) -> bool:
        """Whether the plan stays within every limit."""
        return self.plan.status != "infeasible"
