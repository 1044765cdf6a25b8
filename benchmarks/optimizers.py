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
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _harness import BenchmarkError, publish, spread, table
from _lowrank_contenders import (
    BANDWIDTH,
    GALORE,
    GALORE_TORCH,
    LR,
    WEIGHT_DECAY,
    Contender,
    Probe,
    Shapes,
    floor_seconds,
    operands,
    probes,
    projected,
    refreshing,
)
from torch import Tensor

from memtrain.optim.kernels import adamw, adamw8bit, sign, split_adamw
from memtrain.optim.kernels.pointwise import FP32, SPLIT24, AdamStep, Keys
from memtrain.optim.kernels.sign import LionStep, PlainStep
from memtrain.optim.storage import RandomKey, master_format, state_format

SQUARE = (2048, 2048)
SHAPES = (SQUARE, (1024, 1024), (2736, 1024), (5461, 2048))
"""A square matrix and the projections of Llamas with d = 1024 and 2048."""
RANK = 256
QUICK_SHAPE, QUICK_RANK, QUICK_ROUNDS = (256, 192), 32, 2
THREADS = 2
DENSITY = 0.25
FUSED, BNB, ADAMW8BIT, COLUMNS = "torch fused AdamW", "bitsandbytes AdamW8bit", "AdamW8bit", "FRUGAL columns"


LITERATURE = (
    ("AdamW, bf16 with fp32 master and states (literature)", 16),
    ("FlashOptim AdamW (arXiv 2602.23349)", 7),
)
"""Bytes of weights, gradients and states a parameter."""


def keys(step: int) -> Keys:
    key = RandomKey(seed=0, parameter=0, step=step)
    return Keys(key, key.fold(16), key.fold(17))


def numbers(step: int) -> AdamStep:
    return AdamStep(lr=LR, step=step, weight_decay=WEIGHT_DECAY)


def torch_fused(shape: tuple[int, int], dtype: torch.dtype, name: str) -> Contender:
    weight, gradient = operands(shape, dtype)
    parameter = torch.nn.Parameter(weight)
    parameter.grad = gradient
    optimizer = torch.optim.AdamW([parameter], lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    return Contender(
        name=name,
        step=lambda step: optimizer.step(),
        tensors=lambda: [parameter, gradient, *(t for t in optimizer.state[parameter].values() if t.dim())],
        formula_bytes=4 * dtype.itemsize * weight.numel(),
        moved_bytes=7 * dtype.itemsize * weight.numel(),
    )


def bitsandbytes_8bit(shape: tuple[int, int]) -> Contender:
    try:
        import bitsandbytes
    except ImportError as error:
        raise BenchmarkError("bitsandbytes is missing: run this with .venv-optim/bin/python") from error
    weight, gradient = operands(shape, torch.float32)
    parameter = torch.nn.Parameter(weight)
    parameter.grad = gradient
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=LR, weight_decay=WEIGHT_DECAY)

    def tensors() -> list[Tensor]:
        state = optimizer.state[parameter]
        # Its two code books of 256 numbers are shared by all parameters.
        return [parameter, gradient, *(state[n] for n in ("state1", "state2", "absmax1", "absmax2"))]

    numel = weight.numel()
    return Contender(
        name=BNB,
        step=lambda step: optimizer.step(),
        tensors=tensors,
        formula_bytes=(4 + 4 + 2) * numel + 2 * 4 * math.ceil(numel / 256),
    )


def ours(
    shape: tuple[int, int],
    name: str,
    state: str,
    run: Callable[..., None],
    bytes_per_element: float,
    *,
    master: str = "none",
    moment_shape: tuple[int, int] | None = None,
    signed_only: bool = False,
    has_floor: bool = False,
) -> Contender:
    """``run(weight, gradient, moments, step, **master and keys)`` on states of our own."""
    dtype = torch.float32 if master == "none" else torch.bfloat16
    weight, gradient = operands(shape, dtype)
    holder, form = master_format(master), state_format(state)
    stored, size = holder.empty(weight), torch.Size(moment_shape or shape)
    signs = (True,) if signed_only else (True, False)
    moments = [form.empty(size, signed=signed, device="cpu") for signed in signs]
    states = [tensor for each in (stored, *moments) for tensor in each.values()]
    return Contender(
        name=name,
        step=lambda step: run(weight, gradient, moments, step, master=stored, keys=keys(step)),
        tensors=lambda: [weight, gradient, *states],
        formula_bytes=2 * dtype.itemsize * weight.numel()
        + holder.size_bytes(weight.shape, dtype)
        + sum(form.size_bytes(size, signed=signed) for signed in signs),
        moved_bytes=bytes_per_element * weight.numel(),
        has_floor=has_floor,
    )


def contenders(shape: tuple[int, int]) -> list[Contender]:
    """The point-wise ones, on one shape."""
    rows, columns = shape
    f32, bf16 = torch.float32, torch.bfloat16

    def dense(kernel: Callable[..., None]) -> Callable[..., None]:
        return lambda w, g, moments, step, **rest: kernel(w, g, *moments, numbers(step), **rest)

    def split(axis: split_adamw.Axis, index: Tensor) -> Callable[..., None]:
        return lambda w, g, moments, step, **rest: split_adamw.split_adamw_(
            w, g, *moments, index, axis, numbers(step), PlainStep(lr=LR, weight_decay=WEIGHT_DECAY), **rest
        )

    active_columns = torch.randperm(columns)[: round(DENSITY * columns)]
    active_rows = torch.randperm(rows)[: round(DENSITY * rows)]
    split_bytes = split_adamw.bytes_per_element
    return [
        torch_fused(shape, f32, FUSED),
        torch_fused(shape, bf16, f"{FUSED}, all bf16"),
        bitsandbytes_8bit(shape),
        ours(shape, "AdamW", "fp32", dense(adamw.adamw_), adamw.bytes_per_element(FP32, f32, f32)),
        ours(
            shape,
            "AdamW, bf16 moments, split24",
            "bf16",
            dense(adamw.adamw_),
            adamw.bytes_per_element(SPLIT24, bf16, bf16),
            master="split24",
        ),
        ours(shape, ADAMW8BIT, "int8", dense(adamw8bit.adamw8bit_), adamw8bit.bytes_per_element(FP32, f32)),
        ours(
            shape,
            f"{ADAMW8BIT}, split24",
            "int8",
            dense(adamw8bit.adamw8bit_),
            adamw8bit.bytes_per_element(SPLIT24, bf16),
            master="split24",
        ),
        ours(
            shape,
            "Lion",
            "fp32",
            lambda w, g, moments, step, **rest: sign.lion_(
                w, g, *moments, LionStep(lr=LR, weight_decay=WEIGHT_DECAY), **rest
            ),
            sign.bytes_per_element(FP32, f32, f32),
            signed_only=True,
        ),
        ours(
            shape,
            COLUMNS,
            "fp32",
            split("columns", active_columns),
            split_bytes(FP32, f32, f32, density=DENSITY),
            moment_shape=(rows, len(active_columns)),
            has_floor=True,
        ),
        ours(
            shape,
            "FRUGAL rows",
            "fp32",
            split("rows", active_rows),
            split_bytes(FP32, f32, f32, density=DENSITY),
            moment_shape=(len(active_rows), columns),
            has_floor=True,
        ),
        ours(
            shape,
            f"{COLUMNS}, split24",
            "fp32",
            split("columns", active_columns),
            split_bytes(SPLIT24, bf16, f32, density=DENSITY),
            master="split24",
            moment_shape=(rows, len(active_columns)),
            has_floor=True,
        ),
    ]


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
        self.vs_floor: list[float] = []
        self.errors = 0

    def measure(self, shapes: Shapes, rounds: int, refresh_rounds: int) -> None:
        """One shape."""
        text = f"{shapes.rows}x{shapes.columns}"
        rivals = [*contenders((shapes.rows, shapes.columns)), *projected(shapes)]
        timed = probes(shapes)
        seconds = measure([*rivals, *timed], rounds)
        for probe in timed:
            rate = f"{12 * shapes.numel / statistics.median(seconds[probe.name]) / 1e9:.1f}"
            shown = rate if probe.name == BANDWIDTH else "-"
            self.steps.append((text, probe.name, *milliseconds(seconds[probe.name]), "-", "-", shown, "-"))
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
        over_floor, rate = "-", "-"
        if rival.has_floor:
            floors = floor_seconds(rival, shapes, seconds)
            self.vs_floor.append(statistics.median(a / b for a, b in zip(mine, floors, strict=True)))
            over_floor = f"{self.vs_floor[-1]:.2f}"
        if rival.moved_bytes and not rival.products:
            rate = f"{rival.moved_bytes / statistics.median(mine) / 1e9:.1f}"
        against = f"{ratio(seconds, rival.name, FUSED):.2f}"
        size = f"{live / shapes.numel:.3f}"
        self.steps.append((text, rival.name, *milliseconds(mine), against, over_floor, rate, size))
        self.details.append(
            {
                "shape": text,
                "contender": rival.name,
                "seconds": mine,
                "live_bytes": live,
                "formula_bytes": rival.formula_bytes,
                "moved_bytes": rival.moved_bytes,
                "products": rival.products,
                "over_floor": self.vs_floor[-1] if rival.has_floor else None,
            }
        )

    def publish(self, *, keep: bool) -> None:
        """Headline figures are those of the first shape, the distance to the floor the worst of all."""
        for reference, size in LITERATURE:
            self.steps.append(("-", reference, *["-"] * 6, f"{size:.3f}"))
        times = ("shape", "optimizer", "ms min", "median", "max")
        steps = table((*times, "/ fused", "/ floor", "GB/s", "bytes/parameter"), self.steps)
        refreshes = table((*times, "speedup over galore-torch"), self.refreshes)
        headline = next(iter(self.ratios.values()))
        summary = {
            "galore_step_speedup": headline["galore_step_speedup"],
            "galore_refresh_speedup": headline["galore_refresh_speedup"],
            "worst_vs_floor": round(max(self.vs_floor), 3),
            "frugal_columns_vs_adamw": headline["frugal_columns_vs_adamw"],
            "adamw8bit_speedup": headline["adamw8bit_speedup"],
            "bytes_formula_errors": self.errors,
        }
        text = f"{steps}\n\nsteps with a refresh\n{refreshes}"
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
