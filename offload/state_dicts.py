"""PyTorch's form of an optimizer's state: parameters by number, in the order of their groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.shards import StateSpec

Groups = Sequence[dict[str, Any]]
Entries = list[tuple[str, str, Any]]
"""(parameter, key, value), as ``OffloadedOptimizer.load_state`` takes them."""
Scalars = dict[str, dict[str, Any]]


def to_state_dict(
    groups: Groups, names: Mapping[Tensor, str], state_of: Callable[[str], dict[str, Any] | None]
) -> dict[str, Any]:
    """What ``torch.optim.Optimizer.state_dict`` returns.

    Args:
        groups: the optimizer's.
        names: of its parameters, as far as they have a place in the plan.
        state_of: the state of the parameter of that name; None where it has none yet.
    """
    numbers = {parameter: n for n, parameter in enumerate(p for group in groups for p in group["params"])}
    state = {
        number: found
        for parameter, number in numbers.items()
        if parameter in names and (found := state_of(names[parameter])) is not None
    }
    saved = [{**group, "params": [numbers[parameter] for parameter in group["params"]]} for group in groups]
    return {"state": state, "param_groups": saved}


def from_state_dict(
    state_dict: Mapping[str, Any],
    groups: Groups,
    names: Mapping[Tensor, str],
    specs: Mapping[str, StateSpec],
) -> tuple[Entries, Scalars]:
    """The tensors of a state dict, and its scalars, by the parameter's name.

    Raises:
        ValueError: other parameter groups.
        PlanMismatchError: state of a parameter that is not trainable here.
    """
    saved = state_dict["param_groups"]
    theirs, ours = ([len(group["params"]) for group in side] for side in (saved, groups))
    if theirs != ours:
        raise ValueError(
            f"the state dict has parameter groups of {theirs} parameters, this optimizer of {ours}"
        )
    by_number = {
        number: names.get(parameter)
        for old, new in zip(saved, groups, strict=True)
        for number, parameter in zip(old["params"], new["params"], strict=True)
    }
    entries: Entries = []
    scalars: Scalars = {}
    for number, state in state_dict["state"].items():
        name = by_number.get(number)
        if name is None:
            raise PlanMismatchError(
                f"the state dict has state for parameter {number}, which is not trainable here"
            )
        tensors = {tensor.key for tensor in specs[name].tensors}
        entries += [(name, key, value) for key, value in state.items() if key in tensors]
        scalars[name] = {key: value for key, value in state.items() if key not in tensors}
    return entries, scalars
