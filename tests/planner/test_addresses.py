"""``pack``: certificates, units, parts, limits; against brute force and on instances of known optimum."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks._rectangles import cut_rectangle
from memtrain.planner.addresses import Packing, PackingStatus, pack
from memtrain.planner.buffers import Buffer
from memtrain.planner.check_addresses import check_addresses
from tests.planner.packings import Span, load, lowest, named, spans

CONFLICT = named(
    [(0, 2, 2), (3, 6, 2), (4, 6, 4), (1, 4, 3), (2, 4, 1), (2, 3, 1), (1, 3, 1), (0, 1, 2), (0, 1, 2)]
)
"""Load 6, optimum 7."""


def sound(buffers: Sequence[Buffer], packing: Packing, alignment: int = 1) -> bool:
    return check_addresses(buffers, packing.offsets, capacity=packing.height, alignment=alignment) == ()


def test_three_buffers_by_hand() -> None:
    buffers = [Buffer("a", 0, 2, 300), Buffer("b", 1, 3, 100), Buffer("c", 2, 4, 200)]
    packing = pack(buffers, time_limit_seconds=1)
    # a and b live at once, then b and c: c takes a's place.
    assert packing.offsets == {"a": 0, "b": 300, "c": 0}
    assert (packing.height, packing.load, packing.lower_bound) == (400, 400, 400)
    assert packing.status is PackingStatus.OPTIMAL
    assert packing.fragmentation == 0.0


def test_alignment_is_in_the_sizes() -> None:
    buffers = [Buffer("a", 0, 2, 300), Buffer("b", 1, 3, 100), Buffer("c", 2, 4, 200)]
    packing = pack(buffers, time_limit_seconds=1, alignment=256)
    assert packing.offsets == {"a": 0, "b": 512, "c": 0}
    assert (packing.height, packing.load) == (768, 768)


def test_capacity_below_above_and_at_the_optimum() -> None:
    infeasible = pack(CONFLICT, 6, time_limit_seconds=5)
    assert infeasible.status is PackingStatus.INFEASIBLE
    assert (infeasible.load, infeasible.lower_bound) == (6, 7)
    assert sound(CONFLICT, infeasible)
    exact = pack(CONFLICT, 7, time_limit_seconds=5)
    assert (exact.status, exact.height) == (PackingStatus.FITS, 7)
    lowest_one = pack(CONFLICT, time_limit_seconds=5)
    assert (lowest_one.status, lowest_one.height, lowest_one.lower_bound) == (PackingStatus.OPTIMAL, 7, 7)
    assert lowest_one.fragmentation == pytest.approx(1 / 6)


def test_a_capacity_below_the_load_needs_no_search() -> None:
    packing = pack(named([(0, 2, 4), (1, 3, 4)]), 7, time_limit_seconds=0)
    assert (packing.status, packing.height, packing.lower_bound) == (PackingStatus.INFEASIBLE, 8, 8)


def test_without_time_there_is_still_a_packing() -> None:
    buffers = cut_rectangle(60, 3, 1 << 20, 1 << 20)
    packing = pack(buffers, time_limit_seconds=0)
    assert packing.status is PackingStatus.HEURISTIC
    assert packing.height > packing.load == 1 << 20
    assert sound(buffers, packing)


def test_nothing_needs_nothing() -> None:
    packing = pack([], 0, time_limit_seconds=1)
    assert (packing.offsets, packing.height, packing.fragmentation) == ({}, 0, 0.0)
    assert packing.status is PackingStatus.OPTIMAL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alignment": 0}, "alignment is 0 bytes; it must be at least 1"),
        ({"capacity": -1}, "capacity is -1 bytes; it cannot be negative"),
        ({"time_limit_seconds": -1.0}, r"time_limit_seconds is -1\.0; it cannot be negative"),
        ({"time_limit_seconds": float("nan")}, "time_limit_seconds is nan"),
    ],
)
def test_senseless_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(CONFLICT, **{"time_limit_seconds": 1.0, **arguments})


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="2 buffers are called 'a'"):
        pack([Buffer("a", 0, 1, 1), Buffer("b", 0, 1, 1), Buffer("a", 1, 2, 1)], time_limit_seconds=1)


def test_parts_share_the_time_and_only_the_highest_counts() -> None:
    # Two conflicts after one another, and a lone buffer of 7: its height is the load, so nothing is searched.
    later = [Buffer(f"later {b.name}", b.start + 10, b.end + 10, b.size) for b in CONFLICT]
    lone = Buffer("lone", 20, 21, 7)
    packing = pack([*CONFLICT, *later, lone], time_limit_seconds=5)
    assert (packing.height, packing.load, packing.status) == (7, 7, PackingStatus.OPTIMAL)
    both = pack([*CONFLICT, *later], time_limit_seconds=5)
    assert (both.height, both.load, both.lower_bound) == (7, 6, 7)
    assert both.status is PackingStatus.OPTIMAL


@settings(max_examples=150, deadline=None)
@given(spans(6), st.integers(0, 3))
def test_the_optimum_of_tiny_instances(items: list[Span], over: int) -> None:
    buffers, optimum = named(items), lowest(items)
    packing = pack(buffers, time_limit_seconds=5)
    assert (packing.height, packing.status) == (optimum, PackingStatus.OPTIMAL)
    assert sound(buffers, packing)
    roomy = pack(buffers, optimum + over, time_limit_seconds=5)
    assert roomy.height <= optimum + over
    assert roomy.status in (PackingStatus.OPTIMAL, PackingStatus.FITS)
    assert pack(buffers, optimum - 1, time_limit_seconds=5).status is PackingStatus.INFEASIBLE


@settings(max_examples=60, deadline=None)
@given(spans(25, times=20, sizes=4000), st.sampled_from([1, 3, 64, 512]))
def test_never_an_overlap_never_below_the_load(items: list[Span], alignment: int) -> None:
    buffers = named(items)
    packing = pack(buffers, time_limit_seconds=0.05, alignment=alignment)
    assert sound(buffers, packing, alignment)
    assert packing.height >= packing.lower_bound >= packing.load
    rounded = [(start, end, -(-size // alignment) * alignment) for start, end, size in items]
    assert packing.load == load(rounded)
    assert (packing.status is PackingStatus.OPTIMAL) == (packing.height == packing.lower_bound)


def test_zero_slack_is_packed_to_the_bound() -> None:
    for seed in range(4):
        buffers = cut_rectangle(50, seed, 1 << 20, 1 << 20)
        packing = pack(buffers, time_limit_seconds=10)
        assert (packing.height, packing.status) == (1 << 20, PackingStatus.OPTIMAL)
        assert sound(buffers, packing)


def test_same_arguments_same_addresses() -> None:
    buffers = cut_rectangle(50, 7, 25, 1000)
    first = pack(buffers, 1000, time_limit_seconds=30, seed=3)
    assert first.height == 1000
    assert pack(buffers, 1000, time_limit_seconds=30, seed=3) == first
    assert list(first.offsets) == [b.name for b in buffers]
