"""Gradients that a step refuses, or skips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from memtrain.offload.clipping import is_finite
from memtrain.offload.errors import OffloadError, PlanMismatchError


class NonFiniteGradientError(OffloadError):
    """A gradient holds NaN or inf and the optimizer was told to raise."""


def refuse_unplanned(
    parameters: Sequence[Tensor], planned: Mapping[str, Tensor], unplanned: Mapping[int, str]
) -> None:
    """A parameter that was frozen when the plan was made has no place in it.

    Args:
        parameters: all of the optimizer's, in the order of its groups.
        planned: by name.
        unplanned: names of others, by ``id``.

    Raises:
        PlanMismatchError: one that was not planned has a gradient.
    """
    known = {id(parameter) for parameter in planned.values()}
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    for parameter in parameters:
        if parameter.grad is not None and id(parameter) not in known:
            name = unplanned.get(id(parameter), f"number {numbers[id(parameter)]}")
            raise PlanMismatchError(
                f"parameter {name} of shape {tuple(parameter.shape)} has a gradient but did not need one "
                f"when the plan was made, so it would never be updated: unfreeze it before planning, or "
                f"set requires_grad_(False) and grad to None"
            )


def refuse_nonfinite(planned: Mapping[str, Tensor], nonfinite: str, found: Sequence[str] = ()) -> bool:
    """Whether to skip the step. Raises NonFiniteGradientError where ``nonfinite`` says so.

    Args:
        found: names of others whose gradients are not finite.
    """
    names = [
        name
        for name, parameter in planned.items()
        if parameter.grad is not None and not is_finite(parameter.grad)
    ]
    names += found
    if names and nonfinite == "raise":
        raise NonFiniteGradientError(
            f"NaN or inf in the gradients of {len(names)} parameters, first {names[0]}: lower the "
            f"learning rate or "
            f"the loss scale, or choose nonfinite='skip'"
        )
    return bool(names)
