"""bf16 weights at rest in two thirds of their bytes, to the bit.

The eight exponent bits of trained weights hold 2.6 bits of information, sign and mantissa nearly all of
theirs (7.97 of 8; SmolLM2-135M). So exponents are entropy-coded and the other byte is stored as it is:
NeuZip (Hao et al., arXiv 2410.20650) and DFloat11 (arXiv 2504.11651), which do it on a GPU while a layer is
used. Here it is a codec for a tier: bytes that wait on a disk, in host memory, or for a checkpoint.

The coder is Zstandard's Huffman stage; weights have no repetitions to find, so its search for them is made as
small as its parameters allow (``_SEARCH``). 10.6 M weights of SmolLM2 on one of two cores that others used
too; bytes are those of bf16:

    .                              ratio    encode       decode
    entropy of the exponents        .663
    here                            .667     .5 GB/s      1.0 GB/s
    zstandard level 1               .682
    zlib, Huffman only              .666     .3 GB/s       .4 GB/s  (of the coder alone)
    zipnn 0.5.4 (source only)       .666     .2 GB/s      1.0 GB/s
    constriction 0.5 (ANS)          .663     .3 GB/s       .07 GB/s (of the coder alone)

Not considered: nvcomp and DFloat11, which need a GPU. A disk that reads more than the decode rate above (the
one of the machine measured reads 2 GB/s) is not made faster by this; it is made larger.

Layout, little endian: ``_HEADER`` (magic, count of weights, chunks), the coded bytes of each chunk as
uint32, the coded chunks one after the other, then one byte of sign and mantissa for each weight. A chunk
that does not shrink is stored as it is, so nothing ever takes more than ``bound_bytes``. There is no
checksum: extents of a tier have theirs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_MAGIC = b"MTX1"
_HEADER = struct.Struct("<4sQI")
_SIZE = struct.Struct("<I")
_CHUNK = 1 << 18
"""Weights coded at a time: the working set (512 KiB of weights, two bytes planes) stays in a second-level
cache, and what each chunk's Huffman tables cost (about 60 bytes in each 128 KiB block) is nothing."""
_SEARCH = {
    "window_log": 17,
    "hash_log": 6,
    "chain_log": 6,
    "search_log": 1,
    "min_match": 7,
    "target_length": 0,
}
"""The smallest search: ratio of the exponents .337 where level 1 has .364 (it finds repetitions that
cost more than they spare), and 3 times as fast. The bound by entropy is .3265."""


class MissingZstandardError(ImportError):
    """The codec is asked for where its library is not installed."""


class DamagedWeightsError(ValueError):
    """Bytes that ``decode`` was given are not what ``encode`` made."""


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingZstandardError(
            'lossless weights need the package zstandard: pip install "memtrain[lossless]"'
        ) from error
    return zstandard


def bound_bytes(numel: int) -> int:
    """The most bytes that ``encode`` makes of ``numel`` weights: what to reserve before their values are
    known."""
    return _HEADER.size + _chunks(numel) * _SIZE.size + 2 * numel


def encode(weights: Tensor) -> Tensor:
    """``weights`` (bf16, on a CPU, of any shape) as uint8 ``[bytes]``.

    Raises:
        TypeError: another dtype or device. fp32 has 8 of 32 bits to code, and is better stored as bf16 and
            the hidden bits that belong to it (``masters``).
        MissingZstandardError: see there.
    """
    if weights.dtype != torch.bfloat16 or weights.device.type != "cpu":
        raise TypeError(f"lossless coding is for bf16 on the CPU, got {weights.dtype} on {weights.device}")
    library = _zstandard()
    parameters = library.ZstdCompressionParameters(
        strategy=library.STRATEGY_FAST, write_content_size=True, write_checksum=False, **_SEARCH
    )
    coder = library.ZstdCompressor(compression_params=parameters)
    bits = weights.detach().reshape(-1).view(torch.int16)
    rest = torch.empty(bits.numel(), dtype=torch.uint8)
    scratch = torch.empty(2, min(_CHUNK, bits.numel()), dtype=torch.int16)
    exponents = torch.empty(scratch.shape[1], dtype=torch.uint8)
    coded: list[bytes] = []
    for part in _parts(bits.numel()):
        count = part.stop - part.start
        shifted, signs = scratch[:, :count]
        torch.bitwise_right_shift(bits[part], 7, out=shifted)
        plain = exponents[:count].copy_(shifted).numpy().data
        shifted >>= 1
        shifted &= 0x80
        torch.bitwise_and(bits[part], 0x7F, out=signs)
        rest[part] = signs.bitwise_or_(shifted)
        small = coder.compress(plain)
        coded.append(small if len(small) < count else bytes(plain))
    header = _HEADER.pack(_MAGIC, bits.numel(), len(coded)) + b"".join(_SIZE.pack(len(c)) for c in coded)
    packed = bytearray(b"".join((header, *coded)))
    return torch.cat([torch.frombuffer(packed, dtype=torch.uint8), rest])


def decode(packed: Tensor, shape: torch.Size) -> Tensor:
    """The weights again, bf16 of ``shape``, equal bit by bit (signs of zeros and payloads of NaN included).

    Args:
        packed: what ``encode`` made, uint8 on a CPU.

    Raises:
        DamagedWeightsError: the bytes are not such, or are of another number of weights.
        MissingZstandardError: see there.
    """
    raw = packed.contiguous().numpy().data
    sizes = _read_header(raw, shape.numel())
    start = _HEADER.size + len(sizes) * _SIZE.size
    rest = packed[start + sum(sizes) :]
    coder = _zstandard().ZstdDecompressor()
    bits = torch.empty(shape.numel(), dtype=torch.int16)
    scratch = torch.empty(min(_CHUNK, len(bits)), dtype=torch.int16)
    for part, size in zip(_parts(len(bits)), sizes, strict=True):
        count = part.stop - part.start
        target, signs = bits[part], scratch[:count]
        target.copy_(_exponents(coder, raw[start : start + size], count))
        target <<= 7
        signs.copy_(rest[part])
        signs &= 0x7F
        target |= signs
        signs.copy_(rest[part])
        signs &= 0x80
        signs <<= 8
        target |= signs
        start += size
    return bits.view(torch.bfloat16).view(shape)


def _read_header(raw: memoryview, numel: int) -> list[int]:
    """Coded bytes of each chunk."""
    if len(raw) < _HEADER.size:
        raise DamagedWeightsError(f"{len(raw)} bytes are too few for coded weights")
    magic, stored, chunks = _HEADER.unpack_from(raw)
    if magic != _MAGIC or chunks != _chunks(stored):
        raise DamagedWeightsError("the bytes do not begin as coded weights do")
    if stored != numel:
        raise DamagedWeightsError(f"{stored} weights are stored, {numel} were asked for")
    table = _HEADER.size + chunks * _SIZE.size
    sizes = [size for (size,) in _SIZE.iter_unpack(raw[_HEADER.size : table])] if len(raw) >= table else []
    if len(raw) != table + sum(sizes) + numel:
        raise DamagedWeightsError(f"{len(raw)} bytes hold {numel} coded weights only in part")
    return sizes


def _exponents(coder: Any, coded: memoryview, count: int) -> Tensor:
    plain: Any = coded
    if len(coded) != count:
        library = _zstandard()
        try:
            # Asked first: what a damaged frame says of itself is the memory that would be reserved for it.
            held = library.frame_content_size(coded)
            plain = coder.decompress(coded) if held == count else b""
        except library.ZstdError as error:
            raise DamagedWeightsError(f"a chunk of coded exponents is damaged: {error}") from error
        if held != count:
            raise DamagedWeightsError(f"a chunk holds {held} exponents, not {count}")
    return torch.frombuffer(bytearray(plain), dtype=torch.uint8)


def _chunks(numel: int) -> int:
    return -(-numel // _CHUNK)


def _parts(numel: int) -> Iterator[slice]:
    for start in range(0, numel, _CHUNK):
        yield slice(start, min(start + _CHUNK, numel))
