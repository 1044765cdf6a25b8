"""What DeepSpeed's swapped optimizer does under those faults that it can be given.

Each case trains three layers for four steps (``_faults_deepspeed_child.py``) and meets its fault before the
third, or from the start. What came of it is seen from outside: an error, a crash, no end in time, or weights,
which are compared with those of a run that nobody disturbed. The disks and how they fail are those of our own
tests (tests/offload/faults/disks.py).
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from _harness import BENCHMARKS, DEEPSPEED_VENV, BenchmarkError, MiB, child_environment

from tests.offload.faults.disks import fill, frozen, loop_disk, punch_holes, run

PAUSE = 2
"""The step before which a fault comes: files are there, moments are not zero."""
START_SECONDS = 300.0
LEAST_DEADLINE_SECONDS = 20.0
SILENT, HANG, CRASH, ERROR, RIGHT, LEFT = "silently wrong", "hang", "crash", "error", "right", "left behind"
EXPONENT_BYTE, HIGHEST_EXPONENT_BIT = 3, 0x40
"""Of a little-endian fp32 number."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a case came to."""

    row: int
    fault: str
    outcome: str
    detail: str


class Deadline(Exception):
    """Nothing was said in time."""


class Peer:
    """A process with DeepSpeed in it, which trains in a child as often as it is asked to."""

    def __init__(self, log: Path, *flags: str) -> None:
        self.log = log
        self.deadline_seconds = START_SECONDS
        self._rest = b""
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(DEEPSPEED_VENV / "bin/python"), *flags, str(BENCHMARKS / "_faults_deepspeed_child.py")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env={**os.environ, **child_environment("deepspeed"), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self._answer(START_SECONDS)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def train(
        self,
        order: dict[str, Any],
        at_pause: Callable[[int, ExitStack], None] | None = None,
        *,
        goes_on: bool = True,
    ) -> dict[str, Any]:
        """Carry out ``order``; all answers in one, with ``hang`` where there was none in time.

        ``at_pause`` is called with the process id; what it puts on the stack is undone when the run is over.
        Not ``goes_on``: that has ended it.
        """
        said: dict[str, Any] = {}
        began, logged = time.monotonic(), self.log.stat().st_size
        pause = None if at_pause is None else PAUSE
        self._say({"seed": 0, "nan_at": None, "skip_at": None, "pause_at": pause, **order})
        with ExitStack() as stack:
            try:
                while "exit" not in said:
                    answer = self._answer(self.deadline_seconds - (time.monotonic() - began))
                    said.update(answer)
                    if "paused" in answer and at_pause is not None:
                        at_pause(said["pid"], stack)
                        if goes_on:
                            self._say({})
            except Deadline:
                said["hang"] = True
                os.kill(said["pid"], signal.SIGKILL)
        if "hang" in said:
            self._answer(START_SECONDS)  # its exit, now that nothing holds it up
        log = self.log.read_bytes()[logged:].decode(errors="replace")
        return {**said, "seconds": time.monotonic() - began, "log": log}

    def _say(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line).encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            wait = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], wait)[0]:
                raise Deadline
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise BenchmarkError(
                    f"the process with DeepSpeed in it ended: {self.log.read_text()[-1000:]}"
                )
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return dict(json.loads(line))


def swap_files(folder: Path) -> list[Path]:
    """What lies on the disk, the weights in fp32 first."""
    return sorted(folder.rglob("*.swp"), key=lambda path: (not path.name[0].isdigit(), path.name))


class Cases:
    """The faults, one method each; ``run`` goes through them."""

    def __init__(self, peer: Peer, other: Peer, optimized: Peer, directory: Path) -> None:
        self.peer, self.other, self.optimized, self.directory = peer, other, optimized, directory
        self.weights = directory / "weights"
        undisturbed = [self.peer.train(self._order("reference")) for _ in range(2)]
        self.expected = torch.load(self.weights)
        if undisturbed[0].get("exit") or self._differing(self._train_to("again"), self.expected):
            raise BenchmarkError(f"DeepSpeed's own run is not the same twice, or failed: {undisturbed}")
        for each in (peer, other, optimized):
            each.deadline_seconds = max(LEAST_DEADLINE_SECONDS, 10 * undisturbed[1]["seconds"])

    def _order(self, name: str, folder: Path | None = None, **changes: Any) -> dict[str, Any]:
        self.weights.unlink(missing_ok=True)
        swap = folder or self.directory / name
        swap.mkdir(exist_ok=True)
        return {"swap": str(swap), "weights": str(self.weights), **changes}

    def _train_to(self, name: str, **changes: Any) -> list[torch.Tensor]:
        self.peer.train(self._order(name, **changes))
        return list(torch.load(self.weights))

    @staticmethod
    def _differing(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
        """The share of elements; what is no number differs."""
        differ = sum(int((a != b).sum()) for a, b in zip(found, expected, strict=True))
        return differ / sum(b.numel() for b in expected)

    def judge(self, said: dict[str, Any]) -> tuple[str, str]:
        """What a run came to, and how it said so."""
        if "hang" in said:
            return HANG, f"no end in {said['seconds']:.0f} s"
        if "error" in said:
            return ERROR, f"{said['error']}: {said['message']}".strip(": ").splitlines()[0][:120]
        if said["exit"] or "trained" not in said:
            number = -said["exit"]
            name = signal.Signals(number).name if number > 0 else f"exit {said['exit']}"
            asserted = re.findall(r"Assertion `.*", said["log"])
            return CRASH, ": ".join([name, *asserted[-1:]])[:120]
        differing = self._differing(torch.load(self.weights), self.expected)
        if differing:
            return SILENT, f"{100 * differing:.3g} % of the weights are others, and nothing was said"
        return RIGHT, "as without"

    def run(self, say: Callable[[str], None]) -> Iterator[Result]:
        cases: list[tuple[int, str, Callable[[], tuple[str, str]]]] = [
            (1, "24 MiB of disk for 48", self.small_disk),
            (2, "the disk fills up", self.full_disk),
            (3, "RLIMIT_FSIZE of 1 MiB", self.file_size_limit),
            (4, "the device loses its end", self.lost_end),
            (4, "a file is cut in half", self.truncated),
            (5, "writes fail with EIO", self.failing_writes),
            (9, "two files lie in each other's place", self.exchanged),
            (10, "one flipped bit", self.flipped),
            (11, "the disk hangs", self.hanging),
            (14, "SIGKILL in mid run", self.killed),
            (15, "another run in the same directory", self.two_runs),
            (20, "a loss that is no number", self.not_a_number),
            (21, "python -O", self.without_assertions),
            (23, "the files are removed", self.removed),
        ]
        for row, fault, case in cases:
            began = time.monotonic()
            try:
                outcome, detail = case()
            except pytest.skip.Exception as reason:
                outcome, detail = "not run", str(reason)
            say(f"row {row}, {fault}: {outcome} ({detail}), {time.monotonic() - began:.1f} s")
            yield Result(row=row, fault=fault, outcome=outcome, detail=detail)

    def _disturbed(self, name: str, fault: Callable[[int, Path, ExitStack], None]) -> tuple[str, str]:
        folder = self.directory / name
        said = self.peer.train(self._order(name), lambda pid, stack: fault(pid, folder, stack))
        return self.judge(said)

    # ---- the disk

    def small_disk(self) -> tuple[str, str]:
        with loop_disk(self.directory, "small", 24 * MiB) as disk:
            return self.judge(self.peer.train(self._order("small", disk)))

    def full_disk(self) -> tuple[str, str]:
        """Its room is given back first, as on a file system that copies on write."""

        def fault(pid: int, stack: ExitStack) -> None:
            for path in swap_files(disk):
                with path.open("rb") as file:
                    punch_holes(file.fileno(), 0, path.stat().st_size)
            fill(disk)

        with loop_disk(self.directory, "full", 96 * MiB) as disk:
            return self.judge(self.peer.train(self._order("full", disk), fault))

    def file_size_limit(self) -> tuple[str, str]:
        def fault(pid: int, folder: Path, stack: ExitStack) -> None:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (MiB, resource.RLIM_INFINITY))

        return self._disturbed("limited", fault)

    def lost_end(self) -> tuple[str, str]:
        def fault(pid: int, stack: ExitStack) -> None:
            run("sync", "-f", disk)
            os.truncate(self.directory / "lost.image", 2 * MiB)
            stack.callback(os.truncate, self.directory / "lost.image", 96 * MiB)

        with loop_disk(self.directory, "lost", 96 * MiB) as disk:
            return self.judge(self.peer.train(self._order("lost", disk), fault))

    def failing_writes(self) -> tuple[str, str]:
        """A disk inside a disk that is full: the kernel says EIO."""
        with (
            loop_disk(self.directory, "outer", 32 * MiB) as outer,
            loop_disk(outer, "inner", 96 * MiB) as inner,
        ):
            return self.judge(self.peer.train(self._order("inner", inner)))

    def hanging(self) -> tuple[str, str]:
        def fault(pid: int, stack: ExitStack) -> None:
            stack.enter_context(frozen(disk))

        with loop_disk(self.directory, "frozen", 96 * MiB) as disk:
            return self.judge(self.peer.train(self._order("frozen", disk), fault))

    # ---- the files

    def truncated(self) -> tuple[str, str]:
        def fault(pid: int, folder: Path, stack: ExitStack) -> None:
            path = swap_files(folder)[0]
            os.truncate(path, path.stat().st_size // 2)

        return self._disturbed("truncated", fault)

    def exchanged(self) -> tuple[str, str]:
        def fault(pid: int, folder: Path, stack: ExitStack) -> None:
            first, second, *_ = (path for path in swap_files(folder) if "gradient" not in path.name)
            between = first.with_suffix(".between")
            first.rename(between)
            second.rename(first)
            between.rename(second)

        return self._disturbed("exchanged", fault)

    def flipped(self) -> tuple[str, str]:
        """The highest bit of an exponent, in the middle of a file of weights."""

        def fault(pid: int, folder: Path, stack: ExitStack) -> None:
            with swap_files(folder)[0].open("r+b") as file:
                place = os.fstat(file.fileno()).st_size // 2 + EXPONENT_BYTE
                byte = os.pread(file.fileno(), 1, place)[0]
                os.pwrite(file.fileno(), bytes([byte ^ HIGHEST_EXPONENT_BIT]), place)
                os.fsync(file.fileno())

        return self._disturbed("flipped", fault)

    def removed(self) -> tuple[str, str]:
        def fault(pid: int, folder: Path, stack: ExitStack) -> None:
            for path in swap_files(folder):
                path.unlink()

        return self._disturbed("removed", fault)

    # ---- the processes

    def killed(self) -> tuple[str, str]:
        """What stays of a run that was killed when the next has ended, elsewhere, as it should."""

        said = self.peer.train(
            self._order("killed"), lambda pid, stack: os.kill(pid, signal.SIGKILL), goes_on=False
        )
        if said["exit"] != -signal.SIGKILL:
            raise BenchmarkError(f"a run was killed, and answered {said}")
        self.peer.train(self._order("after"))
        left = sum(path.stat().st_size for path in swap_files(self.directory / "killed"))
        return (LEFT, f"{left // MiB} MiB") if left else (RIGHT, "nothing is left")

    def two_runs(self) -> tuple[str, str]:
        """The other one trains from another seed, from beginning to end, while the first waits."""

        def fault(pid: int, folder: Path, stack: ExitStack) -> None:
            order = {"swap": str(folder), "weights": str(self.directory / "others"), "seed": 1}
            if self.other.train(order)["exit"]:
                raise BenchmarkError("the other run failed")

        return self._disturbed("shared", fault)

    def not_a_number(self) -> tuple[str, str]:
        said = self.peer.train(self._order("nan", nan_at=PAUSE))
        outcome, detail = self.judge(said)
        if outcome == SILENT:
            found = torch.load(self.weights)
            if not self._differing(found, self._train_to("skipped", skip_at=PAUSE)):
                return RIGHT, "that step is left out"
        return outcome, detail

    def without_assertions(self) -> tuple[str, str]:
        return self.judge(self.optimized.train(self._order("optimized")))


def run_cases(swap: str, say: Callable[[str], None]) -> list[Result]:
    """All of them, in a directory on the disk of ``swap``. Raises BenchmarkError without DeepSpeed."""
    if not (DEEPSPEED_VENV / "bin/python").exists():
        raise BenchmarkError(f"{DEEPSPEED_VENV} is missing: run scripts/setup_deepspeed.sh")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=swap)))
        peers = [Peer(directory / f"log{number}", *flags) for number, flags in enumerate([(), (), ("-O",)])]
        for peer in peers:
            stack.callback(peer.close)
        return list(Cases(*peers, directory).run(say))
