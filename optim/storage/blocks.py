"""The arithmetic of block-wise 8-bit and 4-bit states: companding curves, packing, scales.

A tensor is flattened in row-major order and cut into blocks of 128; each block has one fp32 scale, its
largest magnitude, and each element a code. With y in [-1, 1] the code over its greatest value:

    signed, 8 and 4 bits     value = scale * y * |y|     y = c / 127, c in -127..127;  c / 7, c in -7..7
    unsigned, 8 bits         value = scale * y ** 3      y = (c + 1) / 256, c in 0..255
    unsigned, 4 bits         value = scale * y           y = (c + 1) / 16, c in 0..15

*The unsigned codes have no zero.* A second moment that decodes to zero beside a first moment that does not
makes an Adam step of any size. In a block with a scale above zero the least second moment is
scale * 2**-24 (8 bits) or scale / 16 (4 bits); a block that is zero throughout has scale zero and decodes to
zeros.

How the curves were chosen: error of Adam's update, |u - u32| / |u32| with betas .9/.999, 4,096 elements,
mean of steps 100-300, and the largest error of one element. *Equal*: gradients N(0, s^2), the same at s =
1e-3 and 1e-8; *mixed*: the standard deviations of neighbours are log-normal with sigma 1; *wild*: with sigma
2; *sparse*: 95% of the gradients are zero.

    8 bits, blocks of 128                     equal         mixed         wild          sparse
    here                                      1.95%  .05    8.3%   1.0    41%    2.8    1.3%  .5
    v ** (1/4) for the second moment          2.26%  .06    6.9%   .4     58%    9.3    1.4%  2.9
    m ** (2/3) for the first                  1.85%  .04    10%    1.3    90%    5.9    1.4%  .7
    FlashOptim's curves, fp32 scales          1.53%  .03    77%    120    2e4%   9e4    1.9%  .7
    bitsandbytes' dynamic map, blocks of 256  2.47%  .04    11%    .8     4e4%   3e5    2.6%  110
    4 bits, blocks of 128
    here                                      29%    .6     70%    .9     -             27%   .9
    |m| ** (1/3), near torchao's code book    41%    .9     71%    1.1    91%    1.1    33%   1.0

Scales are fp32. fp16 scales lose second moments of gradients below 1e-4. bf16 scales hold them but never
decay: a step of Adam multiplies v by .999, less than half a unit in bf16's last place, and the scale would
round back to itself for ever. At 128 elements fp32 costs .03 bytes an element.

What no round-to-nearest 8-bit state can follow: a second moment that falls *relative to its block*. It moves
by less than half a code a step and stays until the block's scale shakes it loose.

Non-finite values: the scale of their block becomes NaN, every element of that block loads as NaN, and no
other block is touched. Blocks whose largest magnitude is below 1.2e-38, the least normal fp32, are stored as
zeros: a reciprocal of such a scale would be infinite.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Elements to a scale. 64 lowers the *mixed* error by a tenth, 256 raises it by a fifth."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
LEVELS = {(8, True): 127, (8, False): 256, (4, True): 7, (4, False): 16}
"""Codes above zero, by (bits, signed)."""


def block_count(numel: int) -> int:
    """Scales that ``numel`` elements need."""
    return -(-numel // BLOCK)


def to_blocks(value: Tensor) -> Tensor:
    """fp32 ``[blocks, BLOCK]`` of ``value`` in row-major order, zeros behind its end. May share memory."""
    flat = value.detach().reshape(-1).float()
    return F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def block_scales(blocks: Tensor) -> Tensor:
    """fp32 ``[blocks]``: largest magnitude; NaN if any element is not finite; 0 if below the least normal."""
    largest = blocks.abs().amax(dim=1)
    largest = torch.where(largest < SMALLEST_SCALE, 0.0, largest)
    return torch.where(largest.isinf(), torch.nan, largest)


def normalised(blocks: Tensor, scales: Tensor) -> Tensor:
    """``blocks / scales`` in [-1, 1]; 0 where the scale is zero or NaN, so that codes are always defined."""
    reciprocal = torch.where(scales > 0, 1.0 / scales, 0.0)
    return (blocks * reciprocal[:, None]).nan_to_num_(0.0, 0.0, 0.0)


def encode(ratio: Tensor, *, bits: int, signed: bool) -> Tensor:
    """Codes, as fp32 and to nearest, of ratios in [-1, 1] or [0, 1]."""
    levels = LEVELS[bits, signed]
    if signed:
        return ratio.abs().sqrt_().mul_(levels).add_(0.5).floor_().copysign_(ratio)
    root = ratio.clamp(min=0).pow_(1 / 3) if bits == 8 else ratio
    return (root * levels).sub_(0.5).floor_().clamp_(0, levels - 1)


def decode(code: Tensor, *, bits: int, signed: bool) -> Tensor:
    """Ratios of fp32 codes."""
    levels = LEVELS[bits, signed]
    if signed:
        y = code / levels
        return y * y.abs()
    y = (code + 1) / levels
    return y * y * y if bits == 8 else y


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 ``[ceil(n / 2)]`` of ``n`` codes; of each pair the even one lies in the low half.

    Only the low four bits of a code count: two's complement for signed ones.
    """
    even = F.pad(codes.reshape(-1).to(torch.int16) & 0xF, (0, codes.numel() % 2)).view(-1, 2)
    return (even[:, 0] | (even[:, 1] << 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor, numel: int, *, signed: bool) -> Tensor:
    """The inverse: int16 ``[numel]``, in -8..7 or 0..15."""
    wide = packed.to(torch.int16)
    codes = torch.stack((wide & 0xF, wide >> 4), dim=1).view(-1)[:numel]
    return (codes ^ 8) - 8 if signed else codes
