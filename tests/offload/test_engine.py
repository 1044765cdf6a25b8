import os

import pytest
import torch

from memtrain.offload.device import CpuDevice
from memtrain.offload.engine import Engine, open_engine
from memtrain.offload.errors import OffloadError, PlacementError, SwapDirectoryError, TierFullError
from memtrain.offload.slab import Slab
from memtrain.offload.tiers import MemoryStore, NvmeStore
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Budget


def test_a_budget_becomes_stores_of_its_sizes(tmp_path):
    budget = Budget(device="1GiB", nvme=f"{tmp_path}:1MiB", cxl="0:64KiB")
    with open_engine(budget) as engine:
        assert engine.device.place == torch.device("cpu")
        assert {t: engine.store(t).capacity_bytes for t in engine.tiers} == {
            Tier.CXL: 1 << 16,
            Tier.NVME: 1 << 20,
        }
        with pytest.raises(OffloadError, match=r"no host tier in this session \(it has: cxl, nvme\)"):
            engine.store(Tier.HOST)
    assert os.listdir(tmp_path) == []


def test_a_full_tier_names_those_that_have_room(tmp_path):
    budget = Budget(device="1GiB", nvme=f"{tmp_path}:1MiB", cxl="0:64KiB")
    with open_engine(budget) as engine:
        cxl, nvme = engine.store(Tier.CXL), engine.store(Tier.NVME)
        with pytest.raises(
            TierFullError,
            match=r"raise budget\.cxl by at least 36864 bytes, or plan it elsewhere "
            r"\(PlannerOptions\.force\): there are 1048576 bytes on nvme$",
        ):
            cxl.allocate("w", 100 << 10)
        nvme.allocate("v", (1 << 20) - 4096)
        with pytest.raises(TierFullError, match=r"raise budget\.cxl by at least 36864 bytes$"):
            cxl.allocate("w", 100 << 10)


def test_only_what_the_plan_uses_is_reserved(tmp_path):
    budget = Budget(device="1GiB", nvme=f"{tmp_path}:900GiB")
    with open_engine(budget, nvme_bytes=1 << 20) as engine:
        assert engine.store(Tier.NVME).capacity_bytes == 1 << 20
    with open_engine(budget, nvme_bytes=0) as engine:
        assert engine.tiers == ()
    with pytest.raises(ValueError, match=r"within budget.nvme, 0 to 966367641600, got 966367641601"):
        open_engine(budget, nvme_bytes=966367641601)
    with pytest.raises(TierFullError, match=r"the plan reserves 900.000 GiB"):
        open_engine(budget)


def test_what_cannot_be_had_raises_and_leaves_nothing(tmp_path):
    with pytest.raises(PlacementError, match="NUMA node 60 does not exist"):
        open_engine(Budget(device="1GiB", cxl="60:1MiB", nvme=f"{tmp_path}:1MiB"))
    with pytest.raises(SwapDirectoryError, match="does not exist"):
        open_engine(Budget(device="1GiB", nvme=f"{tmp_path}/none:1MiB"))
    with pytest.raises(ValueError, match="on a CPU the device is the host"):
        open_engine(Budget(device="1GiB", host="1GiB"))
    with pytest.raises(OffloadError, match="'mps' is not known: use cpu, cuda or cuda:N"):
        open_engine(Budget(device="1GiB"), device="mps")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_refused():
    with pytest.raises(OffloadError, match="sees no CUDA device: use cpu"):
        open_engine(Budget(device="1GiB"), device="cuda:0")


def test_statistics_by_tier():
    with Engine({Tier.HOST: MemoryStore(Tier.HOST, 1 << 16)}, CpuDevice()) as engine:
        store, buffer = engine.store(Tier.HOST), Slab(4096).buffer
        extent = store.allocate("w", 4096)
        store.write(extent, buffer).wait()
        assert engine.statistics()[Tier.HOST].bytes_written == 4096
        assert engine.statistics()[Tier.HOST].bytes_read == 0


def test_every_store_is_closed_even_where_one_fails(tmp_path):
    class Failing(MemoryStore):
        def close(self):
            super().close()
            raise OffloadError("would not close")

    disk = NvmeStore(tmp_path, 1 << 16)
    engine = Engine({Tier.HOST: Failing(Tier.HOST, 1 << 16), Tier.NVME: disk}, CpuDevice())
    with pytest.raises(OffloadError, match="would not close"):
        engine.close()
    with pytest.raises(OffloadError, match="store is closed"):
        disk.allocate("w", 1)
    assert os.listdir(tmp_path) == []


def test_every_store_is_closed_even_where_the_device_is_broken(tmp_path):
    class Broken(CpuDevice):
        def synchronize(self):
            raise RuntimeError("an illegal memory access was encountered")

    class Failing(MemoryStore):
        def close(self):
            super().close()
            raise OffloadError("would not close")

    disk = NvmeStore(tmp_path, 1 << 16)
    engine = Engine({Tier.HOST: Failing(Tier.HOST, 1 << 16), Tier.NVME: disk}, Broken())
    with pytest.raises(RuntimeError, match="illegal memory access"):  # the first failure
        engine.close()
    with pytest.raises(OffloadError, match="store is closed"):
        disk.allocate("w", 1)
    assert os.listdir(tmp_path) == []


def test_a_store_must_serve_its_tier():
    with (
        MemoryStore(Tier.HOST, 4096) as store,
        pytest.raises(ValueError, match="the store given for nvme serves host"),
    ):
        Engine({Tier.NVME: store}, CpuDevice())
