"""Two levels: the stack, the rings and the passes by hand; the whole step against its load."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.planner.buffers import Buffer
from memtrain.planner.check_addresses import check_addresses
from memtrain.planner.llama_step import LlamaShape, llama_step
from memtrain.planner.step_addresses import StepPacking, pack_step
from memtrain.planner.step_buffers import BlockClass, Kept, Step

BLOCK = BlockClass(
    name="toy",
    forward_ops=2,
    backward_ops=2,
    kept=(Kept(name="x", start=0, end=2, size=10),),
    forward=(Buffer("f", 0, 2, 5),),
    backward=(Buffer("g", 0, 1, 3), Buffer("h", 1, 2, 4)),
    input_gradient_bytes=2,
    input_gradient_start=1,
    output_gradient_end=1,
)


def sound(step: Step, packing: StepPacking, alignment: int) -> bool:
    return (
        check_addresses(step.buffers(), packing.offsets, capacity=packing.height, alignment=alignment) == ()
    )


def test_lifetimes_over_the_whole_step() -> None:
    step = Step(blocks=(BLOCK, BLOCK), staging_slots=1, staging_slot_bytes=8)
    # Forward of 0 in operations 0-1, of 1 in 2-3; backward of 1 in 4-5, of 0 in 6-7.
    assert set(step.buffers()) == {
        Buffer("0.kept.x", 0, 8, 10),
        Buffer("0.forward.f", 0, 2, 5),
        Buffer("0.backward.g", 6, 7, 3),
        Buffer("0.backward.h", 7, 8, 4),
        Buffer("0.gradient.input", 7, 8, 2),
        Buffer("1.kept.x", 2, 6, 10),
        Buffer("1.forward.f", 2, 4, 5),
        Buffer("1.backward.g", 4, 5, 3),
        Buffer("1.backward.h", 5, 6, 4),
        # Written by the last operation of its own backward, read by the first of block 0's.
        Buffer("1.gradient.input", 5, 7, 2),
        Buffer("staging.0", 0, 8, 8),
    }


def test_two_levels_by_hand() -> None:
    step = Step(blocks=(BLOCK, BLOCK), staging_slots=1, staging_slot_bytes=8)
    packing = pack_step(step, time_limit_seconds=0, alignment=1)
    # Staging 0-8, two gradient slots of 2, the stack from 12, transients on what is kept so far.
    assert packing.offsets == {
        "staging.0": 0,
        "0.gradient.input": 8,
        "1.gradient.input": 10,
        "0.kept.x": 12,
        "0.forward.f": 22,
        "0.backward.g": 22,
        "0.backward.h": 22,
        "1.kept.x": 22,
        "1.forward.f": 32,
        "1.backward.g": 32,
        "1.backward.h": 32,
    }
    assert (packing.height, packing.two_level_height) == (37, 37)
    # In operation 5, the backward of block 1: staging 8, kept 20, transient 4, one gradient of 2.
    assert packing.load == 34
    assert packing.fragmentation == pytest.approx(3 / 34)
    assert packing.passes_packed == 2


def test_the_flat_packing_is_taken_where_it_is_lower() -> None:
    step = Step(blocks=(BLOCK, BLOCK), staging_slots=1, staging_slot_bytes=8)
    packing = pack_step(step, time_limit_seconds=5, alignment=1)
    assert (packing.height, packing.load, packing.two_level_height) == (34, 34, 37)
    assert sound(step, packing, 1)


def test_equal_lifetimes_share_a_solution_whatever_their_names() -> None:
    renamed = replace(BLOCK, name="other", forward=(Buffer("other f", 0, 2, 5),))
    wider = replace(BLOCK, name="wider", forward=(Buffer("f", 0, 2, 6),))
    step = Step(blocks=(BLOCK, renamed, wider, BLOCK))
    packing = pack_step(step, time_limit_seconds=0, alignment=1)
    # Two kinds of forward, one backward.
    assert packing.passes_packed == 3
    assert sound(step, packing, 1)


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_a_llama_step(layers: int) -> None:
    shape = LlamaShape(
        blocks=layers, hidden=256, intermediate=896, heads=8, kv_heads=2, vocabulary=2000, tokens=64
    )
    step = llama_step(shape)
    packing = pack_step(step, time_limit_seconds=2)
    assert sound(step, packing, 512)
    assert packing.passes_packed == 4
    assert packing.load <= packing.height <= packing.two_level_height


def test_a_llama_blocks_kept_bytes() -> None:
    """A token: 6 rows of h, k and v of h/8 each, 4 of the intermediate in bf16; 66 values in fp32."""
    block = llama_step(LlamaShape()).blocks[0]
    hidden, intermediate, heads, tokens = 8192, 28672, 64, 4096
    a_token = 2 * (6 * hidden + 2 * hidden // 8 + 4 * intermediate) + 4 * (heads + 2)
    assert sum(k.size for k in block.kept) == tokens * a_token


def test_the_80_layer_step_wastes_less_than_half_a_per_cent() -> None:
    step = llama_step(LlamaShape())
    packing = pack_step(step, time_limit_seconds=5)
    assert len(step.buffers()) == 3631
    assert packing.fragmentation <= 0.005
    assert sound(step, packing, 512)


SIZES = st.integers(1, 2000)


@st.composite
def block_classes(draw: st.DrawFn) -> BlockClass:
    forward_ops, backward_ops = draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def transients(name: str, ops: int) -> tuple[Buffer, ...]:
        starts = draw(st.lists(st.integers(0, ops - 1), max_size=4))
        return tuple(
            Buffer(f"{name}{i}", start, draw(st.integers(start + 1, ops)), draw(SIZES))
            for i, start in enumerate(starts)
        )

    kept = tuple(
        Kept(
            name=f"k{i}",
            start=draw(st.integers(0, forward_ops - 1)),
            end=draw(st.integers(0, backward_ops)),
            size=draw(SIZES),
        )
        for i in range(draw(st.integers(0, 3)))
    )
    return BlockClass(
        name="drawn",
        forward_ops=forward_ops,
        backward_ops=backward_ops,
        kept=kept,
        forward=transients("f", forward_ops),
        backward=transients("b", backward_ops),
        input_gradient_bytes=draw(st.sampled_from([0, 100, 700])),
        input_gradient_start=draw(st.integers(0, backward_ops - 1)),
        output_gradient_end=draw(st.integers(0, backward_ops)),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(block_classes(), min_size=1, max_size=5), st.integers(0, 2), st.sampled_from([0.0, 0.05]))
def test_any_step_is_sound(blocks: list[BlockClass], slots: int, seconds: float) -> None:
    step = Step(blocks=tuple(blocks), staging_slots=slots, staging_slot_bytes=300)
    packing = pack_step(step, time_limit_seconds=seconds, alignment=64)
    assert sound(step, packing, 64)
    assert packing.load <= packing.height <= packing.two_level_height


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward": (Buffer("f", 0, 3, 5),)}, "'f' lives in operations 0 to 3 of a forward pass of 2"),
        ({"backward": (Buffer("g", -1, 1, 5),)}, "'g' lives in operations -1 to 1 of a backward pass of 2"),
        (
            {"kept": (Kept(name="x", start=3, end=1, size=1),)},
            "'x' lives in operations 3 to 2 of a forward pass of 2",
        ),
        ({"kept": (Kept(name="x", start=0, end=3, size=1),)}, "'x' lives in operations 0 to 3 of a backward"),
        ({"output_gradient_end": 3}, "'output gradient' lives in operations 0 to 3 of a backward"),
        ({"input_gradient_start": 2}, "'input gradient' lives in operations 2 to 3 of a backward pass of 2"),
        ({"forward": (Buffer("f", 0, 1, 5),) * 2}, "2 buffers of its forward are called 'f'"),
    ],
)
def test_a_class_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BLOCK, **change)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="kept 'x' has 0 bytes"):
        Kept(name="x", start=0, end=1, size=0)
    with pytest.raises(ValueError, match="at least one block"):
        Step(blocks=())
    with pytest.raises(ValueError, match="staging of 1 slots of -1 bytes"):
        Step(blocks=(BLOCK,), staging_slots=1, staging_slot_bytes=-1)
