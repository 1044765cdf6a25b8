"""A job of two blocks of three operations, small enough to work out what becomes of it by hand."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from memtrain.planner.compose import machine_for
from memtrain.planner.estimate import (
    EstimatedBlock,
    EstimatedUnit,
    Lifetime,
    LifetimeKind,
    ModelEstimate,
    Operation,
    SavedTensor,
    TensorClass,
    TracedPart,
)
from memtrain.planner.job import Job
from memtrain.planner.lowering.tensors import Division
from memtrain.planner.optimizer_bytes import ParameterSpec
from memtrain.planner.parallel import Degrees, ModelShape

TOKENS, HIDDEN, WIDE = 64, 8, 32
SHAPE = ModelShape(layers=2, hidden=HIDDEN, heads=2, key_value_heads=2, head_size=4, intermediate=WIDE)
ALONE = Degrees()
RESIDUAL, INSIDE = TOKENS * HIDDEN * 2, TOKENS * WIDE * 2


def saved(kind: TensorClass, width: int, *, nearly_free: bool = False, moved: int = 0) -> SavedTensor:
    return SavedTensor(
        tensor_class=kind,
        shape=(1, TOKENS, width),
        dtype="bfloat16",
        size_bytes=TOKENS * width * 2,
        operator="aten::mm",
        module="",
        token_axis=1,
        nearly_free=nearly_free,
        recompute_from_input=nearly_free,
        recompute_moved_bytes=moved,
    )


def operation(flops: int, moved: int, *, attention: bool = False) -> Operation:
    name = "memtrain::attention" if attention else "aten::mm"
    return Operation(
        name=name, module="", flops=flops, read_bytes=moved, written_bytes=0, attention=attention
    )


def life(start: int, end: int, size: int, kind: LifetimeKind, index: int | None = None) -> Lifetime:
    return Lifetime(start=start, end=end, size_bytes=size, kind=kind, saved=index)


PART = TracedPart(
    name="layers.0",
    fingerprint="f",
    input_bytes=RESIDUAL,
    output_bytes=RESIDUAL,
    saved=(
        saved(TensorClass.NORM_OUTPUT, HIDDEN, nearly_free=True, moved=3000),
        saved(TensorClass.QKV, 3 * HIDDEN),
        saved(TensorClass.ATTENTION_OUTPUT, HIDDEN),
        saved(TensorClass.MLP_UP, WIDE),
    ),
    operations=(
        operation(0, 3000),  # norm
        operation(30_000, 5000),  # qkv
        operation(80_000, 0, attention=True),
        operation(60_000, 7000),  # up
        operation(0, 1000),  # backward of up, and the rest
        operation(200_000, 0, attention=True),
        operation(150_000, 9000),
    ),
    forward_operations=4,
    lifetimes=(
        life(0, 7, RESIDUAL, LifetimeKind.INPUT),
        life(0, 6, RESIDUAL, LifetimeKind.SAVED, 0),
        life(1, 6, 3 * RESIDUAL, LifetimeKind.SAVED, 1),
        life(2, 6, RESIDUAL, LifetimeKind.SAVED, 2),
        life(3, 5, INSIDE, LifetimeKind.SAVED, 3),
        life(1, 3, 4 * RESIDUAL, LifetimeKind.TRANSIENT),
        life(3, 4, RESIDUAL, LifetimeKind.OUTPUT),
        life(4, 6, RESIDUAL, LifetimeKind.OUTPUT_GRADIENT),
        life(4, 7, 5 * RESIDUAL, LifetimeKind.TRANSIENT),
        life(5, 7, 1_000_000, LifetimeKind.GRADIENT),
    ),
)
EDGE = TracedPart(
    name="prologue",
    fingerprint="e",
    input_bytes=0,
    output_bytes=RESIDUAL,
    saved=(saved(TensorClass.OTHER, HIDDEN),),
    operations=(operation(0, 2000), operation(0, 4000)),
    forward_operations=1,
    lifetimes=(life(0, 2, RESIDUAL, LifetimeKind.SAVED, 0), life(1, 2, RESIDUAL, LifetimeKind.TRANSIENT)),
)


def parameter(name: str, *shape: int) -> ParameterSpec:
    return ParameterSpec(name=name, shape=shape, dtype="bfloat16", element_bytes=2)


ESTIMATE = ModelEstimate(
    model="Toy",
    batch=1,
    sequence=TOKENS,
    attention="flash",
    classes=(PART,),
    blocks=tuple(EstimatedBlock(name=f"layers.{i}", part=0) for i in range(2)),
    prologue=EDGE,
    epilogue=dataclasses.replace(EDGE, name="epilogue"),
    shared=(),
    units=(
        EstimatedUnit(name="prologue", block=None, parameters=(parameter("embed", 100, HIDDEN),)),
        EstimatedUnit(name="layers.0", block=0, parameters=(parameter("w.0", 16, 100),)),
        EstimatedUnit(name="layers.1", block=1, parameters=(parameter("w.1", 16, 100),)),
        EstimatedUnit(name="epilogue", block=None, parameters=()),
    ),
    buffer_bytes=11,
)


@cache
def setup(gpus: int = 1, **more: Any) -> Any:
    return machine_for("a800-80g", gpus=gpus, dram="64GiB", nvme="1TB@6GB/s", **more)


def job(degrees: Degrees = ALONE, **changes: Any) -> Job:
    gpus = degrees.gpus
    return Job(**({"estimate": ESTIMATE, "shape": SHAPE, "setup": setup(gpus), "degrees": degrees} | changes))


def division(degrees: Degrees = ALONE) -> Division:
    return Division(estimate=ESTIMATE, shape=SHAPE, degrees=degrees)
