"""The swap directory: what may serve, whose it is, what becomes of it when a run dies or the disk is full."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections import deque

import pytest
import torch

from memtrain.offload import rundir
from memtrain.offload.errors import (
    CorruptExtentError,
    OffloadError,
    SwapDirectoryError,
    TierFullError,
    TierIOError,
)
from memtrain.offload.tiers import NvmeStore, wait_all
from tests.offload.tier_stores import CAPACITY, U, filled


def test_directories_that_cannot_serve_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SwapDirectoryError, match="does not exist: create it"):
        NvmeStore(tmp_path / "none", U)
    with pytest.raises(SwapDirectoryError, match="is not a directory"):
        NvmeStore(tmp_path / "file", U)
    with pytest.raises(ValueError, match="direct must be"):
        NvmeStore(tmp_path, U, direct="maybe")


@pytest.mark.skipif(rundir.filesystem_type("/dev/shm") != "tmpfs", reason="/dev/shm is not a tmpfs here")
def test_tmpfs_is_refused_by_name():
    with pytest.raises(SwapDirectoryError, match="is on tmpfs, which is memory"):
        NvmeStore("/dev/shm", U)


def test_a_directory_of_no_write_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(SwapDirectoryError, match="is not writable: change its owner"):
        NvmeStore(tmp_path, U)


def test_no_direct_io_is_refused_with_the_remedy_and_leaves_nothing(tmp_path, monkeypatch):
    def wrong_block(descriptor, buffers, offset):
        return real(descriptor, buffers, offset) - 512

    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", wrong_block)
    with pytest.raises(SwapDirectoryError, match=r"cannot do direct I/O.*direct='allow_buffered'"):
        NvmeStore(tmp_path, U)
    monkeypatch.setattr(
        os, "pwritev", lambda *a: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid argument"))
    )
    with pytest.raises(
        SwapDirectoryError, match=r"cannot do direct I/O in blocks of 4096 bytes \(Invalid argument\)"
    ):
        NvmeStore(tmp_path, U)
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_refuses_direct_writes_is_used_buffered_when_allowed(tmp_path, monkeypatch):
    """As some do: the flag is taken, the first direct write is not."""
    real = os.pwritev

    def refuse_if_direct(descriptor, buffers, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", refuse_if_direct)
    with pytest.raises(SwapDirectoryError, match="Invalid argument"):
        NvmeStore(tmp_path, CAPACITY)
    with pytest.warns(UserWarning, match=r"Invalid argument.*through the page cache"):
        store = NvmeStore(tmp_path, CAPACITY, direct="allow_buffered")
    with store:
        assert not store.direct
        extent, source, found = store.allocate("w", 3 * U + 1), filled(3 * U + 1), filled(3 * U + 1, 1)
        wait_all([store.write(extent, source), store.read(extent, found)])
        assert torch.equal(found, source)


def test_more_than_the_disk_has_is_refused_at_the_start(tmp_path):
    space = os.statvfs(tmp_path)
    need = (space.f_bavail * space.f_frsize + (1 << 30)) // U * U
    with pytest.raises(
        TierFullError,
        match=rf"free, the plan reserves .* \({need} bytes\): free \d+ bytes, lower budget.nvme",
    ):
        NvmeStore(tmp_path, need)
    assert os.listdir(tmp_path) == []


def test_the_run_directory_is_private_and_its_arena_has_no_name(tmp_path):
    old = os.umask(0)
    try:
        store = NvmeStore(tmp_path, CAPACITY)
    finally:
        os.umask(old)
    with store:
        (run,) = tmp_path.iterdir()
        assert run.stat().st_mode & 0o777 == 0o700
        assert os.listdir(run) == ["lock"]
        assert (run / "lock").stat().st_mode & 0o777 == 0o600
        status = os.fstat(store._target.descriptor)
        assert status.st_mode & 0o777 == 0o600
        assert (status.st_nlink, status.st_size) == (0, CAPACITY)
        assert status.st_blocks * 512 >= CAPACITY  # reserved, not sparse
    assert os.listdir(tmp_path) == []


def test_planted_links_and_foreign_directories_are_refused(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f"{rundir.PREFIX}mine").symlink_to(elsewhere)
    with pytest.raises(SwapDirectoryError):
        NvmeStore(tmp_path, U, run_id="mine", resumable=True)
    with pytest.raises(SwapDirectoryError, match="exists already"):
        NvmeStore(tmp_path, U, run_id="mine")
    assert os.listdir(elsewhere) == []
    open_to_all = tmp_path / f"{rundir.PREFIX}open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(SwapDirectoryError, match="open to others"):
        NvmeStore(tmp_path, U, run_id="open", resumable=True)
    with pytest.raises(SwapDirectoryError, match="1 to 64 letters"):
        NvmeStore(tmp_path, U, run_id="../up")


def test_two_stores_in_one_directory_do_not_see_each_other(tmp_path):
    with NvmeStore(tmp_path, CAPACITY) as one, NvmeStore(tmp_path, CAPACITY) as two:
        assert len(os.listdir(tmp_path)) == 2
        extents = [store.allocate("w", 9 * U) for store in (one, two)]
        sources = [filled(9 * U, seed) for seed in (1, 2)]
        wait_all(store.write(e, s) for store, e, s in zip((one, two), extents, sources, strict=True))
        one.close()
        assert len(os.listdir(tmp_path)) == 1
        found = filled(9 * U, 3)
        two.read(extents[1], found).wait()
        assert torch.equal(found, sources[1])
    assert os.listdir(tmp_path) == []


def run_python(program, *arguments, flags=(), **options):
    return subprocess.Popen(
        [sys.executable, *flags, "-W", "error", "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


HOLD = """
import sys, time
from memtrain.offload.tiers import NvmeStore
store = NvmeStore(sys.argv[1], 1 << 20)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_run_is_reaped_and_a_living_one_is_not(tmp_path):
    victim, living = run_python(HOLD, tmp_path), run_python(HOLD, tmp_path)
    try:
        assert victim.stdout.readline() + living.stdout.readline() == "ready\nready\n"
        assert rundir.reap_dead_runs(tmp_path) == []
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        assert len(os.listdir(tmp_path)) == 2
        with NvmeStore(tmp_path, U):
            left = os.listdir(tmp_path)
        assert sorted(int(name.removeprefix(rundir.PREFIX).split("-")[0]) for name in left) == sorted(
            [living.pid, os.getpid()]
        )
    finally:
        for process in (victim, living):
            process.kill()
            process.communicate()


def test_what_is_not_provably_dead_is_left(tmp_path):
    def run(name, text, **change):
        path = tmp_path / f"{rundir.PREFIX}{name}"
        path.mkdir(mode=0o700)
        here = {**rundir._this_process(), "resumable": False, **change}
        (path / "lock").write_text(text if text is not None else __import__("json").dumps(here))
        return path

    kept = [
        run("self", None),
        run("other-machine", None, machine="elsewhere", pid=2**22),
        run("resumable", None, pid=2**22 + 1, resumable=True),
        run("garbage", "{not json"),
        run("empty", ""),
    ]
    dead = [
        run("gone", None, pid=2**22 + 1),
        run("recycled", None, start=1),
        run("rebooted", None, boot="earlier"),
    ]
    # Killed between making the directory and filling the lock: the name tells.
    boot = rundir._this_process()["boot"][:8]
    me = rundir._start_time(os.getpid())
    dead.append(run(f"{2**22 + 1}-5-{boot}-00000000", ""))
    (dead[-1] / "lock").unlink()
    kept += [run(f"{os.getpid()}-{me}-{boot}-00000000", ""), run(f"{2**22 + 1}-5-deadbeef-00000000", "")]
    (tmp_path / f"{rundir.PREFIX}file").write_text("not a directory")
    (tmp_path / f"{rundir.PREFIX}link").symlink_to(kept[0])
    assert sorted(rundir.reap_dead_runs(tmp_path)) == sorted(dead)
    assert all(path.exists() for path in kept)


def test_a_forked_child_may_not_use_or_remove_anything(tmp_path):
    with NvmeStore(tmp_path, CAPACITY) as store:
        extent, source, found = store.allocate("w", U), filled(U), filled(U, 1)
        store.write(extent, source).wait()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                try:
                    store.write(extent, torch.zeros(0, dtype=torch.uint8).new_zeros(U))
                except (OffloadError, ValueError) as error:
                    code = 0 if "forked child" in str(error) or "multiple of" in str(error) else 2
                try:
                    store.allocate("x", U)
                    code = 3
                except OffloadError as error:
                    code = code if "forked child may not use it" in str(error) else 4
                store.close()
                store._remove_directory()
                store._close_file()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(os.listdir(tmp_path)) == 1
        store.read(extent, found).wait()
        assert torch.equal(found, source)


@pytest.mark.parametrize("flags", [(), ("-O",)])
def test_exit_without_close_leaves_nothing_and_optimized_python_moves_every_byte(tmp_path, flags):
    program = """
import sys, torch
from memtrain.offload.errors import CorruptExtentError
from memtrain.offload.slab import Slab
from memtrain.offload.tiers import NvmeStore
import os
store = NvmeStore(sys.argv[1], 1 << 20)
source, found = Slab(100000), Slab(100000)
source.buffer.fill_(77)
extent = store.allocate("w", 100000)
store.write(extent, source.buffer[:100000]).wait()
store.read(extent, found.buffer[:100000]).wait()
print(torch.equal(source.buffer[:100000], found.buffer[:100000]), store.statistics().bytes_written)
fd = os.open(f"/proc/self/fd/{store._target.descriptor}", os.O_WRONLY)
os.pwrite(fd, b"x", extent.arena_offset); os.fsync(fd)
try:
    store.read(extent, found.buffer[:100000]).wait()
except CorruptExtentError:
    print("found")
"""
    process = run_python(program, tmp_path, flags=flags)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "True 100000\nfound\n", "")
    assert os.listdir(tmp_path) == []


def test_a_file_size_limit_is_a_typed_error_at_the_start_and_in_mid_run(tmp_path):
    program = """
import resource, sys
from memtrain.offload.errors import SwapDirectoryError, TierIOError
from memtrain.offload.slab import Slab
from memtrain.offload.tiers import NvmeStore
buffer = Slab(1 << 20).buffer
store = NvmeStore(sys.argv[1], 1 << 20, piece_bytes=1 << 18)
resource.setrlimit(resource.RLIMIT_FSIZE, (300 * 1024, 300 * 1024))
extent = store.allocate("w", 1 << 20)
try:
    store.write(extent, buffer).wait()
except TierIOError as error:
    print(error.errno, "ulimit -f" in str(error), "tensor w" in str(error))
try:
    NvmeStore(sys.argv[1], 1 << 20)
except SwapDirectoryError as error:
    print("File too large" in str(error))
store.close()
"""
    process = run_python(program, tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, f"{errno.EFBIG} True True\nTrue\n", "")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of 64 MiB: what a full disk does is the kernel's, not a mock's."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control") or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root, loop devices and mkfs.ext4")
    image, mount = tmp_path / "image", tmp_path / "mount"
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(mount)], capture_output=True).returncode:
        pytest.skip("the kernel refuses to mount a loop device here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_refused_at_the_start_and_harmless_in_mid_run(small_disk):
    with pytest.raises(TierFullError, match=r"\(67108864 bytes\): free \d+ bytes"):
        NvmeStore(small_disk, 64 << 20)
    with NvmeStore(small_disk, 32 << 20) as store:
        extent, source, found = store.allocate("w", 30 << 20), filled(30 << 20), filled(30 << 20, 1)
        with open(small_disk / "other", "wb", buffering=0) as other, pytest.raises(OSError, match="No space"):
            deque(iter(lambda: other.write(bytes(1 << 20)), None))
        store.write(extent, source).wait()  # the arena's space was reserved before the disk filled up
        store.read(extent, found).wait()
        assert torch.equal(found, source)
        with pytest.raises(TierFullError):
            NvmeStore(small_disk, 8 << 20)
    assert sorted(os.listdir(small_disk)) == ["lost+found", "other"]


def test_a_device_that_loses_its_end_is_an_error_that_names_the_tensor(small_disk, tmp_path):
    with NvmeStore(small_disk, 32 << 20) as store:
        extent, buffer = store.allocate("layers.1.v", 30 << 20), filled(30 << 20)
        store.write(extent, buffer).wait()
        subprocess.run(["sync", "-f", str(small_disk)], check=True)
        os.truncate(tmp_path / "image", 12 << 20)
        with pytest.raises((TierIOError, CorruptExtentError), match=r"layers\.1\.v on nvme"):
            store.read(extent, buffer).wait()
        os.truncate(tmp_path / "image", 64 << 20)
