"""Instances for the planner: one rank's share of a 70 B-like training step, with synthetic rates.

Eight ranks share a sequence (context parallel); a rank's tokens are cut into chunks. Per layer three classes:
block input X, attention output and log-sum-exp A, all other token-wise tensors O. Compute rates, links and
sizes are round figures of published hardware, not measurements; a seed makes the jitter.
"""

from __future__ import annotations

import random

from memtrain.planner.ranges.model import (
    Block,
    Codec,
    Hop,
    Machine,
    Place,
    Problem,
    TensorClass,
    causal_attention_seconds,
    even_seconds,
)

GiB = 1 << 30
RANKS = 8
HIDDEN = 8192
LAYER_PARAMETERS = 875_000_000
KV_PARAMETERS = 2 * HIDDEN * 1024
"""Of grouped-query attention with 8 heads of 128."""
OTHER_ELEMENTS_PER_TOKEN = 14 * HIDDEN
FLOPS = 156e12
"""Half of an A100's dense bf16."""
WINDOW = 4096


def layer(name: str, tokens: int, chunks: int, *, window: bool, factor: float = 1.0) -> Block:
    """One layer of a rank with ``tokens`` of a sequence eight times as long.

    Args:
        name: of the block.
        tokens: of this rank.
        chunks: the tokens are cut into.
        window: local attention over 4,096 tokens; otherwise causal over all.
        factor: of its times; shapes are the same for all.
    """
    reach = min(WINDOW, tokens * RANKS) if window else tokens * RANKS / 2
    attention = 4 * tokens * reach * HIDDEN / FLOPS * factor
    dense = 2 * LAYER_PARAMETERS * tokens / FLOPS * factor
    keys = 2 * KV_PARAMETERS * tokens / FLOPS
    again = (
        even_seconds(attention + keys, chunks)
        if window
        else causal_attention_seconds(attention, keys, chunks)
    )
    each = tokens // chunks
    return Block(
        name=name,
        forward_seconds=attention + dense,
        backward_seconds=2.5 * attention + 2 * dense,
        forward_transient_bytes=each * HIDDEN * 8,
        backward_transient_bytes=each * HIDDEN * 16,
        classes=(
            TensorClass(name="X", chunk_bytes=each * HIDDEN * 2, chunks=chunks, lossy=True),
            TensorClass(
                name="A",
                chunk_bytes=each * (HIDDEN * 2 + 64 * 4),
                chunks=chunks,
                recompute_seconds=again,
                needs=("X",),
                lossy=True,
                attention=True,
            ),
            TensorClass(
                name="O",
                chunk_bytes=each * OTHER_ELEMENTS_PER_TOKEN * 2,
                chunks=chunks,
                recompute_seconds=even_seconds(dense, chunks),
                needs=("X", "A"),
                lossy=True,
            ),
        ),
    )


def machine(device: float, host: float, cxl: float, nvme: float) -> Machine:
    """A rank's share of a node, capacities in GiB; PCIe 4 at 25 GB/s, CXL at 10, NVMe at 3 and 6 GB/s."""
    pcie = Hop(link="pcie", write_bytes_per_second=25e9, read_bytes_per_second=25e9)
    places = [Place(name="host", capacity_bytes=int(host * GiB), hops=(pcie,))]
    if cxl:
        way = Hop(link="pcie", write_bytes_per_second=10e9, read_bytes_per_second=10e9)
        places.append(Place(name="cxl", capacity_bytes=int(cxl * GiB), hops=(way,)))
    if nvme:
        flash = Hop(link="nvme", write_bytes_per_second=3e9, read_bytes_per_second=6e9)
        places.append(Place(name="nvme", capacity_bytes=int(nvme * GiB), hops=(pcie, flash)))
    return Machine(device_capacity_bytes=int(device * GiB), places=tuple(places), staging="host")


def problem(
    *,
    layers: int = 80,
    chunks: int = 16,
    sequence: int = 131072,
    device: float = 12,
    host: float = 96,
    cxl: float = 128,
    nvme: float = 1000,
    windows: int = 0,
    jitter: float = 0.0,
    codec_bytes_per_second: float = 1e12,
    lossy_share: float = 0.25,
    seed: int = 1,
) -> Problem:
    """A step of ``layers`` layers; every ``windows + 1``-th attends globally, the others locally."""
    draw = random.Random(seed)
    blocks = tuple(
        layer(
            f"layers.{i}",
            sequence // RANKS,
            chunks,
            window=windows > 0 and i % (windows + 1) != windows,
            factor=1 + jitter * (2 * draw.random() - 1),
        )
        for i in range(layers)
    )
    codec = Codec(
        name="int8",
        ratio=0.53125,
        compress_bytes_per_second=codec_bytes_per_second,
        decompress_bytes_per_second=codec_bytes_per_second,
        error=1.0,
        places=("host",),
    )
    return Problem(
        blocks=blocks,
        machine=machine(device, host, cxl, nvme),
        codecs=(codec,),
        error_budget=lossy_share,
    )


FAMILIES = {
    "homogeneous": {"host": 60, "cxl": 64, "nvme": 100},
    "window/global 5:1, jitter": {"windows": 5, "jitter": 0.1},
    "tight host tiers, 64K": {"sequence": 65536, "host": 24, "cxl": 16, "nvme": 200, "device": 10},
    "host 30 GiB and NVMe": {"host": 30, "cxl": 1, "device": 12},
    "slow codec, jitter": {"jitter": 0.2, "codec_bytes_per_second": 2e11, "host": 60, "cxl": 60},
    "126 x 64": {"layers": 126, "chunks": 64, "jitter": 0.05, "host": 90, "cxl": 100, "nvme": 200},
}
"""Arguments of ``problem`` by name: five of 80 x 16, one of 126 x 64."""
