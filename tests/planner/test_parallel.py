from __future__ import annotations

from typing import Any

import pytest

from memtrain.planner.parallel import (
    ActivationClass,
    Degrees,
    Group,
    ModelShape,
    activation_divisor,
    bubble_fraction,
    group_span,
    in_flight,
    stage_parameters,
    state_bytes,
)

# Llama-3-70B.
SHAPE = ModelShape(layers=80, hidden=8192, heads=64, key_value_heads=8, head_size=128, intermediate=28672)


def mixtral(**changes: Any) -> ModelShape:
    fields: dict[str, Any] = {
        "layers": 32,
        "hidden": 4096,
        "heads": 32,
        "key_value_heads": 8,
        "head_size": 128,
        "intermediate": 14336,
        "experts": 8,
        "experts_per_token": 2,
    }
    return ModelShape(**(fields | changes))


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, (2, 2, 12)),  # 16 bytes
        (1, (2, 2, 12 / 64)),  # 4 + 12/N
        (2, (2, 2 / 64, 12 / 64)),  # 2 + 14/N
        (3, (2 / 64, 2 / 64, 12 / 64)),  # 16/N
    ],
)
def test_zero_divides_mixed_precision_adam(stage: Any, expected: tuple[float, float, float]) -> None:
    held = state_bytes(Degrees(data=64, zero_stage=stage))
    assert (held.parameters, held.gradients, held.optimizer) == pytest.approx(expected)
    assert held.total == pytest.approx(sum(expected))


def test_the_zero_papers_table() -> None:
    """7.5 billion parameters on 64 GPUs: 120, 31.4, 16.6 and 1.9 GB (1910.02054, figure 1)."""
    totals = [
        round(state_bytes(Degrees(data=64, zero_stage=stage), 7.5e9).total / 1e9, 1)  # type: ignore[arg-type]
        for stage in (0, 1, 2, 3)
    ]
    assert totals == [120.0, 31.4, 16.6, 1.9]


def test_context_ranks_are_replicas_too_and_experts_have_fewer() -> None:
    degrees = Degrees(data=4, context=8, zero_stage=3, expert=4)
    assert (degrees.gpus, degrees.replicas, degrees.expert_replicas) == (32, 32, 8)
    assert state_bytes(degrees, 320).total == pytest.approx(16 * 320 / 32)
    assert state_bytes(degrees, 320, experts=True).total == pytest.approx(16 * 320 / 8)


def test_other_regimes_of_state() -> None:
    held = state_bytes(Degrees(data=2, zero_stage=1), 10, weight_bytes=4, gradient_bytes=4, optimizer_bytes=8)
    assert (held.parameters, held.gradients, held.optimizer) == (40, 40, 40)


def test_stages_hold_their_layers_and_the_ends_the_rest() -> None:
    degrees = Degrees(pipeline=4, tensor=2)
    common = {"layers": 80, "layer": 10.0, "embedding": 100.0, "head": 60.0}
    held = [stage_parameters(degrees, stage=stage, **common) for stage in range(4)]
    assert held == [(200 + 100) / 2, 200 / 2, 200 / 2, (200 + 60) / 2]
    assert stage_parameters(Degrees(), stage=0, **common) == 800 + 100 + 60
    with pytest.raises(ValueError, match="stage 4 of 4: give 0 to 3"):
        stage_parameters(degrees, stage=4, **common)


@pytest.mark.parametrize(
    ("kind", "without", "with_sequence"),
    [
        (ActivationClass.RESIDUAL, 1, 8),
        (ActivationClass.HEADS, 8, 8),
        (ActivationClass.KEY_VALUE, 8, 8),
        (ActivationClass.INTERMEDIATE, 8, 8),
        (ActivationClass.LOGITS, 8, 8),
    ],
)
def test_what_tensor_and_sequence_parallelism_divide(
    kind: ActivationClass, without: int, with_sequence: int
) -> None:
    for parallel, expected in ((False, without), (True, with_sequence)):
        degrees = Degrees(tensor=8, context=4, sequence_parallel=parallel)
        assert activation_divisor(kind, degrees, SHAPE) == 4 * expected
    assert activation_divisor(kind, Degrees(context=4), SHAPE) == 4
    assert activation_divisor(kind, Degrees(data=8, zero_stage=3), SHAPE) == 1


def test_keys_and_values_are_repeated_beyond_their_heads() -> None:
    assert activation_divisor(ActivationClass.KEY_VALUE, Degrees(tensor=16), SHAPE) == 8
    assert activation_divisor(ActivationClass.HEADS, Degrees(tensor=16), SHAPE) == 16


def test_one_forward_one_backward_holds_fewer_towards_the_end() -> None:
    degrees = Degrees(pipeline=4)
    assert [in_flight(degrees, stage=stage, micro_batches=8) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(degrees, stage=stage, micro_batches=2) for stage in range(4)] == [2, 2, 2, 1]
    assert bubble_fraction(degrees, micro_batches=8) == 3 / 8
    assert bubble_fraction(Degrees(), micro_batches=8) == 0
    with pytest.raises(ValueError, match="stage 4 of 4"):
        in_flight(degrees, stage=4, micro_batches=8)


def test_degrees_that_fit() -> None:
    degrees = Degrees(data=2, tensor=8, context=4, pipeline=8)
    assert degrees.gpus == 512
    degrees.check(SHAPE, gpus=512, sequence=64 * 1024)
    Degrees(tensor=16).check(SHAPE, gpus=16, sequence=1024)
    Degrees(data=8, expert=8).check(mixtral(), gpus=8, sequence=1024)
    Degrees(context=8, context_method="ulysses").check(SHAPE, gpus=8, sequence=1024)


@pytest.mark.parametrize(
    ("fields", "gpus", "message"),
    [
        ({"data": 4}, 8, r"data 4 x tensor 1 x context 1 x pipeline 1 = 4 GPUs, but there are 8"),
        ({"tensor": 3}, 3, r"tensor 3 does not divide the model's heads 64"),
        ({"pipeline": 6}, 6, r"pipeline 6 does not divide the model's layers 80"),
        ({"context": 3}, 3, r"a sequence of 1000 tokens cannot be cut 6 ways \(context 3, ring"),
        (
            {"context": 3, "context_method": "ulysses"},
            3,
            r"a sequence of 1000 tokens cannot be cut 3 ways \(context 3, ulysses",
        ),
        ({"tensor": 64}, 64, r"1000 tokens cannot be cut 64 ways \(tensor 64, sequence parallelism\)"),
        (
            {"context": 2, "tensor": 8, "context_method": "ulysses", "sequence_parallel": False},
            16,
            r"tensor x context \(ulysses\) 16 does not divide the model's key_value_heads 8",
        ),
        ({"data": 2, "expert": 2}, 2, "expert 2 for a model without experts"),
    ],
)
def test_degrees_that_do_not_fit_the_model_are_named(fields: dict[str, Any], gpus: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Degrees(**fields).check(SHAPE, gpus=gpus, sequence=1000)


def test_tensor_against_key_value_heads_and_experts() -> None:
    odd = mixtral(heads=48, key_value_heads=6, intermediate=14336)
    with pytest.raises(ValueError, match=r"tensor 4 and the model's key_value_heads 6: one must divide"):
        Degrees(tensor=4).check(odd, gpus=4, sequence=1024)
    with pytest.raises(ValueError, match=r"expert 16 does not divide the model's experts 8"):
        Degrees(data=16, expert=16).check(mixtral(), gpus=16, sequence=1024)
    with pytest.raises(ValueError, match=r"tensor 3 does not divide the model's intermediate 14336"):
        Degrees(tensor=3).check(mixtral(heads=48, key_value_heads=6), gpus=3, sequence=1024)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": 0}, "data must be at least 1, got 0"),
        ({"zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3, got 4"),
        ({"context_method": "rings"}, "context_method must be ring or ulysses, got 'rings'"),
        ({"data": 4, "expert": 3}, "expert 3 does not divide data x context = 4"),
    ],
)
def test_degrees_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Degrees(**fields)


def test_groups_reach_over_adjacent_gpus() -> None:
    degrees = Degrees(tensor=4, context=2, data=3, pipeline=2, expert=2)
    spans = {group: group_span(degrees, group) for group in Group}
    assert spans == {
        Group.TENSOR: 4,
        Group.CONTEXT: 8,
        Group.EXPERT: 8,
        Group.DATA: 24,
        Group.PIPELINE: 25,  # the next stage's GPU is 24 away
    }
    assert group_span(Degrees(tensor=4), Group.PIPELINE) == 1


def test_a_ring_and_sequence_parallelism_cut_one_after_the_other() -> None:
    """8 tokens in 4 pieces of 2; a rank's two pieces are 4 tokens, one for each of 4 tensor ranks."""
    Degrees(context=2, tensor=4).check(SHAPE, gpus=8, sequence=8)
    with pytest.raises(ValueError, match=r"a sequence of 12 tokens cannot be cut 8 ways"):
        Degrees(context=2, tensor=4).check(SHAPE, gpus=8, sequence=12)


def test_messages_call_the_degrees_as_they_are_told_to() -> None:
    names = {"data": "--dp", "tensor": "--tp", "context": "--cp", "pipeline": "--pp", "expert": "--ep"}
    shape = mixtral(heads=48, key_value_heads=6, intermediate=14336)
    for degrees, gpus, sequence, message in (
        (Degrees(data=2), 3, 8, "--dp 2 x --tp 1 x --cp 1 x --pp 1 = 2 GPUs, but there are 3"),
        (Degrees(tensor=4), 4, 8, "--tp 4 and the model's key_value_heads 6"),
        (Degrees(pipeline=5), 5, 8, "--pp 5 does not divide the model's layers"),
        (Degrees(context=2), 2, 6, r"cannot be cut 4 ways \(--cp 2, ring\)"),
        (Degrees(data=16, expert=16), 16, 8, "--ep 16 does not divide the model's experts 8"),
    ):
        with pytest.raises(ValueError, match=message):
            degrees.check(shape, gpus=gpus, sequence=sequence, names=names)
