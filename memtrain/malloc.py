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
from pathlib import Path

_DONE = "MEMTRAIN_MALLOC_TUNED"
_PURGE_DELAY_MILLISECONDS = "1000"
"""How long mimalloc keeps freed memory: longer than a block or the head takes, so that temporaries find their
pages again. With 10 ms a step of SmolLM2-135M had 570,000 page faults and took a third longer."""


_PURGE_DELAY_OPTION = 15
"""``mi_option_purge_delay`` in mimalloc.h, 2.1 to 3.1; looked at before it is set."""
_KEPT_MILLISECONDS = 24 * 3600 * 1000
"""Not for ever (-1): then asking for memory back (``resident.trim``) would find nothing to give."""


def keep_freed(keeps: bool) -> bool:
    """Have mimalloc keep what is freed until it is asked back, or no longer than it was started with.

    Under planned addresses all that it serves in a step it serves again in the next: what it gave back in
    between came again as page faults, 200 to 500 a step of a model of 8 blocks.

    Returns:
        Whether this process has mimalloc, as ``restart_with_allocator`` starts it.
    """
    if os.environ.get(_DONE) != "1":
        return False
    here = ctypes.CDLL(None)
    try:
        read, write = here.mi_option_get, here.mi_option_set
    except AttributeError:
        return False
    began = int(os.environ.get("MIMALLOC_PURGE_DELAY", _PURGE_DELAY_MILLISECONDS))
    read.restype, write.restype = ctypes.c_long, None
    if read(_PURGE_DELAY_OPTION) not in (began, _KEPT_MILLISECONDS):
        return False  # Another version, whose options have other numbers.
    write(_PURGE_DELAY_OPTION, ctypes.c_long(_KEPT_MILLISECONDS if keeps else began))
    return True


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
