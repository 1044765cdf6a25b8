"""Tensors of few distinct values as a table of them and a place in it for each: one pass of C++ to find the
values, another to write the places.

Values are bit patterns, so that NaN payloads and the sign of zero come back. The first pass ends where there
are more values than asked for, which for most tensors is after a few thousand elements. The plain-torch
reference sorts.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from memtrain.optim.kernels import native

PATTERNS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers that stand for values, by their bytes."""
NARROW_VALUES = 256
"""Places in a table of so many are bytes, in a larger one of two."""
MOST_VALUES = 1 << 16


def serves(patterns: Tensor) -> bool:
    """Whether C++ can encode these, or decode to what is like them."""
    return native.is_plain(patterns) and native.function("unique", "unique_encode") is not None


def unique_encode(patterns: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """Places (uint8, or int16 as unsigned) and distinct patterns; None where there are more than ``most``.

    Args:
        patterns: of ``PATTERNS``, one-dimensional, contiguous.
        most: at most ``MOST_VALUES``.
    """
    if not serves(patterns):
        return unique_encode_reference(patterns, most)
    count, found = patterns.numel(), ctypes.c_int64(0)
    distinct = patterns.new_empty(min(most, max(count, 1)))
    codes = torch.empty(count, dtype=torch.uint8 if most <= NARROW_VALUES else torch.int16)
    encode = native.function("unique", "unique_encode")
    assert encode is not None
    encode(
        native.pointer(patterns, patterns.dtype),
        native.pointer(distinct, patterns.dtype),
        native.pointer(codes, codes.dtype),
        ctypes.byref(found),
        native.count(patterns),
        ctypes.c_int64(most),
        ctypes.c_int32(patterns.element_size()),
    )
    if found.value < 0:
        return None
    if found.value <= NARROW_VALUES and codes.dtype != torch.uint8:
        codes = codes.view(torch.uint8)[:count].clone()  # it was room for wider ones
    return codes, distinct[: found.value].clone()


def unique_encode_reference(patterns: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """The same by sorting; the table is in another order."""
    distinct, places = torch.unique(patterns, return_inverse=True)
    if distinct.numel() > most:
        return None
    narrow = distinct.numel() <= NARROW_VALUES
    return places.to(torch.uint8 if narrow else torch.int32).to(
        torch.uint8 if narrow else torch.int16
    ), distinct


def unique_decode(codes: Tensor, distinct: Tensor) -> Tensor:
    """The patterns again, one-dimensional."""
    if not serves(distinct) or not native.is_plain(codes):
        return unique_decode_reference(codes, distinct)
    patterns = distinct.new_empty(codes.numel())
    decode = native.function("unique", "unique_decode")
    assert decode is not None
    decode(
        native.pointer(codes, torch.uint8, torch.int16),
        native.pointer(distinct, distinct.dtype),
        native.pointer(patterns, patterns.dtype),
        native.count(codes),
        ctypes.c_int32(distinct.element_size()),
        native.flag(codes.dtype == torch.int16),
    )
    return patterns


def unique_decode_reference(codes: Tensor, distinct: Tensor) -> Tensor:
    """The same by an index."""
    return distinct[codes.to(torch.int64) & 0xFFFF]
