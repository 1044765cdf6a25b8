"""Which linear layers of a model can be given another backward, and the change of their class.

A treated ``nn.Linear`` becomes an instance of a subclass and keeps everything else: parameters, their names,
``state_dict``, hooks, ``isinstance``; it can be copied and pickled. Undoing gives it its class back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Select = Callable[[str, nn.Linear], bool]


class UnsupportedLinearError(ValueError):
    """A linear layer that was asked for cannot be treated correctly."""


def linears_of(model: nn.Module, select: Select | None = None) -> dict[str, nn.Linear]:
    """Name and layer of every plain ``nn.Linear`` with a trainable weight, the output embedding excepted.

    Frozen layers save nothing of their input already. Subclasses (quantised layers, parametrisations) have a
    forward of their own and are left alone.

    Args:
        select: ``(name, layer) -> bool`` for a smaller choice, or to ask for the output embedding; a layer
            that it asks for and that cannot be treated is refused.

    Raises:
        UnsupportedLinearError: nothing is left, or a chosen layer shares its weight with a module that is not
            chosen, whose gradient would take another way; or its weight is not a plain tensor.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    chosen: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or not module.weight.requires_grad:
            continue
        if select(name, module) if select is not None else module is not head:
            chosen[name] = module
    if not chosen:
        raise UnsupportedLinearError(
            f"{type(model).__name__} has no torch.nn.Linear with a trainable weight to treat (adapters and "
            "quantised layers have classes of their own)"
        )
    _check_weights(model, chosen)
    return chosen


def _check_weights(model: nn.Module, chosen: Mapping[str, nn.Linear]) -> None:
    names = {id(module.weight): name for name, module in chosen.items()}
    treated = {id(module) for module in chosen.values()}
    for name, module in chosen.items():
        if "forward" in module.__dict__:
            raise UnsupportedLinearError(
                f"{name} has a forward of its own (apply_to, or a library that moves weights), which would "
                "go on as it was: revert it, and make it after this"
            )
        if type(module.weight) is not nn.Parameter:
            raise UnsupportedLinearError(
                f"the weight of {name} is a {type(module.weight).__name__}: treat the model before it is "
                "sharded, and shard nothing that is treated"
            )
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if id(parameter) in names and id(module) not in treated:
                raise UnsupportedLinearError(
                    f"{names[id(parameter)]} shares its weight with {name}, which is not treated: one weight "
                    "would have two kinds of gradient. Leave both out, or untie them"
                )


def input_groups(chosen: Mapping[str, nn.Linear]) -> list[list[str]]:
    """Layers that may be given the same tensor: children of one module with as many input features.

    A weight that several of them share joins their groups, for its gradient has one basis.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    homes: dict[int, tuple[str, int]] = {}
    for name, module in chosen.items():
        home = homes.setdefault(id(module.weight), (name.rpartition(".")[0], module.in_features))
        groups.setdefault(home, []).append(name)
    return list(groups.values())


def change_class(module: nn.Linear, cls: type[nn.Linear], **attributes: Any) -> None:
    """Make ``module`` a ``cls`` with ``attributes``."""
    module.__class__ = cls
    for name, value in attributes.items():
        setattr(module, name, value)


def restore_class(module: nn.Linear, *attributes: str) -> None:
    """Undo ``change_class``."""
    module.__class__ = nn.Linear
    for name in attributes:
        delattr(module, name)
