import dataclasses
import json
import os
import resource
from datetime import date

import pytest
import torch

from memtrain.offload import measure, rates
from memtrain.offload.errors import OffloadError, PlacementError, SwapDirectoryError
from memtrain.offload.measure import measure_machine, probe_swap_directory
from memtrain.offload.rundir import filesystem_type
from memtrain.optim.storage.lossless import ExponentCodec
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Machine
from memtrain.planner.memory_place import MemoryPlace
from tests.offload.late_device import LateDevice


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memtrain"


@pytest.fixture
def swap(tmp_path):
    (tmp_path / "swap").mkdir()
    return tmp_path / "swap"


def test_a_good_directory_is_probed_and_left_as_it_was(swap, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (8 << 20, 8 << 20))
    probe = probe_swap_directory(swap)
    assert dataclasses.replace(probe, free_bytes=0) == measure.SwapProbe(
        path=str(swap),
        usable=True,
        filesystem=filesystem_type(swap),
        free_bytes=0,
        direct_io=True,
        alignment_bytes=4096,
        memlock_bytes=8 << 20,
    )
    space = os.statvfs(swap)
    assert abs(probe.free_bytes - space.f_bavail * space.f_frsize) < 1 << 30
    rows = dict(probe.rows())
    assert rows["direct I/O"] == "yes, blocks of 4096 bytes"
    assert rows["locked memory limit"] == "0.008 GiB"
    assert "problem" not in rows
    assert os.listdir(swap) == []


def test_bad_directories_are_described_not_raised(tmp_path, swap, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY,) * 2)
    missing = probe_swap_directory(tmp_path / "none")
    assert (missing.usable, missing.filesystem, missing.free_bytes, missing.direct_io) == (
        False,
        "none",
        0,
        False,
    )
    assert "does not exist: create it" in dict(missing.rows())["problem"]
    assert dict(missing.rows())["locked memory limit"] == "unlimited"

    def refuse(descriptor, buffers, offset):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "pwritev", refuse)
    probe = probe_swap_directory(swap)
    assert (probe.usable, probe.direct_io, probe.alignment_bytes) == (False, False, None)
    assert "cannot do direct I/O" in probe.problem
    assert os.listdir(swap) == []


def test_a_machine_is_measured_once_and_remembered(swap, cache, monkeypatch):
    first = measure_machine(swap, round_seconds=0.02)
    link = first.link(Tier.NVME)
    assert first.source == link.source == f"measured {date.today().isoformat()}"
    assert (first.device, first.cores) == ("cpu", len(os.sched_getaffinity(0)))
    assert first.dram_copy_bytes_per_second > 1e8
    assert 1e7 < link.read_bytes_per_second < 1e11
    assert 1e7 < link.write_bytes_per_second < 1e11
    assert 1e7 < link.mixed_bytes_per_second < 1e11
    assert 0 < link.cpu_seconds_per_byte < 1e-7
    assert 0 < link.latency_seconds < 1
    assert first.arithmetic_slowdown == 1.07
    assert os.listdir(swap) == []
    (file,) = cache.iterdir()
    assert Machine.from_json(file.read_text()) == first

    def not_again(*arguments):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(measure, "_measure_dram", not_again)
        assert measure_machine(swap) == first
        with pytest.raises(ZeroDivisionError):
            measure_machine(swap, refresh=True)
        with pytest.raises(ZeroDivisionError):
            measure_machine(swap, cxl=MemoryPlace(nodes=(60,)))  # another machine is another measurement
    old = json.loads(file.read_text()) | {"version": 1}
    del old["arithmetic_slowdown"]
    file.write_text(json.dumps(old))
    assert measure_machine(swap, round_seconds=0.02).arithmetic_slowdown == 1.07
    file.write_text("{damaged")
    again = measure_machine(swap, round_seconds=0.02)
    assert (
        json.loads(file.read_text())["links"][0]["write_bytes_per_second"]
        == again.links[0].write_bytes_per_second
    )


def test_without_a_directory_there_is_no_disk():
    assert measure_machine(None).links == ()


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measure_machine(None).cores >= 1


def test_a_directory_that_cannot_serve_is_refused(tmp_path):
    with pytest.raises(SwapDirectoryError, match="does not exist"):
        measure_machine(tmp_path / "none")


def test_a_device_with_its_own_memory_has_a_link_to_the_host(swap, cache, monkeypatch):
    late = LateDevice(eagerness=0.0)
    monkeypatch.setattr(measure, "make_device", lambda name: late)
    monkeypatch.setattr(rates, "TRANSFER_BYTES", 1 << 20)
    machine = measure_machine(swap, device="cuda:0", round_seconds=0.02)
    assert [link.tier for link in machine.links] == [Tier.HOST, Tier.NVME]
    assert machine.arithmetic_slowdown == 1.0
    host = machine.link(Tier.HOST)
    assert host.source == f"measured {date.today().isoformat()}"
    assert min(host.read_bytes_per_second, host.write_bytes_per_second, host.mixed_bytes_per_second) > 1e6
    assert late.copies["in"] > 3 * rates.TRANSFERS  # alone and together with the other direction
    assert late.copies["out"] > 3 * rates.TRANSFERS
    assert late.registered == {}
    assert late.faults == []


def test_the_slower_of_copies_and_tier_counts(monkeypatch):
    slow = {"read": 3.0, "write": 1e30, "mixed": 5.0}
    monkeypatch.setattr(measure, "copy_rates", lambda device, seconds: slow)
    link = measure._measure_host(LateDevice(), "here", 0.005)
    assert (link.read_bytes_per_second, link.mixed_bytes_per_second) == (3.0, 5.0)
    assert 1e6 < link.write_bytes_per_second < 1e30


def test_a_node_that_does_not_exist_is_refused(swap, cache):
    with pytest.raises(PlacementError, match="NUMA node 60 does not exist"):
        measure_machine(swap, cxl=MemoryPlace(nodes=(60,)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_does_not_exist_is_refused(swap, cache):
    with pytest.raises(OffloadError, match="sees no CUDA device"):
        measure_machine(swap, device="cuda:0")


def test_a_measurement_from_before_codecs_were_measured_is_read(swap, cache, monkeypatch):
    first = measure_machine(swap, round_seconds=0.02)
    (file,) = cache.iterdir()
    old = json.loads(file.read_text())
    for link in old["links"]:
        del link["state_codec"], link["weight_codec"]
    file.write_text(json.dumps(old))
    monkeypatch.setattr(measure, "_measure_dram", lambda: 1 / 0)
    assert measure_machine(swap) == first  # nothing was coded then, and nothing is to be now


@pytest.mark.parametrize("field", ["state_codec", "weight_codec"])
def test_a_measurement_without_the_codec_that_is_asked_for_is_made_again(swap, cache, field):
    asked = {"state_codec": "codecs", "weight_codec": "weight_codecs"}[field]
    codecs = {asked: {Tier.NVME: ExponentCodec()}}
    first = measure_machine(swap, **codecs, round_seconds=0.02)
    assert getattr(first.link(Tier.NVME), field).name == ExponentCodec().name
    (file,) = cache.iterdir()
    for other in (None, json.loads(file.read_text())["links"][0][field] | {"name": "other"}):
        data = json.loads(file.read_text())
        data["links"][0][field] = other
        file.write_text(json.dumps(data))
        again = measure_machine(swap, **codecs, round_seconds=0.02)
        assert getattr(again.link(Tier.NVME), field).name == ExponentCodec().name
        assert Machine.from_json(file.read_text()) == again
