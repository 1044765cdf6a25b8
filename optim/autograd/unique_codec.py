"""Tensors of few distinct values, exactly: a table of the values, and for each element its place in it.

This is what eDKM (Cho et al., arXiv 2309.00964) calls uniquification: a bf16 or fp16 tensor has at most
65,536 distinct values. As a code that is worth nothing by itself, for a place in so large a table takes the
16 bits that the value took. It gains where there are fewer: 256 values of bf16 and 65,536 of fp32 take half,
16 a quarter and an eighth, a mask's two values an eighth of its bytes. Activations of a language model have
far more; masks, indices, palettes and quantised weights have not.

How much that is depends on the values of each batch, so no plan counts on it: a budget is a promise. It is
put on a model by ``SavedTensorCompressor(UniqueCodec())``, or by ``Rule(kind="layer", treatment="unique")``.

Values are compared as bit patterns: NaN payloads and -0.0 come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memtrain.optim.autograd.bitpack import pack, packed_bytes, unpack
from memtrain.optim.kernels.unique_values import (
    MOST_VALUES,
    NARROW_VALUES,
    PATTERNS,
    unique_decode,
    unique_encode,
)

_WORTH = 0.75
"""Of the plain bytes at most, or the tensor stays as it is: decoding it makes a copy in backward."""
_FEW = ((2, 1), (4, 2), (16, 4))
"""Up to so many values, places of so many bits."""


class Unique(NamedTuple):
    """``codes`` (packed places) and ``table`` (bit patterns)."""

    codes: Tensor
    table: Tensor


def code_bits(values: int) -> int:
    """Bits of a place in a table of so many."""
    return next((bits for most, bits in _FEW if values <= most), 8 if values <= NARROW_VALUES else 16)


@dataclass(frozen=True, kw_only=True)
class UniqueCodec:
    """How tensors of few distinct values become places in a table, and back, bit for bit."""

    exact = True

    @property
    def name(self) -> str:
        return "unique"

    def takes(self, tensor: Tensor) -> bool:
        """Whether values of this kind have patterns: numbers and truths, not complex or quantised ones."""
        return tensor.element_size() in PATTERNS and not tensor.is_complex() and not tensor.is_quantized

    def most_values(self, element_size: int) -> int:
        """More distinct values than these do not shrink."""
        return {1: 16, 2: NARROW_VALUES}.get(element_size, MOST_VALUES)

    def encode(self, values: Tensor) -> Unique | None:
        """Places and table; None where there are too many distinct values for it to be worth it.

        Raises:
            TypeError: values of a kind that has no patterns.
        """
        if not self.takes(values):
            raise TypeError(
                f"distinct values are found of integers, truths and real numbers, not {values.dtype}"
            )
        size = values.element_size()
        patterns = values.detach().contiguous().view(-1).view(PATTERNS[size])
        # No more values than a table may have that leaves a quarter of the bytes free.
        room = int(values.nbytes * _WORTH) // size
        found = unique_encode(patterns, max(1, min(self.most_values(size), room)))
        if found is None:
            return None
        codes, table = found
        bits = code_bits(table.numel())
        coded = packed_bytes(codes.numel(), bits) if bits <= 8 else codes.nbytes
        if coded + table.nbytes > values.nbytes * _WORTH:
            return None
        return Unique(pack(codes, bits) if bits < 8 else codes, table)

    def decode(self, encoded: Unique, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor again, contiguous."""
        codes, table = encoded
        bits = code_bits(table.numel())
        if bits < 8:
            codes = unpack(codes, bits, shape.numel())
        return unique_decode(codes, table).view(dtype).view(shape)
