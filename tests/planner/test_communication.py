from __future__ import annotations

from typing import Any

import pytest

from memtrain.planner.communication import block_traffic, stage_traffic
from memtrain.planner.hardware import Interconnect, Quoted
from memtrain.planner.parallel import Degrees, Group, ModelShape
from memtrain.planner.traffic import Traffic, When
from memtrain.planner.zero_traffic import step_traffic

# h = 8192, 64 query heads and 8 key-value heads of 128: q 8192, k and v together 2048 elements a token.
SHAPE = ModelShape(layers=80, hidden=8192, heads=64, key_value_heads=8, head_size=128, intermediate=28672)
MIXTURE = ModelShape(
    layers=32,
    hidden=4096,
    heads=32,
    key_value_heads=8,
    head_size=128,
    intermediate=14336,
    experts=8,
    experts_per_token=2,
)
LINK = Interconnect(
    name="toy",
    peer_bytes_per_second=Quoted(value=50e9, source="given"),
    collective_bytes_per_second=Quoted(value=100e9, source="given"),
)
TOKENS = 2 * 4096
RESIDUAL = TOKENS * 8192 * 2  # bytes of bf16


def of_block(degrees: Degrees, shape: ModelShape = SHAPE, **changes: Any) -> dict[When, list[Traffic]]:
    fields: dict[str, Any] = {"batch": 2, "sequence": 4096, "block_parameters": 1e6}
    found: dict[When, list[Traffic]] = {}
    for item in block_traffic(degrees, shape, **(fields | changes)):
        found.setdefault(item.when, []).append(item)
    return found


def only(items: list[Traffic]) -> Traffic:
    (item,) = items
    return item


def test_one_gpu_sends_nothing() -> None:
    assert of_block(Degrees()) == {}
    assert stage_traffic(Degrees(), SHAPE, batch=2, sequence=4096) == []
    assert step_traffic(Degrees(), parameters=1e9) == []


def test_tensor_parallelism_all_reduces_twice_a_pass() -> None:
    found = of_block(Degrees(tensor=4, sequence_parallel=False))
    for when in (When.BLOCK_FORWARD, When.BLOCK_BACKWARD):
        item = only(found[when])
        assert (item.group, item.count, item.overlaps, item.buffer_bytes) == (Group.TENSOR, 2, False, 0)
        assert item.sent_bytes == 2 * (2 * 3 / 4 * RESIDUAL)  # two all-reduces of 2 (t-1)/t B


def test_sequence_parallelism_sends_as_much_and_gathers_inputs_again_in_backward() -> None:
    plain, cut = of_block(Degrees(tensor=4, sequence_parallel=False)), of_block(Degrees(tensor=4))
    forward = only(cut[When.BLOCK_FORWARD])
    assert forward.sent_bytes == only(plain[When.BLOCK_FORWARD]).sent_bytes
    assert (forward.count, forward.buffer_bytes) == (4, RESIDUAL)
    backward, again = cut[When.BLOCK_BACKWARD]
    assert backward.sent_bytes == forward.sent_bytes
    assert (again.count, again.sent_bytes, again.overlaps) == (2, 2 * 3 / 4 * RESIDUAL, True)


def test_a_ring_sends_keys_and_values_to_everybody_else() -> None:
    found = of_block(Degrees(context=8))
    local = TOKENS // 8 * 2048 * 2  # this rank's keys and values
    forward, backward = only(found[When.BLOCK_FORWARD]), only(found[When.BLOCK_BACKWARD])
    assert (forward.group, forward.count, forward.overlaps) == (Group.CONTEXT, 7, True)
    assert forward.sent_bytes == 7 * local
    assert forward.buffer_bytes == 2 * local
    assert backward.sent_bytes == 7 * local + 8 * local  # keys and values, and their gradients home again
    assert backward.buffer_bytes == 4 * local


def test_a_ring_under_tensor_parallelism_sends_its_own_heads() -> None:
    local = TOKENS // 2 * 2048 * 2
    for tensor, heads in ((4, 4), (8, 8), (16, 8)):  # eight heads of keys and values at most
        found = of_block(Degrees(context=2, tensor=tensor))
        ring = next(item for item in found[When.BLOCK_FORWARD] if item.group is Group.CONTEXT)
        assert ring.sent_bytes == local / heads


def test_rings_and_pipelines_talk_to_one_neighbour() -> None:
    ring, ulysses = (
        only(of_block(Degrees(context=8, context_method=method))[When.BLOCK_FORWARD])  # type: ignore[arg-type]
        for method in ("ring", "ulysses")
    )
    stage, _ = stage_traffic(Degrees(pipeline=2), SHAPE, batch=2, sequence=4096)
    assert ring.seconds(LINK) == ring.sent_bytes / 50e9
    assert stage.seconds(LINK) == stage.sent_bytes / 50e9
    assert ulysses.seconds(LINK) == ulysses.sent_bytes / 100e9


def test_ulysses_changes_between_tokens_and_heads() -> None:
    found = of_block(Degrees(context=4, context_method="ulysses"))
    tokens = TOKENS // 4
    query, key_value = tokens * 8192 * 2, tokens * 2048 * 2
    for when in (When.BLOCK_FORWARD, When.BLOCK_BACKWARD):
        item = only(found[when])
        assert (item.count, item.overlaps, item.buffer_bytes) == (4, False, query + key_value)
        assert item.sent_bytes == 3 / 4 * (query + key_value + query)  # q, k, v, and the output back


def test_ulysses_of_multi_head_attention_is_the_papers_4_n_h_over_p() -> None:
    """2309.14509, section 3.2: 4 N h / P elements, of which (P - 1) / P leave the GPU."""
    shape = ModelShape(
        layers=32, hidden=4096, heads=32, key_value_heads=32, head_size=128, intermediate=11008
    )
    found = of_block(Degrees(context=8, context_method="ulysses"), shape)
    assert only(found[When.BLOCK_FORWARD]).sent_bytes == 7 / 8 * (4 * TOKENS * 4096 / 8) * 2


def test_pipeline_stages_hand_on_the_residual() -> None:
    sent = stage_traffic(Degrees(pipeline=4), SHAPE, batch=2, sequence=4096)
    assert [(item.when, item.sent_bytes, item.overlaps) for item in sent] == [
        (When.STAGE_FORWARD, RESIDUAL, False),
        (When.STAGE_BACKWARD, RESIDUAL, False),
    ]
    cut = stage_traffic(Degrees(pipeline=4, tensor=8, context=2), SHAPE, batch=2, sequence=4096)
    assert cut[0].sent_bytes == cut[0].buffer_bytes == RESIDUAL / 16


@pytest.mark.parametrize(
    ("stage", "in_step", "in_block"),
    [
        (0, [2 * 7 / 8 * 2e9], {}),  # an all-reduce of 2 bytes a parameter
        (1, [7 / 8 * 2e9, 7 / 8 * 2e9], {}),  # a reduce-scatter and an all-gather: as many
        (2, [7 / 8 * 2e9], {When.BLOCK_BACKWARD: [7 / 8 * 2e6]}),
        (3, [], {When.BLOCK_FORWARD: [7 / 8 * 2e6], When.BLOCK_BACKWARD: [7 / 8 * 2e6, 7 / 8 * 2e6]}),
    ],
)
def test_zero_stages_send_two_or_three_times_the_parameters(
    stage: Any, in_step: list[float], in_block: dict[When, list[float]]
) -> None:
    degrees = Degrees(data=8, zero_stage=stage)
    assert [item.sent_bytes for item in step_traffic(degrees, parameters=1e9)] == in_step
    found = of_block(degrees)
    assert {when: [item.sent_bytes for item in items] for when, items in found.items()} == in_block
    assert all(item.group is Group.DATA for items in found.values() for item in items)


def test_what_zero_gathers_needs_room() -> None:
    found = of_block(Degrees(data=8, zero_stage=3), gradient_bytes=4)
    assert only(found[When.BLOCK_FORWARD]).buffer_bytes == 2 * 2e6  # this block's weights and the next one's
    gather, reduce = found[When.BLOCK_BACKWARD]
    assert (gather.buffer_bytes, reduce.buffer_bytes) == (2 * 2e6, 4e6)
    assert gather.overlaps
    assert reduce.overlaps


def test_tokens_travel_to_experts_and_back() -> None:
    found = of_block(Degrees(data=8, expert=4), MIXTURE)
    routed = TOKENS * 2 * 4096 * 2  # two experts a token, bf16
    for when in (When.BLOCK_FORWARD, When.BLOCK_BACKWARD):
        item = only(found[when])
        assert (item.group, item.count, item.overlaps) == (Group.EXPERT, 2, False)
        assert (item.sent_bytes, item.buffer_bytes) == (2 * 3 / 4 * routed, 2 * routed)


def test_experts_are_sharded_over_fewer_ranks() -> None:
    degrees = Degrees(data=8, expert=4, zero_stage=3)
    found = of_block(degrees, MIXTURE, expert_parameters=3e6)
    gathers = [item.sent_bytes for item in found[When.BLOCK_FORWARD] if item.group is Group.DATA]
    assert gathers == [7 / 8 * 2e6, 1 / 2 * 6e6]  # 8 replicas of the rest, 2 of each expert
    once = step_traffic(Degrees(data=8, expert=4), parameters=1e9, experts=True)
    assert [item.sent_bytes for item in once] == [2 * 1 / 2 * 2e9]
    assert step_traffic(Degrees(data=8, expert=8), parameters=1e9, experts=True) == []
