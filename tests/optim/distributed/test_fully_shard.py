"""Parameters sharded by FSDP2 over two and three processes move as they do in one."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from memtrain.optim.distributed.projectors import ShardedRandom
from memtrain.optim.distributed.rows import Rows
from memtrain.optim.grid import GridOptimizer, NonFiniteGradientWarning
from memtrain.optim.projection import Projection
from tests.optim.distributed.sharded_nets import make_late, make_net, make_optimizer, train, whole
from tests.optim.distributed.worlds import run_world

STEPS = 3
OPTIONS = ("whole", "update", "clip", "hooks", "two_pass")

POINTS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1},
    "power": {"projection": "power"},
    "power left": {"projection": "power", "side": "left"},
    "power full": {"projection": "power", "side": "full"},
    "power kept": {"projection": "power", "refresh": "keep"},
    "power lazy": {"projection": "power", "lazy": True, "spread": True},
    "eigh": {"projection": "eigh"},
    "eigh left": {"projection": "eigh", "side": "left"},
    "svd": {"projection": "svd"},
    # R of both sides' singular vectors is diagonal but for rounding, which Adam would make steps of.
    "svd full": {"projection": "svd", "side": "full", "rule": "momentum"},
    "gaussian left": {"projection": "gaussian", "side": "left", "refresh": "rotate"},
    "semi-orthogonal": {"projection": "semi_orthogonal", "side": "full", "refresh": "rotate"},
    "columns": {"projection": "columns", "refresh": "rotate"},
    "rows": {"projection": "rows", "refresh": "rotate"},
    "block": {"projection": "block"},
    "randk": {"projection": "randk", "density": 0.25},
    "sgd residual": {"projection": "power", "residual": "sgd", "whole": "keep"},
    "fira": {"projection": "power", "residual": "scaled", "whole": "keep"},
    "apollo": {"projection": "gaussian", "side": "left", "residual": "scale_only", "whole": "keep"},
    "apollo mini": {
        "projection": "gaussian",
        "side": "right",
        "rank": 1,
        "residual": "scale_only",
        "granularity": "tensor",
        "whole": "keep",
    },
    "momentum": {"projection": "power", "rule": "momentum", "side": "full"},
    "bf16 states": {"projection": "power", "state_dtype": "bf16"},
    "int8 states": {
        "projection": "columns",
        "rank": 128,
        "state_dtype": "int8",
        "rule": "momentum",
        "large": True,
    },
    "in backward": {"projection": "power", "update": "backward"},
    "clipped": {"projection": "power", "clip": 0.05},
    "clipped in two passes": {"projection": "power", "residual": "sgd", "two_pass": 0.05},
    "sharded late": {"projection": "power", "late": True},
    "without hooks": {"projection": "power", "hooks": False},
}
FOR_TWO = ["power full", "eigh left", "svd", "randk", "int8 states", "clipped", "clipped in two passes"]
FOR_TWO_COPIES = ["adamw", "power full", "power lazy", "svd", "columns", "fira", "bf16 states", "in backward"]
FOR_TWO_COPIES += ["clipped", "clipped in two passes"]


EQUAL_BITS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "8-bit AdamW": {"state_dtype": "int8"},
    "4-bit AdamW": {"state_dtype": "int4"},
    "bf16 AdamW": {"state_dtype": "bf16", "master": "fp32"},
    "split master": {"master": "split24", "weight_decay": 0.1},
    "columns": {
        "projection": "columns",
        "rank": 9,
        "state_dtype": "bf16",
        "update_gap": 2,
        "residual": "sign",
    },
    "gaussian": {"projection": "gaussian", "side": "right", "rank": 9, "update_gap": 2},
    # As many entries are chosen as a process has, which leaves most of the gradient out all the same.
    "randk": {"projection": "randk", "density": 0.34, "update_gap": 2, "residual": "sign"},
    "rows": {"projection": "rows", "rank": 17, "update_gap": 2, "residual": "sign"},
    "block": {"projection": "block", "rank": 17, "update_gap": 2, "residual": "sign"},
}
"""On equal gradients, where nothing is summed."""
FOR_TWO_ROWS = ["8-bit AdamW", "4-bit AdamW", "split master"]

REFUSED: dict[str, tuple[bool, dict[str, Any], str]] = {
    "rule": (False, {"projection": "columns", "rule": "adafactor"}, "Adafactor takes means.*side='left'"),
    "blocks": (
        True,
        {"projection": "columns", "rank": 100, "state_dtype": "int8"},
        "'int8' scales blocks of 128.*136 rows of 100 entries, up to 46 rows.*'bf16', or a rank",
    ),
}


def results(
    names: Iterable[str] = POINTS, largest: list[int] | None = None, copies: int = 1
) -> dict[str, dict[str, Any]]:
    found = {}
    for name in names:
        settings = dict(POINTS[name])
        options = {key: settings.pop(key) for key in OPTIONS if key in settings}
        large, late = settings.pop("large", False), settings.pop("late", False)
        if late:
            net, optimizer = make_late(**settings)
        else:
            net = make_net(large, copies)
            optimizer = make_optimizer(net, **settings)
        start = whole(net)
        if largest:
            largest[0] = 0
        norms = train(net, optimizer, 0, STEPS, **options)
        found[name] = {"start": start, "end": whole(net), "norms": norms, "sent": (largest or [0])[0]}
    return found


def save_results(names: list[str], path: str) -> None:
    with traffic() as largest:
        found = results(names, largest)
    found["refused"] = refusals()
    found["skipped"] = skipped_for_nan_in_one_process()
    found["bits"] = {name: moved_by_equal_gradients(settings) for name, settings in EQUAL_BITS.items()}
    found["two rows"] = {name: moved_by_equal_gradients(EQUAL_BITS[name], 2, 4096) for name in FOR_TWO_ROWS}
    if dist.get_rank() == 0:
        torch.save(found, path)


def save_of_two_copies(names: list[str], path: str) -> None:
    with traffic() as largest:
        found: dict[str, Any] = results(names, largest, copies=2)
    ends = torch.cat([found[name]["end"] for name in names])
    each = [torch.empty_like(ends) for _ in range(dist.get_world_size())]
    dist.all_gather(each, ends)
    found["agree"] = all(torch.equal(ends, other) for other in each)
    if dist.get_rank() == 0:
        torch.save(found, path)


@contextmanager
def traffic() -> Iterator[list[int]]:
    """Elements of the largest tensor that the optimizer has sent."""
    largest, methods = [0], {name: getattr(Rows, name) for name in ("sum_", "gather")}

    def counting(method: Callable) -> Callable:
        def call(rows: Rows, tensor: Tensor) -> Tensor:
            largest[0] = max(largest[0], tensor.numel())
            return method(rows, tensor)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, method in methods.items():
            patch.setattr(Rows, name, counting(method))
        yield largest


def moved_by_equal_gradients(
    settings: dict[str, Any], rows: int = 50, columns: int = 128
) -> tuple[Tensor, dict[str, Tensor]]:
    """A bf16 weight and its states after five steps; of 50 rows three processes have 17, 17 and 16."""
    generator = torch.Generator().manual_seed(3)

    def draw(placement: Placement = Shard(0)) -> Tensor:  # noqa: B008
        drawn = torch.randn(rows, columns, generator=generator).bfloat16()
        if not dist.is_initialized():
            return drawn
        return distribute_tensor(drawn, init_device_mesh("cpu", (dist.get_world_size(),)), [placement])

    weight = nn.Parameter(draw())
    optimizer = GridOptimizer([weight], lr=1e-2, **settings)
    for step in range(5):
        weight.grad = draw(Replicate() if step == 3 else Shard(0))
        optimizer.step()
    states = optimizer.state_dict()["state"][0]
    states = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in states.items()}
    return whole(nn.ParameterList([weight])), states


def skipped_for_nan_in_one_process() -> list[int]:
    """Refreshes that each process has skipped."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.ones(6, 8), mesh, [Shard(0)]))
    optimizer = GridOptimizer([weight], projection="power", rank=2)
    gradient = torch.ones(6, 8)
    gradient[0, 0] = torch.nan
    weight.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    with pytest.warns(NonFiniteGradientWarning):
        optimizer.step()
    assert torch.equal(whole(nn.ParameterList([weight])), torch.ones(48))
    counts: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(counts, optimizer.param_groups[0]["skipped_refreshes"])
    return counts


def refusals() -> dict[str, str]:
    """What is said about settings that cannot be honoured."""
    found = {}
    for name, (large, settings, _) in REFUSED.items():
        with pytest.raises(ValueError, match=r"sharded|processes") as refused:
            make_optimizer(make_net(large), **settings)
        found[name] = str(refused.value)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(ValueError, match="placements") as refused:
        GridOptimizer([nn.Parameter(distribute_tensor(torch.ones(6, 8), mesh, [Shard(1)]))])
    found["by columns"] = str(refused.value)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return results()


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_points(3, list(POINTS), tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_points(2, FOR_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def of_two_copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two copies of the net, each on two processes."""
    folder: Path = tmp_path_factory.mktemp("copies")
    run_world(4, folder, save_of_two_copies, FOR_TWO_COPIES, str(folder / "results.pt"))
    return torch.load(folder / "results.pt", weights_only=True)


def run_points(world: int, names: list[str], folder: Path) -> dict[str, Any]:
    run_world(world, folder, save_results, names, str(folder / "results.pt"))
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", POINTS)
def test_three_processes_do_as_one(name: str, alone: dict, of_three: dict) -> None:
    check_equal(name, alone[name], of_three[name])


@pytest.mark.parametrize("name", FOR_TWO)
def test_two_processes_do_as_one(name: str, alone: dict, of_two: dict) -> None:
    check_equal(name, alone[name], of_two[name])


@pytest.mark.parametrize("name", FOR_TWO_COPIES)
def test_two_copies_on_two_processes_each_do_as_one(name: str, alone: dict, of_two_copies: dict) -> None:
    check_equal(name, alone[name], of_two_copies[name])


def test_copies_stay_equal(of_two_copies: dict) -> None:
    assert of_two_copies["agree"]


def check_equal(name: str, one: dict[str, Any], many: dict[str, Any]) -> None:
    assert torch.equal(one["start"], many["start"])
    moved = (one["end"] - one["start"]).norm()
    difference = float((one["end"] - many["end"]).norm() / moved)
    print(name, difference)
    # Gradients themselves differ in the order of their sums over samples; 8-bit codes and random rounding
    # make whole steps of some of these differences.
    assert difference <= (2e-3 if "states" in name else 1e-5)
    torch.testing.assert_close(many["norms"], one["norms"], rtol=1e-5, atol=0)
    if "states" not in name:
        # R, or a sketch of one side, but no gradient, of which there are 24 x 40.
        gram = 40 * 40 if "left" in name or "full" in name else 24 * 24
        assert many["sent"] <= {"eigh": gram, "svd": gram, "randk": 240}.get(name.split()[0], 5 * 40)


@pytest.mark.parametrize("name", EQUAL_BITS)
def test_equal_gradients_give_equal_bits(name: str, of_three: dict) -> None:
    check_bits(of_three["bits"][name], moved_by_equal_gradients(EQUAL_BITS[name]))


@pytest.mark.parametrize("name", FOR_TWO_ROWS)
def test_a_process_may_have_no_rows(name: str, of_three: dict) -> None:
    check_bits(of_three["two rows"][name], moved_by_equal_gradients(EQUAL_BITS[name], 2, 4096))


def test_processes_agree_about_gradients_that_are_not_finite(of_three: dict) -> None:
    assert of_three["skipped"] == [1, 1, 1]


def check_bits(many: tuple[Tensor, dict], one: tuple[Tensor, dict]) -> None:
    assert torch.equal(many[0], one[0])
    assert many[1].keys() == one[1].keys()
    for key, tensor in one[1].items():
        # Blocks are saved row by row.
        assert torch.equal(many[1][key].flatten(), tensor.flatten()), key


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_on_shards_is_refused(name: str, of_three: dict) -> None:
    assert re.search(REFUSED[name][2], of_three["refused"][name])


def test_dependent_signs_can_be_rotated() -> None:
    """Two columns of two signs are parallel half of the time."""
    projection, shape = Projection(kind="rademacher", rank=2, side="left"), torch.Size((2, 3))
    projector = ShardedRandom(projection, shape, Rows(2, 0, 2, 2, 1, 0, None))
    old, new = {"left": torch.ones(2, 2)}, {"left": torch.tensor([[1.0, 1], [1, -1]])}
    # Both old coordinates are worth (1, 1) / 2 each, which the new basis sees as (2, 0) / 2.
    expected = torch.tensor([[0.5, 0.5], [0, 0]])
    torch.testing.assert_close(projector.overlap(old, new).left, expected)


def test_other_layouts_are_refused(of_three: dict) -> None:
    message = r"placements \(Shard\(dim=1\),?\): Shard\(0\) over one dimension.*tensor-parallel layers"
    assert re.search(message, of_three["refused"]["by columns"])
