"""Which parameters are projected: an explicit decision for each, that can be printed and overruled.

    roles = classify(model, rank=128)
    print(role_table(roles))
    optimizer = GaLore(param_groups(model, roles, rank=128), lr=1e-2)

Low-rank optimizers are for the matrices of attention and feed-forward layers. Embeddings and heads have rows
that are seldom or sparsely touched; norms and biases have no rank; adapters are of low rank already. Roles
come from the kinds of modules first and from names second, and what decided is in ``reason``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from memtrain.optim.autograd.tiled_linear import Tile, TiledEmbedding, TiledLinear


class Role(str, Enum):
    """What a parameter is for."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    ATTENTION = "attention"
    MLP = "mlp"
    EXPERTS = "experts"
    ROUTER = "router"
    LORA = "lora"
    CONVOLUTION = "convolution"
    LINEAR = "linear"
    """A linear layer whose name says nothing."""
    OTHER = "other"


PROJECTED = frozenset({Role.ATTENTION, Role.MLP, Role.EXPERTS, Role.LINEAR})
"""Roles that are projected unless the caller says otherwise."""

_HEADS = {"lm_head", "embed_out", "output_projection", "score", "classifier"}
_ROUTERS = {"router", "gate"}
_ATTENTION = re.compile(
    r"attn|attention|^[qkvo]_proj$|^(query|key|value|out_proj|qkv|qkv_proj|in_proj_weight)$", re.IGNORECASE
)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|^(gate|up|down|gate_up)_proj$|^fc\d$|^c_fc$|^w[123]$", re.IGNORECASE
)
_FUSED_QKV = {"qkv_proj", "c_attn", "Wqkv", "qkv", "in_proj_weight", "W_pack", "query_key_value"}
_INTERLEAVED_QKV = {"query_key_value"}
"""GPT-NeoX, BLOOM and Falcon lay q, k and v of each head side by side: rows are no three blocks."""
_FUSED_GATE_UP = {"gate_up_proj"}


@dataclass(frozen=True, kw_only=True)
class ParameterRole:
    """The decision for one parameter."""

    names: tuple[str, ...]
    """Qualified; more than one where it is tied."""
    shape: tuple[int, ...]
    role: Role
    projected: bool
    split: int = 1
    """Equal blocks of rows that were fused into one matrix, and are projected each for itself."""
    trainable: bool = True
    reason: str
    """What decided."""


def classify(
    model: nn.Module,
    *,
    rank: int | None = None,
    project: Collection[Role | str] = PROJECTED,
    overrides: Mapping[str, Role | str] | None = None,
) -> list[ParameterRole]:
    """A role for every parameter, each once, in the model's order.

    Args:
        rank: matrices whose shorter side does not exceed it are not projected.
        project: the roles to project.
        overrides: role by pattern of the name (``*`` matches anything); the first that matches wins.

    Raises:
        ValueError: an unknown role, or a pattern that matches no parameter.
    """
    wanted = {_role(each) for each in project}
    patterns = {pattern: _role(role) for pattern, role in (overrides or {}).items()}
    modules = dict(model.named_modules())
    embeddings = [module for module in modules.values() if isinstance(module, (nn.Embedding, TiledEmbedding))]
    vocabulary = max((module.num_embeddings for module in embeddings), default=None)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for each in names.values() for name in each):
            raise ValueError(f"override {pattern!r} matches no parameter: patterns are for whole names")
    output = getattr(model, "get_output_embeddings", lambda: None)()
    roles = []
    for parameter, aliases in names.items():
        found = [_role_of(alias, parameter, modules, vocabulary, output) for alias in aliases]
        # A tied head is its embedding: the roles that are not projected come first.
        role, reason = min(found, key=lambda each: each[0] in PROJECTED)
        if len(aliases) > 1:
            reason += f", tied to {', '.join(aliases[1:])}"
        overruled = [p for p in patterns if any(fnmatchcase(alias, p) for alias in aliases)]
        if overruled:
            role, reason = patterns[overruled[0]], f"override {overruled[0]!r}"
        decision = ParameterRole(
            names=tuple(aliases),
            shape=tuple(parameter.shape),
            role=role,
            projected=role in wanted,
            trainable=parameter.requires_grad,
            reason=reason,
        )
        roles.append(_with_split(_checked(decision, rank), modules, rank))
    return roles


def _role(name: Role | str) -> Role:
    try:
        return Role(name)
    except ValueError:
        raise ValueError(f"role {name!r} is unknown: one of {', '.join(Role)}") from None


def _role_of(
    name: str, parameter: Tensor, modules: dict[str, nn.Module], vocabulary: int | None, output: Any
) -> tuple[Role, str]:
    owner, _, leaf = name.rpartition(".")
    module = modules[owner]
    if isinstance(module, Tile):  # has the role of its layer
        owner = owner.rpartition(".tiles.")[0]
        name, module = f"{owner}.{leaf}", modules[owner]
    kind = type(module).__name__
    path = [part for part in name.split(".") if part not in ("weight", "base_layer") and not part.isdigit()]
    last = path[-1] if path else leaf
    if any(part.startswith("lora_") for part in path):
        return Role.LORA, "named lora_"
    if "norm" in kind.lower() or (parameter.dim() < 2 and "norm" in last.lower()):
        return Role.NORM, f"in {kind}"
    if parameter.dim() < 2:
        return Role.BIAS, f"{parameter.dim()}-dimensional in {kind}"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag, TiledEmbedding)):
        return Role.EMBEDDING, f"in {kind}"
    if module is output:
        return Role.HEAD, "the model's output embeddings"
    if last in _HEADS:
        return Role.HEAD, f"named {last}"
    if "conv" in kind.lower() and parameter.dim() > 2:
        return Role.CONVOLUTION, f"in {kind}"
    if parameter.dim() == 3:
        return Role.EXPERTS, "a stack of matrices"
    if last in _ROUTERS or "router" in kind.lower():
        return Role.ROUTER, f"named {last}" if last in _ROUTERS else f"in {kind}"
    if parameter.dim() == 2:
        # From the leaf upwards: the nearest name decides.
        for part in reversed(path):
            for role, pattern in ((Role.ATTENTION, _ATTENTION), (Role.MLP, _MLP)):
                if pattern.search(part):
                    return role, f"named {part}" + (", transposed Conv1D" if kind == "Conv1D" else "")
        if isinstance(module, (nn.Linear, TiledLinear)) and module.out_features == vocabulary:
            return Role.HEAD, "as many rows as the largest embedding"
        if isinstance(module, (nn.Linear, TiledLinear)) or kind == "Conv1D":
            return Role.LINEAR, f"in {kind}"
    return Role.OTHER, f"{parameter.dim()}-dimensional in {kind}"


def _checked(decision: ParameterRole, rank: int | None) -> ParameterRole:
    """Not projected where a projection could not be made or would not shorten anything."""
    why = None
    if len(decision.shape) not in (2, 3):
        why = f"{len(decision.shape)}-dimensional"
    elif rank is not None and min(decision.shape[-2:]) <= rank:
        why = f"shorter side within rank {rank}"
    if not decision.projected or why is None:
        return decision
    return replace(decision, projected=False, reason=f"{decision.reason}, not projected: {why}")


def _with_split(decision: ParameterRole, modules: dict[str, nn.Module], rank: int | None) -> ParameterRole:
    owner, _, leaf = decision.names[0].rpartition(".")
    last = owner.rpartition(".")[2] if leaf == "weight" else leaf
    parts = 3 if last in _FUSED_QKV else 2 if last in _FUSED_GATE_UP else 1
    if parts == 1 or not decision.projected or len(decision.shape) != 2:
        return decision
    rows, columns = decision.shape
    if type(modules[owner]).__name__ == "Conv1D":
        why = "fused columns stay together"
    elif last in _INTERLEAVED_QKV:
        why = "fused, interleaved by head, stays together"
    elif rows % parts or (parts == 3 and rows != 3 * columns):
        why = "fused of unequal parts stays together"
    elif rank is not None and rows // parts <= rank:
        why = f"fused of {parts} parts within rank {rank} stays together"
    else:
        return replace(decision, split=parts, reason=f"{decision.reason}, {parts} fused")
    return replace(decision, reason=f"{decision.reason}, {why}")


def param_groups(
    model: nn.Module,
    roles: Iterable[ParameterRole],
    *,
    decay_vectors: bool = True,
    **projected: Any,
) -> list[dict[str, Any]]:
    """Groups of named parameters for the optimizers of this package; frozen parameters are left out.

    Args:
        decay_vectors: False: norms and biases get a group of their own with weight_decay 0.
        projected: settings of the groups that are projected: ``rank=128, update_proj_gap=200``.

    Raises:
        ValueError: the roles name parameters that the model has not.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[Any, dict[str, Any]] = {}
    for each in roles:
        if not each.trainable:
            continue
        name = each.names[0]
        if name not in parameters:
            raise ValueError(f"{name} is no parameter of this model: classify this very model")
        if each.projected:
            settings = {**projected, **({"split": each.split} if each.split > 1 else {})}
            key: Any = ("projected", each.split)
        else:
            plain = not decay_vectors and each.role in (Role.NORM, Role.BIAS)
            settings = {"projection": None, **({"weight_decay": 0.0} if plain else {})}
            key = ("whole", plain)
        groups.setdefault(key, {"params": [], **settings})["params"].append((name, parameters[name]))
    return list(groups.values())


def role_table(roles: Iterable[ParameterRole]) -> str:
    """One line for all parameters that differ in layer numbers only."""
    rows: dict[tuple[str, ...], int] = {}
    for each in roles:
        update = "frozen" if not each.trainable else "projected" if each.projected else "whole"
        if each.trainable and each.split > 1:
            update += f" in {each.split}"
        shape = " x ".join(map(str, each.shape)) or "scalar"
        reason = re.sub(r"(?<=\.)\d+(?=\.)", "*", each.reason)
        row = (re.sub(r"(?<=\.)\d+(?=\.)", "*", each.names[0]), shape, each.role.value, update, reason)
        rows[row] = rows.get(row, 0) + 1
    lines: list[tuple[str, ...]] = [("parameter", "count", "shape", "role", "update", "because")]
    lines += [(row[0], str(count), *row[1:]) for row, count in rows.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
