"""The norm of gradients of which some are spread over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TINY = 1e-6
"""Added to the norm that divides, as torch.nn.utils.clip_grad_norm_ does."""


def norm_of(parts: list[tuple[Tensor, Any]]) -> Tensor:
    """Of all together, fp32.

    Args:
        parts: each with the process group that has the rest of it, or None.
    """
    return joined_norm([(own_norm(part), group) for part, group in parts])


def own_norm(part: Tensor) -> Tensor:
    """Of one tensor, fp32."""
    norm: Tensor = torch.linalg.vector_norm(part, dtype=torch.float32)
    return norm


def joined_norm(norms: list[tuple[Tensor, Any]]) -> Tensor:
    """What :func:`norm_of` gives, from the :func:`own_norm` of each part."""
    by_group: dict[Any, list[Tensor]] = {}
    for norm, group in norms:
        by_group.setdefault(group, []).append(norm)
    joined = {group: _joined(each) for group, each in by_group.items()}
    # In the order in which the groups came, which all processes have in common.
    for group, norm in joined.items():
        if group is not None:
            # In fp64, since squares of small norms underflow.
            square = norm.double().square()
            torch.distributed.all_reduce(square, group=group)
            joined[group] = square.sqrt().float()
    return _joined(list(joined.values()))


def _joined(norms: list[Tensor]) -> Tensor:
    if not norms:
        return torch.zeros((), dtype=torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
    return norm
