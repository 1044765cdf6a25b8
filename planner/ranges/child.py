"""Runs the search in a process of its own, so that a solver that overruns can be killed.

HiGHS may sit in presolve long past its time limit. The child writes its best answer after every phase, so
that killing it costs nothing that was found. ``python -m memtrain.planner.ranges.child`` is that child.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

from memtrain.planner.ranges.formulate import Decisions, formulate
from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.search import Answer, search

RESERVE_SECONDS = 0.5
"""The search is asked to stop this much before it is killed."""


def search_in_child(
    problem: Problem, start: Decisions | None, *, gap: float, seconds: float, whole: bool
) -> Answer | None:
    """What ``search.search`` finds within ``seconds`` of wall clock, the child's start included.

    Returns None when there was no time for any answer.

    Raises:
        RuntimeError: the child failed; with the end of what it said.
    """
    if seconds <= RESERVE_SECONDS:
        return None
    request = pickle.dumps((problem, start, gap, time.time() + seconds - RESERVE_SECONDS, whole))
    path = os.pathsep.join([str(Path(__file__).absolute().parents[3]), os.environ.get("PYTHONPATH", "")])
    try:
        child = subprocess.run(
            [sys.executable, "-m", "memtrain.planner.ranges.child"],
            input=request,
            capture_output=True,
            timeout=seconds,
            env=os.environ | {"PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired as stopped:
        return _last(stopped.stdout or b"")
    if child.returncode != 0:
        raise RuntimeError(f"the solver's process failed: {child.stderr.decode(errors='replace')[-2000:]}")
    return _last(child.stdout)


def _last(text: bytes) -> Answer | None:
    """The last answer that was written whole."""
    stream, answer = io.BytesIO(text), None
    while stream.tell() < len(text):
        try:
            answer = pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):
            break
    return answer


def _main() -> None:
    problem, start, gap, deadline, whole = pickle.load(sys.stdin.buffer)

    def report(answer: Answer) -> None:
        sys.stdout.buffer.write(pickle.dumps(answer))
        sys.stdout.buffer.flush()

    search(formulate(problem), start, gap=gap, seconds=deadline - time.time(), whole=whole, report=report)


if __name__ == "__main__":
    _main()
