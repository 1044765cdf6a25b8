"""How the tensors of an optimizer's state are cut with their parameter, read off a trial.

The same steps are taken on a whole parameter and on flat pieces of it. Where every state tensor of the whole
is that of the pieces, end to end, the update may be streamed piece by piece, and the tensors' lengths say how
each is cut: an element to each of the parameter's, as moments are; an element to a block of them, as scales
of quantised moments are, or to two, as 4-bit codes; or not at all, where every piece keeps the same few
numbers, such as a code book.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.shards import PIECE_ALIGNMENT

Cuts = dict[str, int]
"""By key of a state tensor: elements of the parameter to one of its own, or ``SHARED``."""
SHARED = 0
"""All pieces keep the same."""
_BLOCKS = tuple(1 << power for power in range(1, PIECE_ALIGNMENT.bit_length()))
"""Lengths of blocks that fall alike in every piece: pieces begin at multiples of ``PIECE_ALIGNMENT``."""


def find_cuts(
    shape: torch.Size, whole: Mapping[str, Any], sizes: Sequence[int], parts: Sequence[Mapping[str, Any]]
) -> Cuts | None:
    """Of the tensors in ``whole``; None where the pieces' states are not it, bit for bit.

    Args:
        shape: of the parameter.
        whole: its state.
        sizes: elements of the pieces, in order.
        parts: their states.
    """
    if any(part.keys() != whole.keys() for part in parts):
        return None
    cuts: Cuts = {}
    for key, value in whole.items():
        others = [part[key] for part in parts]
        if isinstance(value, Tensor) and value.dim() > 0:
            cut = _find_cut(shape, value, sizes, others)
            if cut is None:
                return None
            cuts[key] = cut
        elif not all(same_scalar(value, other) for other in others):
            return None
    return cuts


def _find_cut(shape: torch.Size, whole: Tensor, sizes: Sequence[int], parts: Sequence[Any]) -> int | None:
    if not all(isinstance(part, Tensor) and part.dtype == whole.dtype for part in parts):
        return None
    if all(part.shape == whole.shape for part in parts):
        return SHARED if all(torch.equal(whole, part) for part in parts) else None
    if not torch.equal(whole.reshape(-1), torch.cat([part.reshape(-1) for part in parts])):
        return None
    if whole.shape == shape:
        return 1 if [tuple(part.shape) for part in parts] == [(size,) for size in sizes] else None
    lengths = [(shape.numel(), whole), *zip(sizes, parts, strict=True)]
    for block in _BLOCKS:
        if all(tensor.shape == (-(-elements // block),) for elements, tensor in lengths):
            return block
    return None


def same_scalar(one: Any, other: Any) -> bool:
    """Equality of 0-dim tensors or numbers, NaN equal to itself; other things are no scalars."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dim() > 0 or other.dim() > 0 or one.dtype != other.dtype:
            return False
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    return type(one) is type(other) and bool(one == other or one != one)
