"""Lower halves of masters beside weights that are on a tier themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from memtrain.offload.async_snapshot import AsyncCheckpointer
from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.lower_halves import WeightsWrittenError
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from memtrain.offload.tiers import NvmeStore
from memtrain.optim.kernels import fused_adamw
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.async_runs import Gate, assert_same_folders
from tests.offload.optimizer_runs import OPTIMIZERS
from tests.offload.streamed import (
    CAPACITY_BYTES,
    assert_same,
    assert_same_weights,
    batches,
    llama,
    open_engine,
    plain_steps,
    stream,
    streamed_optimizer,
    streamed_steps,
)
from tests.offload.test_async_streamed import StreamedRun, assert_same_runs

pytestmark = pytest.mark.skipif(
    not fused_adamw.agrees(), reason="this build of torch rounds in another order, or there is no compiler"
)
FUSED = OPTIMIZERS["adamw fused"]


@pytest.mark.parametrize("schedule", UpdateSchedule)
@pytest.mark.parametrize("slots", [2, 20])
def test_training_is_bit_equal(schedule: UpdateSchedule, slots: int, tmp_path: Path) -> None:
    plain, model = (llama(tied=True, dtype=torch.bfloat16) for _ in range(2))
    expected = plain_steps(plain, FUSED, master=True)
    with open_engine(tmp_path) as engine:
        streamer = stream(model, engine, slots=slots, tier=Tier.NVME)
        with streamed_optimizer(
            model, streamer, engine, FUSED, schedule=schedule, state_tier=Tier.NVME,
            gradient_tier=Tier.DEVICE, master_weights=True,
        ) as optimizer:  # fmt: skip
            assert len(optimizer.layout.halves) > 4
            assert_same(expected, streamed_steps(model, optimizer))
            assert_same_weights(plain, streamer, model)


@contextmanager
def open_run(directory: Path, schedule: Any, **config: Any) -> Iterator[StreamedRun]:
    directory.mkdir()
    model = llama(depth=2, dtype=torch.bfloat16)
    store = NvmeStore(directory, CAPACITY_BYTES, direct="allow_buffered")
    with Engine({Tier.NVME: store}, make_device("cpu")) as engine:
        streamer = stream(model, engine, slots=3, tier=Tier.NVME)
        with streamed_optimizer(
            model, streamer, engine, FUSED, schedule=schedule, state_tier=Tier.NVME,
            gradient_tier=Tier.NVME, master_weights=True, **config,
        ) as optimizer:  # fmt: skip
            yield StreamedRun(model, optimizer, streamer, store)
        streamer.close()


@pytest.mark.parametrize("schedule", [UpdateSchedule.SEQUENTIAL, UpdateSchedule.AHEAD])
def test_snapshots_hold_weights_and_lower_halves_of_one_step(
    schedule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = batches(6)
    with (
        open_run(tmp_path / "a", schedule) as plain,
        open_run(tmp_path / "b", schedule) as run,
        open_run(tmp_path / "c", schedule, split_masters=False) as whole,
        AsyncCheckpointer(run, spare_bytes={Tier.NVME: 3 << 20}) as snapshots,
    ):
        for step in range(2):
            now = data[3 * step : 3 * step + 3]
            assert [loss.item() for loss in run.train(now)] == [loss.item() for loss in plain.train(now)]
            save_checkpoint(tmp_path / f"sync-{step}", plain, progress={"n": step})
            with monkeypatch.context() as patched:
                gate = Gate(patched, after=20 * step)
                snapshots.save(tmp_path / f"async-{step}", progress={"n": step})
                gate.open_after(0.05)
                run.train(data[:2])
                plain.train(data[:2])
                snapshots.wait()
            assert_same_folders(tmp_path / f"sync-{step}", tmp_path / f"async-{step}")
        for one in (plain, run, whole):
            assert load_checkpoint(tmp_path / "async-1", one) == {"n": 1}
            one.train(data[:2])
        assert_same_runs(plain, run)
        assert_same_runs(plain, whole)


def test_a_weight_that_was_changed_in_its_window_is_refused(tmp_path: Path) -> None:
    data = batches(3)
    with open_run(tmp_path / "a", UpdateSchedule.SEQUENTIAL) as run:
        run.train(data[:2])
        weight = run.model.model.layers[1].mlp.up_proj.weight
        with run.weights.hold("model.layers.1"):
            before = weight.detach().clone()
            weight.data[3, 4] += 1.0
            run.weights.mark_dirty("model.layers.1")
        run.model(input_ids=data[2], labels=data[2]).loss.backward()
        with pytest.raises(WeightsWrittenError, match=r"layers.1.mlp.up_proj.weight were written"):
            run.optimizer.step()
        with pytest.raises(WeightsWrittenError):
            save_checkpoint(tmp_path / "at", run, progress={})
        with run.weights.hold("model.layers.1"), torch.no_grad():
            weight.copy_(before)
        run.optimizer.step()
        save_checkpoint(tmp_path / "at", run, progress={})
        with run.weights.hold("model.layers.1"):
            weight.data[3, 4] += 1.0
            run.weights.mark_dirty("model.layers.1")
            written = weight.detach().clone()
        assert run.optimizer.weights_written() == ["model.layers.1.mlp.up_proj.weight"]
        master = run.optimizer.read_state("model.layers.1.mlp.up_proj.weight", "master_weight")
        assert torch.equal(master, written.float())
        run.train(data[2:])
