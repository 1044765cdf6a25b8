"""Lossless coding of bytes at rest: equal to the bit, sizes, what does not shrink, damage."""

from __future__ import annotations

import contextlib
import struct
import sys
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtrain.optim.storage.lossless import (
    DamagedBytesError,
    ExponentCodec,
    MissingZstandardError,
    Way,
)

CHUNK = 1 << 19
HEADER, ENTRY = 16, 5


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(numel: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(numel, generator=generator()) * 0.02).to(dtype)


def noise(nbytes: int) -> Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator())


def as_bytes(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8)


def round_trip(plain: Tensor) -> tuple[int, list[Way]]:
    """Coded bytes, and the way of each chunk; the room behind them is not touched."""
    codec = ExponentCodec()
    coder, bound = codec.coder(), codec.bound_bytes(plain.numel())
    into = torch.full((bound + 8,), 0xA5, dtype=torch.uint8)
    size = coder.encode(plain, into)
    assert size <= bound
    assert bool((into[bound:] == 0xA5).all())
    found = torch.full_like(plain, 0x5A)
    codec.coder().decode(into[:size].clone(), found)
    assert torch.equal(found, plain)
    chunks = -(-plain.numel() // CHUNK)
    assert sum(coder.ways.values()) == chunks
    return size, [Way(into[HEADER + ENTRY * i].item()) for i in range(chunks)]


def exponent_entropy(values: Tensor) -> float:
    """Bits of information in an exponent of bf16 numbers."""
    counts = torch.bincount(((values.view(torch.int16) >> 7) & 0xFF).long(), minlength=256).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum())


@pytest.fixture(autouse=True)
def _library() -> None:
    pytest.importorskip("zstandard")


def test_bf16_takes_nearly_its_entropy() -> None:
    values = normal(1 << 20)
    size, ways = round_trip(as_bytes(values))
    expected = (8 + exponent_entropy(values)) / 16
    assert expected < 0.67
    assert expected < size / values.nbytes < expected + 0.012  # Huffman's whole bits, and headers
    assert set(ways) == {Way.BF16}


def test_fp32_codes_its_upper_half_alone() -> None:
    values = normal(1 << 19, torch.float32)
    size, ways = round_trip(as_bytes(values))
    expected = (24 + exponent_entropy(values.view(torch.bfloat16)[1::2].contiguous())) / 32
    assert expected < size / values.nbytes < expected + 0.006
    assert set(ways) == {Way.FP32}


def test_each_chunk_is_coded_in_its_own_way() -> None:
    """A record of fp32 masters, bf16 moments, 8-bit numbers and state that was never touched."""
    record = torch.cat(
        [
            as_bytes(normal(CHUNK // 4, torch.float32)),
            as_bytes(normal(CHUNK // 2)),
            noise(CHUNK),
            torch.zeros(CHUNK, dtype=torch.uint8),
        ]
    )
    size, ways = round_trip(record)
    assert ways == [Way.FP32, Way.BF16, Way.PLAIN, Way.ZEROS]
    assert size < 2.6 * CHUNK


@pytest.mark.parametrize("nbytes", [0, 1, 2, 3, 5, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("kind", ["bf16", "fp32", "noise", "zeros"])
def test_sizes_around_a_chunk(nbytes: int, kind: str) -> None:
    plain = {
        "bf16": lambda: as_bytes(normal(nbytes // 2 + 1))[:nbytes],
        "fp32": lambda: as_bytes(normal(nbytes // 4 + 1, torch.float32))[:nbytes],
        "noise": lambda: noise(nbytes),
        "zeros": lambda: torch.zeros(nbytes, dtype=torch.uint8),
    }[kind]()
    round_trip(plain)


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    size, ways = round_trip(noise(CHUNK + 7))
    assert size == HEADER + 2 * ENTRY + CHUNK + 7 == ExponentCodec().bound_bytes(CHUNK + 7)
    assert ways == [Way.PLAIN, Way.PLAIN]


def test_a_sample_that_promises_too_much_costs_nothing() -> None:
    """The sampled words are all alike and no others are: coding would make it larger."""
    words = torch.randint(-(2**15), 2**15, (CHUNK // 2,), generator=generator()).to(torch.int16)
    step = CHUNK // 2 // 2048
    words[::step] = words[1::step] = 0x3F80
    size, ways = round_trip(as_bytes(words))
    assert ways == [Way.PLAIN]
    assert size == HEADER + ENTRY + CHUNK


def test_nearly_zeros_are_not_taken_for_zeros() -> None:
    plain = torch.zeros(CHUNK, dtype=torch.uint8)
    plain[77] = 1
    assert round_trip(plain)[1] != [Way.ZEROS]


def test_every_bit_pattern_of_a_word() -> None:
    """Infinities, signed zeros, subnormals and the payloads of all NaNs."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    round_trip(as_bytes(every))
    skewed = torch.cat([every, torch.full((CHUNK // 2 - 2**16,), 0x3F80, dtype=torch.int16)])
    assert round_trip(as_bytes(skewed))[1] == [Way.BF16]
    upper = torch.stack([torch.arange(CHUNK // 4).to(torch.int16), skewed[: CHUNK // 4]], 1)
    round_trip(as_bytes(upper))
    nans = torch.full((CHUNK // 4,), 0x7F800001, dtype=torch.int32) + torch.arange(CHUNK // 4).int()
    assert round_trip(as_bytes(nans))[1] == [Way.FP32]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    round_trip(torch.tensor(list(data), dtype=torch.uint8))


def test_bytes_need_not_be_aligned() -> None:
    plain = torch.cat([torch.zeros(3, dtype=torch.uint8), as_bytes(normal(70_001, torch.float32))])
    round_trip(plain[3:])
    codec = ExponentCodec()
    into = torch.empty(codec.bound_bytes(plain.numel()) + 1, dtype=torch.uint8)
    size = codec.coder().encode(plain, into[1:])
    found = torch.empty_like(plain)
    codec.coder().decode(into[1 : 1 + size], found)
    assert torch.equal(found, plain)


def coded(plain: Tensor) -> Tensor:
    codec = ExponentCodec()
    into = torch.empty(codec.bound_bytes(plain.numel()), dtype=torch.uint8)
    return into[: codec.coder().encode(plain, into)].clone()


def test_damage_is_noticed() -> None:
    plain = as_bytes(normal(5000))
    packed, found = coded(plain), torch.empty_like(plain)
    decode = ExponentCodec().coder().decode
    entry = packed.clone()
    entry[HEADER] = 3
    longer = packed.clone()
    longer[HEADER + 1 : HEADER + ENTRY] = torch.tensor(list(struct.pack("<I", 1 << 31)), dtype=torch.uint8)
    for broken, message in (
        (packed[:10], "too few"),
        (packed[:18], "end early: 18 are left, 21 are needed"),
        (packed[:-1], "end early"),
        (torch.cat([packed, packed[:1]]), "1 bytes follow"),
        (packed.roll(1), "do not begin"),
        (entry, "3 is not a valid Way"),
        (longer, "end early"),
    ):
        with pytest.raises(DamagedBytesError, match=message):
            decode(broken, found)
    with pytest.raises(DamagedBytesError, match="10000 bytes are stored, 9999"):
        decode(packed, found[:-1])
    hurt = packed.clone()
    hurt[HEADER + ENTRY : HEADER + ENTRY + 4] = 255  # the frame's own header
    with pytest.raises(DamagedBytesError, match="damaged"):
        decode(hurt, found)
    # A frame that says it holds 2^50 bytes must not make anybody reserve them.
    greedy = b"\x28\xb5\x2f\xfd\xe0" + (1 << 50).to_bytes(8, "little")
    hurt[HEADER + ENTRY : HEADER + ENTRY + len(greedy)] = torch.tensor(list(greedy), dtype=torch.uint8)
    with pytest.raises(DamagedBytesError, match="holds 1125899906842624 exponents, not 5000"):
        decode(hurt, found)
    decode(packed, found)  # and a coder that has failed goes on
    assert torch.equal(found, plain)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(at=st.integers(0, 10**9), value=st.integers(0, 255), cut=st.integers(0, 4))
def test_damage_never_gives_anything_but_bytes_or_the_error(at: int, value: int, cut: int) -> None:
    plain = as_bytes(normal(300))
    packed = coded(plain)
    packed[at % packed.numel()] = value
    with contextlib.suppress(DamagedBytesError):
        ExponentCodec().coder().decode(packed[: packed.numel() - cut], torch.empty_like(plain))


def test_a_coder_stays_within_its_memory() -> None:
    """Counted: what numpy and the interpreter reserve; the library says the size of its own contexts."""
    codec = ExponentCodec()
    plain = torch.cat([as_bytes(normal(CHUNK, torch.float32)), as_bytes(normal(CHUNK)), noise(CHUNK)])
    into, found = torch.empty(codec.bound_bytes(plain.numel()), dtype=torch.uint8), torch.empty_like(plain)
    tracemalloc.start()
    try:
        coder = codec.coder()
        size = coder.encode(plain, into)
        coder.decode(into[:size], found)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    contexts = coder._compressor.memory_size() + coder._decompressor.memory_size()
    assert peak + contexts <= codec.working_bytes
    assert torch.equal(found, plain)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingZstandardError, match=r'pip install "memtrain\[lossless\]"'):
        ExponentCodec()
