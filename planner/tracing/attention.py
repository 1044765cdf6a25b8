"""Attention kernels of devices that are not here: what each saves, by formula.

``F.scaled_dot_product_attention`` is replaced, while a model is traced, by an operator without arithmetic
whose outputs, saved tensors and backward buffers have the sizes of the kernel that was named:

    =========  ========================================================  ==================  =======
    kernel     saved besides q, k, v and the output                      k, v of less heads  masks
    =========  ========================================================  ==================  =======
    cpu        log-sum-exp in fp32, in fp64 for fp64                     as they are         saved
    flash      log-sum-exp in fp32; RNG state of three uint64            as they are         refused
    efficient  log-sum-exp in fp32, tokens rounded up to 32; two int64   repeated            saved
    cudnn      log-sum-exp in fp32; RNG state of two int64               as they are         saved
    =========  ========================================================  ==================  =======

Sizes are those of torch 2.13's own shape functions for these operators, against which the tests compare; the
``cpu`` row is here only to be compared with the kernel that really runs. Flash pads heads to a multiple of 8.
It works backward, as its sources in torch say, with an fp32 copy of the query's gradient, tokens rounded up
to 128 and heads to 32 (above 128 to 64), and where keys have less heads with their gradients for every head
of the queries, which are added up last.

``F.dropout`` differs as well: a CPU keeps the scaled mask in the input's dtype, a GPU keeps a mask of bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from memtrain.planner.units import round_up

GPU_KERNELS = ("flash", "efficient", "cudnn")
FORMULA_KERNELS = ("cpu", *GPU_KERNELS)
"""By formula; ``sdpa``, ``math`` and ``eager`` are traced instead."""
_RNG_DTYPE = {"flash": torch.uint64, "efficient": torch.int64, "cudnn": torch.int64}
_EFFICIENT_TOKENS = 32
_FLASH_TOKENS = 128
_FLASH_HEAD = 8

torch.library.define(
    "memtrain::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, str kernel) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "memtrain::attention_backward",
    "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, str kernel)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
)


class AttentionKernelError(ValueError):
    """The model asks of an attention kernel what that kernel cannot do."""


@torch.library.register_fake("memtrain::attention")  # type: ignore[untyped-decorator]
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str) -> tuple[Tensor, ...]:
    batch, heads, tokens, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = round_up(tokens, _EFFICIENT_TOKENS) if kernel == "efficient" else tokens
    log_sum_exp = q.new_empty((batch, heads, rows), dtype=wide)
    if kernel == "efficient" or q.shape[-1] != v.shape[-1]:
        output = q.new_empty((batch, tokens, heads, v.shape[-1])).transpose(1, 2)
    else:
        output = torch.empty_like(q)
    rng = _RNG_DTYPE.get(kernel)
    seed = q.new_empty((2,) if kernel == "flash" else (), dtype=rng) if rng else q.new_empty(0)
    offset = q.new_empty((), dtype=rng) if rng else q.new_empty(0)
    return output, log_sum_exp, seed, offset


@torch.library.register_fake("memtrain::attention_backward")  # type: ignore[untyped-decorator]
def _backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, kernel: str
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dq, dk, dv = (torch.empty_permuted(t.shape, (0, 2, 1, 3), dtype=t.dtype) for t in (q, k, v))
    return dq, dk, dv, _backward_scratch(q, k, kernel)


def _backward_scratch(q: Tensor, k: Tensor, kernel: str) -> list[Tensor]:
    batch, heads, tokens, width = q.shape
    if kernel == "cpu":
        return []
    if kernel != "flash":
        return [q.new_empty((batch, heads, tokens), dtype=torch.float32)]
    tokens = round_up(tokens, _FLASH_TOKENS)
    wide = (batch, heads, tokens, round_up(width, 32 if width <= 128 else 64))
    scratch = [q.new_empty(shape, dtype=torch.float32) for shape in (wide, wide[:-1])]
    if k.shape[1] != heads:
        scratch += [k.new_empty((batch, heads, k.shape[2], width)) for _ in ("keys", "values")]
    return scratch


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, mask, ctx.kernel = inputs
    out, log_sum_exp, seed, offset = output
    drawn = [] if ctx.kernel == "cpu" else [seed, offset]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, log_sum_exp, *([] if mask is None else [mask]), *drawn)


def _differentiate(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, log_sum_exp = ctx.saved_tensors[:5]
    op = torch.ops.memtrain.attention_backward
    dq, dk, dv, _scratch = op(g, q, k, v, out, log_sum_exp, ctx.kernel)
    return dq, dk, dv, None, None


torch.library.register_autograd("memtrain::attention", _differentiate, setup_context=_save)


class FormulaAttention(TorchFunctionMode):
    """Every ``F.scaled_dot_product_attention`` under it is ``kernel``, by formula; dropout is a GPU's."""

    def __init__(self, kernel: str) -> None:
        if kernel not in FORMULA_KERNELS:
            raise AttentionKernelError(f"kernel must be one of {', '.join(FORMULA_KERNELS)}, got {kernel!r}")
        super().__init__()
        self.kernel = kernel
        self.used = False
        """Whether anything asked for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.used = True
            return _attend(self.kernel, *args, **(kwargs or {}))
        if func is F.dropout and self.kernel != "cpu":
            return _drop(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA's arguments; neither causality nor scale changes a byte."""
    if attn_mask is not None and kernel == "flash":
        raise AttentionKernelError(
            "SDPA's flash kernel takes no mask, and this model gives it one: choose efficient or cudnn"
        )
    if dropout_p and kernel == "cpu":
        raise AttentionKernelError("the CPU's flash kernel has no dropout: choose math")
    if kernel == "efficient" and key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _additive(attn_mask, query.dtype)
    padding = -value.shape[-1] % _FLASH_HEAD if kernel == "flash" else 0
    if padding:
        query, key, value = (F.pad(t, (0, padding)) for t in (query, key, value))
    output: Tensor = torch.ops.memtrain.attention(query, key, value, attn_mask, kernel)[0]
    return output[..., :-padding] if padding else output


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What SDPA makes of a boolean mask, for every call anew."""
    allowed, forbidden = (torch.scalar_tensor(x, dtype=dtype) for x in (0.0, float("-inf")))
    return torch.where(mask, allowed, forbidden)


def _drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if inplace:
        raise AttentionKernelError("dropout in place keeps other tensors on a GPU: trace it as it is (sdpa)")
    return torch.native_dropout(input, p, True)[0] if training and p else input
