"""Children that live side by side and take their steps in turn, one at a time: what slows the machine for a
while slows all of them.

A child prints a line when it is ready, a JSON line for each line of its input, and one more when that ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from _harness import BenchmarkError


@dataclass(kw_only=True)
class Contender:
    """A child that takes a step when it is told to."""

    name: str
    process: subprocess.Popen[str]
    log: IO[str]
    steps: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def answer(self) -> str:
        """Its next line. Raises BenchmarkError when there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise BenchmarkError(f"{self.name} has ended; it last said:\n{self.log.read()[-2000:]}")
        return line

    def step(self) -> None:
        """One more."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.steps.append(json.loads(self.answer()))

    def finish(self) -> None:
        """Its report."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.report = json.loads(self.answer())


@contextmanager
def running(name: str, command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Contender]:
    """A contender that has said that it is ready; it is gone afterwards. One that is made while others make
    themselves ready would share the cores with them: three on two cores took more than three times as long.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **environment},
        )
        try:
            contender = Contender(name=name, process=process, log=log)
            contender.answer()
            yield contender
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None and not pipe.closed:
                    pipe.close()


def take_turns(group: Sequence[Contender], rounds: int) -> None:
    """A step of each in every round, every other round backwards; then their reports."""
    for turn in range(rounds):
        for contender in group[:: -1 if turn % 2 else 1]:
            contender.step()
    for contender in group:
        contender.finish()
