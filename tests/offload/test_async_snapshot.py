"""A snapshot that is written while training goes on is the checkpoint that would have stopped it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from memtrain.offload.async_snapshot import AsyncCheckpointer, SnapshotBusyError
from memtrain.offload.atomic import CheckpointError
from memtrain.offload.errors import OffloadError, TierFullError
from memtrain.offload.snapshot import latest_checkpoint, load_checkpoint, save_checkpoint
from memtrain.planner.actions import Tier
from tests.offload.async_runs import RECORD_BYTES, Gate, assert_same_folders, nvme_run
from tests.offload.late_device import LateDevice
from tests.offload.snapshot_runs import AHEAD, SEQUENTIAL, assert_same
from tests.offload.training import batches

SPARES = {"none": 0, "one": RECORD_BYTES * 3 // 2, "all": 16 << 20}  # one with masters too


def spares(name: str) -> dict[Tier, int]:
    return {Tier.NVME: SPARES[name]} if SPARES[name] else {}


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize(("room", "master"), list(product(SPARES, [False, True])))
def test_it_is_the_synchronous_checkpoint_while_training_goes_on(
    schedule: object, room: str, master: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is held up at its start, so that updates meet it wherever they can."""
    dtype, data = torch.bfloat16 if master else torch.float32, batches(9)
    with nvme_run(tmp_path / "plain", schedule, dtype, master_weights=master) as plain:
        for step in range(3):
            plain.train(data[3 * step : 3 * step + 3])
            save_checkpoint(tmp_path / f"sync-{step}", plain, progress={"steps_done": step})
        with nvme_run(tmp_path / "async", schedule, dtype, master_weights=master) as run:
            with AsyncCheckpointer(run, spare_bytes=spares(room)) as snapshots:
                for step in range(3):
                    run.train(data[3 * step : 3 * step + 3])
                    with monkeypatch.context() as patched:
                        gate = Gate(patched, after=20 * step)
                        snapshots.save(tmp_path / f"async-{step}", progress={"steps_done": step})
                        gate.open_after(0.05)
                        if step < 2:
                            run.train(data[3 * step + 3 : 3 * step + 4])
                            run.flush()
                        snapshots.wait()
                    if step < 2:  # back to where the snapshot was taken, as the others never left
                        load_checkpoint(tmp_path / f"async-{step}", run)
                assert snapshots.statistics.completed == 3
            for step in range(3):
                assert_same_folders(tmp_path / f"sync-{step}", tmp_path / f"async-{step}")
            assert_same(plain, run)


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("room", SPARES)
def test_losses_and_state_of_training_are_unchanged(schedule: object, room: str, tmp_path: Path) -> None:
    """A snapshot at every step; records wander to spares and home again, over many updates."""
    data = batches(12)
    with nvme_run(tmp_path / "a", schedule) as plain, nvme_run(tmp_path / "b", schedule) as run:
        plain.train(data)
        with AsyncCheckpointer(run, spare_bytes=spares(room)) as snapshots:
            for number, batch in enumerate(data):
                run.train([batch])
                snapshots.save(tmp_path / f"step-{number}", progress={"steps_done": number})
            snapshots.wait()
            assert snapshots.statistics.completed == len(data)
        assert_same(plain, run)
        run.train(data[:2])  # what was in spares still is, and is read from there
        plain.train(data[:2])
        assert_same(plain, run)


def test_every_record_may_wait_in_a_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a spare for each, no update waits for a snapshot's records: only for what is in memory."""
    data = batches(6)
    with (
        nvme_run(tmp_path / "a", SEQUENTIAL) as plain,
        nvme_run(tmp_path / "b", SEQUENTIAL) as run,
        AsyncCheckpointer(run, spare_bytes=spares("all")) as snapshots,
    ):
        run.train(data[:2])
        plain.train(data[:2])
        save_checkpoint(tmp_path / "sync", plain, progress={})
        in_memory = 2 + 8 + 4  # headers, weights, and the state of two small biases
        with monkeypatch.context() as patched:
            gate = Gate(patched, after=in_memory)
            snapshots.save(tmp_path / "async", progress={})
            assert gate.reached.wait(60)
            run.train(data[2:5])  # three updates, while the snapshot stands still
            used = snapshots.statistics.most_spares
            gate.open()
            snapshots.wait()
        assert used == 7  # embed lies in three shards, first and second in two; unused has no state
        assert snapshots.statistics.waited_seconds == 0
        plain.train(data[2:5])
        assert_same_folders(tmp_path / "sync", tmp_path / "async")
        assert_same(plain, run)


def test_a_second_request_waits_or_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nvme_run(tmp_path / "swap", SEQUENTIAL) as run, AsyncCheckpointer(run) as snapshots:
        run.train(batches(1))
        gate = Gate(monkeypatch)
        snapshots.save(tmp_path / "first", progress={"n": 1})
        with pytest.raises(SnapshotBusyError, match=r"second was asked for while snapshot .*first is being"):
            snapshots.save(tmp_path / "second", progress={"n": 2}, overlap="refuse")
        gate.open_after(0.1)
        snapshots.save(tmp_path / "third", progress={"n": 3})
        assert (tmp_path / "first" / "manifest.json").exists()
        snapshots.wait()
        assert load_checkpoint(tmp_path / "third", run) == {"n": 3}
        assert not (tmp_path / "second").exists()
        with pytest.raises(ValueError, match="overlap must be"):
            snapshots.save(tmp_path / "fourth", progress={}, overlap="later")


def test_loading_waits_for_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(3)
    with nvme_run(tmp_path / "swap", AHEAD) as run, AsyncCheckpointer(run) as snapshots:
        run.train(data[:1])
        save_checkpoint(tmp_path / "old", run, progress={})
        run.train(data[1:])
        save_checkpoint(tmp_path / "sync", run, progress={})
        gate = Gate(monkeypatch)
        snapshots.save(tmp_path / "async", progress={})
        gate.open_after(0.1)
        load_checkpoint(tmp_path / "old", run)
        snapshots.wait()
        assert_same_folders(tmp_path / "sync", tmp_path / "async")


def test_closing_the_optimizer_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with nvme_run(tmp_path / "swap", AHEAD) as run:
        snapshots = AsyncCheckpointer(run)
        run.train(batches(2))
        gate = Gate(monkeypatch)
        snapshots.save(tmp_path / "at", progress={"n": 1})
        gate.open_after(0.1)
    snapshots.close()
    snapshots.close()
    assert latest_checkpoint(tmp_path) == tmp_path / "at"


def test_weights_changed_behind_its_back_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with nvme_run(tmp_path / "swap", SEQUENTIAL) as run:
        snapshots = AsyncCheckpointer(run)
        gate = Gate(monkeypatch)
        snapshots.save(tmp_path / "at", progress={})
        with torch.no_grad():
            run.model.frozen.weight.mul_(2)
        gate.open()
        with pytest.raises(CheckpointError, match=r"frozen.weight was changed in place while a snapshot"):
            snapshots.close()
        assert latest_checkpoint(tmp_path) is None


def test_room_for_spares_is_reserved_or_refused(tmp_path: Path) -> None:
    with nvme_run(tmp_path / "swap", SEQUENTIAL) as run:
        store = next(iter(run.optimizer.records.extents().values()))[0]
        before = store.used_bytes
        with pytest.raises(OffloadError, match=f"do not hold a record of {RECORD_BYTES} bytes"):
            AsyncCheckpointer(run, spare_bytes={Tier.NVME: RECORD_BYTES - 1})
        with pytest.raises(OffloadError, match="no state is kept there"):
            AsyncCheckpointer(run, spare_bytes={Tier.HOST: RECORD_BYTES})
        blocker = store.allocate("blocker", (64 << 20) - before - 4096)
        with pytest.raises(TierFullError, match="spare extents for snapshots"):
            AsyncCheckpointer(run, spare_bytes={Tier.NVME: RECORD_BYTES})
        store.free(blocker)
        with AsyncCheckpointer(run, spare_bytes={Tier.NVME: 3 * RECORD_BYTES}):
            assert store.used_bytes == before + 3 * RECORD_BYTES
            with pytest.raises(CheckpointError, match="has a checkpointer already"):
                AsyncCheckpointer(run)
        assert store.used_bytes == before


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_a_device_with_memory_of_its_own(schedule: object, tmp_path: Path) -> None:
    """Records are stepped in mirrors and copied back late: what is on the tier is still the old one."""
    data, late = batches(8), LateDevice(eagerness=0.3)
    with (
        nvme_run(tmp_path / "a", schedule) as plain,
        nvme_run(tmp_path / "b", schedule, device=late) as run,
        AsyncCheckpointer(run, spare_bytes=spares("one")) as snapshots,
    ):
        for step, batch in enumerate(data):
            plain.train([batch])
            run.train([batch])
            snapshots.save(tmp_path / f"async-{step}", progress={"n": step})
            save_checkpoint(tmp_path / f"sync-{step}", plain, progress={"n": step})
        snapshots.wait()
        assert late.faults == []
        for step in range(len(data)):
            assert_same_folders(tmp_path / f"sync-{step}", tmp_path / f"async-{step}")
