"""Distributed checkpoints: written by two processes, read by three and by one, which go on as the two do.

And written by four that are two copies of two shards.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from memtrain.optim.grid import GridOptimizer
from tests.optim.distributed.sharded_nets import Net, make_net, make_optimizer, train, whole
from tests.optim.distributed.worlds import run_world

POINTS: dict[str, dict[str, Any]] = {
    "power": {"projection": "power"},
    "power full": {"projection": "power", "side": "full", "lazy": True},
    "semi-orthogonal": {"projection": "semi_orthogonal", "side": "left"},
    "randk": {"projection": "randk", "density": 0.25},
    "int8 states": {"projection": "columns", "rank": 128, "state_dtype": "int8", "rule": "momentum"},
    "int4 states": {"projection": "columns", "rank": 128, "state_dtype": "int4", "rule": "momentum"},
}
BEFORE, AFTER = 3, 3
"""Steps. A refresh comes every second, so that the checkpoint is in the middle of a period."""


TWO_COPIES: dict[str, dict[str, Any]] = {"two copies": {"projection": "power", "side": "full"}}


def build(name: str) -> tuple[Net, GridOptimizer]:
    copies = 2 if name in TWO_COPIES and dist.get_world_size() == 4 else 1
    net = make_net("states" in name, copies)
    return net, make_optimizer(net, **(POINTS | TWO_COPIES)[name])


def all_states(optimizer: GridOptimizer) -> dict[str, Tensor]:
    found = {}
    for number, state in optimizer.state_dict()["state"].items():
        for key, each in state.items():
            found[f"{number} {key}"] = (each.full_tensor() if isinstance(each, DTensor) else each).clone()
    return found


def write(folder: str, names: list[str]) -> None:
    for name in names:
        net, optimizer = build(name)
        train(net, optimizer, 0, BEFORE)
        model, state = get_state_dict(net, optimizer)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=f"{folder}/{name}")
        found = {"states": all_states(optimizer), "saved": whole(net).clone()}
        train(net, optimizer, BEFORE, AFTER, hooks=False)
        if dist.get_rank() == 0:
            torch.save({**found, "end": whole(net)}, f"{folder}/{name}.written")
        else:
            whole(net)


def read(folder: str) -> None:
    for name in POINTS | TWO_COPIES:
        net, optimizer = build(name)
        model, state = get_state_dict(net, optimizer)
        dcp.load({"model": model, "optimizer": state}, checkpoint_id=f"{folder}/{name}")
        set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state)
        found = {"states": all_states(optimizer), "saved": whole(net).clone()}
        assert [group["step"] for group in optimizer.param_groups] == [BEFORE, BEFORE]
        train(net, optimizer, BEFORE, AFTER)
        end = whole(net)
        if dist.get_rank() == 0:
            torch.save({**found, "end": end}, f"{folder}/{name}.{dist.get_world_size()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    run_world(2, folder, write, str(folder), list(POINTS))
    run_world(4, folder, write, str(folder), list(TWO_COPIES))
    run_world(3, folder, read, str(folder))
    run_world(1, folder, read, str(folder))
    return folder


@pytest.mark.parametrize("name", POINTS | TWO_COPIES)
@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_processes_goes_on(name: str, world: int, folder: Path) -> None:
    written = torch.load(folder / f"{name}.written", weights_only=True)
    other = torch.load(folder / f"{name}.{world}", weights_only=True)
    assert torch.equal(written["saved"], other["saved"])
    assert written["states"].keys() == other["states"].keys()
    for key, tensor in written["states"].items():
        assert torch.equal(tensor, other["states"][key]), key
    moved = (written["end"] - written["saved"]).norm()
    assert (written["end"] - other["end"]).norm() <= (2e-3 if "states" in name else 1e-5) * moved
