"""How fast optimizer state moves through a codec: measured with the tier behind it, in plain bytes."""

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


def measure_codec(open_store: Callable[[int], Store], codec: Codec, round_seconds: float) -> StateCodec:
    """Rates in plain bytes, of what AdamW keeps in fp32: normal numbers of many scales, and their squares."""
    assert segment_room(codec, SEGMENT_BYTES) <= SEGMENT_BYTES + BLOCK_BYTES, "a header of more than a page"
    sample = torch.empty(2 * TRANSFERS * TRANSFER_BYTES, dtype=torch.uint8)
    numbers = sample.view(torch.float32)
    generator = torch.Generator().manual_seed(0)
    numbers.normal_(generator=generator)
    rows = numbers.view(-1, 1024)
    rows.mul_(torch.empty(len(rows), 1).log_normal_(-10.0, 1.0, generator=generator))
    moments = list(torch.split(sample, TRANSFER_BYTES))
    for squares in moments[1::2]:
        squares.view(torch.float32).square_()
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
