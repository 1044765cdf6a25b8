"""RMSNorm and LayerNorm that save their input and nothing else of its size.

Hugging Face's RMSNorm keeps its input in fp32 and the normalised rows, and each linear layer behind it keeps
the output once more: of a bf16 Llama layer's 45.8 bytes per feature and token, 16. Here the
input is saved in its own dtype with the reciprocal root mean square of each row (fp32); the output is a
``RecomputedOutput``, which the layers of ``recomputed.linear`` do not save.

Three ways to write an RMSNorm are in use, and they round differently (``RMSNormForm``). Forward and every
gradient follow the named form operator by operator, in the order in which autograd would run them, so that
both are bit-equal to the plain module; on a CPU in two compiled passes
(``memtrain.optim.kernels.rms_norm_cpu``), where there is a compiler. On CUDA the form of Llama goes through
the kernels of ``memtrain.optim.kernels.rms_norm``, whose backward rounds once where autograd rounds twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.optim.autograd.recomputed import (
    Held,
    RecomputedOutput,
    linear,
    refuse_double_backward,
    taken,
)
from memtrain.optim.kernels import rms_norm as kernels
from memtrain.optim.kernels import rms_norm_cpu

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class RMSNormForm(str, Enum):
    """Where an RMSNorm rounds; ``n`` is ``x / rms(x)`` in fp32 (in fp64 for fp64)."""

    ROUND_THEN_SCALE = "round_then_scale"
    """``weight * n.to(x.dtype)``: Llama, Mistral, Qwen."""
    SCALE_THEN_ROUND = "scale_then_round"
    """``(weight * n).to(x.dtype)``: ``torch.nn.RMSNorm``, OLMo 2."""
    ONE_PLUS_WEIGHT = "one_plus_weight"
    """``((1 + weight) * n).to(x.dtype)``: Gemma."""


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, form: RMSNormForm = RMSNormForm.ROUND_THEN_SCALE
) -> Tensor:
    """RMSNorm over the last dimension that saves ``x`` and one number a row.

    Saved: ``x.nbytes + 4 * rows`` (8 a row for fp64); the weight by reference.

    Args:
        x: ``[..., features]``, floating point.
        weight: ``[features]``.
        eps: added to the mean square.

    Returns:
        ``[..., features]``; in the promoted dtype of ``x`` and ``weight`` for ROUND_THEN_SCALE, else that of
        ``x``.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: in backward under ``create_graph=True``.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], the features of x, got {tuple(weight.shape)}")
    if torch.compiler.is_compiling():
        return rms_norm_forward(x, weight, eps, form)[0]
    # The kernel hands over one gradient; autograd two, of which see _RMSNorm.
    twice = x if x.dtype == _wide(x.dtype) and not _has_kernel(x, form) else None
    result: Tensor = _RMSNorm.apply(x, twice, weight, eps, form)  # type: ignore[no-untyped-call]
    return result


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """``torch.nn.functional.layer_norm`` over the last dimension, whose output ``linear`` does not save.

    Saved: ``x.nbytes`` and two numbers a row, as torch's own does; weight and bias by reference.

    Args:
        x: ``[..., features]``.
        weight, bias: ``[features]`` or None.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: in backward under ``create_graph=True``.
    """
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be [{x.shape[-1]}], the features of x, got {tuple(value.shape)}")
    kind = x.device.type
    if torch.compiler.is_compiling():
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if kind == "cuda" and torch.is_autocast_enabled(kind):  # there autocast computes layer_norm in fp32
        x, weight, bias = x.float(), *(None if t is None else t.float() for t in (weight, bias))
    result: Tensor = _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return result


class NormLinear(nn.Module):
    """A norm and the linear layers that eat its output, which share the norm's saved input.

    Args:
        norm: ``torch.nn.RMSNorm`` or ``torch.nn.LayerNorm`` with a weight, over the last dimension.
        linears: for instance the projections to query, key and value.

    Calling it gives one output for each linear layer.
    """

    def __init__(self, norm: nn.RMSNorm | nn.LayerNorm, linears: Iterable[nn.Linear]) -> None:
        super().__init__()
        if norm.weight is None or len(norm.normalized_shape) != 1:
            raise ValueError(f"norm must have a weight and normalise the last dimension alone, got {norm}")
        self.norm = norm
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[..., features]`` to one ``[..., out]`` for each linear layer."""
        norm = self.norm
        if isinstance(norm, nn.RMSNorm):
            eps = default_eps(x.dtype) if norm.eps is None else norm.eps
            y = rms_norm(x, norm.weight, eps, form=RMSNormForm.SCALE_THEN_ROUND)
        else:
            y = layer_norm(x, norm.weight, norm.bias, norm.eps)
        return tuple(linear(y, layer.weight, layer.bias) for layer in self.linears)  # type: ignore[arg-type]


def default_eps(dtype: torch.dtype) -> float:
    """What ``torch.nn.RMSNorm(eps=None)`` adds: of the dtype that it computes in, fp32 for bf16."""
    return torch.finfo(_wide(dtype)).eps


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _has_kernel(x: Tensor, form: RMSNormForm) -> bool:
    return (
        x.is_cuda
        and form is RMSNormForm.ROUND_THEN_SCALE
        and x.dtype in _KERNEL_DTYPES
        and x.shape[-1] <= kernels.MAX_COLUMNS
    )


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, form: RMSNormForm = RMSNormForm.ROUND_THEN_SCALE
) -> tuple[Tensor, Tensor]:
    """``(y, rstd)``; ``rstd`` is ``[..., 1]`` in fp32 (fp64 for fp64)."""
    wide = x.to(_wide(x.dtype))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return _scaled(wide * rstd, weight, x.dtype, form), rstd


def _scaled(normalised: Tensor, weight: Tensor, dtype: torch.dtype, form: RMSNormForm) -> Tensor:
    """``normalised`` in fp32, or already rounded to ``dtype`` where the form rounds first."""
    if form is RMSNormForm.ROUND_THEN_SCALE:
        return weight * normalised.to(dtype)
    return (normalised * _wide_scale(weight, normalised.dtype, form)).to(dtype)


def _wide_scale(weight: Tensor, dtype: torch.dtype, form: RMSNormForm) -> Tensor:
    weight = weight.to(dtype)
    return 1.0 + weight if form is RMSNormForm.ONE_PLUS_WEIGHT else weight


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    form: RMSNormForm = RMSNormForm.ROUND_THEN_SCALE,
    normalised: Tensor | None = None,
    *,
    needs_x: bool = True,
    needs_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dx_through_rstd, dweight)`` in the dtypes of ``x`` and ``weight``; None for what is not needed.

    With ``n = x * rstd`` and ``g`` the gradient of ``n`` the gradient of ``x`` has two terms, ``g * rstd``
    and ``-x * rstd^3 * sum(g * x) / features``, associated as autograd does it. They come summed in ``dx``,
    except where ``x`` is in fp32 or fp64. ``normalised``, if somebody has already computed it for
    ROUND_THEN_SCALE, is ``(x * rstd).to(x.dtype)``; it is overwritten.
    """
    wide = x.to(_wide(x.dtype))
    scratch = torch.empty_like(wide)
    if form is RMSNormForm.ROUND_THEN_SCALE:
        if needs_weight and normalised is None:
            normalised = torch.mul(wide, rstd, out=scratch).to(x.dtype)
        dweight = _sum_of_rows(normalised, dy) if needs_weight and normalised is not None else None
        grad = (dy * weight).to(x.dtype).to(wide.dtype)
    else:
        dy = dy.to(wide.dtype)
        dweight = _sum_of_rows(torch.mul(wide, rstd, out=scratch), dy) if needs_weight else None
        grad = dy * _wide_scale(weight, wide.dtype, form)
    if dweight is not None:
        dweight = dweight.to(weight.dtype)
    if not needs_x:
        return None, None, dweight
    along = -0.5 * torch.mul(grad, wide, out=scratch).sum(-1, keepdim=True) * rstd.pow(3) / x.shape[-1]
    # Autograd multiplies by 2x; two is a power of two, so that the order makes no difference.
    direct, through_rstd = grad.mul_(rstd), torch.mul(wide, 2.0 * along, out=scratch)
    if wide is x:
        return direct, through_rstd, dweight
    return direct.add_(through_rstd).to(x.dtype), None, dweight


def _sum_of_rows(scratch: Tensor, dy: Tensor) -> Tensor:
    """``dy * scratch`` summed over all dimensions but the last; ``scratch`` may be overwritten.

    Not if ``dy`` lies otherwise in memory: the order of the sum is that of the product, whose is that of
    ``dy``.
    """
    in_place = scratch.dtype == dy.dtype and scratch.stride() == dy.stride() and dy.dim() > 1
    products = scratch.mul_(dy) if in_place else dy * scratch
    return products.sum_to_size(products.shape[-1:])


class _RMSNorm(RecomputedOutput):
    """In fp32 ``x`` comes twice, because the plain module reads it twice: autograd then adds the two terms of
    its gradient to that of the residual one after the other, and their sum rounds otherwise."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, _: Tensor | None, weight: Tensor, eps: float, form: RMSNormForm
    ) -> Tensor:
        if _has_kernel(x, form):
            y, rstd = kernels.rms_norm_forward(x, weight, eps)
        elif rms_norm_cpu.serves(x, weight):
            y, rstd = rms_norm_cpu.rms_norm_forward(x, weight, eps, form.value)
        else:
            y, rstd = rms_norm_forward(x, weight, eps, form)
        ctx.form = form
        ctx.held = Held()
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def output_again(ctx: Any, saved: tuple[Tensor, ...]) -> Tensor:
        x, weight, rstd = saved
        if rms_norm_cpu.serves(x, weight):
            return rms_norm_cpu.output_again(x, weight, rstd, ctx.form.value)
        normalised = x.to(_wide(x.dtype)) * rstd
        if ctx.form is RMSNormForm.ROUND_THEN_SCALE:
            normalised = ctx.held.kept = normalised.to(x.dtype)
        return _scaled(normalised, weight, x.dtype, ctx.form)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("rms_norm")
        normalised = ctx.held.kept
        x, weight, rstd = taken(ctx)
        needs_x, _, needs_weight = ctx.needs_input_grad[:3]
        if _has_kernel(x, ctx.form):
            dx, dweight = kernels.rms_norm_backward(dy, x, weight, rstd)
            return dx, None, dweight, None, None
        if rms_norm_cpu.serves(x, weight, dy):
            gradients = rms_norm_cpu.rms_norm_backward(
                dy, x, weight, rstd, ctx.form.value, needs_x=needs_x, needs_weight=needs_weight
            )
        else:
            gradients = rms_norm_backward(
                dy, x, weight, rstd, ctx.form, normalised, needs_x=needs_x, needs_weight=needs_weight
            )
        return (*gradients, None, None)


class _LayerNorm(RecomputedOutput):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.eps = eps
        ctx.held = Held()
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def output_again(ctx: Any, saved: tuple[Tensor, ...]) -> Tensor:
        x, weight, bias, _, _ = saved
        return torch.native_layer_norm(x, x.shape[-1:], weight, bias, ctx.eps)[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("layer_norm")
        x, weight, bias, mean, rstd = taken(ctx)
        gradients = torch.ops.aten.native_layer_norm_backward(
            dy, x, x.shape[-1:], mean, rstd, weight, bias, list(ctx.needs_input_grad[:3])
        )
        return (*gradients, None)
