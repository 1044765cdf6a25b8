"""How fast this machine moves bytes: measured through the engine that will move them, and remembered.

A GPU's host memory is measured too: copies between the two through the same streams, and the threads that
move bytes between staging slots and the tier; the slower of the two counts, since they run at once.

The disk is read alone, written alone, and both together, in a preallocated file that was written once
before: what an arena does all day. One measurement takes a few seconds and under 128 MiB; it is kept per
machine and device of the directory, with its date.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch

from memtrain.offload.codec import SEGMENT_BYTES, Codec, staging_bytes
from memtrain.offload.device import Device, make_device
from memtrain.offload.errors import OffloadError, SwapDirectoryError
from memtrain.offload.measure_codec import measure_codec
from memtrain.offload.rates import TRANSFER_BYTES, TRANSFERS, copy_rates, cpu_seconds, median_rates
from memtrain.offload.rundir import (
    RunDirectory,
    check_swap_directory,
    filesystem_type,
    machine_identity,
    open_arena,
)
from memtrain.offload.slab import Slab
from memtrain.offload.targets import BLOCK_BYTES
from memtrain.offload.tiers import MemoryStore, NvmeStore, Store, wait_all
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Link, Machine
from memtrain.planner.memory_place import MemoryPlace
from memtrain.planner.units import MiB, format_gib

_ROUND_SECONDS = 0.5  # long enough that a disk's pauses of some 10 ms weigh little, and 4.5 s in all
_PROBE_BYTES = 2 * TRANSFERS * TRANSFER_BYTES + BLOCK_BYTES
# A step of thirty blocks that moves nothing took 1.07 to 1.11 of its parts timed alone (docs/log.md).
_CPU_SLOWDOWN = 1.07
_DRAM_BYTES = 32 * MiB  # two of them lie well outside the caches of a core


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapProbe:
    """What a swap directory can do, for people to read."""

    path: str
    usable: bool
    filesystem: str
    free_bytes: int
    direct_io: bool
    alignment_bytes: int | None
    """Of direct I/O as it will be used; None without it."""
    memlock_bytes: int | None
    """Limit of locked memory; None means unlimited. Only CUDA registration counts against it."""
    problem: str = ""
    """Why it is not usable, and what to do."""

    def rows(self) -> list[tuple[str, str]]:
        """Name and text of each finding."""
        memlock = "unlimited" if self.memlock_bytes is None else format_gib(self.memlock_bytes)
        direct = f"yes, blocks of {self.alignment_bytes} bytes" if self.direct_io else "no"
        rows = [
            ("swap directory", self.path),
            ("file system", self.filesystem),
            ("free", format_gib(self.free_bytes)),
            ("direct I/O", direct),
            ("locked memory limit", memlock),
        ]
        return [*rows, ("problem", self.problem)] if self.problem else rows


def probe_swap_directory(path: str | os.PathLike[str]) -> SwapProbe:
    """Look at a directory as ``NvmeStore`` will, with a real write and read of one block. Never raises for
    a bad one.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    problem, direct = "", False
    try:
        run = RunDirectory(path)
    except SwapDirectoryError as error:
        problem = str(error)
    else:
        try:
            os.close(open_arena(run, BLOCK_BYTES, direct=True))
            direct = True
        except OffloadError as error:
            problem = str(error)
        finally:
            run.close()
    exists = os.path.isdir(path)
    space = os.statvfs(path) if exists else None
    return SwapProbe(
        path=os.path.realpath(path),
        usable=not problem,
        filesystem=filesystem_type(path) if exists else "none",
        free_bytes=space.f_bavail * space.f_frsize if space else 0,
        direct_io=direct,
        alignment_bytes=BLOCK_BYTES if direct else None,
        memlock_bytes=None if soft == resource.RLIM_INFINITY else soft,
        problem=problem,
    )


def measure_machine(
    directory: str | os.PathLike[str] | None,
    *,
    device: str = "cpu",
    host: MemoryPlace | None = None,
    cxl: MemoryPlace | None = None,
    codecs: Mapping[Tier, Codec] | None = None,
    weight_codecs: Mapping[Tier, Codec] | None = None,
    weight_dtype: torch.dtype = torch.bfloat16,
    refresh: bool = False,
    round_seconds: float = _ROUND_SECONDS,
) -> Machine:
    """This machine's DRAM and swap bandwidth, from the cache where it was measured before.

    Args:
        directory: the swap directory; without one the machine has no nvme link.
        device: what computes, as the plan names it. One with memory of its own has a link to the host.
        host: where the host tier lies, where that was said.
        cxl: the CXL memory to measure a link to.
        codecs: how optimizer state is to be coded on its way to a tier: measured through it too.
        weight_codecs: the same of weights, of ``weight_dtype``.
        refresh: measure again.
        round_seconds: of each of nine rounds.

    Raises:
        SwapDirectoryError, TierFullError: the directory cannot serve.
        PlacementError: the CXL memory cannot.
        OffloadError: there is no such device.
        ValueError: a codec for a tier that is not measured.
    """
    codecs, weight_codecs = codecs or {}, weight_codecs or {}
    where = None if directory is None else check_swap_directory(directory)
    cache = _cache_path(where, device, {Tier.HOST: host, Tier.CXL: cxl}, codecs, weight_codecs, weight_dtype)
    known = None if refresh else _read_cache(cache)
    if known is not None and _has(known, codecs, weight_codecs):
        return known
    source = f"measured {date.today().isoformat()}"
    dram, links = _measure_dram(), []
    opened = make_device(device)
    stores: list[tuple[Tier, Callable[[int], Store]]] = []
    if not opened.shares_memory:
        links.append(_measure_host(opened, source, round_seconds, host))
        stores.append((Tier.HOST, partial(MemoryStore, Tier.HOST, place=host)))
    if cxl is not None:
        with MemoryStore(Tier.CXL, _PROBE_BYTES, cxl) as store:
            links.append(_measure_store(store, source, round_seconds))
        stores.append((Tier.CXL, partial(MemoryStore, Tier.CXL, place=cxl)))
    if where is not None:
        with NvmeStore(where, _PROBE_BYTES) as disk:
            links.append(_measure_store(disk, source, round_seconds))
        stores.append((Tier.NVME, partial(NvmeStore, where)))
    if unmeasured := (codecs.keys() | weight_codecs.keys()) - {tier for tier, _ in stores}:
        names = ", ".join(tier.value for tier in unmeasured)
        raise ValueError(f"a codec is given for {names}, which this machine does not have here")
    for place, (tier, open_store) in enumerate(stores):
        if tier in codecs:
            measured = measure_codec(open_store, codecs[tier], round_seconds)
            links[place] = dataclasses.replace(links[place], state_codec=measured)
        if tier in weight_codecs:
            measured = measure_codec(open_store, weight_codecs[tier], round_seconds, weights=weight_dtype)
            links[place] = dataclasses.replace(links[place], weight_codec=measured)
    machine = Machine(
        name=platform.node() or "this machine",
        device=device,
        cores=len(os.sched_getaffinity(0)),
        dram_copy_bytes_per_second=dram,
        links=tuple(links),
        arithmetic_slowdown=_CPU_SLOWDOWN if opened.shares_memory else 1.0,
        source=source,
    )
    _write_cache(cache, machine)
    return machine


def _measure_dram() -> float:
    source, target = Slab(_DRAM_BYTES), Slab(_DRAM_BYTES)
    source.buffer.fill_(1)
    target.buffer.fill_(2)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        ctypes.memmove(target.address, source.address, _DRAM_BYTES)
        rates.append(_DRAM_BYTES / (time.perf_counter() - start))
    return statistics.median(rates)


def _measure_store(store: Store, source: str, round_seconds: float) -> Link:
    slab = Slab(2 * TRANSFERS * TRANSFER_BYTES)
    slab.buffer.random_(0, 256)  # nothing that a disk or a file system could compress
    views = list(torch.split(slab.buffer, TRANSFER_BYTES))
    extents = [store.allocate(f"probe {i}", TRANSFER_BYTES) for i in range(2 * TRANSFERS)]
    pairs = list(zip(extents, views, strict=True))
    wait_all([store.write(*pair) for pair in pairs])
    read = [partial(store.read, *pair) for pair in pairs[:TRANSFERS]]
    write = [partial(store.write, *pair) for pair in pairs[TRANSFERS:]]
    seconds, moved = cpu_seconds(), _moved(store)
    rates = median_rates(read, write, round_seconds)
    seconds, moved = cpu_seconds() - seconds, _moved(store) - moved
    return Link(
        tier=store.tier,
        read_bytes_per_second=rates["read"],
        write_bytes_per_second=rates["write"],
        mixed_bytes_per_second=rates["mixed"],
        cpu_seconds_per_byte=seconds / moved,
        latency_seconds=_latency(store),
        source=source,
    )


def _measure_host(
    device: Device, source: str, round_seconds: float, place: MemoryPlace | None = None
) -> Link:
    """Host memory behind a device: the slower of the copies and of the tier behind the staging slots."""
    with MemoryStore(Tier.HOST, _PROBE_BYTES, place) as store:
        link = _measure_store(store, source, round_seconds)
    copies = copy_rates(device, round_seconds)
    return dataclasses.replace(
        link,
        read_bytes_per_second=min(link.read_bytes_per_second, copies["read"]),
        write_bytes_per_second=min(link.write_bytes_per_second, copies["write"]),
        mixed_bytes_per_second=min(link.mixed_bytes_per_second, copies["mixed"]),
    )


def _latency(store: Store) -> float:
    """Seconds of a lone read of one block, submission to result."""
    extent, block = store.allocate("probe latency", BLOCK_BYTES), Slab(BLOCK_BYTES).buffer
    store.write(extent, block).wait()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        store.read(extent, block).wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _moved(store: Store) -> int:
    now = store.statistics()
    return now.bytes_read + now.bytes_written


def _cache_path(
    directory: Path | None,
    device: str,
    places: Mapping[Tier, MemoryPlace | None],
    codecs: Mapping[Tier, Codec],
    weight_codecs: Mapping[Tier, Codec],
    weight_dtype: torch.dtype,
) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    disk = "none" if directory is None else f"{os.stat(directory).st_dev}:{filesystem_type(directory)}"
    what = f"{machine_identity()} {platform.node()} {disk} {device}"
    what += "".join(f" {tier.value} {place}" for tier, place in places.items() if place is not None)
    for tier, codec in sorted(codecs.items()):  # with its memory, which another version may need more of
        what += f" {tier.value} coded {codec.name} {SEGMENT_BYTES} {staging_bytes(codec)}"
    for tier, codec in sorted(weight_codecs.items()):
        what += f" {tier.value} weights {weight_dtype} {codec.name} {SEGMENT_BYTES} {staging_bytes(codec)}"
    key = hashlib.sha256(what.encode()).hexdigest()[:16]
    return base / "memtrain" / f"machine-{key}.json"


def _read_cache(path: Path) -> Machine | None:
    try:
        return Machine.from_json(path.read_text())
    except (OSError, ValueError, json.JSONDecodeError):
        return None  # never measured, or by another version


def _has(known: Machine, codecs: Mapping[Tier, Codec], weight_codecs: Mapping[Tier, Codec]) -> bool:
    """Whether every link was measured through what is asked for, and through nothing else."""
    for link in known.links:
        for asked, measured in (
            (codecs.get(link.tier), link.state_codec),
            (weight_codecs.get(link.tier), link.weight_codec),
        ):
            if (asked and asked.name) != (measured and measured.name):
                return False
    return True


def _write_cache(path: Path, machine: Machine) -> None:
    """Remember, where there is a place to; a machine without a writable home measures each time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(machine.to_json())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (
            errno.EACCES,
            errno.EROFS,
            errno.ENOSPC,
            errno.EPERM,
            errno.ENOENT,
            errno.ENOTDIR,
        ):
            raise
