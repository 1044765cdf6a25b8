"""Snapshots beside training of models whose weights are on a tier, plain and coded state beside them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload import copy_on_write
from memtrain.offload.async_snapshot import AsyncCheckpointer, snapshot_bytes
from memtrain.offload.atomic import CheckpointError
from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.errors import CorruptExtentError
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.slab import Slab
from memtrain.offload.snapshot import latest_checkpoint, load_checkpoint, save_checkpoint
from memtrain.offload.tiers import NvmeStore
from memtrain.planner.actions import Tier
from tests.offload.async_runs import Gate, assert_same_folders
from tests.offload.late_device import LateDevice
from tests.offload.snapshot_runs import AHEAD, SEQUENTIAL
from tests.offload.streamed import (
    CAPACITY_BYTES,
    STREAMED,
    batches,
    llama,
    stream,
    streamed_optimizer,
)

SPARES = {"none": 0, "few": 3 << 20, "all": 48 << 20}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.99))


@dataclass
class StreamedRun:
    """A session of four things."""

    model: nn.Module
    optimizer: Any
    weights: ParameterStreamer
    store: NvmeStore

    def flush(self) -> None:
        self.optimizer.flush()

    def train(self, data: list[torch.Tensor]) -> list[torch.Tensor]:
        losses = []
        for tokens in data:
            loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return losses

    def everything(self) -> dict[str, torch.Tensor]:
        """Weights and state, by name."""
        self.flush()
        found = {}
        for unit in self.weights.streamed:
            with self.weights.hold(unit):
                for weight in self.weights._units[unit].weights:
                    found[weight.name] = weight.parameter.detach().clone()
        for name, parameter in self.model.named_parameters():
            if self.weights.unit_of(parameter) is None:
                found[name] = parameter.detach().clone()
        return {**found, **{f"{n}/{k}": t for n, k, t in self.optimizer.iter_state()}}


@contextmanager
def open_run(
    directory: Path,
    schedule: Any,
    *,
    master: bool = True,
    tied: bool = False,
    frozen: bool = False,
    codecs: Any = None,
    backend: Any = None,
    device: Any = None,
    slots: int = 3,
    units: Any = None,
) -> Iterator[StreamedRun]:
    directory.mkdir(exist_ok=True)
    model = llama(tied=tied, depth=2, dtype=torch.bfloat16 if master else torch.float32)
    if frozen:
        for parameter in model.model.layers[1].parameters():
            parameter.requires_grad_(False)
    store = NvmeStore(directory, CAPACITY_BYTES, direct="allow_buffered", backend=backend)
    with Engine({Tier.NVME: store}, device or make_device("cpu"), codecs) as engine:
        streamer = stream(model, engine, slots=slots, tier=Tier.NVME, units=units)
        with streamed_optimizer(
            model,
            streamer,
            engine,
            adamw,
            schedule=schedule,
            state_tier=Tier.NVME,
            gradient_tier=Tier.NVME,
            master_weights=master,
        ) as optimizer:
            yield StreamedRun(model, optimizer, streamer, store)
        streamer.close()


def assert_same_runs(one: StreamedRun, other: StreamedRun) -> None:
    ours, theirs = one.everything(), other.everything()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def room(name: str) -> dict[Tier, int]:
    return {Tier.NVME: SPARES[name]} if SPARES[name] else {}


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("spare", SPARES)
@pytest.mark.parametrize("master", [False, True])
def test_it_is_the_synchronous_checkpoint_while_windows_are_updated(
    schedule: Any, spare: str, master: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held up at its start, in the weights and in the state, so that updates meet it wherever they can."""
    data = batches(9)
    with (
        open_run(tmp_path / "a", schedule, master=master) as plain,
        open_run(tmp_path / "b", schedule, master=master) as run,
        AsyncCheckpointer(run, spare_bytes=room(spare)) as snapshots,
    ):
        for step in range(3):
            now = data[3 * step : 3 * step + 3]
            assert [loss.item() for loss in run.train(now)] == [loss.item() for loss in plain.train(now)]
            save_checkpoint(tmp_path / f"sync-{step}", plain, progress={"n": step})
            with monkeypatch.context() as patched:
                gate = Gate(patched, after=25 * step)
                snapshots.save(tmp_path / f"async-{step}", progress={"n": step})
                gate.open_after(0.05)
                run.train(data[:2])
                plain.train(data[:2])
                snapshots.wait()
            assert_same_folders(tmp_path / f"sync-{step}", tmp_path / f"async-{step}")
        assert_same_runs(plain, run)
        assert load_checkpoint(tmp_path / "async-1", run) == {"n": 1}
        assert load_checkpoint(tmp_path / "sync-1", plain) == {"n": 1}
        run.train(data[:1])
        plain.train(data[:1])
        assert_same_runs(plain, run)
        assert snapshots.statistics.completed == 3


@pytest.mark.parametrize(("tied", "frozen", "slots"), [(True, False, 3), (False, True, 2), (True, True, 4)])
def test_tied_frozen_and_few_windows(
    tied: bool, frozen: bool, slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot at every step; weights wander to spares and home again, over many updates."""
    data = batches(8)
    kind = {"tied": tied, "frozen": frozen, "slots": slots}
    with (
        open_run(tmp_path / "a", AHEAD, **kind) as plain,
        open_run(tmp_path / "b", AHEAD, **kind) as run,
        AsyncCheckpointer(run, spare_bytes=room("few")) as snapshots,
    ):
        for step, batch in enumerate(data):
            plain.train([batch])
            run.train([batch])
            save_checkpoint(tmp_path / f"sync-{step}", plain, progress={})
            snapshots.save(tmp_path / f"async-{step}", progress={})
        snapshots.wait()
        assert_same_runs(plain, run)
        for step in range(len(data)):
            assert_same_folders(tmp_path / f"sync-{step}", tmp_path / f"async-{step}")
        size = sum(path.stat().st_size for path in (tmp_path / "sync-1").glob("*.safetensors"))
        assert size - 32768 < snapshot_bytes(run) <= size


def test_some_units_streamed_and_some_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(4)
    with (
        open_run(tmp_path / "a", AHEAD, units=STREAMED[1:2]) as plain,
        open_run(tmp_path / "b", AHEAD, units=STREAMED[1:2]) as run,
        AsyncCheckpointer(run, spare_bytes=room("all")) as snapshots,
    ):
        run.train(data[:2])
        plain.train(data[:2])
        save_checkpoint(tmp_path / "sync", plain, progress={})
        with monkeypatch.context() as patched:
            gate = Gate(patched)
            snapshots.save(tmp_path / "async", progress={})
            gate.open_after(0.05)
            run.train(data[2:])
            snapshots.wait()
        plain.train(data[2:])
        assert_same_folders(tmp_path / "sync", tmp_path / "async")
        assert_same_runs(plain, run)


def test_with_room_for_everything_no_update_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three updates pass a snapshot that stands still, and what they replace stays on the tier."""
    data = batches(6)
    with (
        open_run(tmp_path / "a", SEQUENTIAL) as plain,
        open_run(tmp_path / "b", SEQUENTIAL) as run,
        AsyncCheckpointer(run, spare_bytes=room("all")) as snapshots,
    ):
        run.train(data[:2])
        plain.train(data[:2])
        save_checkpoint(tmp_path / "sync", plain, progress={})
        in_memory = 2 + 5 + 3 * 5  # headers; norms, their masters and two moments
        with monkeypatch.context() as patched:
            gate = Gate(patched, after=in_memory)
            snapshots.save(tmp_path / "async", progress={})
            assert gate.reached.wait(60)
            run.train(data[2:5])
            assert snapshots.statistics.waited_seconds == 0
            assert snapshots.statistics.most_spares > 10
            gate.open()
            snapshots.wait()
        plain.train(data[2:5])
        assert_same_folders(tmp_path / "sync", tmp_path / "async")
        assert_same_runs(plain, run)


def test_without_keeping_a_snapshot_of_weights_would_be_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_on_write.CopyOnWrite, "place", lambda self, owner, store, extent: extent)
    data = batches(4)
    with open_run(tmp_path / "a", SEQUENTIAL) as run, AsyncCheckpointer(run) as snapshots:
        run.train(data[:2])
        save_checkpoint(tmp_path / "sync", run, progress={})
        with monkeypatch.context() as patched:
            gate = Gate(patched, after=23)  # what is in memory is copied, and one weight
            snapshots.save(tmp_path / "async", progress={})
            assert gate.reached.wait(60)
            run.train(data[2:])
            gate.open()
            snapshots.wait()
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("async", "sync"))
    assert ours.read_bytes() != theirs.read_bytes()


def test_closing_leaves_what_is_in_a_spare_there_and_frees_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batches(4)
    with open_run(tmp_path / "a", SEQUENTIAL) as plain, open_run(tmp_path / "b", SEQUENTIAL) as run:
        before = run.store.used_bytes
        names = sorted(extent.name for extent in run.store._extents)
        for number in range(3):
            with AsyncCheckpointer(run, spare_bytes=room("few")) as snapshots:
                assert run.store.used_bytes == before + SPARES["few"]
                plain.train(data[number : number + 1])
                run.train(data[number : number + 1])
                with monkeypatch.context() as patched:
                    gate = Gate(patched, after=50)
                    snapshots.save(tmp_path / "at", progress={})
                    gate.open_after(0.02)
                    run.train(data[3:])
                plain.train(data[3:])
            assert run.store.used_bytes == before
            assert sorted(extent.name for extent in run.store._extents) == names
        assert_same_runs(plain, run)
    assert run.store.used_bytes == 0


def test_a_session_that_is_closed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(2)
    with open_run(tmp_path / "a", AHEAD) as run:
        snapshots = AsyncCheckpointer(run, spare_bytes=room("few"))
        run.train(data)
        save_checkpoint(tmp_path / "sync", run, progress={})
        gate = Gate(monkeypatch)
        snapshots.save(tmp_path / "at", progress={})
        gate.open_after(0.05)
    snapshots.close()
    assert_same_folders(tmp_path / "sync", tmp_path / "at")


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_a_device_with_memory_of_its_own(schedule: Any, tmp_path: Path) -> None:
    data, late = batches(5), LateDevice(eagerness=0.3)
    with (
        open_run(tmp_path / "a", schedule) as plain,
        open_run(tmp_path / "b", schedule, device=late) as run,
        AsyncCheckpointer(run, spare_bytes=room("few")) as snapshots,
    ):
        for step, batch in enumerate(data):
            plain.train([batch])
            run.train([batch])
            snapshots.save(tmp_path / f"async-{step}", progress={})
            save_checkpoint(tmp_path / f"sync-{step}", plain, progress={})
        snapshots.wait()
        assert late.faults == []
        for step in range(len(data)):
            assert_same_folders(tmp_path / f"sync-{step}", tmp_path / f"async-{step}")


# -- coded state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("spare", SPARES)
def test_coded_state_beside_streamed_weights(
    schedule: Any, spare: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zstandard")
    from memtrain.optim.storage.lossless import ExponentCodec

    codecs = {Tier.NVME: ExponentCodec()}
    data = batches(6)
    with (
        open_run(tmp_path / "a", schedule) as plain,
        open_run(tmp_path / "b", schedule, codecs=codecs) as run,
        AsyncCheckpointer(run, spare_bytes=room(spare)) as snapshots,
    ):
        for step in range(3):
            now = data[2 * step : 2 * step + 1]
            plain.train(now)
            run.train(now)
            save_checkpoint(tmp_path / f"sync-{step}", plain, progress={})
            with monkeypatch.context() as patched:
                gate = Gate(patched, after=40 * step)
                snapshots.save(tmp_path / f"async-{step}", progress={})
                gate.open_after(0.05)
                plain.train(data[5:])
                run.train(data[5:])
                snapshots.wait()
            assert_same_folders(tmp_path / f"sync-{step}", tmp_path / f"async-{step}")
        assert_same_runs(plain, run)


# -- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("after", [5, 60, 150])
def test_a_disk_that_fails_in_the_middle(
    schedule: Any, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is as without the snapshot, the error is told, and the next snapshot is whole."""
    from memtrain.offload.placed import PlacedFile

    data, real, writes = batches(5), PlacedFile.write, 0

    def write(file: PlacedFile, content: Any, offset: int) -> None:
        nonlocal writes
        writes += 1
        if writes == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, content, offset)

    with (
        open_run(tmp_path / "a", schedule) as plain,
        open_run(tmp_path / "b", schedule) as run,
        AsyncCheckpointer(run, spare_bytes=room("few")) as snapshots,
    ):
        plain.train(data[:2])
        run.train(data[:2])
        monkeypatch.setattr(PlacedFile, "write", write)
        snapshots.save(tmp_path / "at", progress={})
        told = 0
        for batch in data[2:]:
            plain.train([batch])
            with contextlib.suppress(CheckpointError):
                run.train([batch])
                continue
            told += 1
            run.optimizer.step()  # nothing of it had been done
            run.optimizer.zero_grad()
        if not told:
            with pytest.raises(CheckpointError, match="No space left"):
                snapshots.wait()
        assert told <= 1
        assert snapshots.statistics.failed == 1
        assert latest_checkpoint(tmp_path) is None
        assert_same_runs(plain, run)
        save_checkpoint(tmp_path / "sync", plain, progress={})
        snapshots.save(tmp_path / "at", progress={})
        snapshots.wait()
        assert_same_folders(tmp_path / "sync", tmp_path / "at")


def test_weights_that_the_tier_has_lost(tmp_path: Path) -> None:
    with open_run(tmp_path / "a", SEQUENTIAL) as run, AsyncCheckpointer(run) as snapshots:
        run.train(batches(1))
        run.weights.flush()
        weight, (store, extent) = next(iter(run.weights.extents().items()))
        with Slab(4096) as page:
            os.pwritev(store._descriptor, [page.buffer.numpy()], extent.arena_offset)
        snapshots.save(tmp_path / "at", progress={})
        with pytest.raises(CorruptExtentError, match=f"weight {weight.name} on nvme"):
            snapshots.wait()
        assert latest_checkpoint(tmp_path) is None
