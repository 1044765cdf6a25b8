"""Codes of 1 to 8 bits, really packed.

A code of ``bits`` is cut into fields of 4, 2 and 1 bits (8 is one field; 3 = 2 + 1, 7 = 4 + 2 + 1), and
every field is packed on its own: the sequence is cut into ``8 / width`` equal parts, and byte ``j`` holds
the fields of the ``j``-th code of each part. All reads and writes are whole rows, which a CPU vectorises
and a GPU coalesces; neighbours in one byte, the obvious layout, would be strided on both.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes of ``numel`` packed codes; at most one more than ``numel * bits / 8`` for each field."""
    return sum(-(-numel * width // 8) for width in _fields(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """``codes`` (uint8, one-dimensional, each below ``2**bits``) as uint8 [packed_bytes]."""
    numel = codes.numel()
    packed = codes.new_empty(packed_bytes(numel, bits))
    start, shift = 0, 0
    for width in _fields(bits):
        size = -(-numel * width // 8)
        target, mask = packed[start : start + size], (1 << width) - 1
        target.zero_()
        for place, part in enumerate(torch.split(codes, max(size, 1))):
            target[: part.numel()] |= ((part >> shift) & mask) << (place * width)
        start, shift = start + size, shift + width
    return packed


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The ``numel`` codes again, uint8."""
    codes = torch.zeros(numel, dtype=torch.uint8, device=packed.device)
    start, shift = 0, 0
    for width in _fields(bits):
        size = -(-numel * width // 8)
        source, mask = packed[start : start + size], (1 << width) - 1
        for place, part in enumerate(torch.split(codes, max(size, 1))):
            part |= ((source[: part.numel()] >> (place * width)) & mask) << shift
        start, shift = start + size, shift + width
    return codes


def _fields(bits: int) -> tuple[int, ...]:
    if not 1 <= bits <= 8:
        raise ValueError(f"a packed code has 1 to 8 bits, not {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)
