"""Snapshots in another process's memory: they survive the trainer, and nothing survives them."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memtrain.offload import atomic
from memtrain.offload import held as held_module
from memtrain.offload.async_snapshot import AsyncCheckpointer
from memtrain.offload.atomic import CorruptCheckpointError
from memtrain.offload.held import HeldSnapshots, HolderError, MemoryFolder, check_room
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from tests.offload.async_runs import assert_same_folders, nvme_run, shared_memory_names
from tests.offload.snapshot_runs import AHEAD, SEQUENTIAL, assert_same
from tests.offload.training import batches


def processes(directory: Path) -> list[int]:
    """Of holders for ``directory``."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if len(words) > 3 and words[2].endswith(b"holder.py") and words[3] == os.fsencode(directory):
                found.append(int(path.name))
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Where a holder is to be; afterwards there is none, and nothing of it."""
    shared = shared_memory_names()
    place = tmp_path / ("a-long-name-" * 12) / "holder"
    yield place
    left = processes(place)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
    assert not place.exists()
    assert shared_memory_names() == shared


def fill(held: HeldSnapshots, name: str, text: str, **options: Any) -> None:
    with held.publish(name, **options) as writer:
        writer.write_text("a.txt", text)


def fill_many(held: HeldSnapshots, name: str) -> None:
    with held.publish(name) as writer:
        for number in range(8):
            writer.write_text(f"{number}.txt", "of many")


def child(work: Any) -> int:
    """A forked process that does ``work`` and then waits to be killed; its pid once it is done."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(sender, b"done")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        assert pipe.read(4) == b"done"
    return pid


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_it_survives_a_kill_and_resumes_bit_equal(directory: Path, tmp_path: Path) -> None:
    data = batches(6)

    def train() -> None:
        held = HeldSnapshots(directory)
        with nvme_run(tmp_path / "a", AHEAD) as run, AsyncCheckpointer(run) as snapshots:
            run.train(data[:2])
            for step in (2, 3):
                name = f"step-{step}"
                progress = {"steps_done": step}
                snapshots.begin(lambda name=name: held.publish(name), name, progress=progress)
                run.train(data[step : step + 1])
            snapshots.wait()
            run.train(data[4:])  # lost
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            train()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert len(processes(directory)) == 1
    with (
        nvme_run(tmp_path / "b", SEQUENTIAL) as plain,
        nvme_run(tmp_path / "c", SEQUENTIAL) as run,
        HeldSnapshots(directory) as held,
    ):
        assert held.names == ["step-3"]
        with held.folder() as folder:
            assert folder is not None
            assert load_checkpoint(folder, run) == {"steps_done": 3}
            plain.train(data[:3])
            save_checkpoint(tmp_path / "sync", plain, progress={"steps_done": 3})
            for path in folder.iterdir():
                if path.name not in ("rng.json", "manifest.json"):  # another process's generators
                    assert path.read_bytes() == (tmp_path / "sync" / path.name).read_bytes(), path.name
        plain.train(data[3:])
        run.train(data[3:])
        assert_same(plain, run)


def test_it_is_the_same_as_on_disk(directory: Path, tmp_path: Path) -> None:
    with nvme_run(tmp_path / "a", SEQUENTIAL) as run, HeldSnapshots(directory) as held:
        run.train(batches(2))
        save_checkpoint(tmp_path / "sync", run, progress={"n": 1})
        with AsyncCheckpointer(run) as snapshots:
            snapshots.begin(lambda: held.publish("one"), "one", progress={"n": 1})
            snapshots.wait()
        with held.folder() as folder:
            assert folder is not None
            assert_same_folders(tmp_path / "sync", folder)


def test_one_takes_the_place_of_another_when_it_is_complete(directory: Path) -> None:
    with HeldSnapshots(directory) as held:
        fill(held, "one", "1")
        with pytest.raises(HolderError, match="No such file"), held.publish("two") as writer:
            writer.copy(directory / "missing")
        assert held.names == ["one"]
        fill(held, "two", "2", retire=False)
        assert held.names == ["one", "two"]
        fill(held, "three", "3")
        assert held.names == ["three"]
        with held.folder() as folder, held.folder("one") as none:
            assert none is None
            assert folder is not None
            assert (folder / "a.txt").read_text() == "3"
            atomic.verify(folder)


def test_killed_while_it_hands_over(directory: Path) -> None:
    """What was not committed is forgotten, what was is held, and the next one may come."""

    def work() -> None:
        held = HeldSnapshots(directory)
        fill(held, "one", "1")
        writer = MemoryFolder()
        writer.write_text("a.txt", "2")
        held._send({"do": "file", "snapshot": "two", "file": "a.txt"}, [writer.descriptors["a.txt"]])

    kill(child(work))
    with HeldSnapshots(directory) as held:
        assert held.names == ["one"]
        with held.folder() as folder:
            assert folder is not None
            assert (folder / "a.txt").read_text() == "1"


def test_one_trainer_at_a_time_and_one_holder(directory: Path) -> None:
    with HeldSnapshots(directory) as held:
        for _ in range(2):
            with pytest.raises(HolderError, match=f"process {os.getpid()} is training there"):
                HeldSnapshots(directory)
        assert processes(directory) == [held.holder_pid]
        # one that is started by hand all the same
        from memtrain.offload import holder

        command = [sys.executable, "-I", holder.__file__, str(directory), "1"]
        assert subprocess.run(command, check=False).returncode == 3
        fill(held, "one", "1")


def test_a_trainers_children_do_not_keep_the_next_one_out(directory: Path) -> None:
    """A worker that it forked has its socket too, and lives on."""
    receiver, sender = os.pipe()

    def work() -> None:
        fill(HeldSnapshots(directory), "one", "1")
        worker = os.fork()
        if worker == 0:
            os.close(1)
            time.sleep(60)
            os._exit(0)
        os.write(sender, worker.to_bytes(4, "little"))

    kill(child(work))
    worker = int.from_bytes(os.read(receiver, 4), "little")
    try:
        with HeldSnapshots(directory) as held:
            assert held.names == ["one"]
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(receiver)
        os.close(sender)


def test_it_ends_by_itself_when_nobody_comes(directory: Path) -> None:
    held = HeldSnapshots(directory, linger_seconds=0.2)
    fill(held, "one", "1")
    time.sleep(0.4)
    assert processes(directory) == [held.holder_pid]  # as long as the trainer is there
    held.leave()
    deadline = time.monotonic() + 20
    while processes(directory) and time.monotonic() < deadline:
        time.sleep(0.02)
    held._await_end()


def test_signals(directory: Path) -> None:
    """A terminal's do not reach it, or harm it; SIGTERM ends it and SIGKILL is told by name."""
    held = HeldSnapshots(directory)
    fill(held, "one", "1")
    assert os.getsid(held.holder_pid) == held.holder_pid
    for harmless in (signal.SIGINT, signal.SIGHUP):
        os.kill(held.holder_pid, harmless)
    fill(held, "two", "2")
    os.kill(held.holder_pid, signal.SIGKILL)
    with pytest.raises(HolderError, match=f"process {held.holder_pid}, .* is gone, and they with it"):
        fill(held, "three", "3")
    held.close()
    with HeldSnapshots(directory) as again:  # what a killed one left is no hindrance
        assert again.names == []
        os.kill(again.holder_pid, signal.SIGTERM)
        again._await_end()
        assert not directory.exists()


def test_what_is_held_cannot_be_changed(directory: Path) -> None:
    with HeldSnapshots(directory) as held:
        fill(held, "one", "1")
        with held.folder() as folder:
            assert folder is not None
            descriptor = os.open(folder / "a.txt", os.O_RDWR)
            try:
                with pytest.raises(PermissionError):
                    os.pwrite(descriptor, b"2", 0)
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptor, 0)
            finally:
                os.close(descriptor)


def test_a_snapshot_that_is_damaged_is_not_loaded(directory: Path, tmp_path: Path) -> None:
    with nvme_run(tmp_path / "a", SEQUENTIAL) as run, HeldSnapshots(directory) as held:
        run.train(batches(1))
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        folder = save_checkpoint(tmp_path / "at", run, progress={})
        with held.publish("one") as writer:
            for path in folder.iterdir():
                if path.name != "manifest.json":
                    data = bytearray(path.read_bytes())
                    entry = atomic.read_manifest(folder)[path.name]
                    data[len(data) // 2] ^= 1
                    writer._write(path.name, bytes(data))
                    writer.note(path.name, entry)
        with held.folder() as found:
            assert found is not None
            with pytest.raises(CorruptCheckpointError, match="has another checksum than was written"):
                load_checkpoint(found, run)
        assert all(torch.equal(before[n], t) for n, t in run.model.state_dict().items())


def test_room() -> None:
    check_room(100, 200, "MemAvailable")
    with pytest.raises(HolderError, match=r"\(202 bytes: the last one and the next\).*give the job 2 bytes"):
        check_room(101, 200, "MemAvailable")


def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HolderError, match="cannot be made"):
        HeldSnapshots(tmp_path / "file" / "holder")


def test_a_visitor_that_is_gone_before_it_is_greeted_takes_nothing_along(directory: Path) -> None:
    held = HeldSnapshots(directory)
    fill(held, "one", "kept")
    os.kill(held.holder_pid, signal.SIGSTOP)
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            os.chdir(directory)
            visitor = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            visitor.connect("socket")
            os._exit(0)
        os.waitpid(pid, 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor, contextlib.chdir(directory):
        visitor.connect("socket")
    os.kill(held.holder_pid, signal.SIGCONT)
    with held.folder() as folder:
        assert folder is not None
        assert (folder / "a.txt").read_text() == "kept"
    held.close()


def test_a_snapshot_that_arrives_in_part_is_not_held(directory: Path) -> None:
    held = HeldSnapshots(directory)
    fill(held, "one", "kept")
    open_now = len(os.listdir(f"/proc/{held.holder_pid}/fd"))
    resource.prlimit(held.holder_pid, resource.RLIMIT_NOFILE, (open_now + 3, open_now + 3))
    for _ in range(2):
        with pytest.raises(HolderError, match=r"took [1-8] of the 9 files of snapshot two.*ulimit -n"):
            fill_many(held, "two")
    assert held.names == ["one"]
    held.leave()
    with HeldSnapshots(directory) as again:
        assert again.names == ["one"]
        with again.folder() as folder:
            assert folder is not None
            assert (folder / "a.txt").read_text() == "kept"


def test_an_answer_that_comes_too_late_is_not_taken_for_another(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_module, "_START_SECONDS", 2.0)
    held = HeldSnapshots(directory)
    fill(held, "one", "kept")
    os.kill(held.holder_pid, signal.SIGSTOP)
    try:
        with pytest.raises(HolderError, match="is gone"):
            fill(held, "two", "late")
    finally:
        os.kill(held.holder_pid, signal.SIGCONT)
    with pytest.raises(HolderError, match="is gone"):
        fill(held, "three", "never")
    held.leave()
    with HeldSnapshots(directory) as again:
        assert again.names in (["one"], ["one", "two"])


def test_a_directory_of_others_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "holder"
    place.mkdir(mode=0o755)
    with pytest.raises(HolderError, match=r"not this user's alone \(owner \d+, mode 755\)"):
        HeldSnapshots(place)
    assert place.exists()


def test_a_relative_directory_goes_and_what_is_others_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with HeldSnapshots("run/holder") as held:
        fill(held, "one", "kept")
    assert not (tmp_path / "run" / "holder").exists()
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "mine" / "precious").write_text("kept")
    with HeldSnapshots(tmp_path / "mine") as held:
        fill(held, "one", "kept")
    assert sorted(os.listdir(tmp_path / "mine")) == ["precious"]
