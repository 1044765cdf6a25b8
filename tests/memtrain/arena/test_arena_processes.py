"""The planned allocator in processes of its own: forked, optimised, without a compiler, at the end."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from memtrain.arena import library

ROOT = Path(__file__).resolve().parents[3]

STEPS = """
import os, sys, torch
from memtrain.arena import ArenaSettings, PlannedAllocator
PAGES = 256
def block(value):
    return torch.full((PAGES * 4096,), value, dtype=torch.uint8)
def holds(tensor, value):
    return tensor.count_nonzero().item() == tensor.numel() and bool((tensor.numpy() == value).all())
def step():
    first = block(1)
    second = block(2)
    return holds(first, 1) and holds(second, 2)
def check(truth, what):
    if not truth:
        print(what, file=sys.stderr)
        os._exit(9)
def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    check(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child failed")
arena = PlannedAllocator(ArenaSettings(smallest_bytes=64 << 10))
"""
LEARN = "for _ in range(2):\n    with arena.step():\n        check(step(), 'recorded')\n"
FOLLOW = (
    "with arena.step():\n    check(step(), 'followed')\n"
    "check(arena.report().planned_steps > 0 and not arena.report().deviations, arena.report())\n"
)


def run(script: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Of this Python with warnings as errors."""
    return subprocess.run(
        [sys.executable, *flags, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


def finish(script: str, *flags: str, follow: bool = True) -> None:
    done = run(STEPS + LEARN + textwrap.dedent(script) + (FOLLOW if follow else ""), *flags)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [(), ("-O",)], ids=["", "O"])
def test_assertions_are_not_needed(flags: tuple[str, ...]) -> None:
    finish("", *flags)


def test_a_child_forked_in_a_step_reads_what_lives_and_leaves_the_parent_alone() -> None:
    finish(
        """
        def work():
            check(holds(first, 3), "inherited")
            check(step(), "the child's own")
            first.fill_(4)
        with arena.step():
            first = block(3)
            child(work)
            second = block(2)
            check(holds(first, 3) and holds(second, 2), "after the fork")
            del first, second
        """
    )


def test_a_child_may_leave_the_parent_s_step_and_close_its_arena() -> None:
    finish(
        """
        with arena.step():
            first = block(3)
            pid = os.fork()
            del first
            if pid:
                check(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "the child failed")
                second = block(2)
                del second
        if pid == 0:
            try:
                arena.step().__enter__()
            except RuntimeError as error:
                check("make one in this process" in str(error), error)
            else:
                check(False, "a child has used its parent's arena")
            arena.close()
            check(step(), "ordinary")
            with PlannedAllocator() as arena:
                for _ in range(3):
                    with arena.step():
                        check(step(), "the child's arena")
                check(arena.report().planned_steps == 1, arena.report())
            sys.exit(0)
        """
    )


def test_a_child_forked_between_steps_does_not_inherit_the_arena() -> None:
    finish(
        """
        with arena.step():
            first = block(3)
            address = first.data_ptr()
            del first
            block(2)
        def work():
            spans = [line.split()[0].split("-") for line in open("/proc/self/maps")]
            check(not any(int(a, 16) <= address < int(b, 16) for a, b in spans), "mapped in the child")
            check(step(), "ordinary")
            arena.close()
        child(work)
        """
    )


def test_workers_of_a_data_loader_that_starts_in_a_step() -> None:
    finish(
        """
        class Rows(torch.utils.data.Dataset):
            def __init__(self):
                self.rows = block(7).view(4, -1)
            def __len__(self):
                return 4
            def __getitem__(self, index):
                return self.rows[index] + index
        arena = PlannedAllocator(ArenaSettings(smallest_bytes=64 << 10))
        for _ in range(4):
            with arena.step():
                loader = torch.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork")
                for index, batch in enumerate(loader):
                    check(bool((batch == 7 + index).all()), "a batch")
                del loader, batch
        report = arena.report()
        check(report.planned_steps == 2 and not report.deviations, report)
        """,
        follow=False,
    )


def test_tensors_may_live_to_the_end_of_the_process() -> None:
    finish(
        """
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with arena.step():
                first = block(3)
        """,
        follow=False,
    )


@pytest.mark.parametrize("failure", ["none", "broken"])
def test_without_a_compiler_it_says_so_and_the_steps_are_ordinary(tmp_path: Path, failure: str) -> None:
    if failure == "broken":
        compiler = tmp_path / "g++"
        compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\n[ $1 = --version ]\n")
        compiler.chmod(0o755)
    script = "import warnings\nwarnings.simplefilter('always')\n" + STEPS + LEARN
    script += "check(arena.report().ordinary_steps == 2, arena.report())\narena.close()\n"
    path = str(tmp_path) if failure == "broken" else ""
    done = run(script, PATH=path, CXX="", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ArenaWarning: the planned allocator could not be set up") == 1
    assert "torch's own is used; install g++ or set CXX" in done.stderr
    assert ("this compiler is broken" if failure == "broken" else "no C++ compiler") in done.stderr


def test_nothing_of_it_is_destroyed_before_the_last_tensor() -> None:
    """A library that was loaded before this one frees its tensors after this one's statics are gone."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library.load()._name], check=True, capture_output=True, text=True
    ).stdout
    assert "munmap" in symbols
    assert "__cxa_atexit" not in symbols
