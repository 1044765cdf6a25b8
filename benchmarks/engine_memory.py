"""Host memory of two offload engines' staging, by arithmetic: ours and DeepSpeed's, on ten real models.

Nothing is run or measured here. From each model's configuration come the shapes of its parameters (a model
on the meta device); from those, what each engine reserves on one process for ZeRO stage 3 with optimizer
and parameters on NVMe, bf16 weights, AdamW.

DeepSpeed 0.19.8, from its source, with its default options (D) and the least that its own rules allow (L):

- optimizer pool: ``buffer_count`` (4: parameter, gradient, two moments) buffers of fp32, each as large as
  the largest sub-group. A sub-group takes parameters until it holds ``sub_group_size`` elements: (D) 1e9,
  (L) 1, so that each parameter is a group of its own.
- parameter pool: ``buffer_count`` slots of one size that the largest parameter must fit, (D) 5 of 1e8
  elements or of the largest parameter, which do not hold a block of more parameters (it then stops with
  "Not enough buffers"); (L) slots of the largest parameter, one for each swapped parameter of two blocks,
  the one that computes and the one that comes, and one for embedding or head: so this can be more than (D).
- gradients: one flat buffer of all parameters in bf16, pinned by torch's allocator, which rounds up to a
  power of two. The pools are ``posix_memalign``-ed by its own engine, and are not.

memtrain: rings of exact size, rounded to pages:

- optimizer ring: shards of equal size, whatever the shapes: the planner's number of slots, each one shard
  of state (12 bytes an element) and its fp32 gradient (4).
- gradient ring: the planner's chunks.
- parameters: windows for units of weights (a block, or what lies before or behind the blocks), three of the
  largest unit's size, as the planner has them where nothing is chosen. What size classes would need, which
  no ring has today, stands beside it: (C) one window of the largest unit, the others of the largest block;
  (P) by the histogram of single parameters, as many slots of each class as two blocks have parameters of it,
  and one of the largest: the same two blocks as (L), at their own sizes.
- saved tensors and recomputed inputs: a slot for each block that is there, and blocks of these models are of
  one size: classes would change nothing.

Tensors below 1 MiB stay in memory in both engines and are left out of both.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from _harness import GiB, publish, table

MODELS = (
    "smollm2-135m",
    "gpt2-xl",
    "llama-7b",
    "llama-2-70b",
    "llama-3-8b",
    "llama-3-70b",
    "mistral-7b",
    "qwen2.5-7b",
    "gemma-2-9b",
    "mixtral-8x7b",
)
ALIGNMENT_BYTES = 1024
"""DeepSpeed's unit, times the threads of one transfer (1 by default)."""
SWAPPABLE_BYTES = 1 << 20
OPTIMIZER_BUFFERS = 4
PARAMETER_BUFFERS = 5
PARAMETER_BUFFER_ELEMENTS = 100_000_000
SUB_GROUP_ELEMENTS = 1_000_000_000
NARROW_BYTES, WIDE_BYTES = 2, 4
STATE_BYTES = 12
PAGE_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What a model's parameters take: elements of each, in order."""

    parameters: tuple[int, ...]
    """Of all, tied ones once."""
    block: tuple[int, ...]
    """Of one block, the largest."""
    outside: tuple[tuple[int, ...], ...] = ()
    """Of what lies before the blocks, and of what lies behind them."""

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.parameters)

    @property
    def moving(self) -> tuple[int, ...]:
        """Of one block, those that move."""
        return tuple(size for size in self.block if size * NARROW_BYTES >= SWAPPABLE_BYTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pools:
    """Bytes that an engine reserves."""

    optimizer: int
    parameters: int
    gradients: int

    @property
    def total(self) -> int:
        """All three."""
        return self.optimizer + self.parameters + self.gradients


def shapes_of(preset: str) -> Shapes:
    """Parameters of a configuration, built on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from memtrain.planner.tracing.blocks import find_blocks
    from memtrain.planner.tracing.fake_model import read_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config(preset), dtype=torch.bfloat16)
    model.tie_weights()
    blocks = [[p.numel() for p in block.parameters()] for _, block in find_blocks(model)]
    inside = {id(p) for _, block in find_blocks(model) for p in block.parameters()}
    before: list[int] = []
    behind: list[int] = []
    here = before
    for parameter in model.parameters():
        if id(parameter) in inside:
            here = behind
        else:
            here.append(parameter.numel())
    return Shapes(
        parameters=tuple(parameter.numel() for parameter in model.parameters()),
        block=tuple(max(blocks, key=sum)),
        outside=(tuple(before), tuple(behind)),
    )


def round_up(value: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return -(-value // unit) * unit


def power_of_two(value: int) -> int:
    """What torch's pinned allocator takes for ``value`` bytes."""
    return 1 << (value - 1).bit_length()


def largest_sub_group(parameters: Sequence[int], limit: int) -> int:
    """Elements of DeepSpeed's largest sub-group: each is closed by the parameter that reaches ``limit``."""
    groups, held = [], 0
    for size in parameters:
        held += size
        if held >= limit:
            groups.append(held)
            held = 0
    return max([*groups, held])


def deepspeed(shapes: Shapes, *, least: bool) -> Pools:
    """DeepSpeed's pools, with default options or with the least that its rules allow."""
    group = largest_sub_group(shapes.parameters, 1 if least else SUB_GROUP_ELEMENTS)
    slot, slots = max(PARAMETER_BUFFER_ELEMENTS, shapes.largest), PARAMETER_BUFFERS
    if least:
        slot, slots = shapes.largest, 2 * len(shapes.moving) + 1
    return Pools(
        optimizer=OPTIMIZER_BUFFERS * round_up(group * WIDE_BYTES, ALIGNMENT_BYTES),
        parameters=slots * round_up(slot * NARROW_BYTES, ALIGNMENT_BYTES),
        gradients=power_of_two(sum(shapes.parameters) * NARROW_BYTES),
    )


def windows(shapes: Shapes, *, classes: bool) -> int:
    """Bytes of the windows for streamed weights: all as large as the largest unit, or one of them so and the
    others as large as the largest block."""
    from memtrain.planner.decisions import SMALLEST_PIECE_ELEMENTS
    from memtrain.planner.weight_windows import DEFAULT_WEIGHT_SLOTS

    def unit(sizes: Sequence[int]) -> int:
        moving = [size for size in sizes if size >= SMALLEST_PIECE_ELEMENTS]
        return sum(round_up(size * NARROW_BYTES, PAGE_BYTES) for size in moving)

    block = unit(shapes.block)
    largest = max(block, *map(unit, shapes.outside))
    return largest + (DEFAULT_WEIGHT_SLOTS - 1) * (block if classes else largest)


def by_parameter(shapes: Shapes) -> int:
    """Bytes of slots by the histogram of single parameters."""
    classes = {size: 2 * count for size, count in Counter(shapes.moving).items()}
    classes[shapes.largest] = classes.get(shapes.largest, 0) + 1
    return sum(count * round_up(size * NARROW_BYTES, PAGE_BYTES) for size, count in classes.items())


def memtrain(shapes: Shapes, parameters: int) -> Pools:
    """Our rings: exact, of pages; with so many bytes for parameters."""
    from memtrain.planner.decisions import (
        DEFAULT_SHARD_ELEMENTS,
        GRADIENT_SLOT_BYTES,
        GRADIENT_SLOTS,
        UPDATE_SLOTS,
    )

    shard = min(DEFAULT_SHARD_ELEMENTS, shapes.largest)
    return Pools(
        optimizer=UPDATE_SLOTS * round_up(shard * (STATE_BYTES + WIDE_BYTES), PAGE_BYTES),
        parameters=parameters,
        gradients=GRADIENT_SLOTS * GRADIENT_SLOT_BYTES,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS, help="presets; default: ten")
    args = parser.parse_args()
    rows, details, ratios, pools, classes = [], {}, [], [], []
    for name in args.models:
        shapes = shapes_of(name)
        engines = {
            "deepspeed D": deepspeed(shapes, least=False),
            "deepspeed L": deepspeed(shapes, least=True),
            "memtrain": memtrain(shapes, windows(shapes, classes=False)),
            "memtrain C": memtrain(shapes, windows(shapes, classes=True)),
            "memtrain P": memtrain(shapes, by_parameter(shapes)),
        }
        details[name] = {
            engine: {"optimizer": p.optimizer, "parameters": p.parameters, "gradients": p.gradients}
            for engine, p in engines.items()
        }
        ratios.append(engines["memtrain"].total / engines["deepspeed L"].total)
        classes.append(engines["memtrain C"].total / engines["memtrain"].total)
        pools.append(engines["memtrain"].parameters / engines["deepspeed L"].parameters)
        for engine, p in engines.items():
            sizes = (p.optimizer, p.parameters, p.gradients, p.total)
            rows.append((name, engine, *(f"{size / GiB:.3f}" for size in sizes)))
    header = ("model", "engine", "optimizer (GiB)", "parameters", "gradients", "in all")
    summary = {
        "arithmetic_only": True,
        "models": len(args.models),
        "deepspeed": "0.19.8, the least of its rules",
        "of_deepspeed_least_mean": round(sum(ratios) / len(ratios), 4),
        "of_deepspeed_least_worst": round(max(ratios), 4),
        "parameter_pool_of_deepspeed_least_mean": round(sum(pools) / len(pools), 4),
        "parameter_pool_of_deepspeed_least_worst": round(max(pools), 4),
        "window_classes_of_today_mean": round(sum(classes) / len(classes), 4),
        "window_classes_of_today_worst": round(max(classes), 4),
    }
    text = "By arithmetic from shapes; nothing was measured.\n" + table(header, rows)
    publish("engine_memory", text=text, summary=summary, details=details)


if __name__ == "__main__":
    main()
