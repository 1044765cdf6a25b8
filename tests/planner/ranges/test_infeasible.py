"""Answers where nothing fits: what is missing, what holds it back, what would help."""

from __future__ import annotations

import dataclasses

import pytest

from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.model import Block, Problem, TensorClass
from memtrain.planner.ranges.plan import Binding, Relaxation
from memtrain.planner.ranges.smaller import fewer_sequences, shortened
from memtrain.planner.ranges.solve import SolveOptions, solve
from tests.planner.ranges.small import INT8, block, hop, place, problem, states, tensors, update

HERE = SolveOptions(gap=1e-4, seconds=20.0, isolated=False)


def test_nothing_fits_and_what_would_help() -> None:
    """Two blocks whose inputs of 10 bytes cannot be recomputed; A and O (50 bytes) come back in backward.

    On the device alone the second block's backward needs both inputs and 50 bytes: 70, of which there are 60.
    """
    one = problem(2, 60)
    plan = solve(one, dataclasses.replace(HERE, offered=(INT8,)))
    assert plan.status == "infeasible"
    assert plan.relaxations[0] == Relaxation(what="device", missing_bytes=10)
    assert plan.peaks[0].size_bytes == 70
    # Half of the sequence needs 35.
    assert plan.relaxations[-1] == Relaxation(what="sequence", share=0.5)
    # Compressed inputs of the first block: 6 bytes instead of 10 are not enough.
    assert [r.what for r in plan.relaxations] == ["device", "sequence"]
    # The second backward alone is too much: the first holds 60.
    assert plan.binding == (
        Binding(limit="device", position="backward layers.1", size_bytes=70, limit_bytes=60),
    )
    assert check(plan, one) == []


def test_a_codec_that_would_help_is_named() -> None:
    """Both inputs compressed are 6 bytes each; the second's 10 are restored beside 50: 72, one is 66."""
    mild = dataclasses.replace(INT8, places=())
    plan = solve(problem(2, 66), dataclasses.replace(HERE, offered=(mild,)))
    assert [r.what for r in plan.relaxations] == ["device", "codec int8", "sequence"]
    allowed = problem(2, 66, codecs=(mild,), error_budget=1.0)
    assert solve(allowed, HERE).peaks[0].size_bytes <= 66


def test_fewer_sequences_are_named() -> None:
    """Four sequences of 1, 1 and 4 bytes a chunk of the usual 5, 5 and 20, rounded up: three fit into 60.

    Two blocks with X of 2 * 4, A of 2 * 4 and O of 2 * 15 bytes: 8 + 8 + 38 are 54.
    """
    plan = solve(problem(2, 60, sequences=4), HERE)
    assert Relaxation(what="batch", share=0.75) in plan.relaxations
    assert solve(fewer_sequences(problem(2, 60, sequences=4), 3), HERE).peaks[0].size_bytes <= 60


def test_limits_that_no_device_can_mend() -> None:
    """State of 32 bytes of which 24 may lie on NVMe alone, where 20 may be written; and it holds 22."""
    held = states(("device",), ("device",), ("nvme",), pieces=4)
    pcie = hop("pcie")
    one = problem(
        1,
        1000,
        place("host", 1000, pcie),
        place("nvme", 22, pcie, hop("nvme"), write_limit_bytes=20),
        blocks=(block(0, classes=(), states=held, pieces=4),),
        staging="host",
        updates=(update("device", "ahead"),),
    )
    plan = solve(one, HERE)
    assert plan.status == "infeasible"
    # No one change is enough: NVMe lacks 2 bytes and writes 4 too many.
    assert plan.relaxations == ()
    assert plan.binding == (
        Binding(limit="nvme", position="step", size_bytes=24, limit_bytes=22),
        Binding(limit="bytes written to nvme", position="step", size_bytes=24, limit_bytes=20),
    )
    assert sum(entry.pieces for entry in plan.blocks[0].held) == 12
    places = (one.machine.places[0], dataclasses.replace(one.machine.places[1], capacity_bytes=24))
    roomy = dataclasses.replace(one, machine=dataclasses.replace(one.machine, places=places))
    assert solve(roomy, HERE).relaxations == (Relaxation(what="bytes written to nvme", missing_bytes=4),)


def test_more_of_one_place_is_named_where_it_is_enough() -> None:
    """A host of 5 bytes takes one chunk of the first block's input; 10 would take both."""
    one = problem(2, 60, place("host", 5), slots=1)
    plan = solve(one, HERE)
    assert plan.status == "infeasible"
    found = {r.what: r.missing_bytes for r in plan.relaxations if r.missing_bytes}
    roomier = {
        "device": dataclasses.replace(one.machine, device_capacity_bytes=60 + found["device"]),
        "host": dataclasses.replace(
            one.machine,
            places=tuple(
                dataclasses.replace(p, capacity_bytes=5 + found.get("host", 0)) for p in one.machine.places
            ),
        ),
    }
    for what in found:
        fits = dataclasses.replace(one, machine=roomier[what])
        assert solve(fits, HERE).status == "optimal"


def one_block(**changes: float) -> Problem:
    classes = (*tensors(again=(0.5, 1.5)), TensorClass(name="W", chunk_bytes=7, recompute_seconds=(1.0,)))
    return problem(1, 100, blocks=(block(0, classes=classes, forward_transient_bytes=9, **changes),))


def only(one: Problem) -> Block:
    (found,) = one.blocks
    return found


def test_a_shorter_sequence_is_cheaper_where_attention_is() -> None:
    """Attention is 2 of forward's 4 s, a quarter of it in the first half of the sequence; the rest halves."""
    half = only(shortened(one_block(), 1, 2))
    assert [t.total_bytes for t in half.classes] == [5, 5, 20, 4]
    assert [t.recompute_seconds for t in half.classes] == [(), (0.5,), (1.0,), (0.5,)]
    assert half.forward_transient_bytes == 5
    assert half.forward_seconds == 0.5 + 1.0
    # The same share of backward: 4 s of attention, of which 1 is left, and 2 of the other 4.
    assert half.backward_seconds == 1.0 + 2.0


def test_fewer_sequences_scale_everything() -> None:
    one = dataclasses.replace(one_block(), sequences=2)
    half = only(fewer_sequences(one, 1))
    assert [t.chunk_bytes for t in half.classes] == [3, 3, 10, 4]
    assert [t.chunks for t in half.classes] == [2, 2, 2, 1]
    assert half.classes[1].recompute_seconds == (0.25, 0.75)
    assert (half.forward_seconds, half.backward_seconds) == (2.0, 4.0)


def test_nothing_helps_where_state_alone_is_too_much() -> None:
    """Ten bytes hold not even one chunk of each class beside what it restores."""
    assert [r.what for r in solve(problem(1, 10), HERE).relaxations] == ["device"]


@pytest.mark.parametrize("count", [0, -1])
def test_a_micro_batch_has_sequences(count: int) -> None:
    with pytest.raises(ValueError, match="sequences must be >= 1"):
        problem(1, 10, sequences=count)
