"""Of 8 ranks each sends 7/8 of what is gathered or reduced."""

from __future__ import annotations

import pytest

from memtrain.planner.hardware import Interconnect, Quoted
from memtrain.planner.parallel import Degrees
from memtrain.planner.traffic import When
from memtrain.planner.zero_traffic import end_traffic, step_traffic

RATE = Quoted(value=100e9, source="given")
LINK = Interconnect(name="toy", peer_bytes_per_second=RATE, collective_bytes_per_second=RATE)


def test_gradients_hide_behind_backward_and_gathered_weights_do_not() -> None:
    degrees = Degrees(data=8, zero_stage=1)
    reduce, gather = step_traffic(degrees, parameters=1e9, weight_bytes=2, gradient_bytes=4)
    assert (reduce.sent_bytes, reduce.overlaps) == (7 / 8 * 4e9, True)
    assert (gather.sent_bytes, gather.overlaps) == (7 / 8 * 2e9, False)
    assert reduce.seconds(LINK) == pytest.approx(0.035)


def test_an_end_waits_for_its_messages_and_is_gathered_once() -> None:
    forward, backward, reduce = end_traffic(
        Degrees(data=8, zero_stage=3), parameters=1e6, value_bytes=2, gradient_bytes=4
    )
    assert not any(message.overlaps for message in (forward, backward, reduce))
    assert (forward.when, forward.sent_bytes, forward.buffer_bytes) == (When.BLOCK_FORWARD, 7 / 8 * 2e6, 2e6)
    # Still whole in backward, beside its gradients.
    assert (backward.when, backward.sent_bytes, backward.buffer_bytes) == (When.BLOCK_BACKWARD, 0, 2e6)
    assert (reduce.when, reduce.sent_bytes, reduce.buffer_bytes) == (When.BLOCK_BACKWARD, 7 / 8 * 4e6, 4e6)
    (only_reduced,) = end_traffic(Degrees(data=8, zero_stage=2), parameters=1e6)
    assert (only_reduced.sent_bytes, only_reduced.overlaps) == (7 / 8 * 2e6, False)


def test_a_tied_head_gathers_the_embedding_and_leaves_its_gradients_to_it() -> None:
    found = end_traffic(Degrees(data=8, zero_stage=3), parameters=1e3, borrowed=1e6)
    own, tied = found[:3], found[3:]
    assert own == end_traffic(Degrees(data=8, zero_stage=3), parameters=1e3)
    assert [(message.when, message.sent_bytes, message.buffer_bytes) for message in tied] == [
        (When.BLOCK_FORWARD, 7 / 8 * 2e6, 2e6),
        (When.BLOCK_BACKWARD, 0, 2e6),
    ]
    assert not any(message.overlaps for message in tied)
    assert end_traffic(Degrees(data=8, zero_stage=2), parameters=0, borrowed=1e6) == []
