"""The answer as the one-file page of ``--html``."""

from __future__ import annotations

import math

from memtrain.planning.answer import Answer
from memtrain.planning.terminal import title
from memtrain.planpage import Alternative, BillLine, PageInput, render


def answer_html(answer: Answer) -> str:
    """The page."""
    forecast = answer.forecast
    rules = answer.ablation[1:]  # the plan itself is drawn anyway
    return render(
        PageInput(
            title=title(answer.request),
            problem=forecast.problem,
            plan=forecast.plan,
            unlimited_seconds=forecast.unlimited_seconds,
            tokens_per_second=forecast.tokens_per_second,
            mfu=forecast.mfu,
            bill=tuple(
                BillLine(category=line.category, place=line.place, size_bytes=line.size_bytes)
                for line in forecast.bill
            ),
            sources=tuple(fact for fact in forecast.sources if not math.isnan(fact.value)),
            ablation=tuple(
                Alternative(
                    name=row.name, step_seconds=math.inf if row.step_seconds is None else row.step_seconds
                )
                for row in rules
            ),
            command="\n".join(target.command for target in answer.targets),
        )
    )
