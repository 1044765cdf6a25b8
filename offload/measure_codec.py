"""How fast optimizer state, or weights, move through a codec: measured with the tier behind it, in plain
bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from memtrain.offload.codec import SEGMENT_BYTES, Codec, segment_room
from memtrain.offload.coded import CodedStore
from memtrain.offload.rates import TRANSFER_BYTES, TRANSFERS, cpu_seconds, median_rates
from memtrain.offload.store import Store
from memtrain.offload.targets import BLOCK_BYTES
from memtrain.planner.machine import StateCodec


def measure_codec(
    open_store: Callable[[int], Store],
    codec: Codec,
    round_seconds: float,
    *,
    weights: torch.dtype | None = None,
) -> StateCodec:
    """Rates in plain bytes: of weights of that dtype, or of what AdamW keeps in fp32."""
    assert segment_room(codec, SEGMENT_BYTES) <= SEGMENT_BYTES + BLOCK_BYTES, "a header of more than a page"
    moments = _moments() if weights is None else _weights(weights)
    segments = len(moments) * -(-TRANSFER_BYTES // SEGMENT_BYTES)
    with open_store(segments * (SEGMENT_BYTES + BLOCK_BYTES)) as store:
        coded = CodedStore(store, codec)
        try:
            extents = [coded.allocate(f"probe {i}", TRANSFER_BYTES) for i in range(len(moments))]
            pairs = list(zip(extents, moments, strict=True))
            for pair in pairs:
                coded.write(*pair).wait()
            read = [partial(coded.read, *pair) for pair in pairs[:TRANSFERS]]
            write = [partial(coded.write, *pair) for pair in pairs[TRANSFERS:]]
            seconds, before = cpu_seconds(), coded.statistics()
            rates = median_rates(read, write, round_seconds)
            seconds, after = cpu_seconds() - seconds, coded.statistics()
        finally:
            coded.close()
    moved = after.plain_bytes_read - before.plain_bytes_read
    moved += after.plain_bytes_written - before.plain_bytes_written
    return StateCodec(
        name=codec.name,
        ratio=after.ratio,
        read_bytes_per_second=rates["read"],
        write_bytes_per_second=rates["write"],
        cpu_seconds_per_byte=seconds / moved,
        segment_bytes=SEGMENT_BYTES,
        staging_bytes=coded.staging_bytes,
    )


def _moments() -> list[torch.Tensor]:
    """Normal numbers of many scales, and their squares."""
    sample = torch.empty(2 * TRANSFERS * TRANSFER_BYTES, dtype=torch.uint8)
    numbers = sample.view(torch.float32)
    generator = torch.Generator().manual_seed(0)
    numbers.normal_(generator=generator)
    rows = numbers.view(-1, 1024)
    rows.mul_(torch.empty(len(rows), 1).log_normal_(-10.0, 1.0, generator=generator))
    moments = list(torch.split(sample, TRANSFER_BYTES))
    for squares in moments[1::2]:
        squares.view(torch.float32).square_()
    return moments


def _weights(dtype: torch.dtype) -> list[torch.Tensor]:
    """Normal numbers of one scale: the exponents of SmolLM2's weights hold 2.6 bits, and so do these."""
    sample = torch.empty(2 * TRANSFERS * TRANSFER_BYTES, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    parts = list(torch.split(sample, TRANSFER_BYTES))
    for part in parts:  # one after the other: what is drawn is of twice the bytes, or more
        numbers = torch.empty(TRANSFER_BYTES // dtype.itemsize).normal_(0.0, 0.02, generator=generator)
        part.view(dtype).copy_(numbers)
    return parts
