"""Memory behind a device: ``/dev/daxX.Y``, as CXL memory appears that the kernel keeps out of its own use.

Such a device (mode ``devdax``) is mapped, by whole multiples of its alignment, and has neither pages that
could go elsewhere nor a page cache. Its node is known to sysfs alone: ``move_pages`` does not see its pages.
Nothing here needs torch.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from memtrain.offload.errors import NodeFullError, PlacementError
from memtrain.planner.units import format_gib, round_up

Mapping = TypeVar("Mapping", bound=mmap.mmap)

_DEVICES = Path("/sys/bus/dax/devices")


@dataclass(frozen=True, kw_only=True, slots=True)
class DaxDevice:
    """What sysfs says of a device."""

    path: str
    size_bytes: int
    align_bytes: int
    node: int
    """The node that its memory would be on; -1 where the kernel does not know."""


def dax_devices() -> tuple[DaxDevice, ...]:
    """The devices that can be mapped: those in mode devdax."""
    try:
        names = sorted(entry.name for entry in _DEVICES.iterdir())
    except OSError:
        return ()
    return tuple(_read(name) for name in names if _driver(name) == "device_dax")


def map_device(path: str, nbytes: int, kind: type[Mapping]) -> Mapping:
    """The first ``nbytes`` of a device, rounded up to its alignment, for this process alone, as a ``kind``.
    The device is held until the mapping is let go of: closing it is not enough.

    What stood there is seen; nothing is wiped, before or after.

    Raises:
        NodeFullError: the device is smaller.
        PlacementError: no such device, not one to be mapped, in use, or not permitted.
    """
    device = _find(path)
    size = round_up(nbytes, device.align_bytes)
    if size > device.size_bytes:
        raise NodeFullError(
            f"{path} has {device.size_bytes} bytes ({format_gib(device.size_bytes)}) and {size} were asked "
            f"for (in units of {device.align_bytes}): lower the tier's budget, or enlarge the device (daxctl)"
        )
    lock = _lock(path)
    try:
        mapping = _map(path, size, kind)
    except BaseException:
        _unlock(lock)
        raise
    weakref.finalize(mapping, _unlock, lock).atexit = False
    return mapping


def _open(path: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise PlacementError(
            f"cannot open {path}: {error.strerror}; only root may, unless a udev rule gives it to others"
        ) from error
    if not stat.S_ISCHR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PlacementError(f"{path} is no device: memory is mapped from one, never from a file")
    return descriptor


def _map(path: str, size: int, kind: type[Mapping]) -> Mapping:
    descriptor = _open(path)
    try:
        return kind(descriptor, size, flags=mmap.MAP_SHARED)
    except OSError as error:
        raise PlacementError(f"cannot map {size} bytes of {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


_locks: dict[object, int] = {}
"""Descriptors that hold the devices, apart from the mappings': a mapping keeps a duplicate of its own, which
nobody can close in a forked child, and a lock is held until its last duplicate is closed. A worker that
outlives its parent would keep the device from everybody."""


def _lock(path: str) -> object:
    """Hold the device for this process; what ``_unlock`` takes."""
    descriptor, key = _open(path), object()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise PlacementError(
            f"{path} is in use by another job: wait for its end, or name another device"
        ) from error
    _locks[key] = descriptor
    return key


def _unlock(key: object) -> None:
    descriptor = _locks.pop(key, None)  # none in a forked child
    if descriptor is not None:
        os.close(descriptor)


def _leave_to_parent() -> None:
    for key in list(_locks):
        _unlock(key)


os.register_at_fork(after_in_child=_leave_to_parent)


def _find(path: str) -> DaxDevice:
    name = os.path.basename(path)
    driver = _driver(name)
    if driver == "kmem":
        node = _number(name, "target_node")
        raise PlacementError(
            f"{path} is in mode system-ram: its memory is NUMA node {node}, name that, or give it back with "
            f"`daxctl reconfigure-device --mode=devdax {name}`"
        )
    if driver != "device_dax":
        known = ", ".join(device.path for device in dax_devices()) or "none"
        raise PlacementError(
            f"there is no {path} to map (devices in mode devdax: {known}); name one of them, or leave it out"
        )
    return _read(name)


def _driver(name: str) -> str:
    """The driver that has the device; empty where there is none, or no device."""
    try:
        return os.path.basename(os.readlink(_DEVICES / name / "driver"))
    except OSError:
        return ""


def _read(name: str) -> DaxDevice:
    return DaxDevice(
        path=f"/dev/{name}",
        size_bytes=_number(name, "size"),
        align_bytes=_number(name, "align"),
        node=_number(name, "target_node"),
    )


def _number(name: str, attribute: str) -> int:
    try:
        return int((_DEVICES / name / attribute).read_text())
    except (OSError, ValueError) as error:
        raise PlacementError(f"sysfs does not tell {attribute} of {name}: {error}") from error
