"""Two levels: the stack, the rings and the passes by hand; the whole step against its load."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.planner.buffers import Buffer
from memtrain.planner.check_addresses import check_addresses
from memtrain.planner.step_addresses import StepPacking, pack_step
from memtrain.planner.step_buffers import BlockClass, Handed, Kept, Step

BLOCK = BlockClass(
    name="toy",
    forward_ops=2,
    backward_ops=2,
    kept=(Kept(name="x", start=0, end=2, size=10),),
    forward=(Buffer("f", 0, 2, 5),),
    backward=(Buffer("g", 0, 1, 3), Buffer("h", 1, 2, 4)),
    input_gradient=Handed(start=1, size=2),
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
        Buffer("0.input_gradient", 7, 8, 2),
        Buffer("1.kept.x", 2, 6, 10),
        Buffer("1.forward.f", 2, 4, 5),
        Buffer("1.backward.g", 4, 5, 3),
        Buffer("1.backward.h", 5, 6, 4),
        # Written by the last operation of its own backward, read by the first of block 0's.
        Buffer("1.input_gradient", 5, 7, 2),
        Buffer("staging.0", 0, 8, 8),
    }


def test_two_levels_by_hand() -> None:
    step = Step(blocks=(BLOCK, BLOCK), staging_slots=1, staging_slot_bytes=8)
    packing = pack_step(step, time_limit_seconds=0, alignment=1)
    # Staging 0-8, two gradient slots of 2, the stack from 12, transients on what is kept so far.
    assert packing.offsets == {
        "staging.0": 0,
        "0.input_gradient": 8,
        "1.input_gradient": 10,
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


def test_outputs_are_handed_on_through_the_ring_or_stay_on_the_stack() -> None:
    handing = replace(BLOCK, output=Handed(start=1, size=6), input_end=1)
    keeping = replace(handing, input_kept_end=2)
    table = Buffer("table", 1, 10, 4)
    step = Step(blocks=(handing, handing, keeping), spanning=(table,))
    buffers = {b.name: b for b in step.buffers()}
    # Forwards begin in operations 0, 2, 4, backwards of 2, 1, 0 in 6, 8, 10.
    assert (step.forward_starts, step.backward_starts) == ((0, 2, 4, 6), (10, 8, 6))
    # Of 0: read by the first operation of 1's forward. Of 1: kept for the backward of 2. Of 2: for nobody.
    assert [buffers[f"{i}.output"] for i in range(3)] == [
        Buffer("0.output", 1, 3, 6),
        Buffer("1.output", 3, 8, 6),
        Buffer("2.output", 5, 6, 6),
    ]
    packing = pack_step(step, time_limit_seconds=0, alignment=1)
    # The table below, then two ring slots of 6 at 4 and 10, then the stack from 16.
    assert packing.offsets["spanning.table"] == 0
    assert [packing.offsets[f"{i}.output"] for i in range(3)] == [4, 36, 4]
    assert [packing.offsets[f"{i}.input_gradient"] for i in range(3)] == [4, 10, 4]
    assert [packing.offsets[f"{i}.kept.x"] for i in range(3)] == [16, 26, 42]
    assert sound(step, packing, 1)


def test_an_output_that_its_own_backward_reads_stays() -> None:
    block = replace(BLOCK, output=Handed(start=1, size=6), output_kept_end=1)
    step = Step(blocks=(block, BLOCK))
    assert Buffer("0.output", 1, 7, 6) in step.buffers()
    assert pack_step(step, time_limit_seconds=0, alignment=1).offsets["0.output"] == 4 + 10


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


SIZES = st.integers(1, 2000)


def handed(ops: int) -> st.SearchStrategy[Handed | None]:
    some = st.builds(Handed, start=st.integers(0, ops - 1), size=st.sampled_from([100, 700]))
    return st.none() | some


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
        output=draw(handed(forward_ops)),
        input_end=draw(st.integers(0, forward_ops)),
        input_kept_end=draw(st.integers(0, backward_ops)),
        output_kept_end=draw(st.integers(0, backward_ops)),
        input_gradient=draw(handed(backward_ops)),
        output_gradient_end=draw(st.integers(0, backward_ops)),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(block_classes(), min_size=1, max_size=5), st.integers(0, 2), st.sampled_from([0.0, 0.05]))
def test_any_step_is_sound(blocks: list[BlockClass], slots: int, seconds: float) -> None:
    spanning = (Buffer("mask", 0, blocks[0].forward_ops, 50), Buffer("table", 1, 2, 900))
    step = Step(blocks=tuple(blocks), spanning=spanning, staging_slots=slots, staging_slot_bytes=300)
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
        ({"input_end": 3}, "'input' lives in operations 0 to 3 of a forward pass of 2"),
        ({"input_kept_end": 3}, "'input' lives in operations 0 to 3 of a backward pass of 2"),
        ({"output_kept_end": 3}, "'output' lives in operations 0 to 3 of a backward pass of 2"),
        ({"output": Handed(start=2, size=1)}, "'output' lives in operations 2 to 3 of a forward pass of 2"),
        (
            {"input_gradient": Handed(start=2, size=2)},
            "'input gradient' lives in operations 2 to 3 of a backward pass of 2",
        ),
        ({"forward": (Buffer("f", 0, 1, 5),) * 2}, "2 buffers of its forward are called 'f'"),
    ],
)
def test_a_class_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BLOCK, **change)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="kept 'x' has 0 bytes"):
        Kept(name="x", start=0, end=1, size=0)
    with pytest.raises(ValueError, match="hand over 0 bytes: say None"):
        Handed(start=0, size=0)
    with pytest.raises(ValueError, match="spanning 'mask' lives in operations 3 to 5 of a step of 4"):
        Step(blocks=(BLOCK,), spanning=(Buffer("mask", 3, 5, 1),))
    with pytest.raises(ValueError, match="at least one block"):
        Step(blocks=())
    with pytest.raises(ValueError, match="staging of 1 slots of -1 bytes"):
        Step(blocks=(BLOCK,), staging_slots=1, staging_slot_bytes=-1)
