"""Linear layer and cross-entropy together, by chunks of tokens, so that logits are never the peak.

With a vocabulary of 49,152 the logits of 1,024 tokens are 96 MiB in bf16, 192 MiB in the fp32 that the loss
wants, and as much again for their gradient. Here one chunk of logits exists at a time; it is overwritten by
its own gradient, which is folded at once into the gradients of the hidden states and of the weight. The
gradients are therefore ready when forward ends, and backward only multiplies them by the incoming gradient.

Why not ``torch.nn.functional.linear_cross_entropy`` (2.13), which has the same structure: in bf16 on a CPU
each of its policies works with fp32 copies of the weight and of its gradient, it rounds the loss itself to
bf16, and it knows neither logit scale nor soft-cap. SmolLM2's head, 1,024 tokens x 576 x 49,152, bf16,
forward and backward on two idle cores with AMX, medians of three; peak of the process above the operands, the
weight's gradient (54 MiB) included; error of the weight's gradient relative to fp64:

    full logits in fp32                     0.46 s   576 MiB   1.15e-3   (loss off by 6e-5)
    torch, 256 tokens a chunk, any policy   1.00 s   535 MiB   1.29e-3   (loss off by 4e-2)
    here, 256 tokens a chunk                0.25 s    94 MiB   1.29e-3   (loss off by 6e-5)
    here, 128 tokens a chunk                0.30 s    81 MiB   1.34e-3

Precision: logits are rounded to the weight's dtype, as the output projection of the model rounds them;
scale, soft-cap, softmax and loss are computed in fp32. The weight's gradient exists once, in the weight's
dtype, and is rounded once per chunk: its error in bf16 grows with their number (against that of the full
logits 1.2 times with 32 chunks above; on a small vocabulary, where every row is hit by every chunk, 1.5 times
with 4 chunks and 2.6 times with 16).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEFAULT_CHUNK_TOKENS = 256
_SCRATCH_BYTES = 8 << 20
"""fp32 rows worked on at a time. Whole chunks of 256 rows (48 MiB) were not faster than 8 MiB of them."""


class _Settings(NamedTuple):
    ignore_index: int
    chunk_tokens: int
    soft_cap: float | None
    logit_scale: float
    label_smoothing: float
    gradients: bool


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of ``soft_cap * tanh(logit_scale * (hidden @ weight.T + bias) / soft_cap)``.

    Args:
        hidden: ``[..., features]``.
        weight: ``[classes, features]``, in the dtype of ``hidden`` unless autocast is on.
        labels: int64, the shape of ``hidden`` without its last dimension; *not* shifted here.
        bias: ``[classes]`` or None.
        ignore_index: tokens with this label count nowhere.
        num_items: divisor of the summed loss; None: the number of labels not ignored (the mean).
        chunk_tokens: tokens whose logits exist at one time; memory is ``chunk_tokens * classes`` elements.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 operands). Backward may run once: the gradients are
        handed on, not copied. A second backward through the same loss raises RuntimeError.

    Raises:
        ValueError: shapes, dtypes, labels or settings that cannot be right.
    """
    settings = _Settings(
        ignore_index, chunk_tokens, soft_cap, logit_scale, label_smoothing, torch.is_grad_enabled()
    )
    _validate(hidden, weight, labels, bias, settings)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden, weight = (t.to(torch.get_autocast_dtype(device)) for t in (hidden, weight))
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one, or use autocast")
    labels = labels.reshape(-1).to(hidden.device)
    if num_items is None:
        num_items = (labels != ignore_index).sum()
    divisor = torch.as_tensor(num_items, dtype=_accurate(hidden.dtype), device=hidden.device)
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels, divisor, settings
    )
    return loss


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _validate(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    settings: _Settings,
) -> None:
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must end with the features of weight [classes, features], "
            f"which is {tuple(weight.shape)}"
        )
    classes = weight.shape[0]
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)} must be one per token of {tuple(hidden.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"bias must be [{classes}], got {tuple(bias.shape)}")
    if settings.chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {settings.chunk_tokens}")
    if settings.soft_cap is not None and not settings.soft_cap > 0:
        raise ValueError(f"soft_cap must be > 0 or None, got {settings.soft_cap}")
    if not math.isfinite(settings.logit_scale):
        raise ValueError(f"logit_scale must be finite, got {settings.logit_scale}")
    if not 0 <= settings.label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {settings.label_smoothing}")
    # Elsewhere than on a CPU reading labels would stall the device, and gather itself asserts.
    if labels.device.type == "cpu":
        wrong = labels[(labels != settings.ignore_index) & ((labels < 0) | (labels >= classes))]
        if wrong.numel():
            raise ValueError(
                f"label {int(wrong[0])} is outside 0..{classes - 1} and is not ignore_index "
                f"({settings.ignore_index})"
            )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients in forward, scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        divisor: Tensor,
        settings: _Settings,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = (n and settings.gradients for n in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=divisor.dtype) if bias is not None and needs_bias else None
        rows = max(1, _SCRATCH_BYTES // (weight.shape[0] * divisor.element_size()))
        total = torch.zeros_like(divisor)
        buffer = hidden.new_empty(min(settings.chunk_tokens, len(hidden)), len(weight))
        # Autocast would make casts of the weight anew for every chunk; the caller has cast already.
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), settings.chunk_tokens):
                chunk = slice(start, start + settings.chunk_tokens)
                logits = buffer[: len(hidden[chunk])]
                torch.mm(hidden[chunk], weight.t(), out=logits)
                parts = zip(torch.split(logits, rows), torch.split(labels[chunk], rows), strict=True)
                for part, part_labels in parts:
                    total += _turn_into_gradient(part, part_labels, bias, grad_bias, divisor, settings)
                if grad_hidden is not None:
                    torch.mm(logits, weight, out=grad_hidden[chunk])
                if grad_weight is not None:
                    grad_weight.addmm_(logits.t(), hidden[chunk])
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total / divisor

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "chunked_cross_entropy has no second derivative: call without create_graph=True"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "chunked_cross_entropy: backward ran twice through one loss, whose gradients are handed on "
                "and not kept. Compute the loss again, or add losses up and call backward once."
            )
        # In place: a second gradient of the weight would be a second peak.
        scaled = (None if g is None else g.mul_(grad_loss) for g in gradients)
        return (*scaled, None, None, None)


def _turn_into_gradient(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    grad_bias: Tensor | None,
    divisor: Tensor,
    settings: _Settings,
) -> Tensor:
    """Overwrite ``[rows, classes]`` projections by the gradient of the loss; return their summed loss."""
    z = logits.to(divisor.dtype, copy=True)
    if bias is not None:
        z += bias
    z *= settings.logit_scale
    slope = None
    if settings.soft_cap is not None:
        z.div_(settings.soft_cap).tanh_()
        slope = 1 - z * z
        z *= settings.soft_cap
    counted = (labels != settings.ignore_index).unsqueeze(1)
    target = labels.unsqueeze(1).where(counted, 0)
    log_total = torch.logsumexp(z, 1, keepdim=True)
    smoothing = settings.label_smoothing
    loss = log_total - (1 - smoothing) * z.gather(1, target)
    if smoothing:
        loss -= smoothing * z.mean(1, keepdim=True)
    summed = loss.where(counted, 0).sum()
    if not settings.gradients:
        return summed
    z.sub_(log_total).exp_()
    if smoothing:
        z -= smoothing / z.shape[1]
    z.scatter_(1, target, z.gather(1, target) - (1 - smoothing))
    z *= torch.where(counted, settings.logit_scale / divisor, 0)
    if slope is not None:
        z *= slope
    if grad_bias is not None:
        grad_bias += z.sum(0)
    logits.copy_(z)
    return summed
