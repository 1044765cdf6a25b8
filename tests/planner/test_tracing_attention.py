"""Formulas of attention kernels against torch's own shape functions for the same kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from memtrain.planner.tracing.attention import AttentionKernelError, FormulaAttention

_OPERATORS: dict[str, Any] = {
    "cpu": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v),
    "flash": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v),
    "efficient": lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True),
    "cudnn": lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True),
}
"""Whose outputs are saved for backward, but for counts and the empty mask for debugging."""


def _sizes(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return sorted((str(t.dtype), t.untyped_storage().nbytes()) for t in tensors if t.numel())


def _layout(width: int, heads: int, tokens: int, rows: int, transposed: bool) -> Tensor:
    if transposed:
        return torch.empty(rows, tokens, heads, width, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    return torch.empty(rows, heads, tokens, width, dtype=torch.bfloat16, device="meta")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kernel=st.sampled_from(list(_OPERATORS)),
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(2, 300),
    width=st.sampled_from([8, 16, 64]),
    transposed=st.booleans(),
)
def test_outputs_are_those_of_torchs_shape_functions(
    kernel: str, rows: int, heads: int, tokens: int, width: int, transposed: bool
) -> None:
    q, k, v = (_layout(width, heads, tokens, rows, transposed) for _ in range(3))
    expected = [t for t in _OPERATORS[kernel](q, k, v) if isinstance(t, Tensor)]
    found = torch.ops.memtrain.attention(q, k, v, None, kernel)
    assert _sizes(found) == _sizes(expected)
    assert found[0].stride() == expected[0].stride()


def _saved(kernel: str, key_heads: int = 4, width: int = 8, mask: bool = False) -> list[Tensor]:
    """What one call with 4 heads of queries leaves to backward."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with FakeTensorMode(), FormulaAttention(kernel), saved_tensors_hooks(pack, lambda t: t):
        q = torch.randn(2, 4, 40, width, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.randn(2, key_heads, 40, width, dtype=torch.bfloat16, requires_grad=True) for _ in "kv")
        allowed = torch.ones(40, 40, dtype=torch.bool) if mask else None
        out = F.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=key_heads != 4)
        assert out.shape == q.shape
        out.sum().backward()
        assert q.grad is not None
        assert k.grad is not None
        assert k.grad.shape == k.shape
    return saved


def test_what_is_saved_by_hand() -> None:
    head = 2 * 4 * 40  # rows, heads, tokens
    assert _sizes(_saved("cudnn")) == sorted(
        [("torch.bfloat16", head * 8 * 2)] * 4 + [("torch.float32", head * 4)] + [("torch.int64", 8)] * 2
    )
    # 40 tokens are rounded up to 64 in the log-sum-exp.
    assert ("torch.float32", 2 * 4 * 64 * 4) in _sizes(_saved("efficient"))
    assert _sizes(_saved("flash"))[-2:] == [("torch.uint64", 8), ("torch.uint64", 16)]
    # Heads of 6 are padded to 8.
    assert _sizes(_saved("flash", width=6)) == _sizes(_saved("flash", width=8))


def test_fewer_heads_of_keys() -> None:
    small, large = 2 * 1 * 40 * 8 * 2, 2 * 4 * 40 * 8 * 2
    for kernel, keys in (("flash", small), ("cudnn", small), ("efficient", large)):
        sizes = [size for dtype, size in _sizes(_saved(kernel, key_heads=1)) if dtype == "torch.bfloat16"]
        assert sizes == sorted([large, large, keys, keys])


def test_masks() -> None:
    assert ("torch.bfloat16", 40 * 40 * 2) in _sizes(_saved("efficient", mask=True))
    assert ("torch.bfloat16", 40 * 40 * 2) in _sizes(_saved("cudnn", mask=True))
    with pytest.raises(AttentionKernelError, match="takes no mask"):
        _saved("flash", mask=True)
    with pytest.raises(AttentionKernelError, match="'quick'"):
        FormulaAttention("quick")


def test_dropout_of_a_gpu_keeps_bytes() -> None:
    kept: list[Tensor] = []
    with FakeTensorMode(), saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(10, 10, requires_grad=True)
        with FormulaAttention("flash"):
            F.dropout(x, 0.1, True)
            assert F.dropout(x, 0.1, False) is x
            with pytest.raises(AttentionKernelError, match="in place"):
                F.dropout(x, 0.1, True, inplace=True)
        with FormulaAttention("cpu"):
            F.dropout(x, 0.1, True)
    assert [(t.dtype, t.nbytes) for t in kept] == [(torch.bool, 100), (torch.float32, 400)]
