"""Messages that nothing hides, in seconds: two GPUs whose link carries 1000 bytes a second.

Of the toy job a block has 1600 parameters of two bytes, the embedding 800: an all-reduce by two ranks sends
3200 and 1600 bytes, a gathering or a reduce-scatter half of that.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain.planner.compose import machine_for
from memtrain.planner.job import Job
from memtrain.planner.lowering import problem_of
from memtrain.planner.lowering.step_messages import exposed_seconds, step_message_seconds
from memtrain.planner.parallel import Degrees
from tests.planner.toy_job import ESTIMATE, HIDDEN, PART, SHAPE, job, operation, parameter

BACKWARD = [0.5, 5.0, 5.0, 1.0]
"""Of the embedding, two blocks and the head."""


def slow_job(degrees: Degrees, **changes: Any) -> Job:
    gpus = degrees.gpus
    slow = machine_for("a800-80g", gpus=gpus, dram="64GiB", interconnect="1KB/s")
    return job(degrees, setup=slow, **changes)


def test_a_queue_leaves_what_became_ready_last() -> None:
    # Sent from 2 to 3, from 4 to 9 and, ready at 6, from 9 to 10: four after the end of the arithmetic.
    assert exposed_seconds([2.0, 2.0, 2.0], [1.0, 5.0, 1.0]) == 4.0
    assert exposed_seconds([2.0, 2.0, 2.0], [2.0, 2.0, 0.0]) == 0.0
    assert exposed_seconds([2.0, 2.0, 2.0], [0.0, 0.0, 0.5]) == 0.5
    assert exposed_seconds([], []) == 0.0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_exposed_is_the_worst_backlog(pairs: list[tuple[int, int]]) -> None:
    computing, sending = zip(*pairs, strict=True)
    # From some message on the link never rests: that message was ready then, and the rest is to be sent.
    backlogs = [sum(sending[i:]) - sum(computing[i + 1 :]) for i in range(len(pairs))]
    assert exposed_seconds(computing, sending) == max(0, *backlogs)


@pytest.mark.parametrize(
    ("stage", "seconds"),
    [
        # Block 1 from 6 to 9.2, block 0 from 11 to 14.2, the embedding until 15.8; backward ends at 11.5.
        (0, 4.3),
        # Half as much, until 7.6, 12.6 and 13.4; then 0.8 + 2 x 1.6 of updated weights are gathered.
        (1, 1.9 + 4.0),
        (2, 4.0),
        (3, 0.0),
    ],
)
def test_a_step_waits_for_what_is_ready_last_and_for_updated_weights(stage: Any, seconds: float) -> None:
    one = slow_job(Degrees(data=2, zero_stage=stage))
    assert step_message_seconds(one, BACKWARD) == pytest.approx(seconds)


def test_a_backward_of_any_length_does_not_hide_the_embeddings_gradient() -> None:
    one = slow_job(Degrees(data=2))
    assert step_message_seconds(one, [0.0, 1e6, 1e6, 1e6]) == pytest.approx(1.6 + 3.2)
    assert step_message_seconds(one, [1e6, 1e6, 1e6, 1e6]) == pytest.approx(1.6)


def test_a_last_stage_has_its_copy_of_a_tied_head_to_reduce() -> None:
    # The head's from 1 to 2.6, the block's 3.2 after its backward.
    one = slow_job(Degrees(data=2, pipeline=2), stage=1)
    assert step_message_seconds(one, [5.0, 1.0]) == pytest.approx(3.2)
    assert step_message_seconds(one, [0.0, 0.0]) == pytest.approx(1.6 + 3.2)


def test_experts_are_reduced_by_those_that_hold_the_same() -> None:
    expert = (parameter("w.0", 800), parameter("mlp.experts.0.w", 400), parameter("mlp.experts.1.w", 400))
    units = tuple(
        dataclasses.replace(unit, parameters=expert) if unit.block is not None else unit
        for unit in ESTIMATE.units
    )
    mixture = dataclasses.replace(ESTIMATE, units=units)
    shape = dataclasses.replace(SHAPE, experts=2)
    apart = slow_job(Degrees(data=2, expert=2), estimate=mixture, shape=shape)
    together = slow_job(Degrees(data=2), estimate=mixture)
    assert step_message_seconds(apart, [0.0] * 4) == pytest.approx(1.6 + 2 * 1.6)
    assert step_message_seconds(together, [0.0] * 4) == pytest.approx(1.6 + 2 * 3.2)


def passes(one: Job) -> list[tuple[float, float]]:
    return [(block.forward_seconds, block.backward_seconds) for block in problem_of(one).blocks]


def test_sharded_blocks_wait_for_the_first_gathering_of_a_pass_and_the_last_reduction() -> None:
    # So much arithmetic that it hides every message beside it.
    heavy = (10**18, 0)
    operations = (operation(*heavy), *PART.operations[1:5], operation(*heavy), *PART.operations[6:])
    part = dataclasses.replace(PART, operations=operations)
    head = dataclasses.replace(ESTIMATE.units[-1], parameters=(parameter("head", 64, HIDDEN),))
    estimate = dataclasses.replace(ESTIMATE, classes=(part,), units=(*ESTIMATE.units[:-1], head))
    alone = passes(slow_job(Degrees(data=2), estimate=estimate))
    sharded = passes(slow_job(Degrees(data=2, zero_stage=3), estimate=estimate))
    waits = [(a - c, b - d) for (a, b), (c, d) in zip(sharded, alone, strict=True)]
    expected = [(0.8, 0.8), (1.6, 1.6), (0.0, 1.6), (0.512, 0.512)]
    for found, wanted in zip(waits, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-9)


def test_sharded_blocks_send_everything_once_a_pass() -> None:
    # So little arithmetic that it hides nothing: the second block's weights come while the first is at work.
    found = passes(slow_job(Degrees(data=2, zero_stage=3)))
    # The head is tied: it gathers the embedding once more, which reduces the gradients of both.
    expected = [(0.8, 0.8), (1.6 + 1.6, 1.6), (0.0, 1.6 + 1.6 + 1.6), (0.8, 0.0)]
    for seconds, wanted in zip(found, expected, strict=True):
        assert seconds == pytest.approx(wanted, abs=1e-6)
    gradients = passes(slow_job(Degrees(data=2, zero_stage=2)))
    assert math.fsum(forward for forward, _ in gradients) == pytest.approx(0.0, abs=1e-6)
    assert math.fsum(backward for _, backward in gradients) == pytest.approx(0.8 + 2 * 1.6, abs=1e-6)
