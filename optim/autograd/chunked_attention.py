"""Exact attention by chunks of queries and keys: dropout, bias and masks without a matrix of scores.

For what ``torch.nn.functional.scaled_dot_product_attention`` computes with all scores in memory: on a CPU
every call with dropout, everywhere a bias that needs a gradient, a soft-cap. Where SDPA has a fused kernel,
use it.

Rabe and Staats (arXiv 2112.05682): a running maximum and sum over chunks of ``sqrt(keys)`` keys, so that
beside inputs and output there are ``query_chunk * sqrt(keys)`` scores. Departure: instead of checkpointing
each chunk, the log of the sum is saved for each query (fp32), and backward computes a chunk's probabilities
from it in one step, as FlashAttention does. Dropout's mask is a hash of (seed, query, key): the same whatever
the chunks, in forward, in backward and under checkpointing; the seed is drawn from torch's CPU generator.

Legend: B batch, H heads of queries, K heads of keys and values (H = K * G), N queries, M keys, D and E
features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memtrain.optim.autograd.attention_dropout import kept_scores
from memtrain.optim.autograd.recomputed import autocast_dtype, refuse_double_backward, without_autocast

DEFAULT_QUERY_CHUNK = 256


class _Settings(NamedTuple):
    scale: float
    is_causal: bool
    dropout: float
    soft_cap: float | None
    query_chunk: int
    key_chunk: int


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
    soft_cap: float | None = None,
    query_chunk: int = DEFAULT_QUERY_CHUNK,
    key_chunk: int | None = None,
) -> Tensor:
    """``dropout(softmax(scale * query @ key^T + bias)) @ value`` in O(sqrt(M)) memory beside its operands.

    Saved: query, key, value, output and fp32 (fp64 for fp64) ``[B, H, N]``; bias and mask by reference. A
    query that may look at no key gets zeros. Products of matrices are rounded to the dtype of the operands
    (or autocast's), as eager attention rounds them; softmax and sums are in fp32 (fp64).

    Args:
        query: ``[B, H, N, D]``.
        key, value: ``[B, K, M, D]`` and ``[B, K, M, E]``; H is a multiple of K (grouped queries).
        bias: added to the scores, broadcastable to ``[B, H, N, M]``; may need a gradient.
        mask: bool, True where a query may look, broadcastable likewise.
        is_causal: query ``i`` looks at keys up to ``i`` (as SDPA counts, from the upper left corner).
        dropout: probability; pass 0 outside training.
        scale: None: ``1 / sqrt(D)``.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)`` before bias and mask (Gemma 2).
        query_chunk, key_chunk: how many at a time; None: ``ceil(sqrt(M))`` keys.

    Raises:
        ValueError: shapes, dtypes or settings that cannot be right.
        RuntimeError: in backward under ``create_graph=True``; under ``torch.compile``.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("chunked_attention draws its seed on the host, which torch.compile does not trace")
    key_chunk = max(1, math.isqrt(max(key.shape[-2] - 1, 0)) + 1) if key_chunk is None else key_chunk
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    settings = _Settings(scale, is_causal, dropout, soft_cap, query_chunk, key_chunk)
    if (dtype := autocast_dtype(query)) is not None:
        query, key, value = (t.to(dtype) for t in (query, key, value))
    _validate(query, key, value, bias, mask, settings)
    seed = int(torch.randint(1 << 31, ())) if dropout else 0
    groups = query.shape[1] // key.shape[1]
    grouped = query.reshape(query.shape[0], key.shape[1], groups, *query.shape[2:])
    bias, mask = (_grouped(t, query.shape, key.shape) for t in (bias, mask))
    out: Tensor = _ChunkedAttention.apply(  # type: ignore[no-untyped-call]
        grouped, key.unsqueeze(2), value.unsqueeze(2), bias, mask, seed, settings
    )
    return out.flatten(1, 2)


def _grouped(extra: Tensor | None, query_shape: torch.Size, key_shape: torch.Size) -> Tensor | None:
    """A bias or mask as ``[B or 1, K or 1, G or 1, N or 1, M or 1]``."""
    if extra is None:
        return None
    extra = extra[(None,) * (4 - extra.dim())]
    if extra.shape[1] == 1:
        return extra.unsqueeze(2)
    groups = query_shape[1] // key_shape[1]
    return extra.reshape(extra.shape[0], key_shape[1], groups, *extra.shape[2:])


def _validate(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, settings: _Settings
) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"query, key and value must be [batch, heads, tokens, features], got {shapes}")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"batch, heads, keys and features must fit, got {shapes}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"heads of query must be a multiple of those of key, got {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"one dtype is wanted, got {query.dtype}, {key.dtype}, {value.dtype}")
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {settings.dropout}")
    if settings.soft_cap is not None and not settings.soft_cap > 0:
        raise ValueError(f"soft_cap must be > 0 or None, got {settings.soft_cap}")
    if settings.query_chunk < 1 or settings.key_chunk < 1:
        raise ValueError(f"chunks must be >= 1, got {settings.query_chunk} and {settings.key_chunk}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True: may look), got {mask.dtype}; pass numbers as bias")
    full = (*query.shape[:3], key.shape[2])
    for name, extra in (("bias", bias), ("mask", mask)):
        if extra is None:
            continue
        wanted = full[4 - extra.dim() :] if extra.dim() <= 4 else None
        if wanted is None or any(a not in (1, b) for a, b in zip(extra.shape, wanted, strict=True)):
            raise ValueError(f"{name} {tuple(extra.shape)} does not broadcast to {full}")


def _part(extra: Tensor, queries: slice, keys: slice) -> Tensor:
    """Rows and columns of a bias or mask; a dimension of one stays."""
    if extra.shape[-2] > 1:
        extra = extra[..., queries, :]
    return extra[..., keys] if extra.shape[-1] > 1 else extra


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Chunk(NamedTuple):
    """One rectangle of scores."""

    queries: slice
    keys: slice


def _chunks(queries: slice, key: Tensor, settings: _Settings) -> Iterator[_Chunk]:
    """The rectangles of some queries, without those that no query of them may look at."""
    keys = key.shape[-2]
    if settings.is_causal:
        keys = min(keys, queries.stop)
    for start in range(0, keys, settings.key_chunk):
        yield _Chunk(queries, slice(start, min(start + settings.key_chunk, keys)))


def _query_slices(query: Tensor, settings: _Settings) -> Iterator[slice]:
    count = query.shape[-2]
    for start in range(0, count, settings.query_chunk):
        yield slice(start, min(start + settings.query_chunk, count))


class _Scores:
    """Scores of one call, by chunks, and what is left of their gradient behind the soft-cap."""

    def __init__(
        self, query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, settings: _Settings
    ) -> None:
        self._query, self._key, self._bias, self._mask, self._settings = query, key, bias, mask, settings

    def __call__(self, chunk: _Chunk) -> tuple[Tensor, Tensor | None]:
        """Scores in fp32, -inf where a query may not look, and the soft-cap's slope."""
        settings, slope = self._settings, None
        key = self._key[..., chunk.keys, :].transpose(-1, -2)
        scores = (self._query[..., chunk.queries, :] @ key).to(_accurate(key.dtype)) * settings.scale
        if settings.soft_cap is not None:
            scores = scores.div_(settings.soft_cap).tanh_()
            slope = 1 - scores * scores
            scores *= settings.soft_cap
        if self._bias is not None:
            scores = scores + _part(self._bias, *chunk)
        if self._mask is not None:
            scores = scores.masked_fill(~_part(self._mask, *chunk), -math.inf)
        if settings.is_causal:
            rows, columns = (torch.arange(s.start, s.stop, device=scores.device) for s in chunk)
            scores = scores.masked_fill_(columns > rows.unsqueeze(1), -math.inf)
        return scores, slope


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        seed: int,
        settings: _Settings,
    ) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=_accurate(query.dtype))
        scores_of = _Scores(query, key, bias, mask, settings)
        with without_autocast(query):
            for queries in _query_slices(query, settings):
                out[..., queries, :], log_sums[..., queries] = _forward_rows(
                    scores_of, queries, key, value, seed, settings, query.shape
                )
        ctx.seed, ctx.settings = seed, settings
        ctx.save_for_backward(query, key, value, bias, mask, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("chunked_attention")
        query, key, value, bias, mask, out, log_sums = ctx.saved_tensors
        settings: _Settings = ctx.settings
        accurate = _accurate(query.dtype)
        dquery, dkey, dvalue = (torch.zeros_like(t, dtype=accurate) for t in (query, key, value))
        dbias = torch.zeros_like(bias, dtype=accurate) if ctx.needs_input_grad[3] else None
        scores_of = _Scores(query, key, bias, mask, settings)
        shape = torch.Size((*query.shape[:-1], key.shape[-2]))
        with without_autocast(query):
            for queries in _query_slices(query, settings):
                grad_rows = grad[..., queries, :]
                # A query that may look nowhere has log_sum -inf, and no probability.
                log_sum = log_sums[..., queries, None]
                log_sum = log_sum.masked_fill(log_sum == -math.inf, math.inf)
                along = (grad_rows.to(accurate) * out[..., queries, :].to(accurate)).sum(-1, keepdim=True)
                for chunk in _chunks(queries, key, settings):
                    scores, slope = scores_of(chunk)
                    probabilities = scores.sub_(log_sum).exp_()
                    dprobabilities = (grad_rows @ value[..., chunk.keys, :].transpose(-1, -2)).to(accurate)
                    used = probabilities
                    if settings.dropout:
                        kept = kept_scores(
                            shape, *chunk, seed=ctx.seed, dropout=settings.dropout, like=probabilities
                        )
                        dprobabilities *= kept
                        used = probabilities * kept
                    heads = used.to(grad.dtype).transpose(-1, -2) @ grad_rows
                    dvalue[..., chunk.keys, :] += heads.sum(2, keepdim=True)
                    dscores = dprobabilities.sub_(along).mul_(probabilities)
                    if dbias is not None:
                        _add_to_part(dbias, dscores, chunk)
                    if slope is not None:
                        dscores *= slope
                    low = dscores.mul_(settings.scale).to(query.dtype)
                    dquery[..., queries, :] += low @ key[..., chunk.keys, :]
                    heads = low.transpose(-1, -2) @ query[..., queries, :]
                    dkey[..., chunk.keys, :] += heads.sum(2, keepdim=True)
        if dbias is not None:
            dbias = dbias.to(bias.dtype)
        return (*(g.to(query.dtype) for g in (dquery, dkey, dvalue)), dbias, None, None, None)


def _forward_rows(
    scores_of: _Scores,
    queries: slice,
    key: Tensor,
    value: Tensor,
    seed: int,
    settings: _Settings,
    query_shape: torch.Size,
) -> tuple[Tensor, Tensor]:
    """Output and log of the sum for some queries."""
    accurate = _accurate(value.dtype)
    rows = (*query_shape[:-2], queries.stop - queries.start, 1)
    largest = value.new_full(rows, -math.inf, dtype=accurate)
    total = value.new_zeros(rows, dtype=accurate)
    weighted = value.new_zeros((*rows[:-1], value.shape[-1]), dtype=accurate)
    shape = torch.Size((*query_shape[:-1], key.shape[-2]))
    for chunk in _chunks(queries, key, settings):
        scores, _ = scores_of(chunk)
        new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
        base = new_largest.masked_fill(new_largest == -math.inf, 0.0)  # nothing to look at so far
        shrink = (largest - base).exp_()
        exponentials = scores.sub_(base).exp_()
        total = total * shrink + exponentials.sum(-1, keepdim=True)
        if settings.dropout:
            exponentials *= kept_scores(shape, *chunk, seed=seed, dropout=settings.dropout, like=exponentials)
        weighted = weighted * shrink + exponentials.to(value.dtype) @ value[..., chunk.keys, :]
        largest = new_largest
    out = weighted / total.masked_fill(total == 0, 1.0)
    return out.to(value.dtype), (largest + total.log()).squeeze(-1)


def _add_to_part(dbias: Tensor, dscores: Tensor, chunk: _Chunk) -> None:
    part = _part(dbias, *chunk)
    part += dscores.sum_to_size(part.shape)
