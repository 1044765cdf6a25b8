"""Steps of optimizers on a CPU, beside their peers: milliseconds, bytes a second, bytes a parameter.

    .venv-optim/bin/python benchmarks/optimizers.py
    .venv-optim/bin/python benchmarks/optimizers.py --rounds 5 --shapes 1024x1024

All contenders run by turns in one process, a step each a round, every round in another order; the first step,
which allocates and compiles, is not counted. A ratio is taken within a round, and the median of the rounds
counts. Bytes a second are those that the kernel's code moves (``bytes_per_element``) over the median time.
Bytes a parameter are those of the live tensors, weight and gradient included; each is compared with the
formula, and the differences are counted.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from _harness import BenchmarkError, publish, spread, table
from torch import Tensor

from memtrain.optim.kernels import adamw, adamw8bit, sign, split_adamw
from memtrain.optim.kernels.pointwise import FP32, SPLIT24, AdamStep, Keys
from memtrain.optim.kernels.sign import LionStep, PlainStep
from memtrain.optim.storage import RandomKey, master_format, state_format

SQUARE = (2048, 2048)
SHAPES = (SQUARE, (1024, 1024), (2736, 1024), (5461, 2048))
"""A square matrix and the projections of Llamas with d = 1024 and 2048."""
THREADS = 2
DENSITY = 0.25
LR, WEIGHT_DECAY, GRADIENT_SCALE = 1e-3, 0.01, 1e-4
FUSED, BNB, ADAMW8BIT, COLUMNS = "torch fused AdamW", "bitsandbytes AdamW8bit", "AdamW8bit", "FRUGAL columns"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One optimizer with its own copy of everything."""

    name: str
    step: Callable[[int], None]
    """Of the number of the step, from 1."""
    tensors: Callable[[], Sequence[Tensor]]
    """Weight, gradient and states, once there has been a step."""
    formula_bytes: int
    moved_bytes: float | None = None
    """By a step, where we can count it."""


def keys(step: int) -> Keys:
    key = RandomKey(seed=0, parameter=0, step=step)
    return Keys(key, key.fold(16), key.fold(17))


def numbers(step: int) -> AdamStep:
    return AdamStep(lr=LR, step=step, weight_decay=WEIGHT_DECAY)


def operands(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), (GRADIENT_SCALE * torch.randn(shape)).to(dtype)


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
    )


def contenders(shape: tuple[int, int]) -> list[Contender]:
    """Everything that is compared, on one shape."""
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
        ),
        ours(
            shape,
            "FRUGAL rows",
            "fp32",
            split("rows", active_rows),
            split_bytes(FP32, f32, f32, density=DENSITY),
            moment_shape=(len(active_rows), columns),
        ),
        ours(
            shape,
            f"{COLUMNS}, split24",
            "fp32",
            split("columns", active_columns),
            split_bytes(SPLIT24, bf16, f32, density=DENSITY),
            master="split24",
            moment_shape=(rows, len(active_columns)),
        ),
    ]


def measure(rivals: Sequence[Contender], rounds: int) -> dict[str, list[float]]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25, help="steps of each contender")
    parser.add_argument("--shapes", nargs="+", default=["x".join(map(str, s)) for s in SHAPES], metavar="MxN")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    lines, details, ratios, errors = [], [], {}, 0
    for text in args.shapes:
        rows, columns = map(int, text.split("x"))
        rivals = contenders((rows, columns))
        seconds = measure(rivals, args.rounds)
        numel = rows * columns
        for rival in rivals:
            found, live = spread(seconds[rival.name]), live_bytes(rival)
            errors += live != rival.formula_bytes
            rate = rival.moved_bytes and rival.moved_bytes / found["median"]
            milliseconds = [f"{1e3 * found[which]:.2f}" for which in ("min", "median", "max")]
            against = f"{ratio(seconds, rival.name, FUSED):.2f}"
            speed = f"{rate / 1e9:.1f}" if rate else "-"
            lines.append((text, rival.name, *milliseconds, against, speed, f"{live / numel:.3f}"))
            details.append(
                {
                    "shape": [rows, columns],
                    "contender": rival.name,
                    "seconds": seconds[rival.name],
                    "live_bytes": live,
                    "formula_bytes": rival.formula_bytes,
                    "moved_bytes": rival.moved_bytes,
                }
            )
        ratios[text] = {
            "frugal_columns_vs_adamw": round(ratio(seconds, COLUMNS, FUSED), 3),
            "adamw8bit_speedup": round(ratio(seconds, BNB, ADAMW8BIT), 2),
        }
    header = ("shape", "optimizer", "ms min", "median", "max", "/ fused", "GB/s", "bytes/parameter")
    first = "x".join(map(str, SQUARE))
    headline = ratios.get(first, next(iter(ratios.values())))
    publish(
        "optimizers",
        text=table(header, lines),
        summary={**headline, "bytes_formula_errors": errors},
        details={"ratios": ratios, "contenders": details},
    )


if __name__ == "__main__":
    main()
