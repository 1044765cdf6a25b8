"""How far ahead shards are read, and what a failure in mid-shard leaves: every slot and mirror free."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from memtrain.offload.device import CpuDevice
from memtrain.offload.pipeline import ShardPipeline, Stages
from memtrain.offload.shards import FlatIndex, Shard
from memtrain.offload.slab import Ring
from tests.offload.late_device import LateCopy, LateDevice

SLOTS = 3


class Written:
    """A write that was over when it was asked for."""

    def __init__(self, tier: dict[Shard, torch.Tensor], shard: Shard, slot: torch.Tensor) -> None:
        tier[shard] = slot[:64].clone()

    def wait(self) -> None:
        """It is over."""

    def done(self) -> bool:
        return True


@pytest.fixture
def late() -> Iterator[LateDevice]:
    device = LateDevice(eagerness=0.0)
    yield device
    assert device.faults == []


@pytest.fixture
def shards() -> list[Shard]:
    index = FlatIndex([("unit", [("weight", nn.Parameter(torch.zeros(49_152 * 3)))])], 49_152)
    found = list(index.all_shards())
    assert len(found) == 3
    return found


@pytest.fixture
def tier(shards: list[Shard]) -> dict[Shard, torch.Tensor]:
    """64 bytes of each shard, all 1, 2 and 3."""
    return {shard: torch.full((64,), 1 + n, dtype=torch.uint8) for n, shard in enumerate(shards)}


@pytest.fixture
def ring(late: LateDevice) -> Ring:
    return Ring(SLOTS, 4096, device=late)


@pytest.fixture
def pipeline(late: LateDevice, ring: Ring, tier: dict[Shard, torch.Tensor]) -> ShardPipeline:
    """A step adds 10. A shard comes in one copy and leaves in two."""

    def read(shard: Shard, slot: torch.Tensor) -> list[Written]:
        slot[:64] = tier[shard]
        return []

    def step(shard: Shard, work: torch.Tensor | None) -> None:
        assert work is not None
        work[:64] += 10

    stages = Stages(
        read=read,
        step=step,
        write=lambda shard, slot: Written(tier, shard, slot),
        needs_slot=lambda shard: True,
        incoming=lambda shard: [slice(0, 64)],
        outgoing=lambda shard: [slice(0, 32), slice(32, 64)],
    )
    return ShardPipeline(ring, stages, late)


def test_a_copy_out_that_fails_costs_neither_slot_nor_mirror(
    late: LateDevice,
    ring: Ring,
    shards: list[Shard],
    tier: dict[Shard, torch.Tensor],
    pipeline: ShardPipeline,
) -> None:
    for _ in range(3):  # one mirror more than there are
        late._fail_after = sum(late.copies.values()) + 3
        with pytest.raises(RuntimeError, match="the device has failed"):
            pipeline.run(shards[:1], [])
        assert ring.free_count == SLOTS
    late._fail_after = None
    pipeline.run(shards, [])
    pipeline.drain()
    assert [tier[shard].unique().tolist() for shard in shards] == [[11], [12], [13]]
    assert ring.free_count == SLOTS


def test_every_slot_is_freed_where_every_copy_has_failed(
    ring: Ring, shards: list[Shard], pipeline: ShardPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run(shards[:1], shards[1:])  # one is leaving, one has come, one is read ahead
    assert ring.free_count == 0

    def fail(copy: LateCopy) -> None:
        raise RuntimeError("the device has failed")

    monkeypatch.setattr(LateCopy, "synchronize", fail)
    pipeline.abandon()
    assert ring.free_count == SLOTS


@pytest.mark.parametrize("slots", [1, 2, 3, 6])
def test_as_many_shards_are_read_ahead_as_there_are_slots(slots: int) -> None:
    index = FlatIndex([("unit", [("weight", nn.Parameter(torch.zeros(49_152 * 9)))])], 49_152)
    shards = list(index.all_shards())
    tier = {shard: torch.full((64,), n, dtype=torch.uint8) for n, shard in enumerate(shards)}
    begun: list[Shard] = []
    seen: list[int] = []

    def read(shard: Shard, slot: torch.Tensor) -> list[Written]:
        begun.append(shard)
        slot[:64] = tier[shard]
        return []

    def step(shard: Shard, work: torch.Tensor | None) -> None:
        assert work is not None
        seen.append(len(begun))
        work[:64] += 10

    stages = Stages(
        read=read,
        step=step,
        write=lambda shard, slot: Written(tier, shard, slot),
        needs_slot=lambda shard: True,
        incoming=lambda shard: [],
        outgoing=lambda shard: [],
    )
    pipeline = ShardPipeline(Ring(slots, 4096), stages, CpuDevice())
    pipeline.run(shards[:4], shards[4:])
    pipeline.run(shards[4:], [])
    pipeline.drain()
    assert begun == shards
    assert seen == [min(9, number + slots) for number in range(9)]
    assert [tier[shard].unique().tolist() for shard in shards] == [[10 + n] for n in range(9)]
