"""Stacks of experts, sharded by experts: each process moves its own as one process moves all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from memtrain.optim.gradient_norm import norm_of
from memtrain.optim.grid import GridOptimizer
from tests.optim.distributed.worlds import run_world

STEPS = 5
POINTS: dict[str, dict[str, Any]] = {
    "power": {"projection": "power"},
    "power left, lazy": {"projection": "power", "side": "left", "lazy": True},
    "power full": {"projection": "power", "side": "full"},
    "svd": {"projection": "svd"},
    "eigh": {"projection": "eigh", "side": "left"},
    "gaussian": {"projection": "gaussian", "refresh": "rotate"},
    "semi-orthogonal": {"projection": "semi_orthogonal", "refresh": "rotate"},
    "columns": {"projection": "columns", "residual": "sign"},
    "rows": {"projection": "rows", "residual": "sign", "refresh": "rotate"},
    "block": {"projection": "block", "residual": "sgd"},
    "randk": {
        "projection": "randk",
        "density": 0.2,
        "residual": "sign",
        "path": "reference",
    },  # not C++, which fuses
    "fira": {"projection": "power", "residual": "scaled"},
    "apollo mini": {
        "projection": "gaussian",
        "rank": 1,
        "residual": "scale_only",
        "granularity": "tensor",
        "limiter": 1.01,
    },
    "adafactor": {"projection": "power", "rule": "adafactor"},
    "adam_mini": {"projection": "power", "rule": "adam_mini"},
    "int8 states": {"projection": "columns", "rank": 16, "state_dtype": "int8"},
    "whole": {"weight_decay": 0.1},
}
BIT_EQUAL = ("columns", "rows", "block", "randk", "int8 states", "whole")
"""What multiplies no matrices, whose rounding may depend on how many of them there are."""
SILENT = (1, 2)
"""The expert that gets no token, and the step."""


def moved(settings: dict[str, Any], experts: int, large: bool) -> tuple[Tensor, dict[str, Tensor], float]:
    """The weight, its states and the last gradient's norm."""
    shape = (experts, 64, 128) if large else (experts, 12, 20)
    generator = torch.Generator().manual_seed(3)

    def draw(silent: bool = False) -> Tensor:
        drawn = torch.randn(shape, generator=generator)
        if silent:
            drawn[SILENT[0]] = 0
        if not dist.is_initialized():
            return drawn
        return distribute_tensor(drawn, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])

    if "projection" in settings:
        settings = {"rank": None if "density" in settings else 5, "update_gap": 2, **settings}
    weight = nn.Parameter(draw())
    optimizer = GridOptimizer([weight], lr=1e-2, **settings)
    for step in range(STEPS):
        weight.grad = draw(silent=step == SILENT[1])
        optimizer.step()
    cell = optimizer.cell_of(weight)
    norm = float(norm_of([(cell.own(weight.grad), cell.norm_group(low=False))]))
    saved = optimizer.state_dict()
    states = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in saved["state"][0].items()}
    # What has been saved is what goes on.
    optimizer.load_state_dict(saved)
    weight.grad = draw()
    optimizer.step()
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return whole.detach().clone(), states, norm


def results(experts: int) -> dict[str, Any]:
    return {name: moved(settings, experts, "states" in name) for name, settings in POINTS.items()}


def save(path: str) -> None:
    found: dict[str, Any] = {"five": results(5), "two": results(2)}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 6, 8), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="history") as refused:
        GridOptimizer([weight], projection="power", rank=2, history=3)
    found["refused"] = str(refused.value)
    if dist.get_rank() == 0:
        torch.save(found, path)


@pytest.fixture(scope="module", params=[2, 3])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("experts")
    run_world(request.param, folder, save, str(folder / "results.pt"))
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {"five": results(5), "two": results(2)}


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("experts", ["five", "two"])
def test_experts_move_as_in_one_process(name: str, experts: str, many: dict, alone: dict) -> None:
    """Five experts are two and three, or two, two and one; of two the third process has none."""
    weight, states, norm = alone[experts][name]
    other, others, other_norm = many[experts][name]
    assert states.keys() == others.keys()
    assert other_norm == pytest.approx(norm, rel=1e-6)
    if name in BIT_EQUAL:
        assert torch.equal(weight, other)
        for key, tensor in states.items():
            assert torch.equal(tensor.flatten(), others[key].flatten()), key
    else:
        torch.testing.assert_close(other, weight, rtol=0, atol=1e-5)
        for key, tensor in states.items():
            # Of which sign a basis vector is may depend on how many matrices are decomposed together.
            torch.testing.assert_close(others[key].abs(), tensor.abs(), rtol=1e-4, atol=1e-4, msg=key)


def test_histories_of_stacks_are_refused(many: dict) -> None:
    assert "history=3 for a stack that is sharded by experts" in many["refused"]
