"""An fp32 master beside the bf16 weight that is rounded from it: only its lower 16 bits are stored.

The weight is the master rounded to the nearest, ties to even, so its bit pattern is the master's upper half,
or one more where the lower half has rounded up:

    lower < 0x8000: upper = weight;    lower > 0x8000: upper = weight - 1

which holds across binades, for bit patterns of one sign are ordered as their values are: for denormals, for
either sign, and where a finite master rounds to infinity (0x7F80 - 1 is the largest finite upper half). At
``lower == 0x8000`` both neighbours round to the even one, and one bit says from which side: the sign of the
second moment, which is a sum of squares and never negative. So 2 + 4 + 4 bytes an element hold what 4 + 4 + 4
do, to the bit. Of a NaN it is kept that it is one: sign and payload are those of the weight.

This is the plain-torch reference of ``optim/kernels/fused_adamw.py``, and what everything but its one pass
takes. Words are little-endian, as on every machine that torch runs on.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.int16
"""Of the lower halves: what they are, torch has no arithmetic for 16 bits without a sign."""
_TIE = -0x8000


def pack(master: Tensor, lower: Tensor, second: Tensor) -> None:
    """Store ``master`` in ``lower``, and the side of ties in the sign of ``second``.

    Args:
        master: fp32, contiguous. The weight beside it must be ``master.bfloat16()``.
        lower: of its shape, written.
        second: fp32 second moments of its shape, whose signs are written; magnitudes stay.

    Raises:
        ValueError: a second moment is negative, so that its sign is no free bit. Nothing is written then.
    """
    if bool((second < 0).any()):
        raise ValueError("second moments below zero: their sign is no free bit")
    halves = master.view(torch.int16).view(*master.shape, 2)
    lower.copy_(halves[..., 0])
    lower.masked_fill_(master.isnan(), 0)
    mark(second, (lower == _TIE) & ((halves[..., 1] & 1) == 1))


def unpack(weight: Tensor, lower: Tensor, second: Tensor) -> Tensor:
    """The fp32 masters of bf16 ``weight``: ``pack``'s, in memory of their own. ``second`` is only read."""
    down = ((lower > _TIE) & (lower < 0)) | ((lower == _TIE) & second.signbit())
    halves = torch.empty(*weight.shape, 2, dtype=torch.int16, device=weight.device)
    halves[..., 0] = lower
    torch.sub(weight.view(torch.int16), down.to(torch.int16), out=halves[..., 1])
    return halves.view(torch.float32).view(weight.shape)


def mark(second: Tensor, sides: Tensor) -> None:
    """Have the signs of ``second`` say ``sides`` (bool), whatever they said."""
    second.abs_()
    torch.where(sides, second.neg(), second, out=second)
