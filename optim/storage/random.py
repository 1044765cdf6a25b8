"""Random bits that depend on names alone: (seed, parameter, step, stream) and the element's offset.

Stochastic rounding and seeded projections must give the same numbers after a resume, on every rank, for every
launch grid, chunk size and device. A generator with a state cannot promise that; a counter-based one can
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): each word is a hash of its counter.

The hash is two rounds of a 32-bit integer mixer (the constants of C. Wellons' ``lowbias32``, public domain)
with a key word entering before each round. Philox4x32-10 needs twenty 32 x 32 -> 64 bit products for four
words that belong to four offsets; this needs four 32-bit products for one word, so each element computes its
own and no lane depends on its neighbours: that vectorises in plain torch, C++ and Triton alike. The key
words differ between the rounds because with a single round two keys would give shifts of one and the same
sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_GOLDEN32 = 0x9E3779B9
_GOLDEN64 = 0x9E3779B97F4A7C15
MIX_FIRST = 0x7FEB352D
MIX_SECOND = 0x846CA68B


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomKey:
    """Names one sequence of random words. Equal keys give equal words everywhere."""

    seed: int
    """Of the run."""
    parameter: int
    """The parameter's number in the optimizer, the same on every rank and after a resume."""
    step: int
    """The optimizer step, counted from any fixed origin."""
    stream: int = 0
    """Tells apart the uses of randomness within one parameter's step: weight, moments, projector."""
    offset: int = 0
    """Where the first word belongs: the place of a shard or a chunk within its parameter, which then gets the
    words that the whole parameter would have got there."""

    def __post_init__(self) -> None:
        for value in (self.seed, self.parameter, self.step, self.stream, self.offset):
            if not isinstance(value, int) or not 0 <= value <= _MASK64:
                names = ("seed", "parameter", "step", "stream", "offset")
                wrong = next(name for name in names if getattr(self, name) is value)
                raise ValueError(f"RandomKey.{wrong} must be an int in [0, 2**64), got {value!r}")

    def fold(self, stream: int) -> RandomKey:
        """The same key for another use of randomness; independent of this one's words."""
        # Not by replace(), which takes 2 us: a small step asks several times.
        return RandomKey(
            seed=self.seed, parameter=self.parameter, step=self.step, stream=stream, offset=self.offset
        )

    def skip(self, count: int) -> RandomKey:
        """The key of what comes ``count`` elements later."""
        return replace(self, offset=self.offset + count) if count else self

    def words(self) -> tuple[int, int]:
        """The two 32-bit key words, unsigned, that kernels take as arguments beside the offset."""
        state = 0
        for name in (self.seed, self.parameter, self.step, self.stream):
            state = _split_mix(state ^ name)
        return state & _MASK32, state >> 32


def _split_mix(state: int) -> int:
    """One output of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit words."""
    state = (state + _GOLDEN64) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def signed32(word: int) -> int:
    """An unsigned 32-bit word as the int32 that has the same bits."""
    return (word & _MASK32) - ((word & 0x80000000) << 1)


def mix_(x: Tensor) -> Tensor:
    """The mixer on int32, in place: every bit of the result depends on every bit of ``x``.

    torch shifts int32 arithmetically: the masks make it logical.
    """
    x ^= (x >> 16) & 0xFFFF
    x *= MIX_FIRST
    x ^= (x >> 15) & 0x1FFFF
    x *= signed32(MIX_SECOND)
    x ^= (x >> 16) & 0xFFFF
    return x


def random_bits(key: RandomKey, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The words of ``key`` for the elements ``key.offset .. key.offset + count - 1``.

    Returns:
        int32 ``[count]``, all 32 bits random: ``mix(mix(low + k0) ^ (k1 + high * golden))``, where low and
        high are the halves of the 64-bit offset and arithmetic is modulo 2**32.
    """
    if count < 0:
        raise ValueError(f"random_bits: count must not be negative, got {count}")
    first, second = key.words()
    index = torch.arange(key.offset, key.offset + count, dtype=torch.int64, device=device)
    bits = mix_(index.to(torch.int32).add_(signed32(first)))
    if (key.offset + count) >> 32:
        bits ^= ((index >> 32) * _GOLDEN32 + second).to(torch.int32)
    else:
        bits ^= signed32(second)
    return mix_(bits)


def random_bytes(key: RandomKey, count: int, device: torch.device | str = "cpu") -> Tensor:
    """A byte for each of the elements ``key.offset .. key.offset + count - 1``: a word of ``key`` serves four
    neighbours, the one of the lowest offset having its lowest byte. A quarter of the hashes.

    Returns:
        int32 ``[count]``, 0 to 255.
    """
    behind = key.offset % 4
    words = random_bits(replace(key, offset=key.offset // 4), -(-(behind + count) // 4), device)
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=device)
    return ((words.unsqueeze(1) >> shifts) & 0xFF).view(-1)[behind : behind + count]


def stochastic_round(value: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16, up or down with the probabilities that make the expectation the value.

    Sixteen random bits are added below the bits that bf16 keeps, and the sum is cut. Unbiased for every
    finite value whose two bf16 neighbours are finite; above the largest bf16 (3.39e38) it may become
    infinite, as nearest rounding would; infinities stay; NaN becomes the canonical NaN.

    Args:
        value: fp32, any shape.
        bits: int32 with as many elements, of which the low 16 bits are used.
    """
    shaped = bits.reshape(value.shape)
    raised = value.contiguous().view(torch.int32) + (shaped & 0xFFFF)
    rounded = (raised >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(value.isnan(), torch.nan, rounded)
