"""Random matrices that are drawn anew whenever they are used: from a key, on every device to the bit.

``rademacher``  entry e is +scale or -scale by bit ``e mod 32`` of the key's word ``e div 32``.
``normal``      entry e is one of 4,096 equally likely quantiles of the normal distribution, scaled to
                variance one, by half ``e mod 2`` of word ``e div 2``: bits 0 to 10 number the magnitude,
                bit 15 is the sign.

A sketch wants entries that are independent, of mean zero and of one variance; quantiles from a table are that
exactly, and nothing in them depends on how a machine rounds a logarithm or a cosine. The largest of them is
3.67; the fourth moment is 2.99. Random matrices that are made once and kept (``random.gaussian``) have true
tails.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from memtrain.optim.kernels import native
from memtrain.optim.storage import RandomKey, random_bits

_WORD_BITS = 32
_MAGNITUDES = 1 << 11
_FIXED_POINT = 1 << 20


def rademacher(
    key: RandomKey,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Signs times ``scale``, rounded to ``dtype``."""
    drawn = _compiled("draw_signs", key, shape, device, dtype)
    if drawn is None:
        return reference_rademacher(key, shape, device, scale=scale, dtype=dtype)
    out, fill = drawn
    fill(native.real(_rounded(scale, dtype)))
    return out


def normal(
    key: RandomKey,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Quantiles times ``scale``, rounded to ``dtype``."""
    drawn = _compiled("draw_quantiles", key, shape, device, dtype)
    if drawn is None:
        return reference_normal(key, shape, device, scale=scale, dtype=dtype)
    out, fill = drawn
    fill(native.pointer(_table(scale, dtype)))
    return out


def reference_rademacher(
    key: RandomKey,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Plainly."""
    count = math.prod(shape)
    words = random_bits(key, -(-count // _WORD_BITS), device)
    shifts = torch.arange(_WORD_BITS, dtype=torch.int32, device=device)
    bits = (words.unsqueeze(1) >> shifts) & 1
    signs = bits.reshape(-1)[:count].reshape(shape).to(dtype).mul_(2).sub_(1)
    return signs.mul_(_rounded(scale, dtype))


def reference_normal(
    key: RandomKey,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Plainly."""
    count = math.prod(shape)
    words = random_bits(key, -(-count // 2), device)
    halves = torch.stack((words, words >> 16), dim=1).view(-1)[:count]
    magnitude = _table(scale, dtype).to(device, dtype)[halves & (_MAGNITUDES - 1)]
    return torch.where((halves & 0x8000) != 0, -magnitude, magnitude).view(shape)


def _rounded(scale: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(scale, dtype=torch.float64, device="cpu").to(dtype))


@functools.lru_cache(maxsize=16)
def _table(scale: float, dtype: torch.dtype) -> Tensor:
    """The quantiles are scaled and rounded to ``dtype``, on the CPU, and not the entries: so all devices have
    the same. fp32; shared, not to be written to."""
    return (quantiles().double() * scale).to(dtype).float()


@functools.cache
def quantiles() -> Tensor:
    """Of the magnitude of a normal number, at the middles of 2,048 equal parts; fp32 on the CPU."""
    middles = (torch.arange(_MAGNITUDES, dtype=torch.float64, device="cpu") + 0.5) / _MAGNITUDES
    magnitude: Tensor = torch.special.ndtri((1 + middles) / 2)
    magnitude /= magnitude.square().mean().sqrt()
    # In fixed point, so that a library's last bit makes no difference.
    return (magnitude * _FIXED_POINT).round_().div_(_FIXED_POINT).float()


def _compiled(
    name: str, key: RandomKey, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, native.Function] | None:
    """An empty matrix and what fills it, where that can be compiled and its words begin at the first."""
    served = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and key.offset == 0
    kernel = native.function("draw", name) if served else None
    if kernel is None:
        return None
    out = torch.empty(shape, dtype=dtype, device="cpu")
    return out, functools.partial(kernel, native.values(out, key), native.count(out))
