"""Real file systems that fail: small, full, frozen, cut off, of odd blocks; and processes of their own to
fail in."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pickle
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MiB = 1 << 20
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_KEEP_SIZE, _PUNCH_HOLE = 1, 2

needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control") or shutil.which("mkfs.ext4") is None,
    reason="needs root, loop devices and mkfs.ext4",
)


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command[0]} failed: {done.stderr}")
    return done.stdout.strip()


@contextlib.contextmanager
def loop_disk(directory: Path, name: str, size_bytes: int, *, block_bytes: int = 512) -> Iterator[Path]:
    """A mounted ext4 on ``directory/name.image``; skips where the kernel refuses to."""
    image, mount = directory / f"{name}.image", directory / name
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    mount.mkdir()
    device = run("losetup", "-f", "--show", "-b", str(block_bytes), image)
    try:
        # Without a journal a failing device stays mounted, and says so for each block.
        run("mkfs.ext4", "-q", "-m", "0", "-b", "4096", "-O", "^has_journal", device)
        try:
            run("mount", "-o", "errors=continue", device, mount)
        except OSError as error:
            pytest.skip(f"the kernel refuses to mount a loop device here: {error}")
        try:
            yield mount
        finally:
            with contextlib.suppress(OSError):
                run("umount", mount)
    finally:
        run("losetup", "-d", device)


def fill(directory: Path) -> Path:
    """Take all the room that is left; the file that holds it."""
    path = directory / "filler"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (MiB, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
                    os.fsync(file.fileno())
    return path


def punch_holes(descriptor: int, offset: int, nbytes: int) -> None:
    """Give a reserved range of a file back to the file system, as one that copies on write does."""
    arena = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        wide = ctypes.c_longlong
        if libc.fallocate(arena, _KEEP_SIZE | _PUNCH_HOLE, wide(offset), wide(nbytes)):
            raise OSError(ctypes.get_errno(), "fallocate")
        os.fsync(arena)
    finally:
        os.close(arena)


@contextlib.contextmanager
def frozen(mount: Path) -> Iterator[None]:
    """Writes to the file system wait, as on a device that hangs."""
    descriptor = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(descriptor, _FITHAW, 0)
    finally:
        os.close(descriptor)


def in_child(work: Callable[[], Any], *, seconds: float = 60.0) -> Any:
    """What ``work`` returns, done in a forked process, whose limits and rights it may spoil."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            answer = pickle.dumps((True, work()))
        except BaseException as error:
            answer = pickle.dumps((False, f"{type(error).__name__}: {error}"))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(answer)
        os._exit(0)
    os.close(writer)
    answer, deadline = b"", time.monotonic() + seconds
    with os.fdopen(reader, "rb") as pipe:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                break
            answer += part
        else:
            os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise AssertionError(f"the process ended with {status} (a hang is -9 after {seconds:.0f} s)")
    good, value = pickle.loads(answer)
    if not good:
        raise AssertionError(value)
    return value


def open_descriptors() -> list[str]:
    """What this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(path for path in found if not path.startswith("/proc/"))
