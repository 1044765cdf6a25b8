"""Does an allocator with a plan beat those without? SmolLM2-135M, bf16, sequence 1024, forward and backward.

    sh scripts/setup_allocators.sh       # once: jemalloc and tcmalloc
    python benchmarks/allocator.py       # under eight minutes on two idle cores: the first seven contenders
    python benchmarks/allocator.py --contenders 10 --rounds 12       # all of them, about fifteen
    python benchmarks/allocator.py --only sessions       # two minutes

Every contender is a process of its own. Some of them live side by side, and take their steps in turn, one at
a time, in alternating order: what slows the machine for a while slows all of them. The planned allocator
takes part in every such group, and ratios are taken turn by turn. All must have the same losses and
gradients, bit for bit.

- vs_jemalloc_time: seconds a step with the planned allocator over those with jemalloc, the faster of its two
  settings; median over turns. As in memtrain's trainer, what is not planned is mimalloc's; over glibc the
  planned allocator is a contender of its own.
- peak_over_load: bytes of the arena over the most bytes of its blocks alive at once. Requests below a page,
  0.02 % of the bytes here, are in neither.
- page_faults_per_step: median over the planned allocator's steps, of the whole process.

Then two sessions of ``memtrain.prepare`` in turn, one with ``allocator: planned``, one without, on one plan
but for the addresses: a third of the blocks keeps, a third swaps to disk, a third recomputes. A step is
forward, backward, update and ``zero_grad``; losses and trained weights must be equal bit for bit.

- session_vs_mimalloc_time, session_page_faults_per_step: as above, of whole steps.
- session_arena_over_load: bytes of the arena over the load of its largest plan.
- session_over_load: bytes of all slabs, staging and transients over the most that is in them at one position.
- session_peak_over_mimalloc: measured peaks of both processes since they were prepared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from _harness import BENCHMARKS, ROOT, BenchmarkError, GiB, model_directory, publish, spread, table
from _turns import Contender, running, take_turns

PLANNED, PLANNED_OVER_GLIBC = "planned", "planned, over glibc"
SESSION_PLANNED, SESSION = "session, planned", "session, mimalloc"
JEMALLOC = ("jemalloc, huge pages", "jemalloc, huge pages, keeps all")
LIBRARIES = Path("/usr/lib")


def library(name: str) -> str:
    """The path of a shared library of the system's. Raises BenchmarkError."""
    found = sorted(LIBRARIES.glob(f"*/{name}")) + sorted(LIBRARIES.glob(name))
    if not found:
        raise BenchmarkError(f"{name} is missing below {LIBRARIES}: run scripts/setup_allocators.sh")
    return str(found[0])


def contenders() -> dict[str, dict[str, str]]:
    """The environment of each; those that matter most first."""
    from memtrain.malloc import mimalloc_library, tuned_environment

    mimalloc = tuned_environment({}, mimalloc_library())
    if mimalloc is None:
        raise BenchmarkError("cmeel-mimalloc is not installed: run make setup")
    jemalloc = {"LD_PRELOAD": library("libjemalloc.so.2")}
    heap = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736"
    return {
        PLANNED: mimalloc,
        JEMALLOC[0]: {**jemalloc, "MALLOC_CONF": "thp:always"},
        JEMALLOC[1]: {**jemalloc, "MALLOC_CONF": "thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1"},
        "glibc": {},
        "glibc without mmap": {"GLIBC_TUNABLES": heap},
        "tcmalloc": {"LD_PRELOAD": library("libtcmalloc_minimal.so.4")},
        "mimalloc": mimalloc,
        PLANNED_OVER_GLIBC: {},
        "glibc, huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        "glibc without mmap, huge pages": {"GLIBC_TUNABLES": f"{heap}:glibc.malloc.hugetlb=1"},
    }


def started(
    name: str, environment: Mapping[str, str], args: argparse.Namespace
) -> AbstractContextManager[Contender]:
    """A contender that is about to say that it is ready; it is gone afterwards."""
    command = [sys.executable, str(BENCHMARKS / "_allocator_child.py"), "--model", str(model_directory())]
    command += ["--sequence", str(args.sequence)]
    if name in (PLANNED, PLANNED_OVER_GLIBC, SESSION_PLANNED):
        command.append("--planned")
    if name in (SESSION_PLANNED, SESSION):
        command += ["--session", str(args.directory)]
    common = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return running(name, command, {**common, **environment})


def measure(names: Iterable[str], args: argparse.Namespace, rounds: int) -> list[Contender]:
    """All of them at once, taking turns."""
    environments = contenders()
    environments |= {SESSION_PLANNED: environments[PLANNED], SESSION: environments["mimalloc"]}
    with ExitStack() as stack:
        group = [stack.enter_context(started(name, environments[name], args)) for name in names]
        take_turns(group, rounds)
    for contender in group:
        print(_line(contender), flush=True)
    return group


def _line(contender: Contender) -> str:
    seconds = statistics.median(step["seconds"] for step in contender.steps)
    return f"{contender.name}: {seconds:.2f} s a step, peak {contender.report['peak_bytes'] / GiB:.3f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6, help="steps of each contender that count")
    parser.add_argument("--session-rounds", type=int, default=5, help="steps of each session that count")
    parser.add_argument("--only", choices=("passes", "sessions"), help="one of the two parts")
    parser.add_argument(
        "--directory", default=tempfile.gettempdir(), help="what sessions swap to: a local disk"
    )
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--at-a-time", type=int, default=5, help="processes of about 2.5 GiB each")
    parser.add_argument("--contenders", type=int, default=7, help="only the first so many (at least 3)")
    args = parser.parse_args()
    if args.at_a_time < 2 or args.contenders < 3 or min(args.rounds, args.session_rounds) < 1:
        parser.error("--at-a-time is at least 2, --contenders at least 3, --rounds at least 1")
    text, summary, details = "", {}, {}
    if args.only != "sessions":
        text, summary, details = passes(args)
        print(text, summary, sep="\n", flush=True)  # half an hour's work, should the sessions fail
    if args.only != "passes":
        lines, found, children = sessions(args)
        text, summary = f"{text}\n\n{lines}".strip(), summary | found
        details["sessions"] = children
    publish("allocator", text=text, summary=summary, details=details)


def passes(args: argparse.Namespace) -> tuple[str, dict[str, float], dict[str, Any]]:
    """Forward and backward of a plain loop: the table, the summary, and what the processes said."""
    others = [name for name in contenders() if name != PLANNED][: args.contenders - 1]
    size = args.at_a_time - 1
    groups = [
        measure([PLANNED, *others[first : first + size]], args, args.rounds)
        for first in range(0, len(others), size)
    ]
    everyone = [contender for group in groups for contender in group]
    require_equal(everyone)
    ours = [group[0] for group in groups]
    arena = ours[0].report["arena"]
    if any(c.report["arena"]["planned_steps"] < args.rounds for c in ours):
        raise BenchmarkError(f"not every step went as planned: {[c.report['arena'] for c in ours]}")
    ratios: dict[str, dict[str, float]] = {}
    by_name: defaultdict[str, list[Contender]] = defaultdict(list)
    for group in groups:
        for contender in group:
            by_name[contender.name].append(contender)
            turns = zip(group[0].steps, contender.steps, strict=True)
            ratios.setdefault(contender.name, spread([a["seconds"] / b["seconds"] for a, b in turns]))
    summary = {
        "vs_jemalloc_time": round(max(ratios[name]["median"] for name in JEMALLOC), 3),
        "peak_over_load": round(arena["arena_bytes"] / arena["load_bytes"], 5),
        "page_faults_per_step": statistics.median(step["page_faults"] for c in ours for step in c.steps),
    }
    header = (
        "allocator",
        *("step min (s)", "median", "max", "CPU s a step", "page faults a step", "VmHWM (GiB)"),
        "planned over it",
    )
    text = table(header, [_row(name, found, ratios[name]) for name, found in by_name.items()])
    text += (
        f"\narena {arena['arena_bytes'] / GiB:.4f} GiB for {arena['planned_requests']} requests; alive at "
        f"once at most {arena['load_bytes'] / GiB:.4f} GiB"
        f"\nlosses and gradients equal bit for bit in {len(everyone)} processes"
    )
    return text, summary, {"children": said(everyone), "ratios": ratios}


def said(contenders: Iterable[Contender]) -> list[dict[str, Any]]:
    """For the kept evidence."""
    return [{"name": c.name, "steps": c.steps, "report": c.report} for c in contenders]


def require_equal(contenders: Iterable[Contender]) -> None:
    """Raises BenchmarkError where they have not computed the same."""
    digests = {c.name: c.report["digest"] for c in contenders}
    if len(set(digests.values())) != 1:
        raise BenchmarkError(f"losses, gradients or weights differ: {digests}")


def sessions(args: argparse.Namespace) -> tuple[str, dict[str, float], list[dict[str, Any]]]:
    """Whole steps of two sessions."""
    with tempfile.TemporaryDirectory(prefix="swap_", dir=args.directory) as directory:
        inside = argparse.Namespace(**{**vars(args), "directory": directory})
        planned, plain = measure([SESSION_PLANNED, SESSION], inside, args.session_rounds)
    require_equal([planned, plain])
    arena = planned.report["arena"]
    if arena["planned_steps"] < 2 * args.session_rounds:  # passes and updates
        raise BenchmarkError(f"not every step went as planned: {arena}")
    turns = zip(planned.steps, plain.steps, strict=True)
    ratio = spread([a["seconds"] / b["seconds"] for a, b in turns])
    one = spread([1.0])
    summary = {
        "session_vs_mimalloc_time": round(ratio["median"], 3),
        "session_page_faults_per_step": statistics.median(step["page_faults"] for step in planned.steps),
        "session_arena_over_load": round(arena["arena_bytes"] / arena["load_bytes"], 5),
        "session_over_load": round(planned.report["held_bytes"] / planned.report["load_bytes"], 5),
        "session_peak_over_mimalloc": round(planned.report["peak_bytes"] / plain.report["peak_bytes"], 4),
    }
    header = (
        "session",
        *("step min (s)", "median", "max", "CPU s a step", "page faults a step", "peak (GiB)"),
        "planned over it",
    )
    rows = [_row(SESSION_PLANNED, [planned], one), _row(SESSION, [plain], ratio)]
    text = table(header, rows)
    for contender in (planned, plain):
        found = contender.report
        text += (
            f"\n{contender.name}: predicted peak {found['predicted_peak_bytes'] / GiB:.3f} GiB; slabs, "
            f"staging and transients {found['held_bytes'] / GiB:.4f} GiB, at once "
            f"{found['load_bytes'] / GiB:.4f} GiB"
        )
    return text, summary, said([planned, plain])


def _row(name: str, found: list[Contender], ratio: Mapping[str, float]) -> tuple[object, ...]:
    steps = [step for contender in found for step in contender.steps]
    seconds = spread([step["seconds"] for step in steps])
    return (
        name,
        *(f"{seconds[key]:.2f}" for key in ("min", "median", "max")),
        f"{statistics.median(step['cpu_seconds'] for step in steps):.2f}",
        f"{statistics.median(step['page_faults'] for step in steps):.0f}",
        f"{max(contender.report['peak_bytes'] for contender in found) / GiB:.3f}",
        f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})",
    )


if __name__ == "__main__":
    main()
