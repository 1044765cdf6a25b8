"""Steps of optimizers on a CPU, beside their peers and their floors: milliseconds, bytes a parameter.

    .venv-optim/bin/python benchmarks/optimizers.py
    .venv-optim/bin/python benchmarks/optimizers.py --quick
    .venv-optim/bin/python benchmarks/optimizers.py --rounds 5 --shapes 1024x1024

All contenders run by turns in one process, a step each a round, every round in another order; the first step,
which allocates and compiles, is not counted. A ratio is taken within a round, and the median of the rounds
counts. Bytes a second are those that the kernel's code moves (``bytes_per_element``) over the median time;
floors are explained in ``_lowrank_contenders.py``. Refreshes, of which an SVD takes seconds, have rounds of
their own. Bytes a parameter are those of the live tensors, weight and gradient included; each is compared
with the formula, and the differences are counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from _harness import publish, spread, table
from _lowrank_contenders import (
    BANDWIDTH,
    COLUMNS,
    GALORE,
    GALORE_TORCH,
    Contender,
    Probe,
    Shapes,
    floor_seconds,
    probes,
    projected,
    refreshing,
)
from _pointwise_contenders import ADAMW8BIT, BNB, FUSED, pointwise

SQUARE = (2048, 2048)
SHAPES = (SQUARE, (1024, 1024), (2736, 1024), (5461, 2048))
"""A square matrix and the projections of Llamas with d = 1024 and 2048."""
RANK = 256
QUICK_SHAPE, QUICK_RANK, QUICK_ROUNDS = (256, 192), 32, 2
THREADS = 2
LITERATURE = (
    ("AdamW, bf16 with fp32 master and states (literature)", 16),
    ("FlashOptim AdamW (arXiv 2602.23349)", 7),
)
"""Bytes of weights, gradients and states a parameter."""


def measure(rivals: Sequence[Probe], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, by contender."""
    for rival in rivals:
        rival.step(1)
    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    order, shuffle = list(rivals), random.Random(0)
    for number in range(rounds):
        shuffle.shuffle(order)
        for rival in order:
            start = time.perf_counter()
            rival.step(number + 2)
            seconds[rival.name].append(time.perf_counter() - start)
    return seconds


def live_bytes(rival: Contender) -> int:
    """Of the distinct storages of its tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in rival.tensors()}
    return sum(storages.values())


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    """Median over the rounds."""
    pairs = zip(seconds[over], seconds[under], strict=True)
    return statistics.median(a / b for a, b in pairs)


def over_floor_of(
    rival: Contender, shapes: Shapes, seconds: dict[str, list[float]], *, with_draws: bool = False
) -> float:
    """Median over the rounds."""
    floors = floor_seconds(rival, shapes, seconds, with_draws=with_draws)
    return statistics.median(a / b for a, b in zip(seconds[rival.name], floors, strict=True))


def milliseconds(seconds: Sequence[float]) -> tuple[str, ...]:
    found = spread(seconds)
    return tuple(f"{1e3 * found[which]:.2f}" for which in ("min", "median", "max"))


class Report:
    """What is printed and written, shape by shape."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, ...]] = []
        self.refreshes: list[tuple[str, ...]] = []
        self.details: list[dict[str, Any]] = []
        self.ratios: dict[str, dict[str, float]] = {}
        self.vs_floor: dict[str, float] = {}
        """By contender and shape."""
        self.errors = 0

    def measure(self, shapes: Shapes, rounds: int, refresh_rounds: int) -> None:
        """One shape."""
        text = f"{shapes.rows}x{shapes.columns}"
        rivals = [*pointwise((shapes.rows, shapes.columns)), *projected(shapes)]
        timed = probes(shapes)
        seconds = measure([*rivals, *timed], rounds)
        for probe in timed:
            rate = f"{12 * shapes.numel / statistics.median(seconds[probe.name]) / 1e9:.1f}"
            shown = rate if probe.name == BANDWIDTH else "-"
            self.steps.append(
                (text, probe.name, *milliseconds(seconds[probe.name]), "-", "-", "-", shown, "-")
            )
        for rival in rivals:
            self._add(text, rival, shapes, seconds)
        self.ratios[text] = {
            "galore_step_speedup": round(ratio(seconds, GALORE_TORCH, GALORE), 2),
            "frugal_columns_vs_adamw": round(ratio(seconds, COLUMNS, FUSED), 3),
            "adamw8bit_speedup": round(ratio(seconds, BNB, ADAMW8BIT), 2),
        }
        del rivals, timed
        rivals = refreshing(shapes)
        seconds = measure(rivals, refresh_rounds)
        for rival in rivals:
            speedup = f"{ratio(seconds, GALORE_TORCH, rival.name):.1f}"
            self.refreshes.append((text, rival.name, *milliseconds(seconds[rival.name]), speedup))
            self.details.append(
                {"shape": text, "refresh": True, "contender": rival.name, "seconds": seconds[rival.name]}
            )
        self.ratios[text]["galore_refresh_speedup"] = round(ratio(seconds, GALORE_TORCH, GALORE), 1)

    def _add(self, text: str, rival: Contender, shapes: Shapes, seconds: dict[str, list[float]]) -> None:
        mine, live = seconds[rival.name], live_bytes(rival)
        self.errors += live != rival.formula_bytes
        over_floor, with_draw, rate = "-", "-", "-"
        if rival.has_floor:
            over = over_floor_of(rival, shapes, seconds)
            self.vs_floor[f"{rival.name} {text}"] = over
            over_floor = f"{over:.2f}"
        if rival.draws:
            with_draw = f"{over_floor_of(rival, shapes, seconds, with_draws=True):.2f}"
        if rival.moved_bytes and not rival.products:
            rate = f"{rival.moved_bytes / statistics.median(mine) / 1e9:.1f}"
        against = f"{ratio(seconds, rival.name, FUSED):.2f}"
        size = f"{live / shapes.numel:.3f}"
        self.steps.append((text, rival.name, *milliseconds(mine), against, over_floor, with_draw, rate, size))
        self.details.append(
            {
                "shape": text,
                "contender": rival.name,
                "seconds": mine,
                "live_bytes": live,
                "formula_bytes": rival.formula_bytes,
                "moved_bytes": rival.moved_bytes,
                "products": rival.products,
                "over_floor": self.vs_floor.get(f"{rival.name} {text}"),
            }
        )

    def publish(self, *, keep: bool) -> None:
        """Headline figures are those of the first shape, the distance to the floor the worst of all."""
        for reference, size in LITERATURE:
            self.steps.append(("-", reference, *["-"] * 7, f"{size:.3f}"))
        times = ("shape", "optimizer", "ms min", "median", "max")
        steps = table(
            (*times, "/ fused", "/ floor", "/ floor and draw", "GB/s", "bytes/parameter"), self.steps
        )
        refreshes = table((*times, "speedup over galore-torch"), self.refreshes)
        headline = next(iter(self.ratios.values()))
        worst = max(self.vs_floor, key=self.vs_floor.__getitem__)
        summary = {
            "galore_step_speedup": headline["galore_step_speedup"],
            "galore_refresh_speedup": headline["galore_refresh_speedup"],
            "worst_vs_floor": round(self.vs_floor[worst], 3),
            "frugal_columns_vs_adamw": headline["frugal_columns_vs_adamw"],
            "adamw8bit_speedup": headline["adamw8bit_speedup"],
            "bytes_formula_errors": self.errors,
        }
        text = f"{steps}\n\nsteps with a refresh\n{refreshes}\n\nfurthest above its floor: {worst}"
        if keep:
            details = {"ratios": self.ratios, "contenders": self.details}
            publish("optimizers", text=text, summary=summary, details=details)
        else:
            print(text, json.dumps(summary), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25, help="steps of each contender")
    parser.add_argument("--refresh-rounds", type=int, default=3, help="refreshes of each contender")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES], metavar="MxN")
    parser.add_argument(
        "--quick", action="store_true", help="a small matrix, to see that everything runs; nothing is kept"
    )
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    report = Report()
    if args.quick:
        report.measure(Shapes(*QUICK_SHAPE, QUICK_RANK), QUICK_ROUNDS, QUICK_ROUNDS)
    else:
        for text in args.shapes:
            rows, columns = map(int, text.split("x"))
            report.measure(Shapes(rows, columns, args.rank), args.rounds, args.refresh_rounds)
    report.publish(keep=not args.quick)


if __name__ == "__main__":
    main()
