"""Outputs of operators whose shapes or dtypes torch's own shape functions do not give, or give for a CPU.

- torch 2.13 multiplies groups of rows (experts) in fp32 and fp16 too, but on fake tensors it knows the shapes
  in bf16 only. They are the same: the product is asked for in bf16, and returned in the dtype it would have.
- The mean and reciprocal deviation of a layer norm have the input's dtype on a CPU, and fp32 on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NORMS = (torch.ops.aten.native_layer_norm.default, torch.ops.aten.native_group_norm.default)


class KernelShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands between a fake tensor mode and whatever runs.

    Args:
        on_gpu: norms are a GPU's.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_gpu = on_gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            rows, weights, *rest = args
            product = func(_as_bfloat16(rows), _as_bfloat16(weights), *rest, **kwargs)
            return rows.new_empty(product.shape)
        out = func(*args, **kwargs)
        if self.on_gpu and func in _NORMS:
            normalised, *statistics = out
            return normalised, *(_at_least_fp32(tensor) for tensor in statistics)
        return out


def _as_bfloat16(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.bfloat16, device=tensor.device)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))
