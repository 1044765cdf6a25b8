"""Device functions: the random words of ``storage.random``, and stochastic rounding by them, in Triton.

The words are those of ``random_bits`` to the bit for offsets below 2**32, so a weight is rounded alike by a
kernel, by the CPU path and after a resume.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memtrain.optim.kernels.lazy import triton_kernel
from memtrain.optim.storage.random import RandomKey, signed32

if TYPE_CHECKING:
    import triton.language as tl


def key_words(key: RandomKey | None) -> tuple[int, int]:
    """The two words of a key as a launch passes them: int32. Zeros where nothing is rounded at random."""
    if key is None:
        return 0, 0
    first, second = key.words()
    return signed32(first), signed32(second)


@triton_kernel
def _mix(x):
    """``storage.random._mix_`` on uint32, whose shifts are logical."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton_kernel
def random_words(offset, first_word, second_word):
    """``random_bits`` at int32 ``offset``, as uint32."""
    word = _mix(offset.to(tl.uint32) + first_word.to(tl.uint32))
    return _mix(word ^ second_word.to(tl.uint32))


@triton_kernel
def round_stochastically(value, bits):
    """``storage.random.stochastic_round``: fp32 to bf16, by the low 16 of ``bits``."""
    raised = value.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
    rounded = tl.where(value == value, raised >> 16, 0x7FC0)  # the canonical NaN
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
