"""Floating-point bytes at rest in fewer bytes, to the bit: exponents are entropy-coded, the rest is stored.

The eight exponent bits of trained weights hold 2.6 bits of information, those of Adam's moments some 4; sign
and mantissa hold nearly all of theirs (SmolLM2-135M). This is what NeuZip (Hao et al., arXiv 2410.20650) and
DFloat11 (arXiv 2504.11651) use on a GPU while a layer is in use; here it is a codec for a tier, for bytes
that wait there. bf16 shrinks to two thirds, fp32 to about 86 %.

Bytes come without a dtype, for a record of optimizer state has several: each chunk is coded as bf16, as fp32
(its upper half as bf16, its lower half stored), as zeros, or not at all, whichever a sample of it says is the
smallest; what does not shrink is stored as it is. A chunk's way stands before it. So any bytes can be coded,
NaN payloads and random ones too, and none take more than ``bound_bytes``.

The coder is Zstandard's Huffman stage; exponents have no repetitions to find, so its search for them is made
as small as its parameters allow (``_SEARCH``). 10.6 M weights of SmolLM2 (bf16) on one of two cores that
others used too:

    .                              ratio    encode       decode
    entropy of the exponents        .663
    here                            .667     .5 GB/s      1.0 GB/s
    zstandard level 1               .682
    zlib, Huffman only              .666     .3 GB/s       .4 GB/s  (of the coder alone)
    zipnn 0.5.4 (source only)       .666     .2 GB/s      1.0 GB/s
    constriction 0.5 (ANS)          .663     .3 GB/s       .07 GB/s (of the coder alone)

Not considered: nvcomp and DFloat11, which need a GPU. A disk that reads more than the decode rate above is
not made faster by this; less is written to it.

Layout, little endian: ``_HEADER`` (magic, plain bytes, chunks), ``_ENTRY`` for each chunk (way, coded bytes
of its exponents), then the chunks one after the other: exponents, a byte of sign and mantissa for each
number, for fp32 two bytes more, and what is left over of a number cut off at the end. There is no checksum:
extents of a tier have theirs."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_Bytes = NDArray[np.uint8]

_MAGIC = b"MTX2"
_HEADER = struct.Struct("<4sQI")
_ENTRY = struct.Struct("<BI")
_CHUNK = 1 << 19
"""Bytes coded at a time: the working set stays in a second-level cache, and what each chunk's Huffman tables
cost (about 60 bytes in each 128 KiB block) is nothing."""
_SAMPLE = 2048
"""Numbers of a chunk whose exponents are counted before it is coded: .1 ms where coding it takes .6 ms. The
entropy of as many is off by some .05 bits."""
_LEAST_GAIN = 0.02
"""Part of a chunk that the sample must promise, or it is stored as it is."""
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


class Way(IntEnum):
    """How a chunk is stored; the value stands before it."""

    PLAIN = 0
    ZEROS = 1
    BF16 = 2
    FP32 = 4


class MissingZstandardError(ImportError):
    """The codec is asked for where its library is not installed."""


class DamagedBytesError(ValueError):
    """Bytes that ``decode`` was given are not what ``encode`` made."""


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingZstandardError(
            'the exponent codec needs the package zstandard: pip install "memtrain[lossless]"'
        ) from error
    return zstandard


class ExponentCodec:
    """Makes coders; ``memtrain.offload.coded.Codec``.

    Raises:
        MissingZstandardError: see there.
    """

    name = "exponent"
    working_bytes = 3 << 20
    """Memory of one coder: 2.1 MiB of arrays, and what the library holds (.5 MiB a direction)."""

    def __init__(self) -> None:
        _zstandard()

    def bound_bytes(self, nbytes: int) -> int:
        """The most bytes that ``nbytes`` become: what to reserve before they are known."""
        return _HEADER.size + _chunks(nbytes) * _ENTRY.size + nbytes

    def coder(self) -> ExponentCoder:
        """One for each thread."""
        return ExponentCoder()


class ExponentCoder:
    """Codes and decodes in memory of its own; for one thread at a time.

    Attributes:
        ways: how many chunks were stored in which way so far.
    """

    def __init__(self) -> None:
        library = _zstandard()
        self._library = library
        parameters = library.ZstdCompressionParameters(
            strategy=library.STRATEGY_FAST, write_content_size=True, write_checksum=False, **_SEARCH
        )
        self._compressor = library.ZstdCompressor(compression_params=parameters)
        self._decompressor = library.ZstdDecompressor()
        self._words = np.empty(_CHUNK // 2, dtype=np.uint16)
        self._signs = np.empty(_CHUNK // 2, dtype=np.uint16)
        self._exponents = np.empty(_CHUNK // 2, dtype=np.uint8)
        self.ways = dict.fromkeys(Way, 0)

    def encode(self, plain: Tensor, into: Tensor) -> int:
        """Code ``plain`` to the beginning of ``into`` (both uint8 ``[bytes]`` on a CPU, ``into`` of at least
        ``bound_bytes``); how many bytes it became."""
        source, target = plain.numpy(), into.numpy()
        chunks = _chunks(source.size)
        _HEADER.pack_into(target.data, 0, _MAGIC, source.size, chunks)
        end = _HEADER.size + chunks * _ENTRY.size
        for number, part in enumerate(_parts(source.size)):
            way, coded, size = self._encode_chunk(source[part], target[end:])
            _ENTRY.pack_into(target.data, _HEADER.size + number * _ENTRY.size, way, coded)
            self.ways[way] += 1
            end += size
        return end

    def decode(self, coded: Tensor, into: Tensor) -> None:
        """Make all of ``into`` the plain bytes again.

        Raises:
            DamagedBytesError: ``coded`` is not what ``encode`` made, or is of another number of bytes.
        """
        source, target = coded.numpy(), into.numpy()
        entries = _read_table(source, target.size)
        at = _HEADER.size + len(entries) * _ENTRY.size
        for part, (way, size) in zip(_parts(target.size), entries, strict=True):
            at += self._decode_chunk(way, size, source[at:], target[part])
        if at != source.size:
            raise DamagedBytesError(f"{source.size - at} bytes follow the last coded chunk")

    def _encode_chunk(self, plain: _Bytes, into: _Bytes) -> tuple[Way, int, int]:
        """Way, coded bytes of the exponents, and bytes in all."""
        way = _best_way(plain)
        if way is Way.ZEROS:
            return way, 0, 0
        if way is not Way.PLAIN:
            high, rest = _split(plain, way)
            count = high.size
            words, exponents = self._words[:count], self._exponents[:count]
            np.right_shift(high, 7, out=words)
            np.copyto(exponents, words, casting="unsafe")
            small = self._compressor.compress(exponents.data)
            size = len(small) + count + sum(each.nbytes for each in rest)
            if size < plain.size:
                into[: len(small)] = np.frombuffer(small, dtype=np.uint8)
                np.right_shift(high, 8, out=words)
                words &= 0x80
                np.bitwise_and(high, 0x7F, out=self._signs[:count])
                words |= self._signs[:count]
                end = len(small) + count
                np.copyto(into[len(small) : end], words, casting="unsafe")
                for each in rest:
                    into[end : end + each.nbytes].view(each.dtype)[:] = each
                    end += each.nbytes
                return way, len(small), end
        into[: plain.size] = plain
        return Way.PLAIN, 0, plain.size

    def _decode_chunk(self, way: Way, size: int, coded: _Bytes, into: _Bytes) -> int:
        """Bytes of ``coded`` that the chunk was."""
        if way is Way.ZEROS:
            into[:] = 0
            return 0
        if way is Way.PLAIN:
            _require(coded, into.size)
            into[:] = coded[: into.size]
            return into.size
        high, rest = _split(into, way)
        count = high.size
        end = size + count
        _require(coded, end + sum(each.nbytes for each in rest))
        exponents = self._decompress(coded[:size], count)
        signs = self._signs[:count]
        np.copyto(high, exponents)
        np.left_shift(high, 7, out=high)
        np.copyto(signs, coded[size:end])
        words = self._words[:count]
        np.bitwise_and(signs, 0x7F, out=words)
        np.bitwise_or(high, words, out=high)
        signs &= 0x80
        np.left_shift(signs, 8, out=signs)
        np.bitwise_or(high, signs, out=high)
        for each in rest:
            each[:] = coded[end : end + each.nbytes].view(each.dtype)
            end += each.nbytes
        return end

    def _decompress(self, coded: _Bytes, count: int) -> _Bytes:
        try:
            # Asked first: what a damaged frame says of itself is the memory that would be reserved for it.
            held = self._library.frame_content_size(coded.data)
            plain = self._decompressor.decompress(coded.data) if held == count else b""
        except self._library.ZstdError as error:
            raise DamagedBytesError(f"a chunk of coded exponents is damaged: {error}") from error
        if held != count or len(plain) != count:
            raise DamagedBytesError(f"a chunk holds {held} exponents, not {count}")
        return np.frombuffer(plain, dtype=np.uint8)


def _best_way(plain: _Bytes) -> Way:
    """What the sample says is the smallest."""
    words = plain[: plain.size // 2 * 2].view(np.uint16)
    if words.size < 2:
        return Way.PLAIN
    step = max(2, words.size // _SAMPLE // 2 * 2)
    even, odd = _exponents(words[::step]), _exponents(words[1::step])
    if not even.any() and not odd.any() and not plain.any():
        return Way.ZEROS
    as_fp32 = (8 - _entropy(odd)) / 32
    as_bf16 = (8 - _entropy(np.concatenate([even, odd]))) / 16
    if max(as_fp32, as_bf16) < _LEAST_GAIN:
        return Way.PLAIN
    return Way.BF16 if as_bf16 >= as_fp32 else Way.FP32


def _exponents(words: NDArray[np.uint16]) -> NDArray[Any]:
    return (words >> 7) & 0xFF


def _entropy(values: NDArray[Any]) -> float:
    """Bits of information in one."""
    counts = np.bincount(values, minlength=256)
    shares = counts[counts > 0] / values.size
    return float(-(shares * np.log2(shares)).sum())


def _split(plain: _Bytes, way: Way) -> tuple[NDArray[np.uint16], tuple[_Bytes | NDArray[Any], ...]]:
    """Views: the words whose exponents are coded, and what is stored beside them."""
    width = int(way)
    whole = plain.size // width * width
    words = plain[:whole].view(np.uint16)
    if way is Way.BF16:
        return words, (plain[whole:],)
    return words[1::2], (words[0::2], plain[whole:])


def _read_table(coded: _Bytes, nbytes: int) -> list[tuple[Way, int]]:
    """Way and coded bytes of each chunk."""
    if coded.size < _HEADER.size:
        raise DamagedBytesError(f"{coded.size} bytes are too few for coded ones")
    magic, stored, chunks = _HEADER.unpack_from(coded.data)
    if magic != _MAGIC or chunks != _chunks(stored):
        raise DamagedBytesError("the bytes do not begin as coded ones do")
    if stored != nbytes:
        raise DamagedBytesError(f"{stored} bytes are stored, {nbytes} were asked for")
    table = _HEADER.size + chunks * _ENTRY.size
    _require(coded, table)
    try:
        return [(Way(way), size) for way, size in _ENTRY.iter_unpack(coded.data[_HEADER.size : table])]
    except ValueError as error:
        raise DamagedBytesError(f"a chunk is stored in a way that there is not: {error}") from error


def _require(coded: _Bytes, nbytes: int) -> None:
    if coded.size < nbytes:
        raise DamagedBytesError(f"the coded bytes end early: {coded.size} are left, {nbytes} are needed")


def _chunks(nbytes: int) -> int:
    return -(-nbytes // _CHUNK)


def _parts(nbytes: int) -> Iterator[slice]:
    for start in range(0, nbytes, _CHUNK):
        yield slice(start, min(start + _CHUNK, nbytes))
