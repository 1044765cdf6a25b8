"""Which tools can run a plan, the nearest first."""

from __future__ import annotations

from collections.abc import Callable

from memtrain.planning.targets import accelerate, deepspeed, fsdp2, recipe
from memtrain.planning.targets.common import Context, Target

_TOOLS: tuple[tuple[Callable[[Context], str | None], Callable[[Context], Target]], ...] = (
    (recipe.refusal, recipe.recipe),
    (deepspeed.refusal, deepspeed.deepspeed),
    (accelerate.refusal, accelerate.accelerate),
    (fsdp2.refusal, fsdp2.fsdp2),
)


def targets(context: Context) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """A target of every tool that can be configured for the plan, and why the others cannot."""
    found, refused = [], []
    for refusal, make in _TOOLS:
        why = refusal(context)
        if why is None:
            found.append(make(context))
        else:
            refused.append(why)
    return tuple(found), tuple(refused)
