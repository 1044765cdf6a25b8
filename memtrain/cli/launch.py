"""``memtrain run``: torchrun with our defaults, and the trainer's own exit code."""

from __future__ import annotations

import os
from pathlib import Path

from memtrain.malloc import environment_for_children

_RENDEZVOUS = ("--standalone", "--rdzv", "--nnodes", "--master", "--node-rank", "--node_rank")
_PROCESSES = ("--nproc-per-node", "--nproc_per_node")


def torchrun_arguments(recipe: Path, options: list[str], overrides: list[str]) -> list[str]:
    """Arguments of torchrun: one process on this machine unless ``options`` say something else."""
    defaults = []
    if not any(option.startswith(_RENDEZVOUS) for option in options):
        defaults.append("--standalone")
    if not any(option.startswith(_PROCESSES) for option in options):
        defaults += ["--nproc-per-node", "1"]
    return [*defaults, *options, "-m", "memtrain.train", str(recipe), *overrides]


def launch(recipe: Path, options: list[str], overrides: list[str]) -> int:
    """Run the trainer under torchrun in this process; the exit code of the first worker that failed, or 0.

    torchrun itself exits with 1 whatever its workers exit with.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.update(environment_for_children())
    try:
        torchrun(torchrun_arguments(recipe, options, overrides))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
