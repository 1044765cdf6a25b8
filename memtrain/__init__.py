"""memtrain trains models that do not fit.

    budget = memtrain.Budget(device="1.2GiB", nvme="/mnt/fast:40GiB")
    session = memtrain.prepare(model, optimizer, sample_batch, budget=budget)

The names of ``memtrain.api`` are loaded when they are first used, so that ``import memtrain`` and
``memtrain --help`` cost neither torch nor transformers.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memtrain.api import Budget as Budget
    from memtrain.api import InfeasibleError as InfeasibleError
    from memtrain.api import Machine as Machine
    from memtrain.api import ModelProfile as ModelProfile
    from memtrain.api import Plan as Plan
    from memtrain.api import PlannerOptions as PlannerOptions
    from memtrain.api import PrepareError as PrepareError
    from memtrain.api import Session as Session
    from memtrain.api import StreamedModel as StreamedModel
    from memtrain.api import Tier as Tier
    from memtrain.api import prepare as prepare
    from memtrain.api import streamed_model as streamed_model

__version__ = "0.1.0"

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
    "__version__",
    "prepare",
    "streamed_model",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'memtrain' has no attribute {name!r}; it has {', '.join(__all__)}")
    from memtrain import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted(__all__)
