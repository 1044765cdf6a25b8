"""What goes wrong with a snapshot is told at the next step or at the end, and the one before it is whole."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memtrain.offload import copy_on_write, placed
from memtrain.offload.async_snapshot import AsyncCheckpointer, SnapshotThreadError
from memtrain.offload.atomic import CheckpointError, CorruptCheckpointError, remove_leftovers, verify
from memtrain.offload.errors import CorruptExtentError
from memtrain.offload.slab import Slab
from memtrain.offload.snapshot import latest_checkpoint, load_checkpoint, save_checkpoint
from memtrain.planner.actions import Tier
from tests.offload.async_runs import RECORD_BYTES, Gate, nvme_run
from tests.offload.snapshot_runs import AHEAD, SEQUENTIAL, assert_same, states
from tests.offload.training import batches


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of 16 MiB: a checkpoint of the model is 4.7 MiB."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control") or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root, loop devices and mkfs.ext4")
    image, mount = tmp_path / "image", tmp_path / "mount"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(mount)], capture_output=True).returncode:
        pytest.skip("the kernel refuses to mount a loop device here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_told_at_the_next_step_and_training_goes_on(small_disk: Path, tmp_path: Path) -> None:
    data = batches(6)
    with (
        nvme_run(tmp_path / "a", SEQUENTIAL) as plain,
        nvme_run(tmp_path / "b", SEQUENTIAL) as run,
        AsyncCheckpointer(run) as snapshots,
    ):
        run.train(data[:1])
        snapshots.save(small_disk / "first", progress={"n": 1})
        snapshots.wait()
        with open(small_disk / "other", "wb", buffering=0) as other, pytest.raises(OSError, match="No space"):
            deque(iter(lambda: other.write(bytes(1 << 16)), None))
        snapshots.save(small_disk / "second", progress={"n": 2})
        while snapshots.busy:
            time.sleep(0.01)
        run.model(data[1]).backward()
        with pytest.raises(CheckpointError, match=r"second: No space left .*bytes are free") as caught:
            run.optimizer.step()
        assert caught.value.errno == errno.ENOSPC
        run.optimizer.step()  # the same step: nothing of it had been done
        run.optimizer.zero_grad()
        assert sorted(path.name for path in small_disk.iterdir()) == ["first", "lost+found", "other"]
        (small_disk / "other").unlink()
        run.train(data[2:5])
        snapshots.save(small_disk / "third", progress={"n": 3})
        snapshots.wait()
        plain.train(data[:5])
        assert_same(plain, run)
        assert load_checkpoint(small_disk / "third", run) == {"n": 3}
        assert load_checkpoint(small_disk / "first", run) == {"n": 1}
        assert snapshots.statistics.failed == 1
        assert snapshots.statistics.completed == 2


def test_a_file_size_limit_in_the_middle(tmp_path: Path) -> None:
    with nvme_run(tmp_path / "swap", AHEAD) as run:
        snapshots = AsyncCheckpointer(run)
        run.train(batches(1))
        save_checkpoint(tmp_path / "at", run, progress={"n": 1})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
            snapshots.save(tmp_path / "at", progress={"n": 2})
            with pytest.raises(CheckpointError, match="ulimit -f"):
                snapshots.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert load_checkpoint(tmp_path / "at", run) == {"n": 1}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["at", "swap"]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "fdatasync", "preadv"])
def test_a_failing_disk(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the operating system wherever the snapshot asks it for something."""
    with nvme_run(tmp_path / "swap", SEQUENTIAL) as run, AsyncCheckpointer(run) as snapshots:
        run.train(batches(1))
        save_checkpoint(tmp_path / "at", run, progress={"n": 1})
        monkeypatch.setattr(placed, "os", _Failing(call))
        monkeypatch.setattr(placed, "WINDOW_BYTES", 1 << 20)
        snapshots.save(tmp_path / "at", progress={"n": 2})
        with pytest.raises(CheckpointError, match="Input/output error") as caught:
            snapshots.wait()
        assert caught.value.errno == errno.EIO
        monkeypatch.undo()
        assert load_checkpoint(tmp_path / "at", run) == {"n": 1}


class _Failing:
    """``os`` with one call that fails from its second time on."""

    def __init__(self, call: str) -> None:
        self._call, self._times = call, 0

    def __getattr__(self, name: str) -> Any:
        if name != self._call:
            return getattr(os, name)
        self._times += 1
        if self._times > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return getattr(os, name)


def test_bytes_that_change_on_the_disk_are_found_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = placed.PlacedFile.close

    def close(file: placed.PlacedFile, buffer: memoryview) -> Any:
        if file.name.startswith("optimizer"):
            byte = os.pread(file._descriptor, 1, 100_000)
            os.pwrite(file._descriptor, bytes([byte[0] ^ 4]), 100_000)
        return real(file, buffer)

    with nvme_run(tmp_path / "swap", SEQUENTIAL) as run, AsyncCheckpointer(run) as snapshots:
        run.train(batches(1))
        monkeypatch.setattr(placed.PlacedFile, "close", close)
        snapshots.save(tmp_path / "at", progress={})
        with pytest.raises(CorruptCheckpointError, match=r"optimizer-00001-of-00001.* holds other bytes at"):
            snapshots.wait()
        assert latest_checkpoint(tmp_path) is None


def test_a_tier_that_returns_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot does not seal what the tier has lost; the message names tensor and tier."""
    with nvme_run(tmp_path / "swap", SEQUENTIAL) as run, AsyncCheckpointer(run) as snapshots:
        run.train(batches(1))
        save_checkpoint(tmp_path / "at", run, progress={"n": 1})
        shard, (store, extent) = list(run.optimizer.records.extents().items())[-1]
        with Slab(4096) as page:  # zeros, in the place of state
            os.pwritev(store._descriptor, [page.buffer.numpy()], extent.arena_offset)
        snapshots.save(tmp_path / "at", progress={"n": 2})
        with pytest.raises(CorruptExtentError, match=f"optimizer state of {shard.name} on nvme"):
            snapshots.wait()
        verify(tmp_path / "at")


def test_a_snapshot_that_stands_still_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(3)
    with nvme_run(tmp_path / "a", SEQUENTIAL) as plain, nvme_run(tmp_path / "b", SEQUENTIAL) as run:
        snapshots = AsyncCheckpointer(run, spare_bytes={Tier.NVME: RECORD_BYTES})
        run.train(data[:1])
        snapshots._keeper._stall_seconds = 0.2
        gate = Gate(monkeypatch, after=20)
        snapshots.save(tmp_path / "at", progress={})
        assert gate.reached.wait(60)
        run.train(data[1:])
        gate.open()
        with pytest.raises(
            CheckpointError, match=r"given up: it has copied nothing for 0 s while the update"
        ):
            snapshots.close()
        plain.train(data)
        assert_same(plain, run)
        assert latest_checkpoint(tmp_path) is None


def test_no_further_thread(tmp_path: Path) -> None:
    """No room for a thread's stack: said by name, and nothing waits for a thread that is not there."""
    data = batches(4)
    with (
        nvme_run(tmp_path / "a", SEQUENTIAL) as plain,
        nvme_run(tmp_path / "b", SEQUENTIAL) as run,
        AsyncCheckpointer(run, spare_bytes={Tier.NVME: RECORD_BYTES}) as snapshots,
    ):
        run.train(data[:1])
        before, stack = resource.getrlimit(resource.RLIMIT_AS), threading.stack_size(1 << 30)
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        used = int(fields["VmSize"].split()[0]) * 1024
        try:
            resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))
            with pytest.raises(SnapshotThreadError, match=r"at was not begun.*Training may go on.*ulimit -u"):
                snapshots.save(tmp_path / "at", progress={})
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
            threading.stack_size(stack)
        assert not snapshots.busy
        run.train(data[1:])
        plain.train(data)
        assert snapshots.statistics.waited_seconds == 0
        assert_same(plain, run)
        snapshots.save(tmp_path / "at", progress={})
        snapshots.wait()
        assert latest_checkpoint(tmp_path) == tmp_path / "at"


def test_without_keeping_a_snapshot_would_be_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests could not fail if updates never met the snapshot: take the keeping away, and it is."""
    monkeypatch.setattr(copy_on_write.CopyOnWrite, "place", lambda self, owner, store, extent: extent)
    monkeypatch.setattr(copy_on_write.CopyOnWrite, "before_step", lambda self, shard: None)
    data = batches(3)
    with nvme_run(tmp_path / "swap", SEQUENTIAL) as run, AsyncCheckpointer(run) as snapshots:
        run.train(data[:1])
        save_checkpoint(tmp_path / "sync", run, progress={})
        with monkeypatch.context() as patched:
            gate = Gate(patched, after=14)
            snapshots.save(tmp_path / "async", progress={})
            assert gate.reached.wait(60)
            run.train(data[1:])
            gate.open()
            snapshots.wait()
        ours, theirs = (
            tmp_path / name / "optimizer-00001-of-00001.safetensors" for name in ("async", "sync")
        )
        assert ours.read_bytes() != theirs.read_bytes()


# -- kill -9 -----------------------------------------------------------------------------------------------

KILLS = int(os.environ.get("MEMTRAIN_KILLS", "20"))
STEPS = 12


def _train_to_the_end(directory: Path, schedule: Any, data: list[torch.Tensor]) -> str:
    """Take up the last checkpoint, go on to ``STEPS`` with a snapshot at every step; a hash of the end."""
    with nvme_run(directory / "swap", schedule) as run:
        folder, done = latest_checkpoint(directory / "checkpoint"), 0
        if folder is not None:
            done = load_checkpoint(folder, run)["steps_done"]
        spare = {Tier.NVME: RECORD_BYTES} if done % 2 else {}
        with AsyncCheckpointer(run, spare_bytes=spare) as snapshots:
            for step in range(done, STEPS):
                run.train(data[step : step + 1])
                snapshots.save(
                    directory / "checkpoint" / f"step-{step + 1:06d}", progress={"steps_done": step + 1}
                )
        return _hash(run)


def _hash(run: Any) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    tensors = [*run.model.state_dict().values(), *(t for _, t in sorted(states(run.optimizer).items()))]
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_kill_at_any_moment(schedule: Any, tmp_path: Path) -> None:
    """Killed again and again while it trains and writes: the last snapshot can always be read, and what is
    taken up from it ends bit-equal to a run that was never disturbed."""
    data = batches(STEPS)
    with nvme_run(tmp_path / "plain", schedule) as plain:
        plain.train(data)
        expected = _hash(plain)
    rng = random.Random(f"{schedule}")
    checkpoints, found, finished = tmp_path / "checkpoint", "", 0
    latest_seen = []
    for number in range(KILLS // 2 + 1):
        receiver, sender = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                text = _train_to_the_end(tmp_path, schedule, data)
                os.write(sender, text.encode())
                code = 0
            finally:
                os._exit(code)
        os.close(sender)
        if number < KILLS // 2:
            time.sleep(rng.uniform(0.05, 0.6))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        finished += not os.WIFSIGNALED(status)
        with os.fdopen(receiver) as pipe:
            found = pipe.read() or found
        folder = latest_checkpoint(checkpoints)
        if folder is not None:
            verify(folder)
            latest_seen.append(folder.name)
        if found and number < KILLS // 2:
            assert found == expected
            shutil.rmtree(checkpoints)
            latest_seen, found = [], ""
    assert latest_seen == sorted(latest_seen)
    assert found == expected
    remove_leftovers(checkpoints)
    assert not [path for path in checkpoints.iterdir() if ".tmp-" in path.name]
