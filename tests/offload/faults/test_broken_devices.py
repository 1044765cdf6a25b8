"""Devices that answer with errors, lose their end, have large blocks or go away; and clocks that jump."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from memtrain.offload import atomic
from memtrain.offload.atomic import CheckpointError, publish
from memtrain.offload.errors import CorruptExtentError, SwapDirectoryError, TierIOError
from memtrain.offload.io import Fault
from memtrain.offload.snapshot import latest_checkpoint, load_checkpoint, save_checkpoint
from memtrain.offload.targets import FileTarget
from memtrain.offload.tiers import NvmeStore, wait_all
from tests.offload.faults.disks import MiB, fill, loop_disk, needs_mounts, run
from tests.offload.faults.runs_on_disk import assert_trained, open_run_in
from tests.offload.tier_stores import CAPACITY, U, faulty_nvme, filled
from tests.offload.training import batches


@needs_mounts
def test_a_run_whose_disk_loses_its_end_names_the_tensor_and_goes_on_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    def until_the_end_is_lost(disk: Path) -> None:
        with open_run_in(disk) as training:
            training.train(batches(5)[:3])
            save_checkpoint(tmp_path / "checkpoints" / "step-3", training, progress={"steps_done": 3})
            run("sync", "-f", disk)
            os.truncate(tmp_path / "disk.image", 2 * MiB)
            training.train(batches(5)[3:])

    lost = pytest.raises((TierIOError, CorruptExtentError), match=r"tensor (optimizer state|gradient) of")
    with loop_disk(tmp_path, "disk", 32 * MiB) as disk:
        with lost:
            until_the_end_is_lost(disk)
        os.truncate(tmp_path / "disk.image", 32 * MiB)
    saved = latest_checkpoint(tmp_path / "checkpoints")
    assert saved is not None
    with open_run_in(tmp_path) as training:
        assert load_checkpoint(saved, training) == {"steps_done": 3}
        training.train(batches(5)[3:])
        assert_trained(training, 5)


@pytest.mark.parametrize(
    "fault", [Fault(error=errno.EIO, times=1), Fault(flip_bit=77, times=1), Fault(short_bytes=0, times=1)]
)
def test_a_read_that_fails_once_is_repeated_said_and_counted(
    tmp_path: Path, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = faulty_nvme(tmp_path, {1: fault})
    with store, caplog.at_level(logging.WARNING):
        extent, source, found = store.allocate("w", U), filled(U), filled(U, 1)
        store.write(extent, source).wait()
        store.read(extent, found).wait()
        assert torch.equal(found, source)
        assert store.statistics().second_reads == 1
    assert "read of tensor w on nvme at offset 0" in caplog.text
    assert "a second read found what was written" in caplog.text


@needs_mounts
def test_a_device_that_cannot_write_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    """A disk inside a disk that is full: the inner one's blocks cannot be written, the kernel says EIO."""
    with loop_disk(tmp_path, "outer", 24 * MiB) as outer, loop_disk(outer, "inner", 64 * MiB) as inner:
        with NvmeStore(inner, 32 * MiB, piece_bytes=MiB) as store:
            kept, lost = store.allocate("kept", 4 * MiB), store.allocate("lost", 24 * MiB)
            before = filled(4 * MiB, 1)
            store.write(kept, before).wait()
            run("sync", "-f", inner)
            filler = fill(outer)
            with pytest.raises(
                TierIOError, match=r"write of tensor lost on nvme at offset \d+ failed"
            ) as caught:
                store.write(lost, filled(24 * MiB, 2)).wait()
            assert caught.value.errno in (errno.EIO, errno.ENOSPC)
            found = filled(4 * MiB, 3)
            store.read(kept, found).wait()
            assert torch.equal(found, before)
            filler.unlink()
            run("sync", "-f", outer)
        fill(outer)


def test_a_sync_that_fails_once_is_told_to_every_writer_that_was_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a page that could not be written to the first who asks, and never again."""
    descriptor = os.open(tmp_path / "arena", os.O_RDWR | os.O_CREAT)
    target, source = FileTarget(descriptor, direct=False), filled(2 * U)
    both_written, failures = threading.Barrier(2), iter([OSError(errno.EIO, "Input/output error")])
    real_write, real_sync = os.pwritev, os.fdatasync

    def write(*arguments: object) -> int:
        count = real_write(*arguments)  # type: ignore[arg-type]
        both_written.wait(10)
        return count

    def sync(number: int) -> None:
        if failure := next(failures, None):
            raise failure
        real_sync(number)

    monkeypatch.setattr(os, "pwritev", write)
    monkeypatch.setattr(os, "fdatasync", sync)
    outcomes: list[int | None] = []

    def writer(offset: int) -> None:
        try:
            outcomes.append(target.write(source.data_ptr(), U, offset))
        except OSError as error:
            outcomes.append(error.errno and -error.errno)

    threads = [threading.Thread(target=writer, args=(offset,)) for offset in (0, U)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [-errno.EIO, -errno.EIO]
    monkeypatch.undo()
    assert target.write(source.data_ptr(), U, 0) == U  # written anew, not synced anew
    os.close(descriptor)


def test_a_checkpoint_whose_sync_failed_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    failures = iter([OSError(errno.EIO, "Input/output error")])
    real = os.fsync

    def sync(descriptor: int) -> None:
        written.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        if failure := next(failures, None):
            raise failure
        real(descriptor)

    monkeypatch.setattr(os, "fsync", sync)

    def save() -> None:
        with publish(tmp_path / "at") as writer:
            writer.write_text("a", "1")

    with pytest.raises(CheckpointError, match="Input/output error"):
        save()
    assert os.listdir(tmp_path) == []
    save()
    assert atomic.verify(tmp_path / "at").keys() == {"a"}
    first, again = (path for path in written if path.name == "a")
    assert first != again


def test_signals_in_mid_transfer_change_nothing(tmp_path: Path) -> None:
    """EINTR as it really comes: a thousand signals a second while bytes move."""
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    stop = threading.Event()

    def pester() -> None:
        while not stop.wait(0.001):
            for thread in threading.enumerate():
                if thread.ident is not None and thread.name.startswith("memtrain-nvme"):
                    signal.pthread_kill(thread.ident, signal.SIGUSR1)

    try:
        with NvmeStore(tmp_path, 16 * MiB, piece_bytes=MiB) as store:
            extent, found = store.allocate("w", 12 * MiB + 7), filled(12 * MiB + 7, 9)
            pester_thread = threading.Thread(target=pester)
            pester_thread.start()
            for seed in range(4):
                source = filled(12 * MiB + 7, seed)
                wait_all([store.write(extent, source), store.read(extent, found)])
                assert torch.equal(found, source)
            stop.set()
            pester_thread.join()
    finally:
        stop.set()
        signal.signal(signal.SIGUSR1, before)
    assert seen


@needs_mounts
def test_blocks_of_4096_bytes_and_tails_that_are_none(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "disk", 32 * MiB, block_bytes=4096) as disk:
        with NvmeStore(disk, 16 * MiB, piece_bytes=MiB) as store:
            assert store.direct
            for number, nbytes in enumerate((1, 511, 512, 1024, 4095, 4097, MiB - 1, MiB + 1024)):
                extent, found = store.allocate(f"t{number}", nbytes), filled(nbytes, 99)
                store.write(extent, filled(nbytes, number)).wait()
                store.read(extent, found).wait()
                assert torch.equal(found, filled(nbytes, number))
        with open_run_in(disk) as training:
            training.train(batches(2))
            assert_trained(training, 2)


@needs_mounts
def test_a_read_only_disk_is_refused_by_name(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "disk", 32 * MiB) as disk:
        run("mount", "-o", "remount,ro", disk)
        with pytest.raises(SwapDirectoryError, match="is not writable"):
            NvmeStore(disk, CAPACITY)
        with pytest.raises(CheckpointError, match="Read-only file system"), publish(disk / "at"):
            pass
        run("mount", "-o", "remount,rw", disk)
        with NvmeStore(disk, CAPACITY):
            pass


@needs_mounts
def test_a_disk_that_is_unmounted_under_a_run_serves_it_to_its_end(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "disk", 32 * MiB) as disk, open_run_in(disk) as training:
        training.train(batches(4)[:2])
        run("umount", "-l", disk)
        training.train(batches(4)[2:])
        assert_trained(training, 4)
        with pytest.raises((SwapDirectoryError, CheckpointError)), open_run_in(disk / "swap"):
            pass


def test_a_cleaner_that_removes_the_swap_directory_stops_nobody(tmp_path: Path) -> None:
    with open_run_in(tmp_path) as training:
        training.train(batches(4)[:2])
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        training.train(batches(4)[2:])
        assert_trained(training, 4)
    kept = NvmeStore(tmp_path, CAPACITY, run_id="kept", resumable=True)
    kept.write(kept.allocate("w", U), filled(U)).wait()
    shutil.rmtree(kept.run.path)
    with pytest.raises(SwapDirectoryError, match=r"cannot create .*manifest"):
        kept.save()
    kept.run.resumable = False
    kept.close()


def test_a_clock_that_is_set_back_hides_no_checkpoint(tmp_path: Path) -> None:
    def save(name: str) -> Path:
        with publish(tmp_path / name) as writer:
            writer.write_text("a", name)
        return tmp_path / name

    first = save("step-2")
    an_hour_ahead = time.time_ns() + 3_600_000_000_000
    os.utime(first / "manifest.json", ns=(an_hour_ahead, an_hour_ahead))
    assert latest_checkpoint(tmp_path) == first
    for name in ("step-3", "step-1"):
        assert latest_checkpoint(tmp_path) != tmp_path / name
        save(name)
        assert latest_checkpoint(tmp_path) == tmp_path / name


def test_no_deadline_looks_at_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> float:
        raise AssertionError("the wall clock may jump")

    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, refuse)
    with open_run_in(tmp_path) as training:
        training.train(batches(2))
        assert_trained(training, 2)
