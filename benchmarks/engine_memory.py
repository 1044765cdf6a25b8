"""Host memory of two offload engines' staging, by arithmetic: ours and DeepSpeed's, on ten real models.

Nothing but our windows for weights is run or measured here, and those of one model. From each model's
configuration come the shapes of its parameters (a model on the meta device); from those, what each engine
reserves on one process for ZeRO stage 3 with optimizer and parameters on NVMe, bf16 weights, AdamW.

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
- parameters: windows for units of weights (a block, or what lies before or behind the blocks), three as the
  planner has them where nothing is chosen: one of the largest unit's size and the others of the largest
  block's, or all of them of a block's where nothing is larger. Beside it stands (1) three of the largest
  unit's size, and what finer classes would need, which no ring has: (P) by the histogram of single
  parameters, as many slots of each class as two blocks have parameters of it, and one of the largest: the
  same two blocks as (L), at their own sizes.
- saved tensors and recomputed inputs: a slot for each block that is there, and blocks of these models are of
  one size: classes would change nothing.

Tensors below 1 MiB stay in memory in both engines and are left out of both.

Measured: the weights of one model, drawn at random, are streamed through the windows that the arithmetic has
for it, in a forward and a backward pass. A streamer refuses windows of any other sizes than the model's;
their pages are counted as the kernel has them (mincore) once every window was used, and a pass through three
windows of one size has the same losses and gradients, bit for bit.
"""

from __future__ import annotations

import argparse
import ctypes
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from _harness import BenchmarkError, GiB, publish, table

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
    return sum(count * size for count, size in window_classes(shapes, classes=classes))


def window_classes(shapes: Shapes, *, classes: bool) -> list[tuple[int, int]]:
    """How many windows of how many bytes."""
    from memtrain.planner.decisions import SMALLEST_PIECE_ELEMENTS
    from memtrain.planner.weight_windows import DEFAULT_WINDOWS

    def unit(sizes: Sequence[int]) -> int:
        moving = [size for size in sizes if size >= SMALLEST_PIECE_ELEMENTS]
        return sum(round_up(size * NARROW_BYTES, PAGE_BYTES) for size in moving)

    block = unit(shapes.block)
    largest = max(block, *map(unit, shapes.outside))
    if not classes or largest == block:
        return [(DEFAULT_WINDOWS.slots, largest)]
    return [(DEFAULT_WINDOWS.slots - 1, block), (1, largest)]


def measured(preset: str) -> dict[str, int]:
    """Bytes of windows that are planned for a model, that there are, and that are in memory in its passes.

    Raises:
        BenchmarkError: two sizes of windows do not give the bits of one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from memtrain.offload.device import make_device
    from memtrain.offload.engine import Engine
    from memtrain.offload.parameters import ParameterStreamer
    from memtrain.offload.tiers import MemoryStore
    from memtrain.planner.actions import Tier
    from memtrain.planner.plan import WindowClass
    from memtrain.planner.tracing.blocks import find_blocks
    from memtrain.planner.tracing.fake_model import read_config
    from memtrain.streamed_models import traced_units

    shapes, seen = shapes_of(preset), []
    tokens = torch.arange(64).reshape(1, 64)
    for classes in (False, True):
        planned = window_classes(shapes, classes=classes)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(read_config(preset), dtype=torch.bfloat16)
        blocks = find_blocks(model)
        units = traced_units(model, blocks)
        weights = sum(p.nbytes + PAGE_BYTES for p in model.parameters())
        with Engine({Tier.HOST: MemoryStore(Tier.HOST, weights)}, make_device("cpu")) as engine:
            streamer = ParameterStreamer(
                model,
                blocks,
                units,
                tiers={name: Tier.HOST for name, members in units if members},
                engine=engine,
                slots=[WindowClass(slots=count, slot_bytes=size) for count, size in planned],
            )
            with streamer.installed():
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
            seen.append([loss.detach(), *(p.grad for p in model.parameters())])
            slab = streamer._pool._slab
            marks = streamer.high_water()
            found = {
                "planned_bytes": windows(shapes, classes=classes),
                "window_bytes": slab.nbytes,
                "resident_bytes": resident_bytes(slab.address, slab.nbytes),
                "windows": sum(mark.slots for mark in marks),
                "windows_used": sum(mark.slots_held for mark in marks),
            }
            streamer.close()
    if not all(map(torch.equal, *seen)):
        raise BenchmarkError(f"windows of two sizes change the bits of a pass of {preset}")
    return found


def resident_bytes(start: int, size: int) -> int:
    """Of an address range, in memory now."""
    pages = (ctypes.c_ubyte * (size // PAGE_BYTES))()
    if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages):
        raise OSError(ctypes.get_errno(), "mincore")
    return PAGE_BYTES * sum(page & 1 for page in pages)


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
    parser.add_argument("--measure", default=MODELS[0], help="whose windows are measured")
    args = parser.parse_args()
    rows, details, ratios, pools, classes = [], {}, [], [], []
    for name in args.models:
        shapes = shapes_of(name)
        engines = {
            "deepspeed D": deepspeed(shapes, least=False),
            "deepspeed L": deepspeed(shapes, least=True),
            "memtrain": memtrain(shapes, windows(shapes, classes=True)),
            "memtrain 1": memtrain(shapes, windows(shapes, classes=False)),
            "memtrain P": memtrain(shapes, by_parameter(shapes)),
        }
        details[name] = {
            engine: {"optimizer": p.optimizer, "parameters": p.parameters, "gradients": p.gradients}
            for engine, p in engines.items()
        }
        ratios.append(engines["memtrain"].total / engines["deepspeed L"].total)
        classes.append(engines["memtrain"].total / engines["memtrain 1"].total)
        pools.append(engines["memtrain"].parameters / engines["deepspeed L"].parameters)
        for engine, p in engines.items():
            sizes = (p.optimizer, p.parameters, p.gradients, p.total)
            rows.append((name, engine, *(f"{size / GiB:.3f}" for size in sizes)))
    found = measured(args.measure)
    header = ("model", "engine", "optimizer (GiB)", "parameters", "gradients", "in all")
    summary = {
        "measured": args.measure,
        **found,
        "models": len(args.models),
        "deepspeed": "0.19.8, the least of its rules",
        "of_deepspeed_least_mean": round(sum(ratios) / len(ratios), 4),
        "of_deepspeed_least_worst": round(max(ratios), 4),
        "parameter_pool_of_deepspeed_least_mean": round(sum(pools) / len(pools), 4),
        "parameter_pool_of_deepspeed_least_worst": round(max(pools), 4),
        "two_sizes_of_one_mean": round(sum(classes) / len(classes), 4),
        "two_sizes_of_one_best": round(min(classes), 4),
    }
    told = ", ".join(f"{key} {value}" for key, value in found.items())
    text = f"By arithmetic from shapes.\n{table(header, rows)}\nMeasured, {args.measure}: {told}"
    publish("engine_memory", text=text, summary=summary, details=details)


if __name__ == "__main__":
    main()
