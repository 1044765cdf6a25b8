"""Fused matrices, sharded by rows: pieces that processes cut are projected as in one process."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from memtrain.optim.distributed.pieces import Pieces
from memtrain.optim.distributed.rows import Rows
from memtrain.optim.grid import GridOptimizer
from tests.optim.distributed.worlds import run_world

STEPS, COLUMNS = 5, 24
ROWS = {2: 40, 3: 42}
"""By pieces. Three processes have 14, 14 and 12 of 40 rows; two have 21 each of 42."""
SILENT = 2
"""The step in which the first piece has no gradient, as its basis is renewed."""
POINTS: dict[str, dict[str, Any]] = {
    "power": {"projection": "power"},
    "power right": {"projection": "power", "side": "right"},
    "power full, lazy": {"projection": "power", "side": "full", "lazy": True},
    "power kept": {"projection": "power", "side": "right", "refresh": "keep", "residual": "sgd"},
    "gaussian": {"projection": "gaussian", "side": "left", "refresh": "rotate"},
    "rademacher": {"projection": "rademacher", "side": "right", "refresh": "rotate"},
    "semi-orthogonal": {"projection": "semi_orthogonal", "side": "full", "refresh": "rotate"},
    "columns": {"projection": "columns", "refresh": "rotate", "residual": "sign"},
    "randk": {"projection": "randk", "density": 0.25, "residual": "sign"},
    "adafactor": {"projection": "power", "side": "left", "rule": "adafactor"},
    "bf16": {"projection": "power", "basis_dtype": "bf16", "rule": "momentum"},
}
BIT_EQUAL = ("columns", "randk")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "svd": ({"projection": "svd"}, r"'svd' with split=2 of a sharded parameter \(40, 24\): use .*'power'"),
    "rows": ({"projection": "rows"}, "'rows' with split=2.*use 'columns' or 'randk'"),
    "fira": ({"projection": "power", "residual": "scaled"}, "residual 'scaled' with split=2.*norms are of"),
}


def make(weight: Tensor, settings: dict[str, Any], pieces: int) -> GridOptimizer:
    settings = {"rank": None if "density" in settings else 5, "update_gap": 2, **settings}
    return GridOptimizer([nn.Parameter(weight)], lr=1e-2, split=pieces, **settings)


def draw(generator: torch.Generator, pieces: int, silent: bool = False) -> Tensor:
    drawn = torch.randn(ROWS[pieces], COLUMNS, generator=generator)
    if silent:
        drawn[: ROWS[pieces] // pieces] = 0
    if not dist.is_initialized():
        return drawn
    return distribute_tensor(drawn, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])


def moved(settings: dict[str, Any], pieces: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The weight and its states."""
    generator = torch.Generator().manual_seed(3)
    optimizer = make(draw(generator, pieces), settings, pieces)
    (weight,) = optimizer.param_groups[0]["params"]
    for step in range(STEPS):
        weight.grad = draw(generator, pieces, silent=step == SILENT)
        optimizer.step()
    saved = optimizer.state_dict()
    states = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in saved["state"][0].items()}
    states = {name: tensor.clone() for name, tensor in states.items()}
    # What has been saved is what goes on.
    optimizer.load_state_dict(saved)
    weight.grad = draw(generator, pieces)
    optimizer.step()
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return whole.detach().clone(), states


def results(pieces: int) -> dict[str, Any]:
    return {name: moved(settings, pieces) for name, settings in POINTS.items()}


def save(path: str) -> None:
    found: dict[str, Any] = {"2": results(2), "3": results(3), "refused": {}}
    for name, (settings, _) in REFUSED.items():
        with pytest.raises(ValueError, match="split=2") as refused:
            make(draw(torch.Generator(), 2), settings, 2)
        found["refused"][name] = str(refused.value)
    if dist.get_rank() == 0:
        torch.save(found, path)


@pytest.fixture(scope="module", params=[2, 3])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("fused")
    run_world(request.param, folder, save, str(folder / "results.pt"))
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {"2": results(2), "3": results(3)}


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("pieces", ["2", "3"])
def test_pieces_move_as_in_one_process(name: str, pieces: str, many: dict, alone: dict) -> None:
    (weight, states), (other, others) = alone[pieces][name], many[pieces][name]
    assert states.keys() == others.keys()
    if name in BIT_EQUAL:
        assert torch.equal(weight, other)
    else:
        # One process multiplies in bf16 at a refresh, where several add in fp32.
        torch.testing.assert_close(other, weight, rtol=0, atol=3e-3 if name == "bf16" else 1e-5)
    for key, tensor in states.items():
        flat, also = tensor.flatten().float(), others[key].flatten().float()
        if name in BIT_EQUAL:
            assert torch.equal(flat, also), key
        elif name != "bf16":
            # Which sign a basis vector has is the decomposition's affair.
            torch.testing.assert_close(also.abs(), flat.abs(), rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_need_whole_pieces_is_refused(name: str, many: dict) -> None:
    assert re.search(REFUSED[name][1], many["refused"][name])


def test_segments_by_hand() -> None:
    """Forty rows in two pieces of 20; the second of three processes has 14 to 27."""
    rows = Rows(total=40, start=14, count=14, chunk=14, world=3, rank=1, group=None)
    pieces = Pieces.of(2, rows)
    assert pieces.segments == ((0, slice(0, 6)), (1, slice(6, 14)))
    own = torch.arange(14.0)[:, None]
    assert pieces.products(own, torch.ones(14, 1)).flatten().tolist() == [15, 76]
    assert pieces.times(own, torch.tensor([[[1.0]], [[10.0]]])).flatten().tolist()[5:7] == [5, 60]
    assert pieces.peaks(own).tolist() == [5, 13]
    none = Pieces.of(2, Rows(total=40, start=40, count=0, chunk=14, world=4, rank=3, group=None))
    assert none.segments == ()
