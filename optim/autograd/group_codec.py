"""Saved activations in 8 or 4 bits: groups of consecutive values that share a scale.

Symmetric absolute-maximum quantisation: codes are ``-m ... m`` with ``m = 2**(bits - 1) - 1``, a group's
scale is its largest magnitude over ``m``, so zeros stay zeros. The family is ActNN's (Chen et al., arXiv
2104.14129), which has 2 bits, a zero point, and fp32 convolutions only; measured on the gradient of a GELU
MLP, int8 in groups of 64 loses .8 %, int4 11 % rounded to the nearest and 16 % rounded at random, 2 bits
87 %. Int4 therefore rounds at random by default: a larger error, but without a bias for many steps to add
up.

- Scales are bf16, rounded *up*. They have fp32's range, where fp16 scales lose every group below 1e-7; and
  a scale that is never too small clips nothing, so that random rounding has no bias at a group's largest
  value.
- The lowest code, which the symmetric range leaves free, stands for what is not finite and comes back as
  NaN: an overflow stays visible to a gradient scaler, and spoils no neighbour.
- Random rounding draws from a hash of (seed, content of the tensor, position), not from a generator. The
  same tensor is always rounded in the same way, so a block that a checkpoint runs again saves what its first
  run would have; dropout's random numbers are left alone; and nothing needs to be stored for a resume.

Where there is a kernel it does the work: on CUDA Triton's for 8 bits rounded to the nearest
(``kernels.int8_groups``), on a CPU C++ (``kernels.group_codes``). The rest is elementwise torch, to the same
bits: ``torch.compile`` traces it, and nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memtrain.optim.kernels import group_codes, lazy, native
from memtrain.optim.kernels.int8_groups import int8_pack, int8_unpack
from memtrain.optim.storage.random import mix_

GROUP = 128
"""With bf16 scales 8.125 bits a value. 64 costs 1.5 % more bytes for an error that is 7 % smaller."""
_GROUPS = (64, 128, 256)
_CPU_CHUNK = 1 << 17
"""Values worked on at a time on a CPU. A pass over 32,768 of them takes no longer than its call; with 131,072
values are encoded in half the time, and their fp32 (512 KiB) still fit a second-level cache."""
_FINGERPRINT_VALUES = 1024
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Encoded(NamedTuple):
    """``codes`` [groups, group * bits / 8] (int8, or two codes in a uint8) and ``scales`` [groups] (bf16)."""

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, kw_only=True)
class GroupCodec:
    """How values become codes, and back.

    Attributes:
        bits: 8 or 4.
        group: consecutive values that share a scale: 64, 128 or 256.
        stochastic: round at random, without bias; None: for 4 bits yes, for 8 no.
        seed: of the random rounding.
    """

    bits: int = 8
    group: int = GROUP
    stochastic: bool | None = None
    seed: int = 0

    exact = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(
                f"bits is {self.bits}, not 8 or 4; 2 bits were measured to lose 87 % of a gradient"
            )
        if self.group not in _GROUPS:
            raise ValueError(f"group is {self.group}, not one of {_GROUPS}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, not in 0 ... 2**31 - 1")

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def rounds_at_random(self) -> bool:
        return self.bits == 4 if self.stochastic is None else self.stochastic

    def size_bytes(self, numel: int) -> int:
        """Bytes of the two tensors that ``encode`` makes of ``numel`` values."""
        return -(-numel // self.group) * (self.group * self.bits // 8 + 2)

    def takes(self, tensor: Tensor) -> bool:
        """Whether values of this kind can be encoded: real, and wider than the codes could make them."""
        return tensor.dtype in _DTYPES

    def encode(self, values: Tensor) -> Encoded:
        """Codes and scales of ``values``, read row by row whatever their strides.

        Raises:
            TypeError: ``values`` are not fp16, bf16, fp32 or fp64.
        """
        if not self.takes(values):
            raise TypeError(f"{self.name} codes are for fp16, bf16, fp32 and fp64, not {values.dtype}")
        flat = values.detach().reshape(-1)
        word = _fingerprint(flat, self.seed) if self.rounds_at_random else None
        if self.bits == 8 and word is None and lazy.takes_triton(flat):
            return Encoded(*int8_pack(flat, group=self.group))
        if group_codes.serves(flat, self.group):
            return Encoded(*group_codes.encode_groups(flat, group=self.group, bits=self.bits, word=word))
        groups = -(-flat.numel() // self.group)
        codes = flat.new_empty((groups, self.group * self.bits // 8), dtype=self._code_dtype)
        scales = flat.new_empty(groups, dtype=torch.bfloat16)
        for rows in self._chunks(groups, flat):
            part = flat[rows.start * self.group : rows.stop * self.group]
            part = part.float()  # the extremes of bf16 rows would take six times as long
            missing = (rows.stop - rows.start) * self.group - part.numel()
            if missing:
                part = torch.nn.functional.pad(part, (0, missing))
            codes[rows], scales[rows] = self._encode_groups(part.view(-1, self.group), rows.start, word)
        return Encoded(codes, scales)

    def decode(self, encoded: Encoded, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The values again, as a new dense tensor of ``shape`` and ``dtype``."""
        if self.bits == 8 and lazy.takes_triton(encoded.codes):
            return int8_unpack(encoded, tuple(shape), dtype)
        numel = math.prod(shape)
        values = encoded.scales.new_empty(numel, dtype=dtype)
        if group_codes.serves(values, self.group):
            group_codes.decode_groups_(values, *encoded, group=self.group, bits=self.bits)
            return values.view(shape)
        for rows in self._chunks(len(encoded.scales), values):
            codes = self._signed(encoded.codes[rows])
            part = codes * encoded.scales[rows].float().unsqueeze(1)
            lowest = -(1 << (self.bits - 1))
            if _cannot_look(codes) or int(codes.amin()) == lowest:
                part = part.masked_fill_(codes == lowest, math.nan)
            target = values[rows.start * self.group : rows.stop * self.group]
            target.copy_(part.view(-1)[: target.numel()])
        return values.view(shape)

    @property
    def _code_dtype(self) -> torch.dtype:
        return torch.int8 if self.bits == 8 else torch.uint8

    def _chunks(self, groups: int, like: Tensor) -> Iterator[slice]:
        """Rows to work on at a time: all, where passes are fused or the device works on thousands at once."""
        step = max(groups, 1) if _cannot_look(like) else _CPU_CHUNK // self.group
        for start in range(0, groups, step):
            yield slice(start, min(start + step, groups))

    def _encode_groups(self, values: Tensor, first_group: int, word: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of ``values`` [groups, group], which stay what they are."""
        levels = (1 << (self.bits - 1)) - 1
        largest = torch.maximum(values.amax(dim=1), -values.amin(dim=1))
        all_finite = not _cannot_look(values) and bool(largest.isfinite().all())
        if not all_finite:
            largest = values.abs().nan_to_num_(nan=0.0, posinf=0.0).amax(dim=1)
        scales = _round_up_to_bf16(largest.float() / levels)
        steps = values / torch.where(scales == 0, 1.0, scales.float()).unsqueeze(1)
        if word is None:
            steps = steps.round_()
        else:  # a quotient of 7 may come out a little above
            steps = steps.add_(_uniform(steps.shape, first_group, word)).floor_().clamp_max_(levels)
        codes = steps.to(torch.int8)
        if not all_finite:
            codes.masked_fill_(~values.isfinite(), -levels - 1)
        return (codes if self.bits == 8 else _pack_nibbles(codes)), scales

    def _signed(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            return codes
        nibbles = codes.view(torch.int8)
        return torch.cat([(nibbles << 4) >> 4, nibbles >> 4], dim=1)


def _cannot_look(values: Tensor) -> bool:
    """Whether a choice by value would break a graph, wait for a device, or have no value to look at."""
    return not native.is_plain(values)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte: a group's first half in the low nibbles, its second half in the high ones."""
    low, high = codes.view(torch.uint8).chunk(2, dim=1)
    return (low & 15) | (high << 4)


def _round_up_to_bf16(positive: Tensor) -> Tensor:
    """The next bf16 above each fp32 number that is not negative (infinity stays)."""
    bits = positive.view(torch.int32)
    return ((bits + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def _fingerprint(flat: Tensor, seed: int) -> Tensor:
    """One int32 [1] of the seed and of at most ``_FINGERPRINT_VALUES`` values, computed where they are."""
    sample = flat[:: max(1, flat.numel() // _FINGERPRINT_VALUES)].float().view(torch.int32)
    places = torch.arange(sample.numel(), dtype=torch.int32, device=flat.device)
    total = mix_(sample ^ mix_(places)).sum(dtype=torch.int32, dim=0, keepdim=True)
    return mix_(total ^ seed)


def _uniform(shape: torch.Size, first_group: int, word: Tensor) -> Tensor:
    """Numbers in (0, 1) that depend on the word and on the position alone. One hash serves two values with
    16 bits each, fine enough for steps of a hundredth: the rounding's bias is below 2**-17 of a step."""
    groups, group = shape
    half = group // 2
    first = first_group * half
    places = torch.arange(first, first + groups * half, dtype=torch.int32, device=word.device)
    bits = mix_(mix_(places).bitwise_xor_(word)).view(groups, half)
    uniform = torch.empty(shape, dtype=torch.float32, device=word.device)
    uniform[:, half:] = (bits >> 16).bitwise_and_(0xFFFF)
    uniform[:, :half] = bits.bitwise_and_(0xFFFF)
    return uniform.add_(0.5).mul_(2.0**-16)
