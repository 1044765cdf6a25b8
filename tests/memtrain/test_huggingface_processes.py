"""The Trainer on two processes (DDP over gloo) does as on one, and is taken up bit-equal."""

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests.memtrain.test_huggingface import make_model, make_trainer

WORLD = 2


def weights(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def in_world(rank: int, port: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    whole = make_trainer(folder / "whole", batch=2)
    whole.train()
    cut = make_trainer(folder / "cut", batch=2)
    cut.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    ends = {"whole": weights(whole.model), "cut": weights(cut.model)}
    torch.save(ends, folder / f"{rank}.pt")
    # Without teardown: in torch 2.13 the last owner of a gloo group, here DDP's reducer, joins under the GIL
    # a thread that may be waiting for the GIL.
    os._exit(0)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What each of the two has at the end."""
    folder: Path = tmp_path_factory.mktemp("two")
    multiprocessing.set_forkserver_preload(["tests.memtrain.test_huggingface"])
    mp.start_processes(in_world, (free_port(), folder), nprocs=WORLD, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_do_as_one(of_two: list, tmp_path: Path) -> None:
    one = make_trainer(tmp_path, batch=4)
    one.train()
    moved = (weights(one.model) - weights(make_model())).norm()
    assert torch.equal(of_two[0]["whole"], of_two[1]["whole"])
    assert (weights(one.model) - of_two[0]["whole"]).norm() <= 1e-5 * moved


def test_two_processes_are_taken_up_bit_equal(of_two: list) -> None:
    assert torch.equal(of_two[0]["whole"], of_two[0]["cut"])
