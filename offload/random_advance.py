"""How far a pass moves the random generators on, and their states moved on as far without the pass.

What a forward draws is a stretch of a generator's stream, and no more than its length has to be known to
begin behind it. The CPU's generator (``mersenne.py``) counts in words of 32 bits: the length is found by a
search of the stream for what the generator gives afterwards. CUDA's (Philox) has its place in the stream as
a number. Either way a state moved on is compared with the one that the pass left, byte for byte, before a
length is believed: a generator that was seeded anew, or that keeps half of a pair of normal numbers for the
next call, has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.offload.mersenne import after_words

MOST_WORDS = 1 << 32
"""Searched at most, at 12 ns a word. torch's dropouts draw two words an element."""
_CHUNK = 1 << 14
"""Words drawn at a time: 64 KiB."""
_PATTERN = 64
"""Words that are looked for, of 31 bits each as random_() gives them: no other stretch looks like them."""
_SEED_BYTES = 8
"""Both generators' states begin with the seed; behind it CUDA's has the place in the stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advance:
    """What a pass draws. Zero of both: nothing."""

    words: int = 0
    """Of the CPU's generator, 32 bits each."""
    offset: int = 0
    """Of CUDA's generator."""


NOTHING = Advance()


def advance_between(
    before: Sequence[Tensor], after: Sequence[Tensor], guess: Advance | None = None
) -> Advance | None:
    """The advance that takes states ``before`` (``surroundings.random_states``) to ``after``; None where
    there is none of at most ``MOST_WORDS`` words. One that is guessed right is not searched for."""
    if guess is not None and _equal(advanced(before, guess), after):
        return guess
    words = _words_between(before[0], after[0])
    offsets = [_offset(state) for state in (*before[1:], *after[1:])] or [0, 0]
    if words is None or offsets[1] < offsets[0]:
        return None
    found = Advance(words=words, offset=offsets[1] - offsets[0])
    return found if _equal(advanced(before, found), after) else None


def _equal(states: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(states, others, strict=True))


def advanced(states: Sequence[Tensor], advance: Advance) -> list[Tensor]:
    """``states`` after a pass that draws ``advance``."""
    moved = [after_words(states[0], advance.words)]
    for state in states[1:]:
        moved.append(state.clone())
        moved[-1][_SEED_BYTES:].view(torch.int64).add_(advance.offset)
    return moved


def _offset(state: Tensor) -> int:
    return int(state[_SEED_BYTES:].view(torch.int64))


def _words_between(before: Tensor, after: Tensor) -> int | None:
    """The first place in the stream of ``before`` at which it goes on as that of ``after``."""
    if torch.equal(before, after):
        return 0
    if not torch.equal(before[:_SEED_BYTES], after[:_SEED_BYTES]):
        return None
    generator = torch.Generator()
    generator.set_state(after)
    pattern = torch.empty(_PATTERN, dtype=torch.int32).random_(generator=generator)
    generator.set_state(before)
    stream = torch.empty(0, dtype=torch.int32)
    start = 0
    """Words before ``stream``."""
    while start <= MOST_WORDS:
        stream = torch.cat([stream, torch.empty(_CHUNK, dtype=torch.int32).random_(generator=generator)])
        whole = stream.numel() - _PATTERN + 1
        for place in (stream[:whole] == pattern[0]).nonzero().flatten().tolist():
            if torch.equal(stream[place : place + _PATTERN], pattern):
                return start + int(place)
        start += whole
        stream = stream[whole:]
    return None
