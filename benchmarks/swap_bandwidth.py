"""Our engine against fio on the same disk: read, rewrite, and both at once.

Both sides move 4 MiB blocks, eight under way on four threads or at a queue depth of four, with direct I/O
in a preallocated file that was written once before. fio runs twice a round, with four ``psync`` jobs
(threads, as ours) and with ``libaio`` at depth four; the ratio is against the faster of the two. fio
neither checks nor generates checksums; we always do both. A round runs every pattern on every side, in an
order that turns; the ratio is taken within a round, and the median of the rounds counts. CPU seconds are
those of the process, libraries' start excluded for us; fio's are what it reports of its jobs.

A virtual machine's disk may lie in the host's cache: say "this disk", not "NVMe".
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

from _harness import BenchmarkError, publish, spread, table

BLOCK_BYTES = 4 << 20
DEPTH = 4
PATTERNS = {"read": "read", "write": "write", "mixed": "rw"}
FIO_ENGINES = ("psync", "libaio")


def require_fio() -> str:
    """Where fio is. Raises BenchmarkError with the hint."""
    path = shutil.which("fio")
    if path is None:
        raise BenchmarkError("fio is not installed: apt-get install fio")
    return path


def run_fio(
    fio: str, file: str, size_bytes: int, pattern: str, engine: str, seconds: float
) -> dict[str, float]:
    """One fio run in ``file``: bytes per second and CPU seconds per GB."""
    threads = DEPTH if engine == "psync" else 1
    part = size_bytes // threads
    command = [
        fio, "--name=swap", f"--filename={file}", f"--rw={pattern}", f"--ioengine={engine}", "--direct=1",
        f"--bs={BLOCK_BYTES}", f"--iodepth={DEPTH // threads}", f"--numjobs={threads}", "--thread",
        f"--size={part}", f"--offset_increment={part}", "--overwrite=1", "--fallocate=none", "--invalidate=0",
        "--time_based", f"--runtime={seconds}", "--group_reporting", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    # fio may say something before the JSON.
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    if job["error"]:
        raise BenchmarkError(f"fio reports error {job['error']}")
    moved = job["read"]["io_bytes"] + job["write"]["io_bytes"]
    run_seconds = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
    # Per cent of the run time, averaged over the jobs of the group.
    cpu_seconds = (job["usr_cpu"] + job["sys_cpu"]) / 100 * run_seconds * threads
    return {"bytes_per_second": moved / run_seconds, "cpu_seconds_per_gb": cpu_seconds / moved * 1e9}


class Ours:
    """The engine with a file of ``size_bytes``, every block of it written once."""

    def __init__(self, directory: str, size_bytes: int) -> None:
        import torch

        from memtrain.offload.slab import Slab
        from memtrain.offload.tiers import NvmeStore

        self.store = NvmeStore(directory, size_bytes, threads=DEPTH, piece_bytes=BLOCK_BYTES)
        slab = Slab(2 * DEPTH * BLOCK_BYTES)
        slab.buffer.random_(0, 256)
        self.views = list(torch.split(slab.buffer, BLOCK_BYTES))
        self.extents = [
            self.store.allocate(f"block {i}", BLOCK_BYTES) for i in range(size_bytes // BLOCK_BYTES)
        ]
        for extent in self.extents:
            self.store.write(extent, self.views[0]).wait()

    def run(self, pattern: str, seconds: float) -> dict[str, float]:
        """As ``run_fio``. Mixed reads one half of the file and writes the other, by turns."""
        submit = self._operations(pattern)
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        tickets = [next(submit)(view) for view in self.views]
        moved, stopping = 0, False
        while not stopping:
            stopping = time.perf_counter() - start >= seconds
            for index, view in enumerate(self.views):
                tickets[index].wait()
                moved += BLOCK_BYTES
                if not stopping:
                    tickets[index] = next(submit)(view)
        elapsed = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"bytes_per_second": moved / elapsed, "cpu_seconds_per_gb": cpu_seconds / moved * 1e9}

    def _operations(self, pattern: str) -> Iterator[Callable[[Any], Any]]:
        half = len(self.extents) // 2
        reads = (
            partial(self.store.read, e)
            for e in cycle(self.extents[:half] if pattern == "mixed" else self.extents)
        )
        writes = (
            partial(self.store.write, e)
            for e in cycle(self.extents[half:] if pattern == "mixed" else self.extents)
        )
        if pattern == "mixed":
            return (operation for pair in zip(reads, writes, strict=True) for operation in pair)
        return reads if pattern == "read" else writes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--swap", default=".", help="directory on the disk to measure")
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 for a claim")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--size-mib", type=int, default=1024, help="of each side's file")
    args = parser.parse_args()
    fio, size = require_fio(), args.size_mib << 20
    if size % (2 * DEPTH * BLOCK_BYTES):
        parser.error(f"--size-mib must be a multiple of {2 * DEPTH * BLOCK_BYTES >> 20}")
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as directory:
        file = os.path.join(directory, "fio")
        with open(file, "wb") as preallocated:
            os.posix_fallocate(preallocated.fileno(), 0, size)
        subprocess.run(
            [fio, "--name=fill", f"--filename={file}", "--rw=write", "--bs=4M", f"--size={size}",
             "--direct=1", "--fallocate=none", "--overwrite=1"],
            check=True, capture_output=True,
        )  # fmt: skip
        ours = Ours(directory, size)
        sides: dict[str, Callable[[str], dict[str, float]]] = {
            "memtrain": lambda p: ours.run(p, args.seconds)
        }
        for engine in FIO_ENGINES:
            sides[f"fio {engine}"] = lambda p, e=engine: run_fio(
                fio, file, size, PATTERNS[p], e, args.seconds
            )
        for index in range(args.rounds):
            for pattern in PATTERNS:
                turn = index % len(sides)
                order = [*list(sides)[turn:], *list(sides)[:turn]]
                rounds.append(
                    {"round": index, "pattern": pattern, "runs": {s: sides[s](pattern) for s in order}}
                )
        ours.store.close()
    report(rounds, list(sides), fio, args)


def report(rounds: list[dict[str, Any]], sides: list[str], fio: str, args: argparse.Namespace) -> None:
    """Print the table and the JSON line, and keep the evidence."""
    summary: dict[str, Any] = {}
    rows, spreads = [], {}
    for pattern in PATTERNS:
        runs = [entry["runs"] for entry in rounds if entry["pattern"] == pattern]
        best = max(sides[1:], key=lambda s: spread([r[s]["bytes_per_second"] for r in runs])["median"])
        ratios = spread([r["memtrain"]["bytes_per_second"] / r[best]["bytes_per_second"] for r in runs])
        spreads[pattern] = ratios
        summary[f"{pattern}_vs_fio"] = round(ratios["median"], 3)
        for side in sides:
            rate = spread([r[side]["bytes_per_second"] / 1e9 for r in runs])
            cpu = spread([r[side]["cpu_seconds_per_gb"] for r in runs])["median"]
            summary[f"{pattern}_cpu_seconds_per_gb_{side.replace(' ', '_')}"] = round(cpu, 3)
            rows.append((pattern, side, *(f"{rate[k]:.2f}" for k in ("min", "median", "max")), f"{cpu:.3f}"))
    version = subprocess.run([fio, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    summary |= {"fio": version, "rounds": args.rounds, "seconds": args.seconds}
    text = table(("pattern", "engine", "GB/s min", "median", "max", "CPU s/GB"), rows) + "".join(
        f"\n{name} against the faster fio: {s['median']:.3f} (from {s['min']:.3f} to {s['max']:.3f})"
        for name, s in spreads.items()
    )
    publish("swap_bandwidth", text=text, summary=summary, details={"rounds": rounds, "spread": spreads})


if __name__ == "__main__":
    main()
