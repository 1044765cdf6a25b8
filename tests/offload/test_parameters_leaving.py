"""Streamed weights whose streamer goes while the tier cannot write, or somebody has a view of them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from memtrain.offload.errors import TierIOError
from memtrain.offload.io import Direction, Fault, FaultyTarget, IORequest, ThreadPoolBackend
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.slab import Slab
from memtrain.planner.actions import Tier
from tests.offload.streamed import batches, llama, open_engine, stream


class FullDisk(ThreadPoolBackend):
    """Reads as ever; writes nothing while it is full."""

    full = False

    def submit(self, request: IORequest) -> None:
        if self.full and request.direction is Direction.WRITE:
            request.target = FaultyTarget(request.target, Fault(error=errno.ENOSPC))
        super().submit(request)


def change(streamer: ParameterStreamer, *models: nn.Module) -> None:
    """The weights of two blocks at once, as many as there are windows: neither can be written before."""
    with streamer.hold("model.layers.1"), streamer.hold("model.layers.2"), torch.no_grad():
        for model in models:
            for block in (1, 2):
                model.model.layers[block].mlp.up_proj.weight.mul_(2.0)


def test_weights_come_home_from_a_tier_that_cannot_write(tmp_path: Path) -> None:
    """Both windows hold changes that are nowhere else: nothing of the rest can come through them before."""
    plain, model, backend = llama(), llama(), FullDisk(2)
    with open_engine(tmp_path, backend=backend) as engine:
        streamer = stream(model, engine, slots=2, tier=Tier.NVME)
        change(streamer, model, plain)
        backend.full = True
        with pytest.raises(TierIOError, match="ENOSPC"):
            streamer.flush()
        streamer.remove()
        assert all(map(torch.equal, model.parameters(), plain.parameters()))
        assert torch.equal(model(batches(1)[0]).logits, plain(batches(1)[0]).logits)


def test_a_release_that_cannot_write_leaves_the_forwards_alone_and_may_be_repeated(tmp_path: Path) -> None:
    plain, model, backend = llama(), llama(), FullDisk(2)
    with open_engine(tmp_path, backend=backend) as engine:
        streamer = stream(model, engine, slots=2, tier=Tier.NVME)
        change(streamer, model, plain)
        backend.full = True
        with pytest.raises(TierIOError, match="ENOSPC"):
            streamer.release()
        assert not [module for module in model.modules() if "forward" in vars(module)]
        name = "model.layers.1.mlp.up_proj.weight"
        backend.full = False
        extents = streamer.release()
        with Slab(extents[name].nbytes) as slab:
            found = slab.buffer[: extents[name].nbytes]
            engine.store(Tier.NVME).read(extents[name], found).wait()
            assert torch.equal(found.view(torch.float32), plain.get_parameter(name).detach().flatten())


def test_a_view_is_never_overwritten() -> None:
    plain, model = llama(), llama()
    with open_engine() as engine:
        streamer = stream(model, engine, slots=3)
        kept = []
        for block in (1, 2):
            with streamer.hold(f"model.layers.{block}"):
                kept.append(model.model.layers[block].mlp.up_proj.weight.detach())
        wanted = [plain.model.layers[block].mlp.up_proj.weight for block in (1, 2)]
        assert streamer.fill_windows() == 3 * streamer.windows[-1].slot_bytes
        assert all(map(torch.equal, kept, wanted))
        assert torch.equal(model(batches(1)[0]).logits, plain(batches(1)[0]).logits)
        streamer.remove()
        assert all(map(torch.equal, kept, wanted))
        assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_windows_that_nobody_has_a_view_of_are_filled() -> None:
    model = llama()
    with open_engine() as engine:
        streamer = stream(model, engine, slots=2)
        with streamer.hold("model.layers.1"):
            pass
        streamer.fill_windows()
        assert streamer.statistics().in_use == 0
        streamer.remove()
