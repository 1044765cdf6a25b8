"""Shapes of experts' grouped matrix products in the dtypes that torch's own shape function refuses.

torch 2.13 multiplies groups of rows in fp32 and fp16 too, but on fake tensors it knows the shapes in bf16
only. They are the same: the product is asked for in bf16, and returned in the dtype it would have had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands between a fake tensor mode and whatever runs; outputs are contiguous."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default or args[0].dtype is torch.bfloat16:
            return func(*args, **(kwargs or {}))
        rows, weights, *rest = args
        product = func(_as_bfloat16(rows), _as_bfloat16(weights), *rest, **(kwargs or {}))
        return rows.new_empty(product.shape)


def _as_bfloat16(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.bfloat16, device=tensor.device)
