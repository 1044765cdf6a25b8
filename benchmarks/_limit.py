"""A hard memory limit for one child process: cgroup v1, cgroup v2, or a systemd scope.

A claim about memory is worth what enforces it. Under these limits the kernel kills a process that takes a
page too many, whatever the process believes about itself, and swap does not help: it is limited to nothing.
Page cache that the child brings in is charged to it too; the kernel reclaims that before it kills.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

V1_ROOT = Path("/sys/fs/cgroup/memory")
V2_ROOT = Path("/sys/fs/cgroup")


class NoHardLimitError(RuntimeError):
    """This machine lets us make no memory cgroup by any of the three ways."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitedGroup:
    """A group that is ready: how to start a command in it, and where its peak is read."""

    kind: str
    prefix: tuple[str, ...]
    """Put before the command; the process that it starts is in the group from its first page on."""
    peak_file: Path | None = None
    events_file: Path | None = None

    def peak_bytes(self) -> int | None:
        """Most bytes that the group has held, page cache included; None where nobody counted."""
        if self.peak_file is None or not self.peak_file.exists():
            return None
        return int(self.peak_file.read_text())

    def oom_kills(self) -> int:
        """How many processes of the group the kernel has killed for want of memory."""
        if self.events_file is None or not self.events_file.exists():
            return 0
        counts = dict(line.split()[:2] for line in self.events_file.read_text().splitlines())
        return int(counts.get("oom_kill", 0))


@contextlib.contextmanager
def memory_limit(limit_bytes: int | None) -> Iterator[LimitedGroup]:
    """A group limited to ``limit_bytes`` (None: counted, not limited); removed on exit.

    Raises:
        NoHardLimitError: neither cgroup v1, nor v2, nor systemd-run will have us, with the reason of each.
    """
    name = f"memtrain_bench_{os.getpid()}_{time.monotonic_ns()}"
    reasons = []
    for make in (_make_v1, _make_v2, _make_scope):
        try:
            group, folder = make(name, limit_bytes)
        except OSError as error:
            reasons.append(f"{make.__name__.removeprefix('_make_')}: {error}")
            continue
        try:
            yield group
        finally:
            if folder is not None:
                _remove(folder)
        return
    raise NoHardLimitError(
        "cannot limit a child's memory on this machine (" + "; ".join(reasons) + "); run as root, or where "
        "`systemd-run --scope -p MemoryMax=1G true` works"
    )


def _own_group(root: Path, controller: str) -> Path:
    """Where this process stands in the hierarchy, so that the child's group lies below it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = root / path.lstrip("/")
            return own if own.is_dir() else root
    raise FileNotFoundError(f"/proc/self/cgroup names no {controller or 'unified'} hierarchy")


def _entering(folder: Path) -> tuple[str, ...]:
    return ("/bin/sh", "-c", f'echo $$ > "{folder}/cgroup.procs" && exec "$@"', "sh")


def _make_v1(name: str, limit_bytes: int | None) -> tuple[LimitedGroup, Path]:
    parent = _own_group(V1_ROOT, "memory")
    if not (parent / "memory.limit_in_bytes").exists():
        raise FileNotFoundError(f"no memory.limit_in_bytes in {parent}")
    folder = parent / name
    folder.mkdir()
    try:
        if limit_bytes is not None:
            (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
            swap = folder / "memory.memsw.limit_in_bytes"  # absent where the kernel does not account swap
            if swap.exists():
                swap.write_text(str(limit_bytes))
    except OSError:
        folder.rmdir()
        raise
    return (
        LimitedGroup(
            kind="cgroup v1",
            prefix=_entering(folder),
            peak_file=folder / "memory.max_usage_in_bytes",
            events_file=folder / "memory.oom_control",
        ),
        folder,
    )


def _make_v2(name: str, limit_bytes: int | None) -> tuple[LimitedGroup, Path]:
    # Not below our own group: a v2 group with processes in it may not have limited children. Only the
    # root is excused from that.
    if "memory" not in (V2_ROOT / "cgroup.subtree_control").read_text().split():
        raise PermissionError(f"{V2_ROOT}/cgroup.subtree_control does not delegate memory")
    folder = V2_ROOT / name
    folder.mkdir()
    try:
        if limit_bytes is not None:
            (folder / "memory.max").write_text(str(limit_bytes))
            swap = folder / "memory.swap.max"
            if swap.exists():
                swap.write_text("0")
    except OSError:
        folder.rmdir()
        raise
    return (
        LimitedGroup(
            kind="cgroup v2",
            prefix=_entering(folder),
            peak_file=folder / "memory.peak",
            events_file=folder / "memory.events",
        ),
        folder,
    )


def _make_scope(name: str, limit_bytes: int | None) -> tuple[LimitedGroup, None]:
    systemd_run = shutil.which("systemd-run")
    if systemd_run is None or not Path("/run/systemd/system").is_dir():
        raise FileNotFoundError("systemd does not run here")
    user = () if os.getuid() == 0 else ("--user",)
    limits = () if limit_bytes is None else ("-p", f"MemoryMax={limit_bytes}", "-p", "MemorySwapMax=0")
    prefix = (systemd_run, *user, "--scope", "--quiet", f"--unit={name}", *limits, "--")
    return LimitedGroup(kind="systemd scope", prefix=prefix), None


def _remove(folder: Path) -> None:
    """Remove an empty group; its last process may take a moment to be gone."""
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.1)
    raise OSError(f"{folder} still holds processes: {(folder / 'cgroup.procs').read_text().split()}")
