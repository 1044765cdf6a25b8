"""What does a snapshot cost training, and how soon is a killed run back?

    python benchmarks/snapshot.py --directory /var/tmp

Two processes train the same Llama (SmolLM2-135M's blocks, fewer of them), one at a time, a few steps at a
time, with a snapshot at the beginning of a stretch or without:

- memtrain keeps fp32 masters and moments on disk; its snapshots are asynchronous (to disk), held (in the
  memory of another process) or synchronous (``save_checkpoint``);
- plain PyTorch keeps all of it in memory; torch.distributed.checkpoint stages it to a copy and writes that
  from a thread (``async_save``: staged at once, to new memory for each save or to memory that is kept, or
  staged by a thread, for which the update waits), or saves at once; and ``torch.save``, with fsync.

The bytes of a snapshot are the same, and each is synced before it counts as complete; the one before is
removed off the clock where the engine itself replaces none. The state's place is not the same: that is what
each of the two is for. So a stall is a difference within one process: seconds of a stretch with a snapshot
less those that as many steps take in the stretches without one before and after it. A stretch goes on until
its snapshot is complete, so that all that it slows down is counted.

Recovery: both processes are killed with SIGKILL; new ones load what is left, and their weights are compared
with those that were saved. Files on disk are dropped from the page cache before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _harness import (
    BENCHMARKS,
    BenchmarkError,
    MiB,
    child_environment,
    evict,
    publish,
    spread,
    table,
)

KINDS = {
    "memtrain": ("asynchronous", "held", "synchronous"),
    "torch": ("dcp", "dcp_reused", "dcp_staged", "dcp_sync", "torch_save"),
}
RECOVERIES = (
    ("memtrain", "held"),
    ("memtrain", "asynchronous"),
    ("torch", "dcp_sync"),
    ("torch", "torch_save"),
)


class Child:
    """A process that does what it is told, line by line."""

    def __init__(self, engine: str, options: Sequence[str]) -> None:
        self.engine = engine
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (lives as long as the child)
        self._process = subprocess.Popen(
            [sys.executable, str(BENCHMARKS / "_snapshot_child.py"), "--engine", engine, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **child_environment("memtrain" if engine == "memtrain" else "plain")},
        )

    def answer(self) -> dict[str, Any]:
        """Its next line of JSON. Raises BenchmarkError: it has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        self._log.seek(0)
        raise BenchmarkError(f"{self.engine} ended; it last said:\n{self._log.read()[-2000:]}")

    def ask(self, text: str) -> dict[str, Any]:
        """Tell it to do something; what it says when that is done."""
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        began = time.monotonic()
        found = self.answer()
        note(f"{self.engine} {text}: {time.monotonic() - began:.1f} s")
        return found

    def kill(self) -> None:
        """As the kernel would for want of memory."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def note(text: str) -> None:
    """Progress, for whoever watches."""
    print(text, file=sys.stderr, flush=True)


def stalls(rounds: Sequence[dict[str, dict[str, Any]]], kind: str) -> list[float]:
    """Seconds that each snapshot of ``kind`` took from training: against the stretches without one before
    and after it."""
    plain = [one["none"]["seconds"] / one["none"]["steps"] for one in rounds]
    return [
        rounds[i][kind]["seconds"] - rounds[i][kind]["steps"] * (plain[i] + plain[i + 1]) / 2
        for i in range(len(rounds) - 1)
    ]


def measure(children: dict[str, Child], deadline: float, most: int) -> dict[str, list[dict[str, Any]]]:
    """Rounds of stretches, both engines taking turns, and a last one without snapshots."""
    rounds: dict[str, list[dict[str, Any]]] = {engine: [] for engine in children}
    longest = 0.0
    for _ in range(most):
        began = time.monotonic()
        if began + longest > deadline and len(rounds["memtrain"]) >= 2:
            break
        for engine in children:
            rounds[engine].append({})
        for place in range(max(len(kinds) for kinds in KINDS.values()) + 1):
            for engine, child in children.items():
                kinds = ("none", *KINDS[engine])
                if place < len(kinds):
                    rounds[engine][-1][kinds[place]] = child.ask(f"run {kinds[place]}")
        longest = max(longest, time.monotonic() - began)
    for engine, child in children.items():
        rounds[engine].append({"none": child.ask("run none")})
    return rounds


def describe(rounds: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Of one kind of snapshot."""
    runs, plain = [one[kind] for one in rounds[:-1]], [one["none"] for one in rounds]
    peak = statistics.median(run["peak_bytes"] for run in plain)
    written = statistics.median(run["written_bytes"] for run in plain)
    return {
        "stall_seconds": spread(stalls(rounds, kind)),
        "request_seconds": spread([run["request_seconds"] for run in runs]),
        "complete_seconds": spread([run["complete_seconds"] for run in runs]),
        "steps": statistics.median(run["steps"] for run in runs),
        "memory_bytes": round(statistics.median(run["peak_bytes"] for run in runs) - peak),
        "written_bytes": round(statistics.median(run["written_bytes"] for run in runs) - written),
    }


def recover(directory: Path, options: Sequence[str], digests: dict[str, str]) -> list[dict[str, Any]]:
    """Take each kind of snapshot up in a new process."""
    found = []
    for engine, kind in RECOVERIES:
        evict([path for path in directory.rglob("*") if path.is_file() and "holder" not in path.parts])
        began = time.monotonic()
        child = Child(engine, [*options, "--recover", kind])
        answer = child.answer()
        whole_seconds = time.monotonic() - began
        child.kill()
        note(f"{kind} taken up: {whole_seconds:.1f} s")
        if answer["digest"] != digests[engine]:
            raise BenchmarkError(f"{kind} gave other weights back than were saved")
        found.append({"engine": engine, "kind": kind, "whole_seconds": whole_seconds, **answer})
    return found


def text_of(kinds: dict[str, Any], recoveries: Sequence[dict[str, Any]], plain: dict[str, float]) -> str:
    rows = []
    for engine, names in KINDS.items():
        for name in names:
            one = kinds[name]
            stall = one["stall_seconds"]
            rows.append(
                (
                    f"{engine} {name}",
                    f"{stall['median']:.2f} ({stall['min']:.2f} to {stall['max']:.2f})",
                    f"{one['request_seconds']['median']:.2f}",
                    f"{one['complete_seconds']['median']:.2f}",
                    f"{one['steps']:g}",
                    f"{one['memory_bytes'] / MiB:.0f}",
                    f"{one['written_bytes'] / MiB:.0f}",
                )
            )
    header = (
        "snapshot",
        "stall s (spread)",
        "call s",
        "complete s",
        "steps meanwhile",
        "memory MiB",
        "written MiB",
    )
    lines = [table(header, rows), ""]
    lines += [f"a step without a snapshot: {name} {seconds:.2f} s" for name, seconds in plain.items()]
    lines += [
        "",
        table(
            ("taken up after SIGKILL", "load s", "from start s"),
            [
                (
                    f"{one['engine']} {one['kind']}",
                    f"{one['load_seconds']:.2f}",
                    f"{one['whole_seconds']:.2f}",
                )
                for one in recoveries
            ],
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="on a local disk, with 10 GiB free")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="of a stretch")
    parser.add_argument("--spare-mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4, help="at most")
    parser.add_argument("--seconds", type=float, default=270.0, help="no round begins that would end later")
    parser.add_argument("--keep", action="store_true", help="write the outcome to benchmarks/results")
    args = parser.parse_args()
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="snapshot-", dir=args.directory))
    options = ["--directory", str(directory), "--layers", str(args.layers)]
    options += ["--steps", str(args.steps), "--spare-mib", str(args.spare_mib)]
    children: dict[str, Child] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # children and holder are ended then too
    try:
        ready = {}
        for engine in KINDS:
            children[engine] = Child(engine, options)
            ready[engine] = children[engine].answer()
            note(f"{engine} is ready after {time.monotonic() - began:.1f} s")
        rounds = measure(children, began + args.seconds, args.rounds)
        digests = {engine: child.ask("finish")["digest"] for engine, child in children.items()}
        for child in children.values():
            child.kill()
        recoveries = recover(directory, options, digests)
    finally:
        for child in children.values():
            child.kill()
        end_holder(directory)
        shutil.rmtree(directory, ignore_errors=True)
    kinds = {name: describe(rounds[engine], name) for engine, names in KINDS.items() for name in names}
    plain = {
        e: statistics.median(one["none"]["seconds"] / one["none"]["steps"] for one in rounds[e])
        for e in rounds
    }
    stall = {name: one["stall_seconds"]["median"] for name, one in kinds.items()}
    best_dcp = min(stall["dcp"], stall["dcp_reused"], stall["dcp_staged"])
    load = {one["kind"]: one["load_seconds"] for one in recoveries}
    summary = {
        "stall_seconds": round(stall["asynchronous"], 3),
        "vs_dcp_stall": ratio(stall["asynchronous"], best_dcp),
        "vs_sync_stall": ratio(stall["asynchronous"], stall["synchronous"]),
        "vs_torch_save_stall": ratio(stall["asynchronous"], stall["torch_save"]),
        "extra_bytes": kinds["asynchronous"]["memory_bytes"],
        "dcp_extra_bytes": kinds["dcp"]["memory_bytes"],
        "spare_bytes_on_disk": args.spare_mib << 20,
        "recovery_seconds": round(load["held"], 3),
        "recovery_from_disk_seconds": round(load["asynchronous"], 3),
        "recovery_dcp_seconds": round(load["dcp_sync"], 3),
        "parameters": ready["memtrain"]["parameters"],
        "rounds": len(rounds["memtrain"]) - 1,
    }
    text = text_of(kinds, recoveries, plain)
    text += f"\n{time.monotonic() - began:.0f} s"
    if args.keep:
        details = {"kinds": kinds, "rounds": rounds, "recoveries": recoveries}
        publish("snapshot", text=text, summary=summary, details=details)
    else:
        print(text)
        print(json.dumps(summary), flush=True)


def ratio(ours: float, theirs: float) -> float | None:
    """None where the other's stall is too small to be told from noise."""
    return round(ours / theirs, 3) if theirs > 0.01 else None


def end_holder(directory: Path) -> None:
    """The process that holds snapshots would wait for a trainer for an hour."""
    script = "import sys; from memtrain.offload.held import HeldSnapshots; HeldSnapshots(sys.argv[1]).close()"
    if (directory / "holder").exists():
        subprocess.run([sys.executable, "-c", script, str(directory / "holder")], check=False)


if __name__ == "__main__":
    main()
