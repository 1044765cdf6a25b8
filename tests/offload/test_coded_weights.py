"""Streamed weights that lie coded on their tier: the same bits, fewer bytes, faults by name."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from memtrain.offload.contents import Content
from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.errors import CorruptExtentError, PlanMismatchError, TierIOError
from memtrain.offload.io import Fault, FaultyBackend, ThreadPoolBackend
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.tiers import NvmeStore
from memtrain.offload.weight_units import allocate_weight, own_parameters
from memtrain.optim.storage.lossless import ExponentCodec
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.late_device import LateDevice
from tests.offload.optimizer_runs import AHEAD, SEQUENTIAL
from tests.offload.streamed import (
    CAPACITY_BYTES,
    STREAMED,
    assert_same,
    assert_same_weights,
    blocks_of,
    llama,
    plain_steps,
    stream,
    streamed_optimizer,
    streamed_steps,
    units_of,
)
from tests.offload.test_parameters import adamw
from tests.offload.test_parameters_activations import passes

pytestmark = pytest.mark.filterwarnings("ignore:.*goes through the page cache")


@pytest.fixture(autouse=True)
def _library() -> None:
    pytest.importorskip("zstandard")


@contextmanager
def coding_engine(tmp_path: Path, *, device: Any = None, **options: Any) -> Iterator[Engine]:
    store = NvmeStore(tmp_path, CAPACITY_BYTES, direct="allow_buffered", **options)
    codecs = {Tier.NVME: ExponentCodec()}
    with Engine({Tier.NVME: store}, device or make_device("cpu"), weight_codecs=codecs) as engine:
        yield engine


@pytest.mark.parametrize(
    ("dtype", "schedule", "masters"),
    [
        (torch.float32, SEQUENTIAL, False),
        (torch.bfloat16, SEQUENTIAL, False),
        (torch.bfloat16, AHEAD, True),
    ],
)
def test_training_is_bit_equal(
    dtype: torch.dtype, schedule: UpdateSchedule, masters: bool, tmp_path: Path
) -> None:
    plain, model = llama(dtype=dtype), llama(dtype=dtype)
    expected = plain_steps(plain, adamw, accumulate=2, max_norm=0.5, master=masters)
    with coding_engine(tmp_path) as engine:
        streamer = stream(model, engine, tier=Tier.NVME)
        with streamed_optimizer(
            model, streamer, engine, adamw, schedule=schedule, state_tier=Tier.NVME,
            gradient_tier=Tier.NVME, master_weights=masters,
        ) as optimizer:  # fmt: skip
            assert_same(expected, streamed_steps(model, optimizer, accumulate=2, max_norm=0.5))
        assert_same_weights(plain, streamer, model)
        done = engine.weight_coding_statistics()[Tier.NVME]
        assert not engine.coding_statistics()  # state has no codec here
        assert 0.6 < done.ratio < (0.75 if dtype is torch.bfloat16 else 0.92)
        # Coded bytes are what the store was given to write of weights.
        assert engine.store(Tier.NVME).written_bytes()[Content.WEIGHTS] == done.coded_bytes_written
        streamer.remove()
        assert_same([p.detach() for p in plain.parameters()], [p.detach() for p in model.parameters()])


def test_on_a_device_with_memory_of_its_own(tmp_path: Path) -> None:
    plain, model = llama(), llama()
    expected = passes(plain)
    with coding_engine(tmp_path, device=LateDevice()) as engine:
        streamer = stream(model, engine, tier=Tier.NVME)
        assert_same(expected, passes(model))
        streamer.remove()


def test_frozen_weights_are_coded_once(tmp_path: Path) -> None:
    model = llama().requires_grad_(False)
    with coding_engine(tmp_path) as engine:
        streamer = stream(model, engine, slots=2, tier=Tier.NVME)
        before = engine.weight_coding_statistics()[Tier.NVME]
        with torch.no_grad():
            for _ in range(2):
                model(torch.zeros(1, 3, dtype=torch.int64))
        streamer.flush()
        after = engine.weight_coding_statistics()[Tier.NVME]
        assert after.plain_bytes_written == before.plain_bytes_written > 0
        assert after.plain_bytes_read > before.plain_bytes_read
        streamer.remove()


@pytest.mark.parametrize(
    ("fault", "error"),
    [({"error": errno.EIO}, TierIOError), ({"flip_bit": 12345}, CorruptExtentError)],
)
def test_a_failed_read_is_named_and_loses_nothing(fault: Any, error: Any, tmp_path: Path) -> None:
    plain, model = llama(), llama()
    expected = passes(plain)
    backend = FaultyBackend(ThreadPoolBackend(2))
    with coding_engine(tmp_path, backend=backend) as engine:
        streamer = stream(model, engine, slots=2, tier=Tier.NVME)
        passes(model)
        for number in range(backend.submitted, backend.submitted + 3):
            backend.plan[number] = Fault(**fault)
        with pytest.raises(error, match="weight model"):
            passes(model)
        backend.plan.clear()
        assert_same(expected, passes(model))
        streamer.remove()


def test_a_failed_write_keeps_the_weights_in_memory(tmp_path: Path) -> None:
    plain, model = llama(), llama()
    backend = FaultyBackend(ThreadPoolBackend(2))
    with coding_engine(tmp_path, backend=backend) as engine:
        streamer = stream(model, engine, slots=2, tier=Tier.NVME)
        with streamer.hold("model.layers.1"), torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(2.0)
            plain.model.layers[1].mlp.up_proj.weight.mul_(2.0)
        for number in range(backend.submitted, backend.submitted + 400):
            backend.plan[number] = Fault(error=errno.ENOSPC)
        with pytest.raises(TierIOError, match=r"layers\.1\.mlp\.up_proj.*ENOSPC"):
            streamer.flush()
        backend.plan.clear()
        streamer.flush()
        assert_same_weights(plain, streamer, model)
        streamer.remove()


def test_weights_that_lie_there_already_are_refused(tmp_path: Path) -> None:
    model = llama()
    units = units_of(model)
    with coding_engine(tmp_path) as engine:
        store = engine.store(Tier.NVME)
        placed = {
            name: allocate_weight(store, name, parameter)
            for _, members in own_parameters(units).items()
            for name, parameter in members
        }
        with pytest.raises(PlanMismatchError, match=r"on nvme already, as they are: .*\(it is exponent\)"):
            ParameterStreamer(
                model, blocks_of(model), units, tiers=dict.fromkeys(STREAMED, Tier.NVME), engine=engine,
                slots=2, placed=placed,
            )  # fmt: skip


def test_coded_weights_are_handed_on_to_whoever_has_the_codec(tmp_path: Path) -> None:
    plain, model = llama(), llama()
    expected = passes(plain)
    units, options = units_of(model), {"tiers": dict.fromkeys(STREAMED, Tier.NVME), "slots": 2}
    with coding_engine(tmp_path) as engine:
        extents = stream(model, engine, tier=Tier.NVME).release()
        store = engine.store(Tier.NVME)
        used = store.used_bytes
        without = Engine({Tier.NVME: store}, engine.device, lent=[Tier.NVME])
        with pytest.raises(PlanMismatchError, match=r"already, coded \(exponent\): .* \(it is none\)"):
            ParameterStreamer(
                model,
                blocks_of(model),
                units,
                engine=without,
                placed=extents,
                **options,  # type: ignore[arg-type]
            )
        other = Engine(
            {Tier.NVME: store}, engine.device, weight_codecs={Tier.NVME: ExponentCodec()}, lent=[Tier.NVME]
        )
        streamer = ParameterStreamer(
            model,
            blocks_of(model),
            units,
            engine=other,
            placed=extents,
            **options,  # type: ignore[arg-type]
        )
        streamer.install()
        assert store.used_bytes == used
        assert_same(expected, passes(model))
        streamer.remove()
        other.close()
        assert store.used_bytes == 0
