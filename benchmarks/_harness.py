"""What the benchmark scripts share: start a child under a hard limit, read what it says, keep the evidence.

A child prints what it likes and ends with one JSON line. The harness itself imports neither torch nor
memtrain, so that it is small beside what it measures. Results go to benchmarks/results/<script>_<date>.json
(every child's report) and .txt (the table that was printed).
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from _limit import memory_limit

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
RESULTS = BENCHMARKS / "results"
DEEPSPEED_VENV = (ROOT / ".venv-deepspeed").resolve()  # its extensions are built anew under another path
ENGINES = ("plain", "checkpointing", "deepspeed", "memtrain")
GiB = 1 << 30
MiB = 1 << 20
INFEASIBLE_EXIT_CODE = 2
"""A child whose budget no plan can meet; the same number as memtrain's own command line."""
RESERVE_BYTES = 24 * MiB
"""Of a hard limit, what memtrain's budget leaves to the kernel: page tables (2 MiB a GiB), stacks, and page
cache that is being read; the budget itself speaks of the process's resident memory."""
TIMEOUT_SECONDS = 900.0
LOG_TAIL_CHARACTERS = 2000


class BenchmarkError(RuntimeError):
    """A benchmark cannot give its answer; says what failed and what the child last said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildRun:
    """How one child ended."""

    outcome: str
    """``finished``, ``infeasible`` (no plan fits the budget), ``killed`` (out of memory), ``timeout`` or
    ``failed``."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """Its last JSON line; empty unless it finished or was infeasible."""
    cgroup_peak_bytes: int | None = None
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    log_tail: str = ""

    @property
    def finished(self) -> bool:
        """Whether it did all that was asked."""
        return self.outcome == "finished"

    def require(self) -> Mapping[str, Any]:
        """The report of a child that had to finish. Raises BenchmarkError with what it last said."""
        if not self.finished:
            raise BenchmarkError(f"a child that had to finish {self.outcome}; it last said:\n{self.log_tail}")
        return self.report


def last_json_line(text: str) -> dict[str, Any]:
    """The last line of ``text`` that is a JSON object. Raises ValueError when there is none."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(value, dict):
                return value
    raise ValueError(f"no line of the output is a JSON object; it ends with {text[-200:]!r}")


def run_child(
    command: Sequence[str],
    *,
    limit_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> ChildRun:
    """Run ``command`` to its end in a memory group of its own, limited to ``limit_bytes`` or only counted.

    Raises:
        NoHardLimitError: this machine offers no memory group.
        BenchmarkError: the child ended well without a JSON line.
    """
    with memory_limit(limit_bytes) as group, tempfile.TemporaryFile("w+", errors="replace") as log:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        process = subprocess.Popen(
            [*group.prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        wall_seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        log.seek(0)
        text = log.read()
        report: dict[str, Any] = {}
        if code in (0, INFEASIBLE_EXIT_CODE):
            try:
                report = last_json_line(text)
            except ValueError as error:
                if code == 0:
                    raise BenchmarkError(f"{' '.join(command)}: {error}") from error
        outcome = _outcome(code, group.oom_kills(), infeasible="shortfall_bytes" in report)
        return ChildRun(
            outcome=outcome,
            report=report,
            cgroup_peak_bytes=group.peak_bytes(),
            wall_seconds=wall_seconds,
            cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            log_tail=text[-LOG_TAIL_CHARACTERS:],
        )


def _outcome(code: int | None, oom_kills: int, *, infeasible: bool) -> str:
    if code is None:
        return "timeout"
    if code == 0:
        return "finished"
    if code == INFEASIBLE_EXIT_CODE and infeasible:  # argparse leaves with 2 as well
        return "infeasible"
    return "killed" if oom_kills or code == -signal.SIGKILL else "failed"


def model_directory() -> Path:
    """SmolLM2-135M: ``$MEMTRAIN_MODEL``, or what ``make data`` unpacked. Raises BenchmarkError."""
    folder = Path(os.environ.get("MEMTRAIN_MODEL", ROOT / "data/models/smollm2-135m"))
    if not (folder / "config.json").exists():
        raise BenchmarkError(f"no model in {folder}: run `make data`, or set MEMTRAIN_MODEL to its folder")
    return folder


def train_command(engine: str, **options: Any) -> list[str]:
    """The command of ``_train_child.py`` for ``engine``; ``sequence=256`` becomes ``--sequence 256``.

    True is a bare flag; False and None leave the option out. Raises BenchmarkError without an environment
    for DeepSpeed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    python = sys.executable
    if engine == "deepspeed":
        python = str(DEEPSPEED_VENV / "bin/python")
        if not Path(python).exists():
            raise BenchmarkError(f"{python} is missing: run scripts/setup_deepspeed.sh")
    script = str(BENCHMARKS / "_train_child.py")
    command = [python, script, "--engine", engine, "--model", str(model_directory())]
    for key, value in options.items():
        if value is None or value is False:
            continue
        command.append("--" + key.replace("_", "-"))
        if value is not True:
            command.append(str(value))
    return command


def child_environment(engine: str, *, mimalloc: bool = False) -> dict[str, str]:
    """Threads, allocator, no network, DeepSpeed on the CPU.

    memtrain starts itself with mimalloc. The others get glibc with huge pages, the faster of its settings for
    them, or with ``mimalloc`` the same allocator as memtrain.
    """
    from memtrain.malloc import mimalloc_library, tuned_environment

    if engine == "memtrain" or mimalloc:
        allocator = tuned_environment({}, mimalloc_library()) or {}
    else:
        allocator = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return {
        "OMP_NUM_THREADS": "2",
        **allocator,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(DEEPSPEED_VENV / "torch_extensions"),
        "PATH": f"{DEEPSPEED_VENV / 'bin'}:{os.environ.get('PATH', '/usr/bin:/bin')}",
    }


def bisect_smallest(
    trial: Callable[[int], bool], *, low: int, high: int, ratio: float = 1.05, ceiling: int = 64 * GiB
) -> tuple[int, int]:
    """The smallest number that passes ``trial``, and the largest that does not, within ``ratio``.

    ``trial`` is taken to be monotonic: what finishes in x bytes finishes in more. The bracket is tried
    before it is believed: ``low`` is halved until it fails, ``high`` doubled until it passes.

    Returns:
        (smallest that passed, largest that failed), passed / failed <= ratio.
    Raises:
        ValueError: the bracket or the ratio makes no sense.
        BenchmarkError: not even ``ceiling`` passes.
    """
    if not 0 < low < high <= ceiling or ratio <= 1:
        raise ValueError(
            f"need 0 < low < high <= ceiling and ratio > 1, got {low}, {high}, {ceiling}, {ratio}"
        )
    while not trial(high):
        if high == ceiling:
            raise BenchmarkError(f"does not finish even in {ceiling / GiB:.1f} GiB")
        low, high = high, min(2 * high, ceiling)
    while low > 1 and trial(low):
        low, high = low // 2, low
    while high > low * ratio and high - low > 1:
        middle = round(math.sqrt(low * high))
        if trial(middle):
            high = middle
        else:
            low = middle
    return high, low


def evict(paths: Sequence[Path]) -> None:
    """Drop files from the page cache, so that the next child is charged for the pages it reads.

    Page cache belongs to the group that first read it: without this, the libraries and the weights that an
    earlier child brought in would be free for the later ones. Pages that a running process maps stay.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def child_files(engine: str) -> list[Path]:
    """The large files that a child maps or reads: torch's libraries and the model's weights."""
    prefix = DEEPSPEED_VENV if engine == "deepspeed" else Path(sys.prefix)
    libraries = sorted(prefix.glob("lib/python*/site-packages/torch/lib/*.so*"))
    return [*libraries, *sorted(model_directory().glob("*.safetensors"))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, median and greatest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def stamp() -> dict[str, Any]:
    """Where and with what a result was measured."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit + ("+changes" if changes else ""),
        "kernel": platform.release(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GiB, 1),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers")},
    }


def _git(*arguments: str) -> str:
    """What git says of this checkout; empty where there is none."""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of plain text, numbers and all, two spaces apart."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def publish(script: str, *, text: str, summary: Mapping[str, Any], details: Any) -> None:
    """Print ``text`` and, as the last line, ``summary`` as JSON; keep both, and ``details``, in results/."""
    RESULTS.mkdir(exist_ok=True)
    stamped = stamp()
    stem = RESULTS / f"{script}_{stamped['date'][:10]}"
    line = json.dumps(summary)
    document = {"summary": dict(summary), "stamp": stamped, "details": details}
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".txt").write_text(f"{text}\n{json.dumps(stamped)}\n{line}\n")
    print(text)
    print(line, flush=True)
