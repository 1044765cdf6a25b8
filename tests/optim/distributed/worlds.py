"""A few processes on this machine that share a gloo group, and end with the test that started them."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)
"""After which a collective that some process does not take part in is an error."""

PRELOADED = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo"]
"""Two seconds of imports, done once by a process that does nothing else and is forked for each of ours."""


def run_world(world: int, folder: Path, function: Callable[..., None], *args: Any) -> None:
    """Call ``function(*args)`` in each of ``world`` processes; an exception in one ends all and is raised.

    A world of one is this process.
    """
    if world == 1:
        _enter(0, 1, str(folder / "store1"), function, args)
        return
    multiprocessing.set_forkserver_preload(PRELOADED)
    store = str(folder / f"store{world}")
    mp.start_processes(_enter, (world, store, function, args), nprocs=world, start_method="forkserver")


def _enter(rank: int, world: int, store: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    try:
        function(*args)
    finally:
        dist.destroy_process_group()
