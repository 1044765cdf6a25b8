"""Two processes under DDP that average projections do as one process with all the data."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from memtrain.optim.distributed.data_parallel import share_projections
from memtrain.optim.small_gradients import SmallGradients
from memtrain.optim.two_pass import TwoPassClipping
from tests.optim.distributed.sharded_nets import Net, backward, make_optimizer, whole
from tests.optim.distributed.worlds import run_world

STEPS, MICRO, ROWS = 5, 3, 8

POINTS: dict[str, dict[str, Any]] = {
    "power": {"projection": "power"},
    "columns": {"projection": "columns"},
    "gaussian": {"projection": "gaussian"},
    "sign residual": {"projection": "power", "residual": "sgd"},
    "clipped": {"projection": "power", "rule": "adafactor", "clip": 0.05},
    "all synced": {"projection": "power", "all_synced": True},
}


def train(settings: dict[str, Any]) -> Tensor:
    settings = dict(settings)
    clip, all_synced = settings.pop("clip", None), settings.pop("all_synced", False)
    torch.manual_seed(0)
    net = Net()
    optimizer = make_optimizer(net, **settings)
    gradients = SmallGradients(optimizer, whole="keep")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model: Any = net
    if dist.is_initialized():
        model = DistributedDataParallel(net)
        share_projections(gradients, model)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for micro in range(MICRO):
            x = torch.randn(ROWS, 24, generator=generator).chunk(world)[rank]
            if dist.is_initialized():
                model.require_backward_grad_sync = all_synced or micro == MICRO - 1
            (model(x).square().mean() / MICRO).backward()
        if clip:
            gradients.clip_grad_norm_(clip)
        optimizer.step()
        assert all(p.grad is None for p in net.parameters())
        optimizer.zero_grad()
    return whole(net)


def in_world(path: str) -> None:
    found: dict[str, Any] = {name: train(settings) for name, settings in POINTS.items()}
    torch.manual_seed(0)
    net = Net()
    optimizer = make_optimizer(net, projection="columns")
    SmallGradients(optimizer)
    model = DistributedDataParallel(net)
    model(torch.randn(2, 24)).sum().backward()
    with pytest.raises(RuntimeError, match=r"did not come through its hook.*share_projections") as refused:
        optimizer.step()
    found["refused"] = str(refused.value)
    net = Net()
    before = whole(net)
    clipping = TwoPassClipping(make_optimizer(net, projection="columns", residual="sign"), 1.0)
    model = DistributedDataParallel(net)
    with pytest.raises(RuntimeError, match=r"averages gradients after the hooks have run. Use fully_shard"):
        clipping.step(lambda: backward(model, torch.randn(2, 24)))
    assert torch.equal(whole(net), before)
    each = [torch.empty_like(found["power"]) for _ in range(dist.get_world_size())]
    dist.all_gather(each, found["power"])
    found["agree"] = torch.equal(*each)
    if dist.get_rank() == 0:
        torch.save(found, path)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("two")
    run_world(2, folder, in_world, str(folder / "results.pt"))
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", POINTS)
def test_two_processes_do_as_one(name: str, of_two: dict) -> None:
    torch.manual_seed(0)
    start = whole(Net())
    one = train(POINTS[name])
    assert (of_two[name] - one).norm() <= 1e-5 * (one - start).norm()


def test_processes_agree(of_two: dict) -> None:
    assert of_two["agree"]


def test_ddp_that_nobody_told_of_is_an_error(of_two: dict) -> None:
    assert "'narrow' (24, 40) has a gradient" in of_two["refused"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": "backward"}, "update='backward' with DistributedDataParallel.*fully_shard"),
        ({"refresh_from": "first"}, "refresh_from='first' with DistributedDataParallel"),
    ],
)
def test_what_would_differ_between_processes_is_refused(options: dict, message: str) -> None:
    gradients = SmallGradients(make_optimizer(Net(), projection="power"), **options)
    with pytest.raises(ValueError, match=message):
        share_projections(gradients, None)
