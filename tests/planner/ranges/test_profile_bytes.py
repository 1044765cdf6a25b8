from __future__ import annotations

import dataclasses
import itertools

from hypothesis import given, seed, settings
from hypothesis import strategies as st

from memtrain.planner.ranges.formulate import Formulated, formulate
from memtrain.planner.ranges.model import DEVICE, Problem
from memtrain.planner.ranges.plan import RangePlan, make_plan
from memtrain.planner.ranges.profile_bytes import (
    CATEGORIES,
    Stay,
    device_moments,
    device_positions,
    place_sizes,
    stays,
)
from memtrain.planner.ranges.simulate import simulate
from tests.planner.ranges.small import (
    INT8,
    block,
    every,
    place,
    problem,
    problems,
    some_state,
    states,
    with_state_anywhere,
)

MICRO_BATCHES = st.sampled_from([(1, 1), (1, 1), (3, 1), (3, 2)])
"""Micro-batches of a step, and in flight."""


def with_micro_batches(one: Problem, count: int, in_flight: int) -> Problem:
    return dataclasses.replace(one, micro_batches=count, in_flight=in_flight)


def plan_of(formulated: Formulated, decisions: tuple[int, ...]) -> RangePlan:
    return make_plan(
        formulated, decisions, status="heuristic", lower_bound_seconds=0.0, gap=0.0, solver="by hand"
    )


def counted(formulated: Formulated, *actions: str) -> tuple[int, ...]:
    """One action for all chunks of each class, class by class and the same in every block."""
    counts = {}
    for one in formulated.choices.counts:
        for wanted, chosen in zip(actions, one, strict=True):
            open_here = {a.label: v for a, v in chosen.items()}
            tensor_chunks = 2
            counts[open_here.get(wanted, open_here.get("slot", -1))] = tensor_chunks
    return formulated.decisions(counts)


def three_blocks() -> tuple[Problem, RangePlan]:
    """X (10 bytes) goes to the host, A (10) is recomputed, O (40) is kept; two of three blocks send."""
    one = problem(
        3,
        1000,
        place("host", 100),
        blocks=tuple(block(i, forward_transient_bytes=3, backward_transient_bytes=5 + i) for i in range(3)),
        reserved_bytes=7,
    )
    formulated = formulate(one)
    return one, plan_of(formulated, counted(formulated, "swap:host", "recompute", "keep"))


def test_the_device_category_by_category() -> None:
    one, plan = three_blocks()
    sizes = device_positions(plan, one)
    # One slot of 10 bytes; 40 bytes kept a block; A's 10 bytes are made again in backward.
    assert sizes["forward layers.0"] == {
        "reserved": 7,
        "transfer slots": 10,
        "saved tensors": 40,
        "transients": 3,
    }
    assert sizes["backward layers.2"] == {
        "reserved": 7,
        "transfer slots": 10,
        "saved tensors": 120,
        "recomputed": 10,
        "transients": 7,
    }


def test_moments_fill_the_step_in_order() -> None:
    one, plan = three_blocks()
    moments = device_moments(plan, one)
    assert [m.position for m in moments] == [
        *(f"forward layers.{i}" for i in range(3)),
        *(f"backward layers.{i}" for i in (2, 1, 0)),
    ]
    assert moments[0].start_seconds == 0.0
    assert moments[-1].end_seconds == plan.step_seconds
    assert all(a.end_seconds == b.start_seconds for a, b in itertools.pairwise(moments))
    assert max(m.total_bytes for m in moments) == plan.peaks[0].size_bytes


def test_each_kind_of_micro_batch_has_its_moments() -> None:
    one, _ = three_blocks()
    one = with_micro_batches(one, 3, 2)
    formulated = formulate(one)
    plan = plan_of(formulated, counted(formulated, "swap:host", "recompute", "keep"))
    moments = device_moments(plan, one)
    assert [m.position.split()[0] for m in moments] == ["forward"] * 3 + ["backward"] * 3
    assert all(a.end_seconds == b.start_seconds for a, b in itertools.pairwise(moments))
    assert moments[-1].end_seconds == plan.parts[-1].end_seconds
    # The other micro-batch in flight keeps O, 40 bytes a block, beside the first block's own.
    assert moments[0].sizes["saved tensors"] == 3 * 40 + 40
    # All three blocks send 10 bytes for each of the two; when which of them leave is not in the timeline.
    assert place_sizes(plan, one, "host") == {"saved tensors": 60}
    assert [(stay.size_bytes, stay.start_seconds) for stay in stays(plan, one, "host")] == [(20, 0.0)] * 3


def test_saved_tensors_stay_in_a_place_from_write_to_read() -> None:
    one, plan = three_blocks()
    # 10 bytes at 10 B/s through one slot: forward at 0..4, 5..9, 10..14 s, writes at 4..5 and 9..10 s.
    # Backward takes 8 s and 4 s of recompute: 14..26 s. Layer 1 is read at 26..27 s, layer 0 at 39..40 s.
    assert stays(plan, one, "host") == (
        Stay(block="layers.0", size_bytes=10, start_seconds=4.0, end_seconds=40.0),
        Stay(block="layers.1", size_bytes=10, start_seconds=9.0, end_seconds=27.0),
    )
    assert place_sizes(plan, one, "host") == {"saved tensors": 20}


def test_state_of_a_host_that_updates() -> None:
    """Weights on the device, gradients and optimizer state in the host; the CPU updates."""
    held = states((DEVICE,), ("host",), ("host",), sizes=(4, 6, 24))
    one = problem(
        2,
        1000,
        place("host", 1000, cpu_bytes_per_second=10.0),
        blocks=tuple(block(i, classes=(), states=held) for i in range(2)),
        staging="host",
    )
    formulated = formulate(one)
    counts: dict[int, int] = {}
    for updated, placed in zip(formulated.states.updated, formulated.states.placed, strict=True):
        counts |= {v: 1 for u, v in updated.items() if u.label == "cpu-ahead"}
        counts |= {v: 1 for p, v in placed.items() if p.update.label == "cpu-ahead"}
    plan = plan_of(formulated, formulated.decisions(counts))
    # Two gradient slots of 6 bytes; the new weights (4 a block) wait in the host.
    assert device_positions(plan, one)["forward layers.0"] == {"weights": 8, "transfer slots": 12}
    assert place_sizes(plan, one, "host") == {"weights": 8, "optimizer state": 48, "gradients": 12}


def same_bytes(one: Problem, formulated: Formulated, decisions: tuple[int, ...]) -> None:
    plan = plan_of(formulated, decisions)
    timeline = simulate(formulated, decisions)
    on_device = device_positions(plan, one)
    for position, where, size in timeline.positions:
        sizes = on_device[position] if where == DEVICE else place_sizes(plan, one, where)
        assert sum(sizes.values()) == size, (position, where, sizes)
        assert list(sizes) == [c for c in CATEGORIES if c in sizes]


@seed(3)
@settings(max_examples=60, deadline=None)
@given(one=problems(), pick=st.integers(0, 10**6), batches=MICRO_BATCHES)
def test_categories_add_up_to_what_the_simulator_says(
    one: Problem, pick: int, batches: tuple[int, int]
) -> None:
    one = with_micro_batches(one, *batches)
    formulated = formulate(one)
    for number, decisions in zip(range(1 + pick % 50), every(formulated), strict=False):
        if number == pick % 50:
            same_bytes(one, formulated, decisions)


@seed(3)
@settings(max_examples=60, deadline=None)
@given(number=st.integers(0, 10**6), batches=MICRO_BATCHES)
def test_state_adds_up_wherever_it_lies(number: int, batches: tuple[int, int]) -> None:
    one = with_micro_batches(with_state_anywhere(), *batches)
    formulated = formulate(one)
    same_bytes(one, formulated, some_state(formulated, number))


def test_a_compressed_chunk_is_saved_small_and_made_again_large() -> None:
    one = problem(1, 1000, place("host"), codecs=(INT8,), error_budget=1.0, slots=1)
    formulated = formulate(one)
    plan = plan_of(formulated, counted(formulated, "compress:int8", "keep", "keep"))
    sizes = device_positions(plan, one)["backward layers.0"]
    # X: two chunks of 5 bytes, 3 each under a ratio of 1/2, 10 again in backward; A 10 and O 40 kept.
    assert (sizes["saved tensors"], sizes["recomputed"]) == (56, 10)
