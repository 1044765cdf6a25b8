"""A few processes on this machine that share a gloo group, and end with the test that started them."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)
"""After which a collective that some process does not take part in is an error."""


def run_world(world: int, folder: Path, function: Callable[..., None], *args: Any) -> None:
    """Call ``function(*args)`` in each of ``world`` processes; an exception in one ends all and is raised."""
    mp.start_processes(
        _enter, (world, str(folder / f"store{world}"), function, args), nprocs=world, start_method="spawn"
    )


def _enter(rank: int, world: int, store: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    try:
        function(*args)
    finally:
        dist.destroy_process_group()
