"""memtrain's own optimizers over a model: which parameters are projected, and what is kept for them.

    optimizer, roles = make_optimizer("galore", model, lr=1e-2, rank=128)
    print(role_table(roles))

The classes are ``memtrain.optim``'s; here a name becomes one of them, with the groups that the classifier of
roles finds, and its bytes are predicted by the planner's formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from memtrain.offload.lower_halves import keeps_lower_half
from memtrain.offload.optimizer import OffloadedOptimizer
from memtrain.optim import (
    FRUGAL,
    AdamW8bit,
    Apollo,
    ApolloMini,
    Fira,
    GaLore,
    GridOptimizer,
    NaturalGaLore,
    ParameterRole,
    classify,
    param_groups,
)
from memtrain.optimizer_sections import GridSection, OptimizerSection, SGDSection
from memtrain.planner.grid_rule import GridRule
from memtrain.planner.optimizer_bytes import OptimizerRule, ParameterSpec, state_bytes
from memtrain.sparse_tables import sparse_weights

CLASSES: dict[str, type[GridOptimizer]] = {
    "adamw-8bit": AdamW8bit,
    "galore": GaLore,
    "natural-galore": NaturalGaLore,
    "frugal": FRUGAL,
    "fira": Fira,
    "apollo": Apollo,
    "apollo-mini": ApolloMini,
}
"""By the names of recipes, of ``memtrain plan`` and of the Trainer's factory."""
_WHOLE = frozenset({"adamw-8bit"})
"""Names of those that project nothing."""


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    overrides: Mapping[str, str] | None = None,
    decay_vectors: bool = True,
    **arguments: Any,
) -> tuple[GridOptimizer, list[ParameterRole]]:
    """The optimizer over the trainable parameters of ``model``, and what the classifier decided.

    Args:
        overrides: roles by pattern of the name, for the classifier.
        decay_vectors: False: norms and biases have no weight decay.
        arguments: of the class.

    Raises:
        ValueError: an unknown name, role or argument, or one that the model's parameters cannot have.
    """
    if name not in CLASSES:
        raise ValueError(f"optimizer must be one of {', '.join(CLASSES)}, got {name!r}")
    roles = roles_of(name, model, rank=_rank(name, arguments), overrides=overrides)
    groups = param_groups(model, roles, decay_vectors=decay_vectors)
    try:
        # What is named to the class holds for all groups that are projected.
        return CLASSES[name](groups, **arguments), roles
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def roles_of(
    name: str, model: nn.Module, *, rank: int | None, overrides: Mapping[str, str] | None = None
) -> list[ParameterRole]:
    """What the classifier decides for the optimizer of that name. Raises ValueError as ``classify``."""
    if name in _WHOLE:
        return classify(model, project=(), overrides=overrides)
    return classify(model, rank=rank, overrides=overrides)


def _rank(name: str, arguments: Mapping[str, Any]) -> int | None:
    rank = arguments.get("rank", 1 if name == "apollo-mini" else None)
    return None if rank is None else int(rank)


def grid_rule(section: GridSection, roles: Iterable[ParameterRole], value: str = "") -> GridRule:
    """The planner's view of it.

    Args:
        value: how it is called where bytes are shown; the name by default.
    """
    projected = {name: each.split for each in roles if each.projected for name in each.names}
    return GridRule(
        value=value or section.name,
        settings=section.grid_settings(),
        projected=projected,
        update_gap=section.update_every,
    )


def predicted_state_bytes(
    section: OptimizerSection,
    model: nn.Module,
    roles: Sequence[ParameterRole] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Of optimizer state and masters once every trainable parameter has been updated, by formula.

    Args:
        roles: of ``make_optimizer``, for one of memtrain's own.
        optimizer: what is streamed, where of some masters no more than the lower half is kept.
    """
    by_rows = set(map(id, sparse_weights(model)))  # of another optimizer
    specs = [
        ParameterSpec(
            name=name,
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            element_bytes=parameter.element_size(),
            trainable=parameter.requires_grad,
        )
        for name, parameter in model.named_parameters()
        if id(parameter) not in by_rows
    ]
    if isinstance(section, GridSection):
        found = state_bytes(specs, grid_rule(section, roles))
        return found.moments + found.masters
    rule = OptimizerRule.SGD_MOMENTUM if isinstance(section, SGDSection) else OptimizerRule.ADAMW
    found = state_bytes(specs, rule, master_weights=section.master_weights)
    without = isinstance(section, SGDSection) and not section.momentum
    halves = section.master_weights and optimizer is not None and _upper_halves_bytes(optimizer)
    return found.masters - int(halves) + (0 if without else found.moments)


def _upper_halves_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the masters of which the weights hold the upper halves."""
    members = ((group, parameter) for group in optimizer.param_groups for parameter in group["params"])
    return sum(2 * p.numel() for group, p in members if keeps_lower_half(optimizer, group, p))


def measured_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the tensors of the state, wherever they are; nothing is read that lies on a tier."""
    tensors = (value for state in optimizer.state.values() for value in state.values())
    found = sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))
    if isinstance(optimizer, OffloadedOptimizer):  # its state shows whole masters
        halves = optimizer.layout.halves & optimizer.records.initialised
        found -= sum(2 * optimizer.index.parameters[name].numel() for name in halves)
    return found
