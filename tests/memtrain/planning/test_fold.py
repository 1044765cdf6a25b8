from __future__ import annotations

import dataclasses

import pytest

from memtrain.planner.ranges.model import (
    DEVICE,
    Block,
    Codec,
    Hop,
    Machine,
    Place,
    Problem,
    Role,
    StateClass,
    TensorClass,
)
from memtrain.planner.ranges.plan import BlockPlan, Held, Range, RangePlan
from memtrain.planning.fold import compress_names, fold_activations, fold_states, usage_of


def ranges(tensor: str, *parts: tuple[str, int]) -> tuple[Range, ...]:
    found, start = [], 0
    for action, count in parts:
        found.append(Range(tensor=tensor, start=start, stop=start + count, action=action))
        start += count
    return tuple(found)


def held(**places: dict[str, int]) -> tuple[Held, ...]:
    return tuple(
        Held(state=state, update="cpu-ahead", place=place, pieces=pieces)
        for state, where in places.items()
        for place, pieces in where.items()
    )


def plan(*blocks: BlockPlan) -> RangePlan:
    return RangePlan(
        status="gap",
        step_seconds=1.0,
        lower_bound_seconds=1.0,
        gap=0.0,
        solver="hand",
        blocks=blocks,
        events=(),
        parts=(),
        peaks=(),
        moved_bytes=0,
    )


def layer(index: int, swapped: int) -> BlockPlan:
    """X leaves; of O's 16 chunks 9 are computed again, some leave and the rest stays."""
    return BlockPlan(
        name=f"model.layers.{index}",
        ranges=(
            *ranges("X", ("swap:host", 16)),
            *ranges("A", ("swap:host", 16)),
            *ranges("O", ("recompute", 9), ("swap:nvme", swapped), ("keep", 7 - swapped)),
        ),
        updates=(("cpu-ahead", 4),),
        held=held(weights={DEVICE: 4}, gradients={"host": 4}, optimizer={"host": 3, "nvme": 1}),
    )


LAST = BlockPlan(
    name="model.layers.3",
    ranges=(*ranges("X", ("slot", 16)), *ranges("A", ("slot", 16)), *ranges("O", ("keep", 16))),
    updates=(("device-in-backward", 4),),
    held=held(weights={DEVICE: 4}, optimizer={DEVICE: 4}),
)
HEAD = BlockPlan(name="epilogue", ranges=(), updates=(("device-in-backward", 4),), held=LAST.held)
FOUR = plan(layer(0, 3), layer(1, 5), layer(2, 3), LAST, HEAD)


def test_names_are_compressed() -> None:
    names = [f"model.layers.{i}" for i in (0, 1, 2, 5, 7, 8)]
    assert compress_names(["prologue", *names, "epilogue"]) == "prologue, layers 0-2, 5, 7-8, epilogue"


def test_blocks_that_do_the_same_are_one_line() -> None:
    first, last = fold_activations(FOUR)
    assert (first.blocks, first.count) == ("layers 0-2", 3)
    assert first.text == "X and A swap host; O recompute 9 of 16, swap nvme 3-5, keep 2-4"
    assert (last.blocks, last.text) == ("layers 3", "X and A stay in the staging slot; O keep")


def test_state_is_one_line_too() -> None:
    first, last = fold_states(FOUR)
    assert first.text == (
        "weights device; gradients host; optimizer host 3 of 4, nvme 1; "
        "updated by the CPU before the next forward"
    )
    assert (last.blocks, last.text) == (
        "layers 3, epilogue",
        "weights and optimizer device; updated on the device in backward",
    )


def problem() -> Problem:
    sizes = {"X": 1, "A": 1, "O": 2}
    classes = tuple(TensorClass(name=name, chunk_bytes=size, chunks=16) for name, size in sizes.items())
    states = tuple(
        StateClass(name=name, role=role, piece_bytes=size, places=(DEVICE, "host"))
        for name, role, size in (
            ("weights", Role.PARAMETER, 1),
            ("gradients", Role.GRADIENT, 1),
            ("optimizer", Role.OPTIMIZER, 6),
        )
    )
    blocks = [
        Block(
            name=block.name,
            forward_seconds=1,
            backward_seconds=2,
            classes=classes if block.ranges else (),
            states=states,
            pieces=4,
        )
        for block in FOUR.blocks
    ]
    hop = Hop(link="pcie", write_bytes_per_second=1, read_bytes_per_second=1)
    host = Place(name="host", capacity_bytes=999, hops=(hop,))
    codec = Codec(
        name="int8", ratio=0.5, compress_bytes_per_second=1, decompress_bytes_per_second=1, error=0.1
    )
    machine = Machine(device_capacity_bytes=999, places=(host,))
    return Problem(blocks=tuple(blocks), machine=machine, codecs=(codec,))


def test_shares_of_bytes() -> None:
    usage = usage_of(FOUR, problem())
    # Each layer saves 64 bytes: of three, 32 leave to the host and 18 of O are computed again; 6, 10 and 6
    # go to nvme. The last block's slots count as swapped.
    assert usage.actions == {
        "swap": pytest.approx((3 * 32 + 22 + 32) / 256),
        "recompute": pytest.approx(54 / 256),
        "keep": pytest.approx((8 + 4 + 8 + 32) / 256),
    }
    assert usage.swapped_to == {"host": pytest.approx(96 / 256), "nvme": pytest.approx(22 / 256)}
    assert usage.state[Role.PARAMETER] == {DEVICE: 1.0}
    # Of five blocks' 20 pieces of optimizer state, 8 on the device, 9 in the host and 3 on nvme.
    assert usage.state[Role.OPTIMIZER] == {"host": 9 / 20, "nvme": 3 / 20, DEVICE: 8 / 20}
    assert usage.cpu_updates == 12 / 20
    assert usage.splits_tokens
    assert usage.codecs == ()


def test_codecs_that_are_used_are_named() -> None:
    parts = ranges("X", ("compress-swap:int8:host", 10), ("compress:int8", 6))
    lossy = BlockPlan(name="layers.0", ranges=parts)
    one = problem()
    block = dataclasses.replace(one.blocks[0], name="layers.0", classes=one.blocks[0].classes[:1], states=())
    usage = usage_of(plan(lossy), dataclasses.replace(one, blocks=(block,)))
    assert usage.codecs == ("int8",)
    assert usage.swapped_to == {"host": 10 / 16}
    assert usage.state == {}
    assert usage.cpu_updates == 0.0
