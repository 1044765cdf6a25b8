"""Lossless weights: equal to the bit, sizes, damage is noticed, and what is refused."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtrain.optim.storage.lossless import (
    DamagedWeightsError,
    MissingZstandardError,
    bound_bytes,
    decode,
    encode,
)


def normal(*shape: int, scale: float = 0.02) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).bfloat16()


def assert_round_trip(weights: Tensor) -> Tensor:
    packed = encode(weights)
    restored = decode(packed, weights.shape)
    assert restored.dtype == torch.bfloat16
    assert restored.shape == weights.shape
    assert torch.equal(restored.reshape(-1).view(torch.int16), weights.reshape(-1).view(torch.int16))
    assert packed.dtype == torch.uint8
    assert packed.numel() <= bound_bytes(weights.numel())
    return packed


def exponent_entropy(weights: Tensor) -> float:
    """Bits of information in an exponent."""
    counts = torch.bincount(
        ((weights.reshape(-1).view(torch.int16) >> 7) & 0xFF).long(), minlength=256
    ).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum())


def test_normal_weights_take_nearly_their_entropy() -> None:
    pytest.importorskip("zstandard")
    weights = normal(1000, 1031)
    packed = assert_round_trip(weights)
    expected = (8 + exponent_entropy(weights)) / 16
    assert expected < 0.67
    assert expected < packed.numel() / weights.nbytes < expected + 0.012  # Huffman's whole bits, and headers


@pytest.mark.parametrize("numel", [0, 1, 7, 1 << 18, (1 << 18) + 1, (1 << 19) - 3])
def test_sizes_around_a_chunk(numel: int) -> None:
    pytest.importorskip("zstandard")
    assert_round_trip(normal(numel))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(words=st.lists(st.integers(-(2**15), 2**15 - 1), max_size=300))
def test_every_bit_pattern(words: list[int]) -> None:
    pytest.importorskip("zstandard")
    assert_round_trip(torch.tensor(words, dtype=torch.int16).view(torch.bfloat16))


def test_all_patterns_zeros_and_what_does_not_shrink() -> None:
    pytest.importorskip("zstandard")
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    assert_round_trip(every)
    assert assert_round_trip(torch.zeros(100_000, dtype=torch.bfloat16)).numel() < 100_200
    noise = torch.randint(-(2**15), 2**15, (300_000,), generator=torch.Generator().manual_seed(0))
    packed = assert_round_trip(noise.to(torch.int16).view(torch.bfloat16))
    # 16 bytes of header, two chunks of 4 bytes of size each, stored as they are
    assert packed.numel() == 16 + 2 * 4 + 600_000 == bound_bytes(300_000)


def test_strides_and_views() -> None:
    pytest.importorskip("zstandard")
    weights = normal(40, 50)
    assert_round_trip(weights.t())
    assert_round_trip(weights[3:9, 10:20])
    padded = torch.cat([torch.zeros(3, dtype=torch.uint8), encode(weights)])
    assert torch.equal(decode(padded[3:], weights.shape), weights)  # not aligned


def test_damage_is_noticed() -> None:
    pytest.importorskip("zstandard")
    weights = normal(5000)
    packed = encode(weights)
    for broken, message in (
        (packed[:10], "too few"),
        (packed[:-1], "only in part"),
        (torch.cat([packed, packed[:1]]), "only in part"),
        (packed.roll(1), "do not begin"),
    ):
        with pytest.raises(DamagedWeightsError, match=message):
            decode(broken, weights.shape)
    with pytest.raises(DamagedWeightsError, match="5000 weights are stored, 4999"):
        decode(packed, torch.Size((4999,)))
    hurt = packed.clone()
    hurt[20:24] = 255  # the frame's own header
    with pytest.raises(DamagedWeightsError, match="damaged"):
        decode(hurt, weights.shape)
    # A frame that says it holds 2^50 bytes must not make anybody reserve them.
    greedy = b"\x28\xb5\x2f\xfd\xe0" + (1 << 50).to_bytes(8, "little")
    hurt[20 : 20 + len(greedy)] = torch.tensor(list(greedy), dtype=torch.uint8)
    with pytest.raises(DamagedWeightsError, match="holds 1125899906842624 exponents, not 5000"):
        decode(hurt, weights.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int16])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        encode(torch.zeros(4, dtype=dtype))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingZstandardError, match=r"memtrain\[lossless\]"):
        encode(normal(3))


def test_bytes_in_the_worst_case() -> None:
    assert bound_bytes(0) == 16
    assert bound_bytes(1) == 16 + 4 + 2
    assert bound_bytes((1 << 18) + 1) == 16 + 8 + 2 * ((1 << 18) + 1)
    assert math.isclose(bound_bytes(10**9) / 2e9, 1.0, rel_tol=1e-5)
