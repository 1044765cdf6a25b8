"""A model under a plan is not to be copied: what the plan installed would run the original's blocks, or hand
out the original's parameters.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from memtrain.offload.errors import OffloadError


class PlannedModelCopyError(OffloadError):
    """``copy.deepcopy`` of a model, or of a part of it, that a session has taken over."""


class CopyGuard:
    """Refuses ``copy.deepcopy`` of a model's modules, looked up on the instance, until ``remove``."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if "__deepcopy__" not in module.__dict__]
        refusals = {kind: _Refusal(kind.__name__) for kind in map(type, self._modules)}
        for module in self._modules:
            object.__setattr__(module, "__deepcopy__", refusals[type(module)])

    def remove(self) -> None:
        """Let the modules be copied again."""
        for module in self._modules:
            module.__dict__.pop("__deepcopy__", None)
        self._modules.clear()


def is_planned(model: nn.Module) -> bool:
    """Whether a session that is open has taken over the model or a part of it."""
    return any(isinstance(module.__dict__.get("__deepcopy__"), _Refusal) for module in model.modules())


class _Refusal:
    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, memo: dict[int, Any]) -> NoReturn:
        raise PlannedModelCopyError(
            f"copy.deepcopy of {self._name}, which runs under a memory plan: the copy would run the "
            f"blocks of the original. Copy it before memtrain.prepare() or after session.close(), or load "
            f"session.model.state_dict() into a second model"
        )
