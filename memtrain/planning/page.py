"""The answer as the one-file page of ``--html``."""

from __future__ import annotations

import math

from memtrain.planning.answer import Answer
from memtrain.planning.terminal import title
from memtrain.planpage import Alternative, PageInput, render


def answer_html(answer: Answer) -> str:
    """The page."""
    rules = tuple(
        Alternative(name=row.name, step_seconds=math.inf if row.step_seconds is None else row.step_seconds)
        for row in answer.ablation[1:]  # the first is the plan itself
    )
    command = "\n".join(target.command for target in answer.targets)
    page = PageInput.of(answer.forecast, title=title(answer.request), ablation=rules, command=command)
    return render(page)
