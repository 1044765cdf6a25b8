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


def run_tuned(code: str, **environment: str) -> str:
    """What a process says that started with the allocator."""
    tuned = tuned_environment({**environment}, mimalloc_library())
    assert tuned is not None
    plain = {k: v for k, v in os.environ.items() if k not in tuned and k != "GLIBC_TUNABLES"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=plain | tuned, capture_output=True, text=True, check=True
    )
    return result.stdout


def test_while_freed_memory_is_kept_it_comes_without_page_faults_and_a_trim_still_gives_it_back() -> None:
    code = """
import ctypes, resource
from memtrain import malloc
from memtrain.planner import resident
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
SIZE = 8 << 20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(SIZE)
    ctypes.memset(block, 1, SIZE)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def least():
    return min(faults() for _ in range(4))

assert malloc.keep_freed(malloc.Keep.NOTHING)
given_back = least()
assert malloc.keep_freed(malloc.Keep.ALL) and malloc.keep_freed(malloc.Keep.ALL)
kept = least()
resident.trim()
after_trim = faults()
assert malloc.keep_freed(malloc.Keep.NOTHING)
least()
given_back_again = least()
assert malloc.keep_freed(malloc.Keep.A_WHILE)
print(given_back, kept, after_trim, given_back_again, libc.mi_option_get(15))
"""
    *faults, delay = map(int, run_tuned(code, MIMALLOC_PURGE_DELAY="700").split())
    given_back, kept, after_trim, given_back_again = faults
    assert (kept, delay) == (0, 700)
    assert min(given_back, after_trim, given_back_again) > 0


def test_an_allocator_that_we_have_not_chosen_is_left_alone() -> None:
    code = "from memtrain import malloc; print(*map(malloc.keep_freed, malloc.Keep))"
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "MEMTRAIN_MALLOC_TUNED")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False"] * 3
