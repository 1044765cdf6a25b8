"""What is saved comes back where several streams work on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from memtrain.offload import saved_group
from memtrain.offload.activations import ActivationExecutor
from memtrain.offload.engine import Engine
from memtrain.offload.saved_group import SavedGroup
from memtrain.offload.tiers import MemoryStore
from memtrain.planner.actions import Action, BlockDecision, Tier, UpdateSchedule
from memtrain.planner.plan import Plan, Staging
from tests.offload.late_device import LateDevice

PLAN = Plan(
    status="heuristic",
    blocks=(BlockDecision(block=0, action=Action.SWAP, saved_tier=Tier.HOST),),
    states=(),
    update_schedule=UpdateSchedule.SEQUENTIAL,
    staging=Staging(saved_slots=1, saved_slot_bytes=1 << 16),
    micro_batches=1,
    step_seconds=0.0,
    lower_bound_seconds=0.0,
    gap=0.0,
    solver="hand",
    bill=(),
    peaks=(),
    capacities=(),
    bytes_moved_per_step=0,
)


class Streams:
    """Which stream is the current one, and which were told to the allocator."""

    def __init__(self) -> None:
        self.current = "first"
        self.recorded: list[tuple[int, str]] = []

    def of(self, tensor: torch.Tensor) -> str:
        return self.current

    def record(self, tensor: torch.Tensor, stream: str) -> None:
        self.recorded.append((tensor.data_ptr(), stream))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    streams = Streams()
    monkeypatch.setattr(saved_group, "_stream", streams.of)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: streams.record(tensor, stream))
    return streams


@pytest.fixture
def executor() -> Iterator[ActivationExecutor]:
    block = nn.Linear(4, 4)
    with Engine({Tier.HOST: MemoryStore(Tier.HOST, 1 << 20)}, LateDevice()) as engine:
        executor = ActivationExecutor(block, [("block", block)], PLAN, engine)
        executor.install()
        yield executor
        executor.remove()


def test_a_stream_that_does_not_own_the_memory_is_told_to_the_allocator(
    executor: ActivationExecutor, streams: Streams
) -> None:
    """Work of another stream may still run when the tensor dies: its owner would be given the memory."""
    assert executor._saved is not None
    group = SavedGroup(executor, executor._saved, "block", Tier.HOST)
    tensor = torch.arange(2048, dtype=torch.float32)
    saved = group.pack(tensor)
    group.seal()
    found = [saved_group.unpack(saved)]
    assert streams.recorded == []
    streams.current = "second"
    found.append(saved_group.unpack(saved))
    assert streams.recorded == [(found[0].data_ptr(), "second")]
    streams.current = "first"
    found.append(saved_group.unpack(saved))
    assert len(streams.recorded) == 1
    assert all(torch.equal(one, tensor) for one in found)
