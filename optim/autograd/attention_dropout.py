"""Dropout of attention's probabilities as a hash of (seed, query, key): the same whatever the chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from memtrain.optim.storage.random import mix_


def keep_mask(
    shape: torch.Size, queries: range, keys: range, *, seed: int, dropout: float, device: torch.device
) -> Tensor:
    """Which scores dropout keeps: bool ``[B, K, G, len(queries), len(keys)]`` of ``[B, K, G, N, M]``.

    Args:
        shape: of all scores; a row of it is numbered modulo 2^32.
    """
    heads = torch.arange(shape[:3].numel(), dtype=torch.int32, device=device).view(*shape[:3], 1)
    rows = heads * shape[3] + torch.arange(queries.start, queries.stop, dtype=torch.int32, device=device)
    rows = mix_(rows.bitwise_xor_(seed)).unsqueeze(-1)
    columns = mix_(torch.arange(keys.start, keys.stop, dtype=torch.int32, device=device).mul_(-0x61C88647))
    bits = mix_(rows + columns).bitwise_and_(0x7FFFFFFF)
    return bits >= round(dropout * (1 << 31))


def kept_scores(
    shape: torch.Size, queries: slice, keys: slice, *, seed: int, dropout: float, like: Tensor
) -> Tensor:
    """What dropout multiplies the probabilities of some queries and keys by, in the dtype of ``like``."""
    rows, columns = (range(part.start, part.stop) for part in (queries, keys))
    mask = keep_mask(shape, rows, columns, seed=seed, dropout=dropout, device=like.device)
    return mask.to(like.dtype).mul_(1 / (1 - dropout))
