"""Counter-based random words and stochastic rounding (T6: mean within 4 sigma, variance within 10%)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.optim.storage import RandomKey, random_bits, stochastic_round
from memtrain.optim.storage.random import random_bytes

KEY = RandomKey(seed=7, parameter=3, step=11)
M32 = 0xFFFFFFFF


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & M32
    x ^= x >> 15
    x = x * 0x846CA68B & M32
    return x ^ (x >> 16)


def word(key: RandomKey, offset: int) -> int:
    """The definition in Python's integers, which cannot overflow."""
    first, second = key.words()
    bits = mix(mix((offset + first) & M32) ^ ((second + (offset >> 32) * 0x9E3779B9) & M32))
    return bits - ((bits >> 31) << 32)


def test_words_are_these_for_ever() -> None:
    """Checkpoints rely on it: a run that is resumed by a later version must go on with the same words."""
    assert RandomKey(seed=1, parameter=2, step=3).words() == (2647558311, 307793280)
    bits = random_bits(RandomKey(seed=1, parameter=2, step=3), 4)
    assert bits.tolist() == [1558120363, -2131077390, -86143283, -1103934960]


@pytest.mark.parametrize("offset", [0, 1, 2**31 - 3, 2**32 - 3, 5 * 2**32 - 1])
def test_words_are_the_definition_across_the_halves_of_the_offset(offset: int) -> None:
    key = KEY.skip(offset)
    assert random_bits(key, 6).tolist() == [word(KEY, offset + i) for i in range(6)]


@given(start=st.integers(0, 50), count=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_a_chunk_gets_the_words_of_the_whole(start: int, count: int) -> None:
    assert torch.equal(random_bits(KEY.skip(start), count), random_bits(KEY, 100)[start : start + count])


@pytest.mark.parametrize("field", ["seed", "parameter", "step", "stream"])
def test_every_field_of_the_key_gives_independent_words(field: str) -> None:
    """Neighbouring keys: half of the bits differ, and no shift of one sequence is the other."""
    count = 1 << 14
    ours = random_bits(KEY, count)
    theirs = random_bits(dataclasses.replace(KEY, **{field: getattr(KEY, field) + 1}), count)
    flips = (ours ^ theirs).view(torch.uint8)
    share = sum(((flips >> bit) & 1).sum().item() for bit in range(8)) / (32 * count)
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(32 * count)
    assert not set(ours.tolist()) >= set(theirs[:64].tolist())


def test_each_bit_is_fair_and_neighbours_are_independent() -> None:
    count = 1 << 16
    bits = random_bits(KEY, count)
    limit = 4 * 0.5 / math.sqrt(count)
    for bit in range(32):
        plane = (bits >> bit) & 1
        assert abs(plane.float().mean().item() - 0.5) < limit
        for lag in (1, 2, 128):
            assert abs((plane[lag:] ^ plane[:-lag]).float().mean().item() - 0.5) < limit


def test_the_low_sixteen_bits_are_uniform() -> None:
    count = 1 << 18
    seen = torch.bincount((random_bits(KEY, count) & 0xFFFF) >> 8, minlength=256).double()
    chi_squared = ((seen - count / 256) ** 2 / (count / 256)).sum().item()
    assert abs(chi_squared - 255) < 4 * math.sqrt(2 * 255)


def test_keys_are_validated() -> None:
    with pytest.raises(ValueError, match=r"RandomKey\.step must be an int in \[0, 2\*\*64\), got -1"):
        RandomKey(seed=0, parameter=0, step=-1)
    with pytest.raises(ValueError, match="count must not be negative, got -2"):
        random_bits(KEY, -2)


def test_stochastic_rounding_is_unbiased_with_the_variance_of_theory() -> None:
    """T6. Between neighbours u apart, at a fraction f of the way up, the variance is f (1 - f) u^2."""
    draws = 4000
    value = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-32, 32)
    low = ((value.view(torch.int32) >> 16) << 16).view(torch.float32)
    unit = (((value.view(torch.int32) >> 16) + 1) << 16).view(torch.float32) - low
    fraction = (value.double() - low) / unit
    sigma = (fraction * (1 - fraction)).sqrt()
    rounded = torch.stack(
        [
            stochastic_round(value, random_bits(dataclasses.replace(KEY, step=step), 64)).double()
            for step in range(draws)
        ]
    )
    places = (rounded - low) / unit
    assert set(places.unique().tolist()) == {0.0, 1.0}
    assert ((places.mean(0) - fraction).abs() <= 4 * sigma / math.sqrt(draws)).all()
    assert abs(places.var(0).sum() / (sigma**2).sum() - 1) < 0.1


def test_draws_over_offsets_are_unbiased_too() -> None:
    value = torch.full((4000,), 1 + 0.3 / 128)
    ups = (stochastic_round(value, random_bits(KEY, 4000)).float() > 1).float().mean().item()
    assert abs(ups - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)


def test_what_bf16_holds_stays_and_what_is_not_finite_stays_so() -> None:
    every = (torch.arange(65536, dtype=torch.int32) << 16).view(torch.float32)
    rounded = stochastic_round(every, torch.full((65536,), -1, dtype=torch.int32))
    number = ~every.isnan()
    assert torch.equal(rounded[number].float(), every[number])
    assert rounded[~number].isnan().all()
    low_payload = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert stochastic_round(low_payload, torch.zeros(2, dtype=torch.int32)).isnan().all()


def test_above_the_largest_it_may_become_infinite() -> None:
    value = torch.full((2,), torch.finfo(torch.float32).max)
    bits = torch.tensor([0, 0xFFFF], dtype=torch.int32)
    assert stochastic_round(value, bits).tolist() == [torch.finfo(torch.bfloat16).max, math.inf]


def test_bytes_are_those_of_words_that_four_neighbours_share():
    """Also from an offset inside of a word, and from one behind the low half of the count."""
    whole = random_bytes(KEY, 41)
    words = [word % 2**32 for word in random_bits(KEY, 11).tolist()]
    assert whole.tolist() == [words[place // 4] >> 8 * (place % 4) & 0xFF for place in range(41)]
    for start in (1, 2, 3, 4, 7):
        assert torch.equal(random_bytes(KEY.skip(start), 30), whole[start : start + 30])
    far = dataclasses.replace(KEY, offset=(1 << 34) + 2)
    expected = random_bits(dataclasses.replace(KEY, offset=1 << 32), 1).item() >> 16 & 0xFF
    assert random_bytes(far, 1).item() == expected
