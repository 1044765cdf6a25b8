"""Limits of the process and of the kernel: few descriptors, little address space, no locked memory, system
calls that a container forbids, file systems on top of others."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import threading
from pathlib import Path

import pytest

from memtrain.offload.atomic import CheckpointError, publish
from memtrain.offload.errors import OffloadError, PlacementError, StagingError, SwapDirectoryError
from memtrain.offload.io import ThreadPoolBackend
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from memtrain.offload.tiers import MemoryStore, NvmeStore
from memtrain.planner.actions import Tier
from memtrain.planner.memory_place import MemoryPlace
from tests.offload.faults.disks import MiB, in_child, loop_disk, needs_mounts, run
from tests.offload.faults.runs_on_disk import assert_trained, open_run_in
from tests.offload.tier_stores import CAPACITY
from tests.offload.training import batches

# Of x86-64, as in asm/unistd_64.h.
IO_URING = (425, 426, 427)
AIO = (206, 209, 208)
MLOCK = (149, 151, 325)
MBIND, RENAMEAT2 = 237, 316
_LOAD_NUMBER, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2

needs_seccomp = pytest.mark.skipif(platform.machine() != "x86_64", reason="system call numbers of x86-64")


def forbid(*calls: int, number: int) -> None:
    """From now on the kernel answers these system calls with an error, as a container's filter does."""
    lines = [struct.pack("HBBI", _LOAD_NUMBER, 0, 0, 0)]
    for call in calls:
        lines.append(struct.pack("HBBI", _JUMP_EQUAL, 0, 1, call))
        lines.append(struct.pack("HBBI", _RETURN, 0, 0, _ERRNO | number))
    lines.append(struct.pack("HBBI", _RETURN, 0, 0, _ALLOW))
    program = ctypes.create_string_buffer(b"".join(lines))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_SECCOMP, _FILTER, filter_, 0, 0) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a run imports on its way, once here instead of in every child."""
    train(tmp_path_factory.mktemp("first"))


def train(directory: Path) -> None:
    with open_run_in(directory) as training:
        training.train(batches(2))
        save_checkpoint(directory / "at", training, progress={})
        load_checkpoint(directory / "at", training)
        assert_trained(training, 2)


def test_no_locked_memory_is_needed(tmp_path: Path) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        train(tmp_path)

    in_child(work)


@needs_seccomp
def test_no_system_call_is_needed_that_containers_forbid(tmp_path: Path) -> None:
    def work() -> None:
        forbid(*IO_URING, *AIO, *MLOCK, MBIND, number=errno.EPERM)
        train(tmp_path)
        with pytest.raises(PlacementError), MemoryStore(Tier.CXL, CAPACITY, MemoryPlace(nodes=(0,))):
            pass

    in_child(work)


@needs_seccomp
def test_a_kernel_that_cannot_exchange_names_says_so_and_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    def work() -> None:
        with publish(tmp_path / "at") as writer:
            writer.write_text("a", "old")
        forbid(RENAMEAT2, number=errno.ENOSYS)
        with (
            pytest.raises(CheckpointError, match="save under a new name"),
            publish(tmp_path / "at") as writer,
        ):
            writer.write_text("a", "new")
        with publish(tmp_path / "next") as writer:
            writer.write_text("a", "new")
        assert (tmp_path / "at" / "a").read_text() == "old"
        assert sorted(os.listdir(tmp_path)) == ["at", "next"]

    in_child(work)


def test_too_few_descriptors_are_an_error_at_the_start_that_leaves_nothing(tmp_path: Path) -> None:
    def work() -> list[str]:
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 16, used + 16))
        taken: list[int] = []
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        seen = set()
        for attempt in range(12):
            try:
                NvmeStore(tmp_path, CAPACITY).close()
                seen.add("works")
            except SwapDirectoryError as error:
                seen.add("Too many open files" if "Too many open files" in str(error) else str(error))
            for _ in range(2):  # one more than before is free, and none was lost
                os.close(taken.pop())
            taken.append(os.dup(0))
            free = attempt + 1
            probes = [os.dup(0) for _ in range(free)]
            with pytest.raises(OSError, match="Too many open files"):
                os.dup(0)
            for probe in probes:
                os.close(probe)
            assert os.listdir(tmp_path) == []
        return sorted(seen)

    assert in_child(work) == ["Too many open files", "works"]


def test_too_little_address_space_is_a_typed_error(tmp_path: Path) -> None:
    def work() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + 64 * MiB, hard))
        with pytest.raises(StagingError, match=r"no 1073741824 bytes of address space .*ulimit -v"):
            MemoryStore(Tier.HOST, 1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        train(tmp_path)

    in_child(work)


def test_threads_that_cannot_be_started_are_a_typed_error_and_the_others_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = set(threading.enumerate())
    real, left = threading.Thread.start, [2]

    def start(self: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OffloadError, match=r"only 2 of 4 I/O threads could be started .*ulimit -u"):
        ThreadPoolBackend(4)
    assert set(threading.enumerate()) == before


@needs_mounts
def test_a_file_system_on_top_of_another(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "disk", 64 * MiB) as disk:
        for name in ("lower", "upper", "work", "merged"):
            (disk / name).mkdir()
        layers = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
        try:
            run("mount", "-t", "overlay", "overlay", "-o", layers, disk / "merged")
        except OSError as error:
            pytest.skip(f"no overlay here: {error}")
        try:
            train(disk / "merged")
        finally:
            run("umount", disk / "merged")
