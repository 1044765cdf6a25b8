"""How much memory there is, how much this process may use, and how much it does use, over time.

A process under a control group (a container, a batch system's slot) may use less than the machine has;
both versions of control groups are read, and the tightest limit on the way up to the root is the one that
kills.
"""

from __future__ import annotations

import threading
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from memtrain.planner import resident

_UNLIMITED = 1 << 60
"""Version 1 writes "no limit" as the largest multiple of a page below 2**63."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLimit:
    """One limit that holds for this process."""

    limit_bytes: int
    used_bytes: int
    source: str
    """The file that holds the limit, or ``MemAvailable``."""

    @property
    def free_bytes(self) -> int:
        """What is left under the limit."""
        return max(0, self.limit_bytes - self.used_bytes)


def cgroup_limit(proc: Path = Path("/proc"), sysfs: Path = Path("/sys/fs/cgroup")) -> MemoryLimit | None:
    """The tightest control-group limit of this process, of either version; None without one."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    found: list[MemoryLimit] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for root in (sysfs, sysfs / "unified"):
                found += _limits_upwards(root, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            found += _limits_upwards(sysfs / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return min(found, key=lambda limit: limit.limit_bytes, default=None)


def _limits_upwards(root: Path, path: str, limit_name: str, usage_name: str) -> list[MemoryLimit]:
    """Limits of the group at ``path`` and of all above it; a container may see its own as the root."""
    found = []
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:depth])
        try:
            limit = (folder / limit_name).read_text().strip()
            used = int((folder / usage_name).read_text())
        except (OSError, ValueError):
            continue
        if limit != "max" and int(limit) < _UNLIMITED:
            found.append(
                MemoryLimit(limit_bytes=int(limit), used_bytes=used, source=str(folder / limit_name))
            )
    return found


def machine_memory(proc: Path = Path("/proc")) -> MemoryLimit:
    """The machine's DRAM and how much of it is not available. Raises OSError without /proc/meminfo."""
    fields = {}
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    total = fields["MemTotal"]
    return MemoryLimit(
        limit_bytes=total, used_bytes=total - fields["MemAvailable"], source=str(proc / "meminfo")
    )


class MemorySampler:
    """A thread that notes the resident memory of this process, every so often, while it is entered.

    One reading costs some ten microseconds. Spikes between two readings escape it: a peak comes from
    ``planner.resident``, which asks the kernel; the samples are for the picture.
    """

    def __init__(self, period_seconds: float = 0.1) -> None:
        if period_seconds <= 0:
            raise ValueError(f"period_seconds must be > 0, got {period_seconds}")
        self.period_seconds = period_seconds
        self.seconds = array("d")
        """Since the sampler was made."""
        self.resident_bytes = array("q")
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._note()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._note()

    def now_seconds(self) -> float:
        """Seconds since the sampler was made: the clock of its samples."""
        return time.monotonic() - self._start

    def _note(self) -> None:
        self.seconds.append(self.now_seconds())
        self.resident_bytes.append(resident.rss_bytes())

    def _run(self) -> None:
        while not self._stop.wait(self.period_seconds):
            self._note()


class PeakMeter:
    """The peak of the whole process, and of phases of it, out of the one peak that the kernel keeps.

    The kernel's mark can only be set back, so ``start_phase`` reads it first. Code that sets the mark back
    without telling us can hide an earlier peak, but never one that comes after.
    """

    def __init__(self) -> None:
        self._whole_bytes = 0

    def start_phase(self) -> None:
        """Begin a phase; the kernel's mark starts at what is resident now.

        Where the kernel does not permit that, a phase's peak is that of the whole process: never too small.
        """
        self._whole_bytes = self.whole_bytes()
        resident.reset_peak()

    def phase_bytes(self) -> int:
        """Peak since the last ``start_phase``."""
        return resident.peak_bytes()

    def whole_bytes(self) -> int:
        """Peak of all phases until now."""
        return max(self._whole_bytes, resident.peak_bytes())
