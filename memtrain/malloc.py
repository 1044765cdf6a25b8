"""Start the program again with an allocator that gives memory back.

A budget holds for what the process occupies, and that is decided by the C library's heap as much as by what
is alive. glibc's heap (2.36) grows when aligned blocks of megabytes come and go among small ones: for a
training step of SmolLM2-135M that needs 1.17 GiB it took 1.6 GiB. Serving large blocks by mmap alone keeps
the budget and costs a page fault for every 4 KiB of every temporary. mimalloc does neither. Measured idle,
sequence 1024, two cores, budget 1.2 GiB (docs/log.md):

    glibc as it comes                                7.2 s a step, peak 1.6 GiB
    glibc, mmap from 256 KiB                        10.3 s a step, peak 1.17 GiB
    mimalloc, freed memory kept for 10 ms            8.2 s a step, peak 1.18 GiB
    mimalloc, kept for 1 s and asked back in need    6.2 s a step, peak 1.18 GiB

``memtrain.reclaim`` does the asking.

An allocator can only be chosen for a new program; ``execve`` keeps the process id, and torchrun does not
notice. What the user has set (``LD_PRELOAD``, ``GLIBC_TUNABLES``) stays as it is, and ``prepare`` then makes
glibc keep the budget in the slower way (``planner.resident.limit_heap``).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

_DONE = "MEMTRAIN_MALLOC_TUNED"
_PURGE_DELAY_MILLISECONDS = "1000"
"""How long mimalloc keeps freed memory: longer than a block or the head takes, so that temporaries find their
pages again. With 10 ms a step of SmolLM2-135M had 570,000 page faults and took a third longer."""


_PURGE_DELAY_OPTION = 15
"""``mi_option_purge_delay`` in mimalloc.h, 2.1 to 3.1; looked at before it is set."""
_NEVER_MILLISECONDS = 24 * 3600 * 1000
"""Not for ever (-1): then asking for memory back (``resident.trim``) would find nothing to give."""


class Keep(Enum):
    """How long mimalloc keeps what is freed before it gives the pages back to the kernel."""

    NOTHING = "nothing"
    """It gives them back at once: a page fault for every 4 KiB of every temporary, and least memory."""
    A_WHILE = "a while"
    """As long as it was started with."""
    ALL = "all"
    """Until it is asked."""


def keep_freed(keep: Keep) -> bool:
    """Have mimalloc keep what is freed so long, from now on, in every thread; the last caller is obeyed.

    Returns:
        Whether this process has mimalloc, as ``restart_with_allocator`` starts it.
    """
    option = _purge_delay()
    if option is None:
        return False
    write, began = option
    kept = {Keep.NOTHING: 0, Keep.A_WHILE: began, Keep.ALL: _NEVER_MILLISECONDS}
    write(_PURGE_DELAY_OPTION, ctypes.c_long(kept[keep]))
    return True


@cache
def _purge_delay() -> tuple[Any, int] | None:
    """``mi_option_set``, and the milliseconds that this process was started with. None without mimalloc,
    where somebody else has chosen it, and where the option is not what it was started with: another
    version, whose options have other numbers."""
    if os.environ.get(_DONE) != "1":
        return None
    here = ctypes.CDLL(None)
    try:
        read, write = here.mi_option_get, here.mi_option_set
        began = int(os.environ.get("MIMALLOC_PURGE_DELAY", _PURGE_DELAY_MILLISECONDS))
    except (AttributeError, ValueError):
        return None
    read.restype, write.restype = ctypes.c_long, None
    return (write, began) if read(_PURGE_DELAY_OPTION) == began else None


def mimalloc_library() -> Path | None:
    """The shared library of the ``cmeel-mimalloc`` package, or None where that is not installed."""
    try:
        package = importlib.metadata.distribution("cmeel-mimalloc")
    except importlib.metadata.PackageNotFoundError:
        return None
    library = Path(str(package.locate_file("cmeel.prefix/lib/libmimalloc.so")))
    return library if library.is_file() else None


def tuned_environment(environment: Mapping[str, str], library: Path | None) -> dict[str, str] | None:
    """The environment to start again with, or None where that is done, impossible or unwanted.

    Args:
        environment: the present one.
        library: the allocator to load.
    """
    chosen = any(name in environment for name in (_DONE, "LD_PRELOAD", "GLIBC_TUNABLES"))
    if chosen or library is None:
        return None
    return {
        "MIMALLOC_PURGE_DELAY": _PURGE_DELAY_MILLISECONDS,
        **environment,
        "LD_PRELOAD": str(library),
        _DONE: "1",
    }


def environment_for_children() -> dict[str, str]:
    """What a child's environment must be so that it starts with the allocator; empty where unwanted."""
    return tuned_environment(os.environ, mimalloc_library()) or {}


def restart_with_allocator() -> None:
    """Replace this process by itself with the allocator; returns where that is not to be done."""
    environment = tuned_environment(os.environ, mimalloc_library())
    if environment is not None:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
