"""The allocator of a training process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from memtrain.malloc import mimalloc_library, tuned_environment

LIBRARY = Path("/lib/libmimalloc.so")


def test_the_library_is_added_to_the_environment_once() -> None:
    tuned = tuned_environment({"HOME": "/h"}, LIBRARY)
    assert tuned is not None
    assert (tuned["HOME"], tuned["LD_PRELOAD"], tuned["MIMALLOC_PURGE_DELAY"]) == ("/h", str(LIBRARY), "1000")
    assert tuned_environment(tuned, LIBRARY) is None
    del tuned["LD_PRELOAD"]  # a loader that strips it must not make us loop
    assert tuned_environment(tuned, LIBRARY) is None


def test_what_the_user_set_stays() -> None:
    assert tuned_environment({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, LIBRARY) is None
    assert tuned_environment({"LD_PRELOAD": "/other.so"}, LIBRARY) is None
    tuned = tuned_environment({"MIMALLOC_PURGE_DELAY": "0"}, LIBRARY)
    assert tuned is not None
    assert tuned["MIMALLOC_PURGE_DELAY"] == "0"


def test_no_library_no_restart() -> None:
    assert tuned_environment({}, None) is None


def test_the_restart_keeps_the_process_and_its_arguments() -> None:
    code = """
import ctypes, os, sys
from memtrain import malloc
print(os.getpid(), hasattr(ctypes.CDLL(None), "mi_collect"), sys.argv[1:], flush=True)
malloc.restart_with_allocator()
"""
    ours = ("GLIBC_TUNABLES", "LD_PRELOAD", "MEMTRAIN_MALLOC_TUNED")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    result = subprocess.run(
        [sys.executable, "-c", code, "a", "b=c"], env=environment, capture_output=True, text=True, check=True
    )
    first, second = (line.split(maxsplit=2) for line in result.stdout.splitlines())
    assert mimalloc_library() is not None
    assert first[0] == second[0]
    assert (first[1], second[1]) == ("False", "True")
    assert first[2] == second[2] == "['a', 'b=c']"
