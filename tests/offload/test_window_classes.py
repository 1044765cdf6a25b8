"""Windows of two sizes: the bits of one size and of plain PyTorch, progress with the fewest, exact memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload.activations import ActivationExecutor
from memtrain.offload.engine import Engine
from memtrain.offload.errors import PlanMismatchError, WeightWindowError
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.tiers import MemoryStore
from memtrain.planner.actions import Tier, UpdateSchedule
from memtrain.planner.plan import WindowClass
from tests.offload.late_device import LateDevice
from tests.offload.latest_store import make_plan
from tests.offload.streamed import (
    DEPTH,
    WIDTH,
    assert_same,
    assert_same_weights,
    batches,
    blocks_of,
    llama,
    open_engine,
    plain_steps,
    stream,
    streamed_optimizer,
    streamed_steps,
)
from tests.offload.test_parameters_activations import DECISIONS
from tests.offload.test_vertical import vertical_plan
from tests.offload.vertical_runs import horizontal, micro_batches, vertical

WORDS = 4104
BLOCK_BYTES = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * 384)
TABLE_BYTES = 4 * WORDS * WIDTH
"""Nearly two blocks."""


def wordy(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    return llama(tied=tied, dtype=dtype, vocabulary=WORDS)


def sizes(small: int, large: int = 1, *, itemsize: int = 4) -> list[WindowClass]:
    return [
        WindowClass(slots=small, slot_bytes=BLOCK_BYTES * itemsize // 4),
        WindowClass(slots=large, slot_bytes=TABLE_BYTES * itemsize // 4),
    ]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, foreach=False)


def passes(model: nn.Module, count: int = 2) -> list[torch.Tensor]:
    found = []
    for tokens in batches(count):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append(loss.detach())
    return found + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("small", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_passes_are_bit_equal_in_memory_to_the_byte(tied: bool, small: int, tmp_path: Path) -> None:
    plain, model = wordy(tied=tied), wordy(tied=tied)
    expected = passes(plain)
    with open_engine(tmp_path) as engine:
        streamer = stream(model, engine, slots=sizes(small), tier=Tier.NVME)
        assert_same(expected, passes(model))
        assert_same_weights(plain, streamer, model)
        assert streamer.fill_windows() == small * BLOCK_BYTES + TABLE_BYTES
        assert streamer._pool._slab.nbytes == small * BLOCK_BYTES + TABLE_BYTES
        blocks, tables = streamer.high_water()
        assert (blocks.name, blocks.slots_held, blocks.bytes_used) == ("weights", small, BLOCK_BYTES)
        assert (tables.name, tables.slots_held, tables.bytes_used) == ("large weights", 1, TABLE_BYTES)
        assert blocks.size_bytes + tables.size_bytes == small * BLOCK_BYTES + TABLE_BYTES
        streamer.remove()
        assert all(map(torch.equal, plain.parameters(), model.parameters()))


@pytest.mark.parametrize("schedule", UpdateSchedule)
@pytest.mark.parametrize(("tied", "small", "master"), [(False, 1, False), (True, 1, True), (True, 2, False)])
def test_training_is_bit_equal_to_one_size_and_to_plain(
    tied: bool, small: int, master: bool, schedule: UpdateSchedule, tmp_path: Path
) -> None:
    dtype = torch.bfloat16 if master else torch.float32
    plain = wordy(tied=tied, dtype=dtype)
    expected = plain_steps(plain, adamw, steps=2, master=master)
    for slots in (2, sizes(small, itemsize=dtype.itemsize)):
        model = wordy(tied=tied, dtype=dtype)
        with open_engine(tmp_path) as engine:
            streamer = stream(model, engine, slots=slots, tier=Tier.NVME)
            with streamed_optimizer(
                model, streamer, engine, adamw, schedule=schedule, state_tier=Tier.NVME,
                gradient_tier=Tier.DEVICE, master_weights=master,
            ) as optimizer:  # fmt: skip
                assert_same(expected, streamed_steps(model, optimizer, steps=2))
                assert_same_weights(plain, streamer, model)


@contextmanager
def executing(model: nn.Module, plan: Any) -> Iterator[ParameterStreamer]:
    with open_engine() as engine:
        streamer = stream(model, engine, slots=sizes(1))
        executor = ActivationExecutor(model, blocks_of(model), plan, engine)
        executor.install()
        yield streamer
        executor.remove()
        streamer.remove()


@pytest.mark.parametrize("name", DECISIONS)
def test_one_window_of_each_size_under_every_action(name: str) -> None:
    data = micro_batches(2, same_length=True)
    plain = wordy(tied=True)
    expected = horizontal(plain, data)
    with executing(model := wordy(tied=True), make_plan(DECISIONS[name], slots=3, slot_bytes=4 << 20)):
        assert_same(expected, horizontal(model, data))
    with executing(model := wordy(tied=True), vertical_plan(name, 2)):
        assert_same(expected, vertical(model, data))


def test_tables_alone_take_turns_in_one_window() -> None:
    plain, model = wordy(), wordy()
    expected = passes(plain)
    with open_engine() as engine:
        stream(
            model,
            engine,
            slots=[WindowClass(slots=2, slot_bytes=TABLE_BYTES)],
            units=["prologue", "epilogue"],
        )
        assert_same(expected, passes(model))


def test_a_tied_table_is_read_once() -> None:
    """Nothing else wants its window; of two of one size it comes three times a pass."""
    model = wordy(tied=True)
    with open_engine() as engine:
        streamer = stream(model, engine, slots=sizes(2))
        tokens = batches(1)[0]

        def reads() -> tuple[int, int]:
            before = streamer.statistics()
            model(input_ids=tokens, labels=tokens).loss.backward()
            after = streamer.statistics()
            return after.reads - before.reads, after.bytes_read - before.bytes_read

        reads()
        count, size = reads()
        # Forward finds the blocks that backward has ended with, and backward those that forward has.
        assert count == 2 * (DEPTH - 2)
        assert size <= 2 * DEPTH * BLOCK_BYTES


def test_a_large_unit_never_waits_for_small_ones() -> None:
    """All small windows are held, one is viewed: tables come and go."""
    plain, model = wordy(), wordy()
    with open_engine() as engine:
        streamer = stream(model, engine, slots=sizes(2))
        with streamer.hold("model.layers.0"):
            kept = model.model.layers[0].mlp.up_proj.weight.detach()
        with streamer.hold("model.layers.1"):
            for unit, table in (("prologue", "model.embed_tokens"), ("epilogue", "lm_head")):
                with streamer.hold(unit):
                    name = f"{table}.weight"
                    assert torch.equal(model.get_parameter(name), plain.get_parameter(name))
            with pytest.raises(WeightWindowError, match=rf"layers\.2 have no window of {BLOCK_BYTES} "):
                streamer.fetch("model.layers.2")
        with streamer.hold("prologue"), pytest.raises(WeightWindowError, match="all 1 are taken"):
            streamer.fetch("epilogue")
        del kept
        assert torch.equal(model(batches(1)[0]).logits, plain(batches(1)[0]).logits)


@pytest.mark.parametrize("eagerness", [0.1, 0.6])
def test_a_device_with_memory_of_its_own(eagerness: float) -> None:
    plain, model = wordy(), wordy()
    expected = plain_steps(plain, adamw, steps=2)
    device = LateDevice(seed=5, eagerness=eagerness)
    with Engine({Tier.HOST: MemoryStore(Tier.HOST, 96 << 20)}, device) as engine:
        streamer = stream(model, engine, slots=sizes(1))
        with streamed_optimizer(model, streamer, engine, adamw, schedule=UpdateSchedule.AHEAD) as optimizer:
            assert_same(expected, streamed_steps(model, optimizer, steps=2))
            assert_same_weights(plain, streamer, model)


def test_windows_that_are_not_the_models_are_refused_and_leave_it_as_it_was() -> None:
    model = wordy()
    before = [p.detach().clone() for p in model.parameters()]
    small, large = sizes(2)
    page = 4096
    wrong = [
        ([small], rf"windows of {BLOCK_BYTES} bytes for weights, this model needs {TABLE_BYTES}"),
        ([small, WindowClass(slots=1, slot_bytes=TABLE_BYTES + page)], f"needs {TABLE_BYTES}"),
        ([WindowClass(slots=2, slot_bytes=BLOCK_BYTES - page), large], "needs none"),
        ([small, large, WindowClass(slots=1, slot_bytes=2 * TABLE_BYTES)], "needs none"),
        ([WindowClass(slots=0, slot_bytes=BLOCK_BYTES), large], "at least 1 for this model, got 0"),
        ([WindowClass(slots=1, slot_bytes=TABLE_BYTES)], "at least 2 for this model, got 1"),
    ]
    with open_engine() as engine:
        for windows, message in wrong:
            with pytest.raises(PlanMismatchError, match=message):
                stream(model, engine, slots=windows)
            assert engine.store(Tier.HOST).used_bytes == 0
            assert all(map(torch.equal, before, model.parameters()))
        streamer = stream(model, engine, slots=[WindowClass(slots=2, slot_bytes=TABLE_BYTES)])
        assert streamer.windows == (WindowClass(slots=2, slot_bytes=TABLE_BYTES),)
        streamer.remove()
        streamer = stream(model, engine, slots=[large, small])  # in any order
        assert streamer.windows == (small, large)
        streamer.remove()
