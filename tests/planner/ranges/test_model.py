"""Words of a problem: what contradicts itself is refused, with field, value and limit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from memtrain.planner.ranges.model import (
    DEVICE,
    Role,
    StateClass,
    TensorClass,
    causal_attention_seconds,
    even_seconds,
)
from tests.planner.ranges.small import INT8, block, hop, place, problem, tensors

REFUSED: dict[str, Callable[[], Any]] = {
    "two classes share a name": lambda: block(classes=(*tensors()[:1], *tensors()[:1])),
    "forward_seconds must be finite and >= 0, got nan": lambda: block(forward_seconds=math.nan),
    "backward_transient_bytes must be >= 0, got -1": lambda: block(backward_transient_bytes=-1),
    "pieces must be >= 1, got 0": lambda: block(pieces=0),
    "which do not stand before it": lambda: block(classes=tensors()[1:]),
    "recompute_seconds must be >= 0 and never fall": lambda: TensorClass(
        name="A", chunk_bytes=1, chunks=2, recompute_seconds=(2.0, 1.0)
    ),
    "1 recompute_seconds for 2 chunks": lambda: TensorClass(
        name="A", chunk_bytes=1, chunks=2, recompute_seconds=(2.0,)
    ),
    "at least one place, got 1 and ": lambda: StateClass(
        name="w", role=Role.PARAMETER, piece_bytes=1, places=()
    ),
    r"\['layers.0'\] stand there twice": lambda: problem(1, 1, blocks=(block(0), block(0))),
    "names places beyond": lambda: problem(
        1,
        1,
        blocks=(block(states=(StateClass(name="w", role=Role.PARAMETER, piece_bytes=1, places=("tape",)),)),),
    ),
    "codec int8 names places beyond": lambda: problem(1, 1, codecs=(INT8,)),
    "ratio must lie between 0 and 1, got 1.5": lambda: dataclasses.replace(INT8, ratio=1.5),
    "compress_bytes_per_second must be finite and > 0, got inf": lambda: dataclasses.replace(
        INT8, compress_bytes_per_second=math.inf
    ),
    "needs a name other than 'device'": lambda: place(DEVICE),
    "one hop or two lead to a place, got 3": lambda: place("far", 1, hop("a"), hop("b"), hop("c")),
    "both hops use link a": lambda: place("far", 1, hop("a"), hop("a")),
    "a way of two hops needs a staging place": lambda: problem(1, 1, place("far", 1, hop("a"), hop("b"))),
    "slots and forwarding_slots must be >= 1, got 0 and 2": lambda: problem(1, 1, place("host"), slots=0),
    "staging must name a place one hop away, got 'tape'": lambda: problem(1, 1, staging="tape"),
    "two places share a name": lambda: problem(1, 1, place("host"), place("host")),
    "device_capacity_bytes must be >= 0, got -1": lambda: problem(1, -1),
    "reserved_bytes and error_budget must be >= 0, got -1 and 0.0": lambda: problem(1, 1, reserved_bytes=-1),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_contradicts_itself_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        REFUSED[words]()


def test_seconds_of_attention_by_chunk() -> None:
    """Of four chunks the first costs 1 of 16 parts, the last 7; keys and values are even."""
    assert causal_attention_seconds(16.0, 4.0, 4) == (2.0, 4.0, 6.0, 8.0)
    assert even_seconds(6.0, 4) == (1.5, 1.5, 1.5, 1.5)


def test_what_a_problem_sums_up() -> None:
    one = problem(2, 1, micro_batches=3)
    assert one.saved_bytes == 2 * 60
    assert one.compute_seconds == 3 * 2 * 12.0
    with pytest.raises(KeyError, match=r"no place 'tape'; there are \['host'\]"):
        problem(1, 1, place("host")).machine.place("tape")
