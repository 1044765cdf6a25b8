"""``memtrain run``: torchrun with our defaults, and the trainer's own exit code."""

from __future__ import annotations

import os
import re
from pathlib import Path

from memtrain.malloc import environment_for_children
from memtrain.recipe import RecipeError

_TRAINER = "memtrain.train"
_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")
_TAKES_PAIRS = ("--rdzv-conf", "--rdzv_conf")
"""Options of torchrun whose next argument may look like an override: ``--rdzv-conf timeout=60``."""
_RENDEZVOUS = ("--standalone", "--rdzv", "--nnodes", "--master", "--node-rank", "--node_rank")
_PROCESSES = ("--nproc-per-node", "--nproc_per_node")


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options of torchrun, and overrides of the recipe.

    Whatever has the form ``key=value`` is an override, whether the recipe has such a key or not: one that is
    misspelt is to be told, not to be run by torchrun as a script.
    """
    options: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        is_value = bool(options) and options[-1] in _TAKES_PAIRS
        (overrides if _OVERRIDE.match(argument) and not is_value else options).append(argument)
    return options, overrides


def torchrun_arguments(recipe: Path, options: list[str], overrides: list[str]) -> list[str]:
    """Arguments of torchrun: one process on this machine unless ``options`` say something else."""
    defaults = []
    if not any(option.startswith(_RENDEZVOUS) for option in options):
        defaults.append("--standalone")
    if not any(option.startswith(_PROCESSES) for option in options):
        defaults += ["--nproc-per-node", "1"]
    return [*defaults, *options, "-m", _TRAINER, str(recipe), *overrides]


def launch(recipe: Path, options: list[str], overrides: list[str]) -> int:
    """Run the trainer under torchrun in this process; the exit code of the first worker that failed, or 0.

    torchrun itself exits with 1 whatever its workers exit with, and with 2 when it is called wrongly: that
    is 1 here, for 2 is the trainer's word for a budget that cannot work.

    Raises:
        RecipeError: among ``options`` is what torchrun would run in the trainer's place.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        parsed = parse_args(torchrun_arguments(recipe, options, overrides))  # type: ignore[no-untyped-call]
    except SystemExit as end:
        return 1 if end.code else 0
    if not parsed.module or parsed.training_script != _TRAINER:
        raise RecipeError(
            f"{parsed.training_script!r} is neither an option of torchrun nor an override "
            "(section.key=value): memtrain run RECIPE [torchrun options] -- section.key=value ..."
        )
    os.environ.update(environment_for_children())
    try:
        run(parsed)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
