"""The public names of memtrain, each imported from its own module when it is first used.

``from memtrain import Budget, prepare`` is the usual way in. What is not listed here or documented in a
module of its own may change without notice.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memtrain.planner.actions import Tier as Tier
    from memtrain.planner.machine import Budget as Budget
    from memtrain.planner.machine import Machine as Machine
    from memtrain.planner.plan import Plan as Plan
    from memtrain.planner.profile import ModelProfile as ModelProfile
    from memtrain.planner.solve import PlannerOptions as PlannerOptions
    from memtrain.preparing import prepare as prepare
    from memtrain.refusals import InfeasibleError as InfeasibleError
    from memtrain.refusals import PrepareError as PrepareError
    from memtrain.session import Session as Session
    from memtrain.streamed_models import StreamedModel as StreamedModel
    from memtrain.streamed_models import streamed_model as streamed_model

_HOMES = {
    "Budget": "memtrain.planner.machine",
    "InfeasibleError": "memtrain.refusals",
    "Machine": "memtrain.planner.machine",
    "ModelProfile": "memtrain.planner.profile",
    "Plan": "memtrain.planner.plan",
    "PlannerOptions": "memtrain.planner.solve",
    "PrepareError": "memtrain.refusals",
    "Session": "memtrain.session",
    "StreamedModel": "memtrain.streamed_models",
    "Tier": "memtrain.planner.actions",
    "prepare": "memtrain.preparing",
    "streamed_model": "memtrain.streamed_models",
}

__all__ = [
    "Budget",
    "InfeasibleError",
    "Machine",
    "ModelProfile",
    "Plan",
    "PlannerOptions",
    "PrepareError",
    "Session",
    "StreamedModel",
    "Tier",
    "prepare",
    "streamed_model",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"memtrain.api has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(home), name)
