"""Streamed weights: losses, gradients and weights are those of plain PyTorch, and memory is bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.optimizer_runs import AHEAD, SEQUENTIAL
from tests.offload.streamed import (
    DEPTH,
    VOCABULARY,
    WIDTH,
    assert_same,
    assert_same_weights,
    batches,
    llama,
    open_engine,
    plain_steps,
    stream,
    streamed_optimizer,
    streamed_steps,
)

BLOCK_BYTES = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * 384)
TABLE_BYTES = 4 * VOCABULARY * WIDTH


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, foreach=False)


def passes(model: nn.Module, count: int = 2) -> list[torch.Tensor]:
    """Losses of several passes, and the accumulated gradients."""
    found = []
    for tokens in batches(count):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append(loss.detach())
    return found + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.NVME])
@pytest.mark.parametrize("slots", [2, 3, 5, 20])
@pytest.mark.parametrize("tied", [False, True])
def test_passes_are_bit_equal(tied: bool, slots: int, tier: Tier, tmp_path: Path) -> None:
    plain, model = llama(tied=tied), llama(tied=tied)
    expected = passes(plain)
    with open_engine(tmp_path) as engine:
        streamer = stream(model, engine, slots=slots, tier=tier)
        assert_same(expected, passes(model))
        statistics = streamer.statistics()
        assert statistics.peak_in_use == min(slots, DEPTH + 2 - tied)
        assert statistics.bytes_written == DEPTH * BLOCK_BYTES + (2 - tied) * TABLE_BYTES
        assert engine.store(tier).statistics().bytes_written == statistics.bytes_written
        assert_same_weights(plain, streamer, model)
        streamer.remove()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert type(q) is nn.Parameter
            assert torch.equal(p, q)
            assert torch.equal(p.grad, q.grad)
        assert engine.store(tier).used_bytes == 0
        assert not any("forward" in module.__dict__ for module in model.modules())
    assert_same([tensor.detach() for tensor in passes(plain)], passes(model))


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("slots", [2, 3, 20])
@pytest.mark.parametrize("tied", [False, True])
def test_training_is_bit_equal(tied: bool, slots: int, schedule: UpdateSchedule) -> None:
    plain, model = llama(tied=tied), llama(tied=tied)
    expected = plain_steps(plain, adamw, accumulate=2, max_norm=0.5)
    with open_engine() as engine:
        streamer = stream(model, engine, slots=slots)
        with streamed_optimizer(model, streamer, engine, adamw, schedule=schedule) as optimizer:
            assert_same(expected, streamed_steps(model, optimizer, accumulate=2, max_norm=0.5))
            assert_same_weights(plain, streamer, model)
            assert streamer.statistics().peak_in_use <= slots


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("slots", [2, 3, 20])
def test_masters_are_bit_equal(slots: int, schedule: UpdateSchedule, tmp_path: Path) -> None:
    plain, model = llama(tied=True, dtype=torch.bfloat16), llama(tied=True, dtype=torch.bfloat16)
    expected = plain_steps(plain, adamw, max_norm=0.5, master=True)
    with open_engine(tmp_path) as engine:
        streamer = stream(model, engine, slots=slots, tier=Tier.NVME)
        with streamed_optimizer(
            model, streamer, engine, adamw, schedule=schedule, state_tier=Tier.NVME, master_weights=True
        ) as optimizer:
            assert_same(expected, streamed_steps(model, optimizer, max_norm=0.5))
            assert_same_weights(plain, streamer, model)
