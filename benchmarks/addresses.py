"""Addresses: how often does ``planner.addresses.pack`` reach the least height there can be, and how soon?

Zero-slack instances are made by cutting a rectangle recursively: the pieces fill it, so its height is the
load and the optimum. On the fine grid (2**20 moments, 2**20 units) few cuts coincide; on the coarse one
(about n/2.5 moments, 1,000 units) many do, which leaves more ways to go wrong. MiniMalloc's own instances
A-K are read from a folder (``benchmarks/challenging`` of google/minimalloc), capacity 1,048,576. Beside each:
the same buffers by greedy-by-size, first fit and best fit, and for the smallest ones the big-M program that
MEMO uses, in PuLP with HiGHS and the same time limit. The step is that of Llama 3 70B in bf16 on one row of
4,096 tokens, every buffer of every operation, traced on fake tensors, everything kept, with two staging slots
of one block's input. Every packing is checked.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from _harness import BenchmarkError, publish, table
from _rectangles import cut_rectangle

from memtrain.planner.addresses import pack
from memtrain.planner.buffers import Buffer, read_csv
from memtrain.planner.check_addresses import check_addresses
from memtrain.planner.model_presets import PRESETS
from memtrain.planner.packing import greedy
from memtrain.planner.packing.grid import components
from memtrain.planner.step_addresses import pack_step
from memtrain.planner.traced_step import step_of
from memtrain.planner.tracing.estimator import estimate_config

FINE = 1 << 20
COARSE_HEIGHT = 1000
MINIMALLOC_CAPACITY = 1 << 20
LETTERS = "ABCDEFGHIJK"
STEP_MODEL, STEP_TOKENS, STEP_SECONDS = "llama-3-70b", 4096, 5.0
QUICK_MODEL = {**PRESETS["smollm2-135m"], "num_hidden_layers": 3}
STAGING_SLOTS = 2
ALIGNMENT = 512
"""Of torch's CUDA allocator, and of ``pack_step``."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One instance; heights in its units, None where nothing was found."""

    family: str
    instance: str
    buffers: int
    load: int
    capacity: int
    height: int
    status: str
    seconds: float
    first_fit: int
    best_fit: int
    big_m: int | None = None
    big_m_seconds: float | None = None

    @property
    def solved(self) -> bool:
        """Whether it is within the capacity."""
        return self.height <= self.capacity


def instances(args: argparse.Namespace) -> Iterator[tuple[str, str, list[Buffer], int]]:
    """Family, name, buffers and capacity of everything that is to be packed."""
    for count in args.counts:
        for seed in range(args.seeds):
            yield f"fine {count}", str(seed), cut_rectangle(count, seed, FINE, FINE), FINE
    for count in args.counts if args.coarse else ():
        for seed in range(args.seeds):
            buffers = cut_rectangle(count, seed, round(count / 2.5), COARSE_HEIGHT)
            yield f"coarse {count}", str(seed), buffers, COARSE_HEIGHT
    if args.minimalloc:
        for letter in LETTERS:
            path = Path(args.minimalloc) / f"{letter}.{MINIMALLOC_CAPACITY}.csv"
            if not path.exists():
                raise BenchmarkError(
                    f"{path} is missing: --minimalloc names benchmarks/challenging of a clone"
                )
            yield "minimalloc", letter, list(read_csv(path).buffers), MINIMALLOC_CAPACITY


def measure(
    family: str, name: str, buffers: list[Buffer], capacity: int, seconds: float, with_big_m: bool
) -> Result:
    """Pack one instance by every method. Raises BenchmarkError if a packing of ours is not sound."""
    start = time.perf_counter()
    packing = pack(buffers, capacity, time_limit_seconds=seconds)
    elapsed = time.perf_counter() - start
    _require_sound(buffers, packing.offsets, packing.height, f"{family} {name}")
    found, big_m_seconds = None, None
    if with_big_m:
        start = time.perf_counter()
        found = big_m(buffers, seconds)
        big_m_seconds = round(time.perf_counter() - start, 3)
    return Result(
        family=family,
        instance=name,
        buffers=len(buffers),
        load=packing.load,
        capacity=capacity,
        height=packing.height,
        status=packing.status.value,
        seconds=round(elapsed, 3),
        first_fit=by_size(buffers, best_fit=False),
        best_fit=by_size(buffers, best_fit=True),
        big_m=found,
        big_m_seconds=big_m_seconds,
    )


def _require_sound(buffers: Sequence[Buffer], offsets: Mapping[str, int], height: int, what: str) -> None:
    faults = check_addresses(buffers, offsets, capacity=height)
    if faults:
        raise BenchmarkError(f"{what}: {faults[0].detail} ({len(faults)} faults)")


def by_size(buffers: Sequence[Buffer], *, best_fit: bool) -> int:
    """Height of greedy-by-size."""
    heights = []
    for part in components([(b.start, b.end, b.size) for b in buffers]):
        order = greedy.order_by(part.grid, "size")
        heights.append(greedy.height(part.grid, greedy.place(part.grid, order, best_fit=best_fit)))
    return max(heights)


def big_m(buffers: Sequence[Buffer], seconds: float) -> int | None:
    """Height of MEMO's program: a binary a pair that lives at once says which of the two is lower."""
    import pulp

    bound = by_size(buffers, best_fit=False)
    unit = math.gcd(*(b.size for b in buffers))
    big = bound // unit
    program = pulp.LpProblem("addresses", pulp.LpMinimize)
    height = program.add_variable("height", 0, big)
    offsets = [program.add_variable(f"a{i}", 0, big - b.size // unit) for i, b in enumerate(buffers)]
    program += height
    for offset, b in zip(offsets, buffers, strict=True):
        program += offset + b.size // unit <= height
    for (i, a), (j, b) in combinations(enumerate(buffers), 2):
        if a.start < b.end and b.start < a.end:
            below = program.add_variable(f"z{i}_{j}", cat="Binary")
            program += offsets[i] + a.size // unit <= offsets[j] + big * (1 - below)
            program += offsets[j] + b.size // unit <= offsets[i] + big * below
    program.solve(pulp.HiGHS(msg=False, timeLimit=seconds, threads=1))
    if any(offset.value() is None for offset in offsets):
        return None
    found = {b.name: round(offset.value()) * unit for offset, b in zip(offsets, buffers, strict=True)}
    top = max(found[b.name] + b.size for b in buffers)
    # HiGHS may stop without a solution and leave numbers all the same.
    return None if check_addresses(buffers, found, capacity=top) else top


def measure_step(model: str | Mapping[str, Any], tokens: int, seconds: float) -> dict[str, Any]:
    """A whole training step of ``model``, traced on fake tensors; only laying it out has a limit."""
    start = time.perf_counter()
    estimate = estimate_config(model, sequence=tokens)
    traced = time.perf_counter()
    step = step_of(estimate, staging_slots=STAGING_SLOTS, staging_slot_bytes=estimate.classes[0].input_bytes)
    packing = pack_step(step, time_limit_seconds=seconds)
    elapsed = time.perf_counter() - traced
    buffers = step.buffers()
    faults = check_addresses(buffers, packing.offsets, capacity=packing.height, alignment=ALIGNMENT)
    if faults:
        raise BenchmarkError(f"step of {estimate.model}: {faults[0].detail} ({len(faults)} faults)")
    return {
        "model": model if isinstance(model, str) else estimate.model,
        "tokens": tokens,
        "layers": len(estimate.blocks),
        "buffers": len(buffers),
        "load_bytes": packing.load,
        "height_bytes": packing.height,
        "two_level_height_bytes": packing.two_level_height,
        "fragmentation": packing.fragmentation,
        "seconds": round(elapsed, 3),
        "trace_seconds": round(traced - start, 3),
    }


def report(results: Sequence[Result], step: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the table and the JSON line, and keep the evidence."""
    large = max(args.counts)
    rows = []
    for family in dict.fromkeys(r.family for r in results):
        runs = [r for r in results if r.family == family]
        # MiniMalloc's differ from each other; seeds do not.
        for group in [[r] for r in runs] if family == "minimalloc" else [runs]:
            rows.append(_row(family, group))
    fine = [r for r in results if r.family.startswith("fine")]
    small = [r for r in fine if r.buffers != large]
    minimalloc = [r for r in results if r.family == "minimalloc"]
    coarse = [r for r in results if r.family.startswith("coarse")]
    summary: dict[str, Any] = {
        "zero_slack_solved": sum(r.solved for r in small),
        "of": len(small),
        "large_solved": sum(r.solved for r in fine if r.buffers == large),
        "large_of": args.seeds,
        "minimalloc_solved": sum(r.solved for r in minimalloc) if minimalloc else None,
        "minimalloc_of": len(minimalloc),
        "step_fragmentation": round(step["fragmentation"], 6),
        "step_seconds": step["seconds"],
        "time_limit_seconds": args.seconds,
    }
    if coarse:
        summary["coarse_solved"] = {c: sum(r.solved for r in coarse if r.buffers == c) for c in args.counts}
    two_level = step["two_level_height_bytes"] / step["load_bytes"] - 1
    header = ("instances", "solved", "median s", "worst s", "height/bound", "first fit", "best fit", "big-M")
    text = table(header, rows) + (
        f"\nstep of {step['model']}, {step['layers']} layers, {step['tokens']} tokens, "
        f"{step['buffers']} buffers: height/load - 1 = {step['fragmentation']:.4%} in "
        f"{step['seconds']:.2f} s (two levels alone {two_level:.4%}), traced in {step['trace_seconds']:.2f} s"
        f"\nheights are worst ratios to the capacity or load; big-M: those that reached it, worst ratio, and "
        f"median seconds of at most {args.seconds:g}"
    )
    details = {"instances": [asdict(r) for r in results], "step": step}
    publish("addresses", text=text, summary=summary, details=details)


def _row(family: str, runs: Sequence[Result]) -> tuple[object, ...]:
    seconds = sorted(r.seconds for r in runs)
    programs = [r for r in runs if r.big_m_seconds is not None]
    solved = [r for r in programs if r.big_m is not None and r.big_m <= r.capacity]
    found = [r.big_m / r.capacity for r in programs if r.big_m is not None]
    program_seconds = sorted(r.big_m_seconds or 0.0 for r in programs)
    program = "-"
    if programs:
        ratio = f"{max(found):.3f}" if found else "none"
        program = f"{len(solved)} of {len(programs)}, {ratio}, {program_seconds[len(programs) // 2]:.1f} s"
    return (
        f"{family} {runs[0].instance} ({runs[0].buffers})" if family == "minimalloc" else family,
        f"{sum(r.solved for r in runs)} of {len(runs)}",
        f"{seconds[len(seconds) // 2]:.2f}",
        f"{seconds[-1]:.2f}",
        *(f"{max(heights):.3f}" for heights in zip(*(_ratios(r) for r in runs), strict=True)),
        program,
    )


def _ratios(r: Result) -> tuple[float, float, float]:
    return r.height / r.capacity, r.first_fit / r.capacity, r.best_fit / r.capacity


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minimalloc", metavar="DIR", help="folder with A.1048576.csv to K.1048576.csv")
    parser.add_argument(
        "--coarse", action="store_true", help="also the zero-slack instances on a coarse grid"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of each instance")
    parser.add_argument("--seeds", type=int, default=10, help="instances of each size")
    parser.add_argument(
        "--big-m", type=int, default=10, metavar="N", help="of the smallest ones, by big-M too"
    )
    parser.add_argument("--quick", action="store_true", help="tiny instances: does the script work?")
    args = parser.parse_args(arguments)
    args.counts = (50, 150, 450)
    traced: tuple[str | Mapping[str, Any], int] = STEP_MODEL, STEP_TOKENS
    if args.quick:
        args.counts, args.seeds, args.seconds, args.big_m = (8, 12, 16), 2, 2.0, 1
        traced = QUICK_MODEL, 64
    results, programs = [], 0
    for family, name, buffers, capacity in instances(args):
        with_big_m = family == f"fine {min(args.counts)}" and programs < args.big_m
        programs += with_big_m
        results.append(measure(family, name, buffers, capacity, args.seconds, with_big_m))
    report(results, measure_step(*traced, STEP_SECONDS), args)


if __name__ == "__main__":
    main()
