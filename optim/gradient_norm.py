"""The norm of gradients of which some are spread over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def norm_of(parts: list[tuple[Tensor, Any]]) -> Tensor:
    """Of all together, fp32.

    Args:
        parts: each with the process group that has the rest of it, or None.
    """
    norms: dict[Any, list[Tensor]] = {}
    for part, group in parts:
        norms.setdefault(group, []).append(torch.linalg.vector_norm(part, dtype=torch.float32))
    joined = {group: _joined(each) for group, each in norms.items()}
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
