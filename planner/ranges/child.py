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
import tempfile
import time
from pathlib import Path

from memtrain.planner.ranges.formulate import Decisions, formulate
from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.search import Answer, search

RESERVE_SECONDS = 0.5
"""The search is asked to stop this much before it is killed."""


class Child:
    """A search under way in a process of its own, to be used as a context, whose end is the process's."""

    def __init__(
        self, problem: Problem, start: Decisions | None, *, gap: float, seconds: float, whole: bool
    ) -> None:
        self._deadline = time.monotonic() + seconds
        # Files, not pipes: nobody reads along while the rules are tried.
        self._request, self._answers, self._errors = (tempfile.TemporaryFile() for _ in range(3))  # noqa: SIM115
        pickle.dump((problem, start, gap, time.time() + seconds - RESERVE_SECONDS, whole), self._request)
        self._request.seek(0)
        path = os.pathsep.join([str(Path(__file__).absolute().parents[3]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "memtrain.planner.ranges.child"],
            stdin=self._request,
            stdout=self._answers,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": path},
        )

    def result(self) -> Answer | None:
        """What was found when its seconds are over, or before; None when there was no time for any answer.

        Raises:
            RuntimeError: the process failed; with the end of what it said.
        """
        try:
            code = self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = 0
        finally:
            self._kill()
        self._answers.seek(0)
        self._errors.seek(0)
        answer, said = _last(self._answers.read()), self._errors.read()
        if code != 0:
            raise RuntimeError(f"the solver's process failed: {said.decode(errors='replace')[-2000:]}")
        return answer

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()
        for file in (self._request, self._answers, self._errors):
            file.close()

    def _kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def search_in_child(
    problem: Problem, start: Decisions | None, *, gap: float, seconds: float, whole: bool
) -> Answer | None:
    """What ``search.search`` finds within ``seconds`` of wall clock, the child's start included.

    Returns None when there was no time for any answer.

    Raises:
        RuntimeError: as ``Child.result``.
    """
    if seconds <= RESERVE_SECONDS:
        return None
    with Child(problem, start, gap=gap, seconds=seconds, whole=whole) as child:
        return child.result()


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
