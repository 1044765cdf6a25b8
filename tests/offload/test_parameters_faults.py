"""Streamed weights when a tier fails, and on a device with memory of its own."""

from __future__ import annotations

import errno
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload import away
from memtrain.offload.activations import ActivationExecutor
from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.errors import (
    CorruptExtentError,
    OffloadError,
    PlanMismatchError,
    TierFullError,
    TierIOError,
)
from memtrain.offload.io import Fault, FaultyBackend, ThreadPoolBackend
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.slab import Slab
from memtrain.offload.tiers import MemoryStore
from memtrain.offload.weight_units import allocate_weight, is_streamed, own_parameters
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.late_device import LateDevice
from tests.offload.latest_store import make_plan
from tests.offload.optimizer_runs import AHEAD, SEQUENTIAL
from tests.offload.streamed import (
    STREAMED,
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
    units_of,
)
from tests.offload.test_parameters import adamw
from tests.offload.test_parameters_activations import DECISIONS, passes


def fail_next(backend: FaultyBackend, count: int = 1, **fault: Any) -> None:
    """The next requests go wrong."""
    for number in range(backend.submitted, backend.submitted + count):
        backend.plan[number] = Fault(**fault)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"error": errno.EIO}, TierIOError),
        ({"flip_bit": 12345}, CorruptExtentError),
        ({"short_bytes": 0}, TierIOError),
    ],
)
@pytest.mark.parametrize("slots", [2, 3])
def test_a_failed_read_loses_nothing(slots: int, fault: Any, error: Any, tmp_path: Path) -> None:
    plain, model = llama(), llama()
    expected = passes(plain)
    backend = FaultyBackend(ThreadPoolBackend(2))
    with open_engine(tmp_path, backend=backend) as engine:
        streamer = stream(model, engine, slots=slots, tier=Tier.NVME)
        passes(model)
        for distance in (0, 9, 40):  # what is needed now, what is read ahead, and in backward
            for number in range(backend.submitted + distance, backend.submitted + distance + 3):
                backend.plan[number] = Fault(**fault)
            with pytest.raises(error, match="weight model"):
                passes(model)
            backend.plan.clear()
            assert_same(expected, passes(model))
        assert_same_weights(plain, streamer, model)
        streamer.remove()


def test_a_full_disk_keeps_what_was_not_written(tmp_path: Path) -> None:
    plain, model = llama(), llama()
    backend = FaultyBackend(ThreadPoolBackend(2))
    with open_engine(tmp_path, backend=backend) as engine:
        streamer = stream(model, engine, slots=2, tier=Tier.NVME)
        with streamer.hold("model.layers.1"), torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(2.0)
            plain.model.layers[1].mlp.up_proj.weight.mul_(2.0)
        fail_next(backend, 400, error=errno.ENOSPC)
        with pytest.raises(TierIOError, match=r"layers\.1\.mlp\.up_proj.*ENOSPC.*free space"):
            streamer.flush()
        with pytest.raises(TierIOError, match="ENOSPC"):  # block 1 stays, whoever wants its window
            streamer.fetch("model.layers.3")
        backend.plan.clear()
        with torch.no_grad():
            assert torch.equal(plain(batches(1)[0]).logits, model(batches(1)[0]).logits)
        streamer.flush()
        assert_same_weights(plain, streamer, model)
        streamer.remove()


def test_no_room_leaves_the_model_alone() -> None:
    plain, model = llama(), llama()
    with Engine({Tier.HOST: MemoryStore(Tier.HOST, 4 << 20)}, make_device("cpu")) as engine:
        with pytest.raises(TierFullError, match="weight model"):
            stream(model, engine)
        assert engine.store(Tier.HOST).used_bytes == 0
    assert_same(passes(plain), passes(model))


@pytest.mark.parametrize("at", [0, 17, 29])
def test_a_tier_that_fails_at_the_start_leaves_the_model_alone(at: int, tmp_path: Path) -> None:
    plain, model = llama(), llama()
    backend = FaultyBackend(ThreadPoolBackend(2), {at: Fault(error=errno.EIO)})
    with open_engine(tmp_path, backend=backend) as engine:
        with pytest.raises(TierIOError, match="EIO"):
            stream(model, engine, slots=2, tier=Tier.NVME)
        assert engine.store(Tier.NVME).used_bytes == 0
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert_same(passes(plain), passes(model))


def test_weights_that_are_on_the_tier_already() -> None:
    """As a loader leaves them: a model on the meta device, bytes in extents, small ones in memory."""
    plain = llama(tied=True)
    model = llama(tied=True).to("meta")
    model.tie_weights()
    with open_engine() as engine:
        store = engine.store(Tier.HOST)
        sources = dict(plain.named_parameters())
        placed = {}
        for members in own_parameters(units_of(model)).values():
            for name, parameter in members:
                placed[name] = allocate_weight(store, name, parameter)
                slab = Slab(placed[name].nbytes)
                slab.buffer[: placed[name].nbytes] = sources[name].detach().flatten().view(torch.uint8)
                store.write(placed[name], slab.buffer[: placed[name].nbytes]).wait()
        for source, module in zip(plain.modules(), model.modules(), strict=True):
            for key, parameter in source._parameters.items():
                if parameter is not None and not is_streamed(parameter):
                    module._parameters[key] = nn.Parameter(parameter.detach().clone())
            for key, buffer in source._buffers.items():
                module._buffers[key] = buffer
        wrong = {name: extent for name, extent in placed.items() if "layers.1.mlp.up" not in name}
        with pytest.raises(PlanMismatchError, match="place all of a unit"):
            placed_stream(model, engine, wrong)
        streamer = placed_stream(model, engine, placed)
        written = store.statistics().bytes_written
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert_same(passes(plain), passes(model))
        assert store.statistics().bytes_written == written
        streamer.remove()
        assert store.used_bytes == 0
        assert_same([p.detach() for p in plain.parameters()], [p.detach() for p in model.parameters()])


def placed_stream(model: nn.Module, engine: Engine, placed: Any) -> ParameterStreamer:
    streamer = ParameterStreamer(
        model,
        blocks_of(model),
        units_of(model),
        tiers=dict.fromkeys(STREAMED, Tier.HOST),
        engine=engine,
        slots=2,
        placed=placed,
    )
    streamer.install()
    return streamer


@pytest.mark.parametrize(
    ("action", "slots", "eagerness"),
    [("none", 2, 0.0), ("none", 3, 0.2), ("none", 2, 1.0), ("swap", 2, 0.2), ("recompute", 2, 0.2)],
)
def test_on_a_device_with_memory_of_its_own(action: str, slots: int, eagerness: float) -> None:
    plain, model = llama(tied=True), llama(tied=True)
    expected = passes(plain)
    device = LateDevice(seed=slots, eagerness=eagerness)
    with open_engine(device=device) as engine:
        streamer = stream(model, engine, slots=slots)
        if action != "none":
            plan = make_plan(DECISIONS[action], slots=3, slot_bytes=4 << 20)
            executor = ActivationExecutor(model, blocks_of(model), plan, engine)
            executor.install()
        assert_same(expected, passes(model))
        if action != "none":
            executor.remove()
        assert streamer.statistics().peak_in_use == slots
        streamer.remove()
        assert device.faults == []
        assert not device.registered
    assert_same([p.detach() for p in plain.parameters()], [p.detach() for p in model.parameters()])


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("master", [False, True])
def test_updates_on_a_device_with_memory_of_its_own(master: bool, schedule: UpdateSchedule) -> None:
    dtype = torch.bfloat16 if master else torch.float32
    plain, model = (llama(tied=True, dtype=dtype, depth=2) for _ in range(2))
    expected = plain_steps(plain, adamw, steps=2, max_norm=0.5, master=master)
    device = LateDevice(seed=3, eagerness=0.1)
    with open_engine(device=device) as engine:
        streamer = stream(model, engine, slots=2)
        with streamed_optimizer(
            model, streamer, engine, adamw, schedule=schedule, master_weights=master
        ) as optimizer:
            assert_same(expected, streamed_steps(model, optimizer, steps=2, max_norm=0.5))
            assert_same_weights(plain, streamer, model)
        streamer.remove()
        assert device.faults == []


def test_a_device_that_refuses_memory_leaves_the_model_alone() -> None:
    plain, model = llama(), llama()
    with open_engine(device=LateDevice(refuse_registration=1)) as engine:
        with pytest.raises(OffloadError, match="locked memory"):
            stream(model, engine)
        assert engine.store(Tier.HOST).used_bytes == 0
    assert_same(passes(plain), passes(model))


def test_a_failed_update_says_so_and_the_tier_keeps_the_old_weights(tmp_path: Path) -> None:
    plain, model = llama(dtype=torch.bfloat16), llama(dtype=torch.bfloat16)
    plain_steps(plain, adamw, steps=1, master=True)
    backend = FaultyBackend(ThreadPoolBackend(2))
    with open_engine(tmp_path, backend=backend) as engine:
        streamer = stream(model, engine, slots=2, tier=Tier.NVME)
        with streamed_optimizer(
            model,
            streamer,
            engine,
            adamw,
            state_tier=Tier.NVME,
            gradient_tier=Tier.DEVICE,
            master_weights=True,
        ) as optimizer:
            streamed_steps(model, optimizer, steps=1)
            tokens = batches(2)[1]
            model(input_ids=tokens, labels=tokens).loss.backward()
            fail_next(backend, 400, error=errno.EIO)
            with pytest.raises(TierIOError):
                optimizer.step()
            backend.plan.clear()
            with pytest.raises(OffloadError, match="Restore the last checkpoint"):
                optimizer.step()
        streamer.remove()
    for (name, p), q in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        # Small ones do not leave memory, and are stepped first.
        assert torch.equal(p, q[1]) == is_streamed(p), name


def test_a_parameter_is_born_away_only_from_the_meta_device() -> None:
    with pytest.raises(PlanMismatchError, match="meta"):
        away.born_away(nn.Parameter(torch.ones(2)), torch.device("cpu"), "w, which are on host")
    parameter = nn.Parameter(torch.ones(3, 2, device="meta"), requires_grad=False)
    number = id(parameter)
    away.born_away(parameter, torch.device("cpu"), "w, which are on host")
    assert (id(parameter), parameter.device.type, parameter.requires_grad) == (number, "cpu", False)
    assert away.is_away(parameter)
    away.put(parameter, torch.ones(3, 2))
    away.permit(parameter)
    assert parameter.sum() == 6


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("slots", [2, 3])
def test_transfers_that_are_late_and_out_of_order(
    slots: int, schedule: UpdateSchedule, tmp_path: Path
) -> None:
    plain, model = llama(tied=True), llama(tied=True)
    expected = plain_steps(plain, adamw, steps=2)
    numbers = random.Random(slots)
    plan = {number: Fault(delay_seconds=numbers.choice([0.0, 0.0, 0.004])) for number in range(1500)}
    backend = FaultyBackend(ThreadPoolBackend(4), plan, reorder=3, seed=slots, hold_seconds=0.002)
    with open_engine(tmp_path, backend=backend) as engine:
        streamer = stream(model, engine, slots=slots, tier=Tier.NVME)
        with streamed_optimizer(model, streamer, engine, adamw, schedule=schedule) as optimizer:
            assert_same(expected, streamed_steps(model, optimizer, steps=2))
            assert_same_weights(plain, streamer, model)
        streamer.remove()


def test_a_window_waits_for_a_transfer_that_was_given_up(tmp_path: Path) -> None:
    """A read that stalled and arrives later must not land on the weights of another unit."""
    plain, model = llama(), llama()
    backend = FaultyBackend(ThreadPoolBackend(2))
    with open_engine(tmp_path, backend=backend) as engine:
        streamer = stream(model, engine, slots=2, tier=Tier.NVME)
        for unit in ("model.layers.2", "model.layers.3"):
            streamer.fetch(unit)
        streamer.flush()
        store = engine.store(Tier.NVME)
        store.stall_seconds = 0.2
        fail_next(backend, delay_seconds=1.5)
        with pytest.raises(TierIOError, match="moved nothing"):
            streamer.fetch("prologue")
        backend.plan.clear()
        store.stall_seconds = 300.0
        with streamer.hold("model.layers.0"), streamer.hold("model.layers.1"):
            time.sleep(2)
            for one, other in zip(plain.model.layers[:2], model.model.layers[:2], strict=True):
                assert_same(list(one.parameters()), list(other.parameters()))
        streamer.remove()


def test_a_forked_child_is_told(tmp_path: Path) -> None:
    """Its windows are out of reach, also those of units that were there."""
    model = llama()
    with open_engine(tmp_path) as engine:
        streamer = stream(model, engine, slots=2, tier=Tier.NVME)
        streamer.fetch("prologue")
        child = os.fork()
        if child == 0:
            try:
                with streamer.hold("prologue"):
                    model.model.embed_tokens.weight.sum()
            except OffloadError as error:
                os._exit(0 if "forked child" in str(error) else 3)
            os._exit(4)
        assert os.waitpid(child, 0)[1] == 0
        streamer.remove()
