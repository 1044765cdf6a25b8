from __future__ import annotations

import dataclasses

import pytest

from memtrain.planner.ranges.model import (
    DEVICE,
    Block,
    Codec,
    Hop,
    Machine,
    Place,
    Problem,
    Role,
    StateClass,
    TensorClass,
)
from memtrain.planner.ranges.plan import BlockPlan
from memtrain.planning.usage import class_shares, usage_of
from tests.memtrain.planpage.hand_plan import FOUR, plan, ranges


def problem() -> Problem:
    sizes = {"X": 1, "A": 1, "O": 2}
    classes = tuple(TensorClass(name=name, chunk_bytes=size, chunks=16) for name, size in sizes.items())
    states = tuple(
        StateClass(name=name, role=role, piece_bytes=size, places=(DEVICE, "host"))
        for name, role, size in (
            ("weights", Role.PARAMETER, 1),
            ("gradients", Role.GRADIENT, 1),
            ("optimizer", Role.OPTIMIZER, 6),
        )
    )
    blocks = [
        Block(
            name=block.name,
            forward_seconds=1,
            backward_seconds=2,
            classes=classes if block.ranges else (),
            states=states,
            pieces=4,
        )
        for block in FOUR.blocks
    ]
    hop = Hop(link="pcie", write_bytes_per_second=1, read_bytes_per_second=1)
    host = Place(name="host", capacity_bytes=999, hops=(hop,))
    codec = Codec(
        name="int8", ratio=0.5, compress_bytes_per_second=1, decompress_bytes_per_second=1, error=0.1
    )
    machine = Machine(device_capacity_bytes=999, places=(host,))
    return Problem(blocks=tuple(blocks), machine=machine, codecs=(codec,))


def test_shares_of_bytes() -> None:
    usage = usage_of(FOUR, problem())
    # Each layer saves 64 bytes: of three, 32 leave to the host and 18 of O are computed again; 6, 10 and 6
    # go to nvme. The last block's slots count as swapped.
    assert usage.actions == {
        "swap": pytest.approx((3 * 32 + 22 + 32) / 256),
        "recompute": pytest.approx(54 / 256),
        "keep": pytest.approx((8 + 4 + 8 + 32) / 256),
    }
    assert usage.swapped_to == {"host": pytest.approx(96 / 256), "nvme": pytest.approx(22 / 256)}
    assert usage.state[Role.PARAMETER] == {DEVICE: 1.0}
    # Of five blocks' 20 pieces of optimizer state, 8 on the device, 9 in the host and 3 on nvme.
    assert usage.state[Role.OPTIMIZER] == {"host": 9 / 20, "nvme": 3 / 20, DEVICE: 8 / 20}
    assert usage.cpu_updates == 12 / 20
    assert usage.splits_tokens
    assert usage.codecs == ()


def test_codecs_that_are_used_are_named() -> None:
    parts = ranges("X", ("compress-swap:int8:host", 10), ("compress:int8", 6))
    lossy = BlockPlan(name="layers.0", ranges=parts)
    one = problem()
    block = dataclasses.replace(one.blocks[0], name="layers.0", classes=one.blocks[0].classes[:1], states=())
    usage = usage_of(plan(lossy), dataclasses.replace(one, blocks=(block,)))
    assert usage.codecs == ("int8",)
    assert usage.swapped_to == {"host": 10 / 16}
    assert usage.state == {}
    assert usage.cpu_updates == 0.0


def test_shares_of_a_class_are_in_words() -> None:
    shares = {share.tensor: share for share in class_shares(FOUR, problem())}
    # Three layers send 16 chunks of one byte; the last one's stay in their slot.
    assert shares["X"].actions == (("swap to host", 48), ("stay in slot", 16))
    # Of O's chunks of two bytes: 9 of 16 in three layers; 3, 5 and 3; 4, 2 and 4, and the last layer's 16.
    assert dict(shares["O"].actions) == {"recompute": 54, "swap to nvme": 22, "keep": 52}
    assert shares["O"].size_bytes == 128
