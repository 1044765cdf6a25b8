"""Records of an estimate: sums, loads and JSON, on numbers small enough to add up by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

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
from memtrain.planner.optimizer_bytes import OptimizerRule, ParameterSpec


def saved(size: int, tensor_class: TensorClass, **more: object) -> SavedTensor:
    values: dict[str, object] = {"operator": "aten::mm", "module": "", "token_axis": 0, "nearly_free": False}
    return SavedTensor(
        tensor_class=tensor_class, shape=(size,), dtype="uint8", size_bytes=size, **(values | more)
    )


def operation(flops: int, attention: bool = False) -> Operation:
    return Operation(
        name="aten::mm", module="", flops=flops, read_bytes=2, written_bytes=1, attention=attention
    )


PART = TracedPart(
    name="layers.0",
    fingerprint="f",
    input_bytes=10,
    output_bytes=10,
    saved=(
        saved(10, TensorClass.BLOCK_INPUT),
        saved(40, TensorClass.QKV),
        saved(20, TensorClass.NORM_OUTPUT, nearly_free=True, recompute_from=(0,)),
    ),
    operations=(operation(100), operation(7, attention=True), operation(300), operation(21, attention=True)),
    forward_operations=2,
    lifetimes=(
        Lifetime(start=0, end=4, size_bytes=10, kind=LifetimeKind.INPUT, saved=0),
        Lifetime(start=0, end=3, size_bytes=40, kind=LifetimeKind.SAVED, saved=1),
        Lifetime(start=1, end=2, size_bytes=5, kind=LifetimeKind.TRANSIENT),
        Lifetime(start=1, end=4, size_bytes=20, kind=LifetimeKind.SAVED, saved=2),
        Lifetime(start=3, end=4, size_bytes=60, kind=LifetimeKind.INPUT_GRADIENT),
    ),
)
EMPTY = TracedPart(
    name="prologue",
    fingerprint="prologue",
    input_bytes=0,
    output_bytes=10,
    saved=(),
    operations=(),
    forward_operations=0,
    lifetimes=(),
)


def estimate() -> ModelEstimate:
    weight = ParameterSpec(name="w", shape=(4, 5), dtype="bfloat16", element_bytes=2)
    return ModelEstimate(
        model="Toy",
        batch=1,
        sequence=10,
        attention="default",
        classes=(PART,),
        blocks=(EstimatedBlock(name="layers.0", part=0), EstimatedBlock(name="layers.1", part=0)),
        prologue=EMPTY,
        epilogue=dataclasses.replace(EMPTY, name="epilogue", saved=(saved(3, TensorClass.LOSS),)),
        shared=(saved(6, TensorClass.MASK),),
        units=(
            EstimatedUnit(name="layers.0", block=0, parameters=(weight,)),
            EstimatedUnit(name="layers.1", block=1, parameters=(weight,)),
        ),
        buffer_bytes=0,
        repeated_bytes=10,
        sources={"flops": "counter"},
    )


def test_sums_of_a_part() -> None:
    assert PART.saved_bytes == 70
    assert PART.nearly_free_bytes == 20
    assert PART.class_bytes() == {
        TensorClass.BLOCK_INPUT: 10,
        TensorClass.QKV: 40,
        TensorClass.NORM_OUTPUT: 20,
    }
    assert PART.flops(backward=False) == 107
    assert PART.flops(backward=True, attention=True) == 21
    assert PART.flops(backward=True, attention=False) == 300
    assert PART.load() == [50, 75, 70, 90]
    assert (PART.forward_peak_bytes, PART.backward_peak_bytes) == (75, 90)
    assert (EMPTY.forward_peak_bytes, EMPTY.backward_peak_bytes) == (0, 0)


def test_sums_of_a_model() -> None:
    model = estimate()
    assert model.saved_bytes == 70 + 70 + 3 + 6 - 10
    assert model.flops(backward=False) == 2 * 107
    assert model.state(OptimizerRule.ADAMW).total == 2 * (40 + 40 + 80 + 4)


def test_json_is_canonical_and_complete() -> None:
    model = estimate()
    text = model.to_json()
    assert ModelEstimate.from_json(text) == model
    assert ModelEstimate.from_json(text).to_json() == text
    assert json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) == text
    assert len(model.digest) == 16
    assert dataclasses.replace(model, sequence=11).digest != model.digest


def test_what_is_no_estimate_is_refused() -> None:
    data = json.loads(estimate().to_json())
    with pytest.raises(ValueError, match="version 99"):
        ModelEstimate.from_json(json.dumps({**data, "version": 99}))
    with pytest.raises(ValueError, match="colour"):
        ModelEstimate.from_json(json.dumps({**data, "colour": "red"}))
    with pytest.raises(ValueError, match="no class 1"):
        dataclasses.replace(estimate(), blocks=(EstimatedBlock(name="x", part=1),))
    with pytest.raises(ValueError, match="start <= end"):
        Lifetime(start=3, end=2, size_bytes=1, kind=LifetimeKind.TRANSIENT)
    with pytest.raises(ValueError, match="no axis 1"):
        saved(4, TensorClass.OTHER, token_axis=1)
