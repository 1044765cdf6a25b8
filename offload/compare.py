"""Compares what a forward on the first tokens gave with what the forward on all of them did."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch
import xxhash

from memtrain.offload.token_rows import RowAxis

_LEAST = sys.float_info.min
_PIECE_ELEMENTS = 1 << 16
"""Half a MiB in double precision: copies of whole tensors would stand beside what a block saves."""


class Mismatch(Exception):
    """Two tensors that should be the same one, of different tokens, and are not: why."""


class TwoTokenAxes(Mismatch):
    """Tokens lie along more than one dimension."""


def token_axis(
    whole: torch.Tensor, part: torch.Tensor, tokens: int, prefix: int
) -> tuple[RowAxis | None, float]:
    """Where the tokens lie in a tensor, and by how much its first ones differ from ``part``.

    Args:
        whole: of ``tokens`` tokens.
        part: the same of the first ``prefix`` of them.

    Returns:
        None for the axis where both have one shape: no tokens lie in them.

    Raises:
        Mismatch: the shapes differ by more than the number of tokens.
    """
    if whole.dtype != part.dtype or whole.dim() != part.dim():
        raise Mismatch(f"a tensor of shape {tuple(whole.shape)} becomes one of {tuple(part.shape)}")
    dims = [dim for dim, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b]
    if not dims:
        return None, difference(whole, part)
    if len(dims) > 1:
        raise TwoTokenAxes(f"{len(dims)} dimensions of {tuple(whole.shape)} become {tuple(part.shape)}")
    axes = [RowAxis(dim=dims[0]), RowAxis(dim=dims[0], leading=True)]
    if not axes[0].fits(whole.shape, tokens) or axes[0].resized(whole.shape, tokens, prefix) != part.shape:
        raise Mismatch(f"{tuple(whole.shape)} becomes {tuple(part.shape)}: not by the number of tokens")
    if whole.shape[dims[0]] == tokens:
        del axes[1:]  # nothing is folded with the tokens
    found = [
        difference(axis.rows(whole, tokens, 0, prefix), axis.rows(part, prefix, 0, prefix)) for axis in axes
    ]
    best = found.index(min(found))
    return axes[best], found[best]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of two tensors, in parts of the largest entry of ``one``.

    Exactly 0 when all bits are the same; infinite when whole numbers or truth values differ, or when one of
    two is not a number.
    """
    if all(torch.equal(_bits(a), _bits(b)) for a, b in _pieces(one, other)):
        return 0.0
    if not one.is_floating_point():
        return math.inf
    apart, largest = 0.0, 0.0
    for a, b in _pieces(one, other):
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        delta = torch.where(same, 0.0, (a - b).abs())
        if bool(delta.isnan().any()):
            return math.inf
        apart = max(apart, float(delta.max()))
        largest = max(largest, float(torch.where(a.isfinite(), a.abs(), 0.0).max()))
    if apart == 0.0:
        return _LEAST  # zeros with other signs
    return apart / largest if largest else math.inf


def beyond_rounding(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> float:
    """``difference`` where it is more than ``tolerance``, otherwise 0; and 0 where ``one`` is not finite: a
    training that has diverged is not to be stopped by us."""
    apart = difference(one, other)
    return apart if apart > tolerance and bool(one.isfinite().all()) else 0.0


def fingerprint(tensor: torch.Tensor) -> bytes:
    """128 bits that stand for those of ``tensor``: for comparing with a tensor of the same shape that will be
    there when this one is gone."""
    digest = xxhash.xxh3_128()
    for (piece,) in _pieces(tensor):
        digest.update(_bits(piece).cpu().numpy())
    return digest.digest()


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one shape, cut alike, as views: a piece can be laid out anew without a copy of the whole."""
    if tensors[0].numel() <= _PIECE_ELEMENTS:
        yield tensors
        return
    dim = next(dim for dim, size in enumerate(tensors[0].shape) if size > 1)
    for halves in zip(*(tensor.tensor_split(2, dim) for tensor in tensors), strict=True):
        yield from _pieces(*halves)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
