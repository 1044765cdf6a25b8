"""The checks around a dax device, over a file that stands in for one; a real one is that of test_guest.py."""

import mmap
import os

import pytest

from memtrain.offload import dax
from memtrain.offload.dax import DaxDevice, dax_devices, map_device
from memtrain.offload.errors import NodeFullError, PlacementError
from memtrain.offload.slab import Slab
from memtrain.planner.memory_place import MemoryPlace

MiB = 1 << 20


@pytest.fixture
def device(tmp_path, monkeypatch):
    """dax0.0 of 8 MiB in sysfs, with a driver that the test sets, and a file behind /dev/dax0.0."""
    sysfs, file = tmp_path / "sysfs", tmp_path / "memory"
    (sysfs / "dax0.0").mkdir(parents=True)
    for name, number in (("size", 8 * MiB), ("align", 2 * MiB), ("target_node", 3)):
        (sysfs / "dax0.0" / name).write_text(f"{number}\n")
    (sysfs / "dax0.0" / "driver").symlink_to("../drivers/device_dax")
    file.write_bytes(bytes(8 * MiB))
    monkeypatch.setattr(dax, "_DEVICES", sysfs)
    really = os.open

    def redirected(path, flags):
        return really(file if path == "/dev/dax0.0" else path, flags)

    monkeypatch.setattr(dax.os, "open", redirected)
    monkeypatch.setattr(dax.stat, "S_ISCHR", lambda mode: True)
    return sysfs / "dax0.0"


def test_a_slab_is_mapped_in_whole_units_and_for_one_job(device):
    assert dax_devices() == (DaxDevice(path="/dev/dax0.0", size_bytes=8 * MiB, align_bytes=2 * MiB, node=3),)
    slab = Slab(3 * MiB, MemoryPlace(dax="/dev/dax0.0"))
    assert slab.nbytes == 4 * MiB
    slab.buffer.fill_(7)
    with pytest.raises(PlacementError, match=r"/dev/dax0\.0 is in use by another job"):
        map_device("/dev/dax0.0", MiB, mmap.mmap)
    slab.close()
    again = map_device("/dev/dax0.0", MiB, mmap.mmap)
    assert again[0] == 7  # what was written there is there
    assert len(again) == 2 * MiB


def test_a_forked_worker_does_not_keep_the_device(device):
    """Nor does it give the parent's lock away."""
    slab = Slab(MiB, MemoryPlace(dax="/dev/dax0.0"))
    wait, go = os.pipe()
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        os.write(tell, b".")
        os.read(wait, 1)
        os._exit(0)
    os.close(wait)
    os.read(told, 1)
    try:
        with pytest.raises(PlacementError, match="in use by another job"):
            map_device("/dev/dax0.0", MiB, mmap.mmap)
        slab.close()
        assert len(map_device("/dev/dax0.0", MiB, mmap.mmap)) == 2 * MiB
    finally:
        os.close(go)
        os.waitpid(pid, 0)
        os.close(told)
        os.close(tell)


def test_a_device_that_cannot_be_mapped_is_free_for_others(device):
    with pytest.raises(TypeError):
        map_device("/dev/dax0.0", MiB, lambda *_, **__: len(None))
    assert len(map_device("/dev/dax0.0", MiB, mmap.mmap)) == 2 * MiB


def test_a_device_that_is_too_small_is_refused(device):
    with pytest.raises(
        NodeFullError, match=rf"has {8 * MiB} bytes \(0\.008 GiB\) and {10 * MiB} were asked for"
    ):
        map_device("/dev/dax0.0", 8 * MiB + 1, mmap.mmap)


def test_a_device_that_the_kernel_uses_as_a_node_is_refused(device):
    (device / "driver").unlink()
    (device / "driver").symlink_to("../drivers/kmem")
    assert dax_devices() == ()
    with pytest.raises(PlacementError, match="mode system-ram: its memory is NUMA node 3, name that"):
        map_device("/dev/dax0.0", MiB, mmap.mmap)


def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(
        PlacementError, match=r"no /dev/dax7\.0 to map \(devices in mode devdax: /dev/dax0\.0\)"
    ):
        map_device("/dev/dax7.0", MiB, mmap.mmap)
    (device / "align").write_text("?")
    with pytest.raises(PlacementError, match=r"sysfs does not tell align of dax0\.0"):
        map_device("/dev/dax0.0", MiB, mmap.mmap)


def test_what_the_system_refuses_is_told(device, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", refuse)
        with pytest.raises(PlacementError, match=f"cannot map {2 * MiB} bytes of /dev/dax0.0: Operation not"):
            map_device("/dev/dax0.0", MiB, mmap.mmap)
    monkeypatch.setattr(dax.stat, "S_ISCHR", lambda mode: False)
    with pytest.raises(PlacementError, match="is no device: memory is mapped from one"):
        map_device("/dev/dax0.0", MiB, mmap.mmap)
    monkeypatch.setattr(dax.os, "open", refuse)
    with pytest.raises(PlacementError, match=r"cannot open /dev/dax0\.0: Operation not permitted"):
        map_device("/dev/dax0.0", MiB, mmap.mmap)
