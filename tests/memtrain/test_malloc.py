from __future__ import annotations

import os
import subprocess
import sys

from memtrain.malloc import tuned_environment

MADVISE = "always [madvise] never\n"


def test_the_tunable_is_added_to_the_environment_once() -> None:
    tuned = tuned_environment({"HOME": "/h"}, MADVISE)
    assert tuned is not None
    assert (tuned["HOME"], tuned["GLIBC_TUNABLES"]) == ("/h", "glibc.malloc.hugetlb=1")
    assert tuned_environment(tuned, MADVISE) is None
    del tuned["GLIBC_TUNABLES"]  # a loader that strips it must not make us loop
    assert tuned_environment(tuned, MADVISE) is None


def test_what_the_user_set_stays() -> None:
    assert tuned_environment({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, MADVISE) is None


def test_no_huge_pages_no_restart() -> None:
    assert tuned_environment({}, "always madvise [never]\n") is None
    assert tuned_environment({}, "") is None
    assert tuned_environment({}, "[always] madvise never\n") is not None


def test_the_restart_keeps_the_process_and_its_arguments() -> None:
    code = """
import os, sys
from memtrain import malloc
malloc._huge_pages_setting = lambda: "[madvise]"
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], flush=True)
malloc.restart_with_huge_pages()
"""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("GLIBC_TUNABLES", "MEMTRAIN_MALLOC_TUNED")
    }
    result = subprocess.run(
        [sys.executable, "-c", code, "a", "b=c"], env=environment, capture_output=True, text=True, check=True
    )
    first, second = (line.split(maxsplit=2) for line in result.stdout.splitlines())
    assert first[0] == second[0]
    assert (first[1], second[1]) == ("None", "glibc.malloc.hugetlb=1")
    assert first[2] == second[2] == "['a', 'b=c']"
