"""torch's CPU generator (MT19937, Matsumoto and Nishimura 1998) moved on by many words without drawing them.

A step of the generator is linear over GF(2), so that ``n`` steps are a polynomial in it: ``x^n`` modulo the
characteristic polynomial of the recurrence (Haramoto et al. 2008). The array after ``n`` words is then a sum
of windows of the next 20,000 words, whatever ``n`` is: 20 ms, where drawing takes 12 ns a word. Polynomials
are Python integers here, bit ``i`` for ``x^i``.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DRAWN_WORDS = 1 << 20
"""Fewer are drawn: a jump takes as long as one to two million."""
_LENGTH, _MIDDLE, _DEGREE = 624, 397, 19937
_TWIST = 0x9908B0DF
_CHUNK = 1 << 14
"""Words drawn at a time: 64 KiB."""
_LEFT, _NEXT, _ARRAY = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * _LENGTH)
"""Bytes of a state: words left in the round and one, place of the next, and the round, 8 bytes a word."""


def after_words(state: Tensor, words: int) -> Tensor:
    """The generator's ``state`` (``torch.get_rng_state``) after so many words of 32 bits; a new tensor."""
    if words >= DRAWN_WORDS:
        return _jumped(state, words)
    generator = torch.Generator()
    generator.set_state(state)
    drawn = torch.empty(min(words, _CHUNK), dtype=torch.int32)
    for start in range(0, words, _CHUNK):
        drawn[: words - start].random_(generator=generator)
    return generator.get_state()


def _jumped(state: Tensor, words: int) -> Tensor:
    moved = state.clone()
    raw = moved.numpy()
    place = int(raw[_NEXT].view(np.uint64)[0]) or _LENGTH  # just seeded: this round is never drawn
    rounds, place = divmod(place + words - 1, _LENGTH)  # a round is made when its first word is drawn
    array = raw[_ARRAY].view(np.uint64)
    array[:] = _words_behind(array.astype(np.uint32), rounds * _LENGTH)
    raw[_NEXT].view(np.uint64)[0] = place + 1
    raw[_LEFT].view(np.int32)[0] = _LENGTH - place
    return moved


def _words_behind(array: NDArray[np.uint32], steps: int) -> NDArray[np.uint32]:
    """The array ``steps`` words further on. All bits of a word follow from the state one step before: of the
    first word of an array only one bit is part of it."""
    stream = np.empty(_LENGTH + _DEGREE + 227, dtype=np.uint32)
    stream[:_LENGTH] = array
    width = _LENGTH - _MIDDLE
    for at in range(0, _DEGREE, width):
        mixed = (stream[at : at + width] & 0x80000000) | (stream[at + 1 : at + 1 + width] & 0x7FFFFFFF)
        twisted = (mixed >> 1) ^ (mixed & 1) * np.uint32(_TWIST)
        stream[at + _LENGTH : at + _LENGTH + width] = stream[at + _MIDDLE : at + _MIDDLE + width] ^ twisted
    found = np.zeros(_LENGTH, dtype=np.uint32)
    for begin in _power(steps - 1):
        found ^= stream[begin + 1 : begin + 1 + _LENGTH]
    return found


@functools.lru_cache(maxsize=64)
def _power(exponent: int) -> list[int]:
    """Exponents of ``x^exponent`` modulo the characteristic polynomial. About 0.05 s."""
    found = 1
    for bit in bin(exponent)[2:]:
        found = int("0".join(bin(found)[2:]), 2)  # squared: every bit twice as far
        found = _reduced(found << int(bit))
    return _exponents(found)


def _reduced(polynomial: int) -> int:
    low = (1 << _DEGREE) - 1
    while high := polynomial >> _DEGREE:
        polynomial &= low
        for exponent in _characteristic()[:-1]:
            polynomial ^= high << exponent
    return polynomial


@functools.cache
def _characteristic() -> tuple[int, ...]:
    """Exponents, the largest last: ``u v^31 + a_0 u v^30 + ... + a_30 u + a_31`` with ``u = x^624 + x^397``,
    ``v = x^623 + x^396`` and the bits ``a`` of the twist (Matsumoto and Nishimura, appendix A)."""
    total, power = _TWIST >> 31, 1 << _LENGTH | 1 << _MIDDLE
    for bit in reversed(range(31)):
        total ^= power * (_TWIST >> bit & 1)
        power = power << (_LENGTH - 1) ^ power << (_MIDDLE - 1)
    return tuple(_exponents(total ^ power))


def _exponents(polynomial: int) -> list[int]:
    raw = np.frombuffer(polynomial.to_bytes(_DEGREE // 8 + 1, "little"), dtype=np.uint8)
    found: list[int] = np.unpackbits(raw, bitorder="little").nonzero()[0].tolist()
    return found
