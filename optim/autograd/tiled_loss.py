"""Cross-entropy over a head whose weight is cut into tiles of its vocabulary, one tile in memory at a time.

``chunked_loss`` needs the whole weight, and its gradient, while the loss is computed. Here forward goes over
the tiles once and keeps two numbers a token: the logarithm of the sum of exponentials so far (Milakov and
Gimelshein 2018, the online softmax) and the logit of the label. Backward goes over the tiles in reverse,
computes the logits of each again, and hands each tile its gradient before the next one comes. So a tile's
weight is needed twice, and the logits are computed twice; never more exists than the logits of
``chunk_tokens`` tokens over one tile, one tile's gradient, and the gradient of the hidden states in fp32.

Precision: as ``chunked_loss``: logits are rounded to the weight's dtype, all else is fp32. The sum of
exponentials is rounded once a tile; the gradient of the hidden states is added up over tiles in fp32, from
products rounded to the weight's dtype, and rounded once. A tile's gradient has the rows that it would have in
the whole weight, but for the rounding of the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memtrain.optim.autograd.chunked_loss import DEFAULT_CHUNK_TOKENS
from memtrain.optim.autograd.tiled_linear import TiledLinear


def tiled_cross_entropy(
    hidden: Tensor,
    head: TiledLinear,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """``chunked_cross_entropy(hidden, head.weight, labels, bias=head.bias, ...)`` of a tiled head.

    Args:
        hidden: ``[..., features]``.
        head: its tiles are called one by one, in forward and, by what autograd saves of them, in backward.
        labels: int64, the shape of ``hidden`` without its last dimension; *not* shifted here.
        ignore_index, num_items, chunk_tokens, soft_cap, logit_scale: as of ``chunked_cross_entropy``.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 operands).

    Raises:
        ValueError: shapes, dtypes, labels or settings that cannot be right; columns of the head are cut.
    """
    _validate(hidden, head, labels, ignore_index, chunk_tokens)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if torch.is_autocast_enabled(hidden.device.type):
        rows = rows.to(torch.get_autocast_dtype(hidden.device.type))
    labels = labels.reshape(-1).to(hidden.device)
    counted = labels != ignore_index
    work = _Work(rows, labels, counted, chunk_tokens, soft_cap, logit_scale)
    divisor = counted.sum() if num_items is None else num_items
    work.divisor = torch.as_tensor(divisor, dtype=work.dtype, device=hidden.device)
    link = torch.zeros((), dtype=work.dtype, device=hidden.device)
    for start, tile in zip(head.starts, head.parts, strict=True):
        link = tile(rows, _operation(work, link, start))
    loss: Tensor = _Loss.apply(link, work)  # type: ignore[no-untyped-call]
    return loss


def _validate(
    hidden: Tensor, head: TiledLinear, labels: Tensor, ignore_index: int, chunk_tokens: int
) -> None:
    if head.in_tiles > 1:
        raise ValueError(f"the head's columns are cut into {head.in_tiles} tiles; cut rows alone")
    if hidden.shape[-1] != head.in_features:
        raise ValueError(f"hidden {tuple(hidden.shape)} must end with the head's {head.in_features} features")
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels {tuple(labels.shape)} {labels.dtype} must be int64, one per token of "
            f"{tuple(hidden.shape)}"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk_tokens}")
    if labels.device.type == "cpu":
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= head.out_features))]
        if wrong.numel():
            raise ValueError(
                f"label {int(wrong[0])} is outside 0..{head.out_features - 1} and is not ignore_index "
                f"({ignore_index})"
            )


class _Work:
    """One loss under way: what passes from tile to tile."""

    divisor: Tensor

    def __init__(
        self,
        hidden: Tensor,
        labels: Tensor,
        counted: Tensor,
        chunk_tokens: int,
        soft_cap: float | None,
        logit_scale: float,
    ) -> None:
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.labels, self.counted = labels, counted
        self._chunk_tokens, self._cap, self._scale = chunk_tokens, soft_cap, logit_scale
        self.log_total = torch.full((len(hidden),), -torch.inf, dtype=self.dtype, device=hidden.device)
        self.target = torch.zeros_like(self.log_total)
        self.grad_hidden: Tensor | None = None
        """Of the tiles that backward has gone over."""

    def _logits(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Projections, logits in fp32, and the slope of the soft cap."""
        projected = torch.mm(hidden, weight.t())
        z = projected.to(self.dtype, copy=True)
        if bias is not None:
            z += bias
        z *= self._scale
        if self._cap is None:
            return projected, z, None
        z.div_(self._cap).tanh_()
        slope = 1 - z * z
        return projected, z.mul_(self._cap), slope

    def _own(self, chunk: slice, start: int, rows: int) -> tuple[Tensor, Tensor]:
        """Which tokens of a chunk have their label in a tile, and where in it."""
        local = self.labels[chunk] - start
        mine = self.counted[chunk] & (local >= 0) & (local < rows)
        return mine, local.where(mine, 0).unsqueeze(1)

    def _chunks(self, tokens: int) -> list[slice]:
        return [slice(s, min(s + self._chunk_tokens, tokens)) for s in range(0, tokens, self._chunk_tokens)]

    def fold(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, start: int) -> None:
        """Take a tile's logits into account."""
        for chunk in self._chunks(len(hidden)):
            _, z, _ = self._logits(hidden[chunk], weight, bias)
            mine, local = self._own(chunk, start, len(weight))
            self.log_total[chunk] = torch.logaddexp(self.log_total[chunk], torch.logsumexp(z, 1))
            self.target[chunk] += z.gather(1, local).squeeze(1).where(mine, 0)

    def gradients(
        self,
        grad_loss: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        start: int,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of a tile's weight and bias; that of the hidden states is added to ``grad_hidden``."""
        grad_weight = torch.zeros_like(weight) if needs[1] else None
        grad_bias = torch.zeros(len(weight), dtype=self.dtype, device=weight.device) if needs[2] else None
        if needs[0] and self.grad_hidden is None:
            self.grad_hidden = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device)
        factor = grad_loss * self._scale / self.divisor
        for chunk in self._chunks(len(hidden)):
            projected, z, slope = self._logits(hidden[chunk], weight, bias)
            mine, local = self._own(chunk, start, len(weight))
            z.sub_(self.log_total[chunk].unsqueeze(1)).exp_()
            z.scatter_add_(1, local, -mine.to(z.dtype).unsqueeze(1))
            z *= torch.where(self.counted[chunk], factor, 0).unsqueeze(1)
            if slope is not None:
                z *= slope
            if grad_bias is not None:
                grad_bias += z.sum(0)
            projected.copy_(z)
            if needs[0]:
                assert self.grad_hidden is not None
                self.grad_hidden[chunk] += torch.mm(projected, weight)
            if grad_weight is not None:
                grad_weight.addmm_(projected.t(), hidden[chunk])
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_weight, grad_bias

    def take_grad_hidden(self, dtype: torch.dtype) -> Tensor | None:
        """The sum over all tiles, rounded; another backward pass begins anew."""
        total, self.grad_hidden = self.grad_hidden, None
        return None if total is None else total.to(dtype)


def _operation(work: _Work, link: Tensor, start: int) -> Any:
    def operation(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
        if hidden.dtype != weight.dtype:
            raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one, or use autocast")
        folded: Tensor = _TileLoss.apply(link, hidden, weight, bias, work, start)  # type: ignore[no-untyped-call]
        return folded

    return operation


class _TileLoss(torch.autograd.Function):
    """One tile. ``link`` has no value: it has backward go over the tiles in reverse, one after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        link: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        work: _Work,
        start: int,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            work.fold(hidden, weight, bias, start)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.work, ctx.start = work, start
        return link.clone()

    @staticmethod
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("tiled_cross_entropy has no second derivative: call without create_graph=True")
        hidden, weight, bias = ctx.saved_tensors
        work: _Work = ctx.work
        with torch.autocast(hidden.device.type, enabled=False):
            grad_weight, grad_bias = work.gradients(
                grad_link, hidden, weight, bias, ctx.start, ctx.needs_input_grad[1:4]
            )
        first = ctx.start == 0  # which backward comes to last
        grad_hidden = work.take_grad_hidden(hidden.dtype) if first else None
        return grad_link, grad_hidden, grad_weight, grad_bias, None, None


class _Loss(torch.autograd.Function):
    """The loss, when all tiles have been folded."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, work: _Work) -> Tensor:
        return (work.log_total - work.target).where(work.counted, 0).sum() / work.divisor

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        return grad_loss, None
