"""Latencies, and directions that share a link."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import Hop, Machine, Problem
from memtrain.planner.ranges.plan import make_plan
from memtrain.planner.ranges.simulate import simulate
from tests.planner.ranges.small import (
    block,
    hop,
    place,
    problem,
    problems,
    some_decisions,
    stateful_problems,
    states,
    update,
)
from tests.planner.ranges.test_simulate import HOST, decide, ends

SLOW = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
FIELDS = {"status": "heuristic", "lower_bound_seconds": 0.0, "gap": 1.0, "solver": "by hand"}


def test_every_chunk_that_moves_costs_a_latency() -> None:
    """X of block 0: two chunks of 5 bytes at 10 B/s and half a second each, both ways; kept, none."""
    slow = dataclasses.replace(hop("pcie"), latency_seconds=0.5)
    formulated = formulate(problem(2, 500, place("host", 500, slow)))
    both = ends(formulated, decide(formulated, {"X": {HOST: 2}}, {}))
    assert both["write layers.0", "write:pcie"] == (4.0, 6.0)
    assert both["read layers.0", "read:pcie"] == (18.0, 20.0)
    none = ends(formulated, decide(formulated, {}, {}))
    assert none["write layers.0", "write:pcie"] == (4.0, 4.0)
    assert simulate(formulated, decide(formulated, {}, {})).step_seconds == 24.0


def test_every_piece_of_state_costs_a_latency() -> None:
    """Two pieces of optimizer state, 24 bytes at 10 B/s: 2.4 s and twice half a second in, and out again."""
    slow = dataclasses.replace(hop("pcie"), latency_seconds=0.5)
    held = states(("device",), ("device",), ("host",), pieces=2)
    one = problem(
        1,
        500,
        place("host", 500, slow),
        blocks=(block(0, classes=(), states=held, pieces=2, device_update_seconds=1.0),),
        staging="host",
        updates=(update("device", "ahead"),),
    )
    formulated = formulate(one)
    found = ends(formulated, some_decisions(formulated, 0))
    assert found["read update layers.0", "read:pcie"] == pytest.approx((0.0, 3.4))
    assert found["write update layers.0", "write:pcie"] == pytest.approx((4.4, 7.8))


def shared(link: str, write: float, read: float, mixed: float) -> Hop:
    return dataclasses.replace(hop(link, write, read), mixed_bytes_per_second=mixed)


def streamed(mixed: float) -> Problem:
    """Optimizer state of four blocks through a link that moves 10 B/s either way; the device updates."""
    held = states(("device",), ("device",), ("host",), sizes=(4, 4, 20))
    times = {"forward_seconds": 0.5, "backward_seconds": 0.25}
    return problem(
        4,
        500,
        place("host", 500, shared("pcie", 10.0, 10.0, mixed)),
        blocks=tuple(block(i, classes=(), states=held, **times) for i in range(4)),
        staging="host",
        updates=(update("device", "ahead"),),
    )


def test_directions_of_a_link_with_state_share_what_it_moves() -> None:
    """20 bytes in and out for each of four blocks; 15 B/s both ways together are 7.5 each, 8/3 s for a block.

    Block after block comes in beside the one before on its way out: five times 8/3 s, 13.3. Alone the first
    way in and the last way out would take 2 s each, 12 s in all: 11 % too much is what the shares cost here.
    At 20 B/s, where the directions do not slow each other, it is five times 2 s.
    """
    assert streamed(15.0).rates() == {shared("pcie", 10.0, 10.0, 15.0): (7.5, 7.5)}
    tight, free = (formulate(streamed(mixed)) for mixed in (15.0, 20.0))
    found = ends(tight, some_decisions(tight, 0))
    assert found["read update layers.0", "read:pcie"] == pytest.approx((0.0, 8 / 3))
    assert found["write update layers.0", "write:pcie"] == pytest.approx((8 / 3, 16 / 3))
    assert found["read update layers.1", "read:pcie"] == pytest.approx((8 / 3, 16 / 3))
    steps = [simulate(f, some_decisions(f, 0)).step_seconds for f in (tight, free)]
    assert steps == pytest.approx([5 * 8 / 3, 5 * 2.0])


def test_directions_of_a_link_with_tensors_alone_do_not() -> None:
    one = problem(3, 500, place("host", 500, shared("pcie", 10.0, 10.0, 10.0)))
    assert one.two_way_links == frozenset()
    formulated = formulate(one)
    found = ends(formulated, decide(formulated, {"X": {HOST: 2}}, {}, {}))
    assert found["write layers.0", "write:pcie"] == (4.0, 5.0)


def test_a_link_that_is_first_and_second_hop_goes_both_ways() -> None:
    switch = shared("switch", 10.0, 10.0, 12.0)
    places = (place("host", 500, switch), place("nvme", 500, hop("pcie"), switch))
    one = problem(2, 500, *places, staging="host")
    assert one.two_way_links == {"switch"}
    assert one.rates()[switch] == (6.0, 6.0)


def test_hops_of_one_link_share_it() -> None:
    """The bus moves 20 out and 10 in, 24 together: 16 and 8. Behind it an expander of 8 and 8, 12 together:
    6 and 6; one that reads as it writes is held to the bus's share of reads, 8."""
    bus, slow, even = (
        shared("pcie", 20.0, 10.0, 24.0),
        shared("pcie", 8.0, 8.0, 12.0),
        shared("pcie", 10.0, 10.0, 20.0),
    )
    places = (place("host", 1, bus), place("cxl0", 1, slow), place("cxl1", 1, even))
    machine = Machine(device_capacity_bytes=1, places=places, staging="host")
    blocks = (block(0, states=states(("host", "cxl0", "cxl1"), ("host",), ("host",))),)
    assert Problem(blocks=blocks, machine=machine).rates() == {
        bus: (16.0, 8.0),
        slow: (6.0, 6.0),
        even: (10.0, 8.0),
    }


@SLOW
@given(problems(), st.integers(0, 10**6))
def test_tensors_never_use_both_ways_at_once(one: Problem, seed: int) -> None:
    """Why a link without state keeps the full bandwidth of each direction."""
    formulated = formulate(one)
    events = simulate(formulated, some_decisions(formulated, seed)).events
    busy = [e for e in events if e.end_seconds > e.start_seconds]
    for link in one.machine.links:
        reads = [e for e in busy if e.resource == f"read:{link}"]
        for out in (e for e in busy if e.resource == f"write:{link}"):
            for back in reads:
                assert out.end_seconds <= back.start_seconds or back.end_seconds <= out.start_seconds


@SLOW
@given(stateful_problems(), st.integers(0, 10**6), st.sampled_from([0.6, 1.0, 1.9]))
def test_never_more_than_a_link_can_move(one: Problem, seed: int, factor: float) -> None:
    """The checker, which adds up what both directions move at once, finds nothing."""

    def limited(way: Hop) -> Hop:
        most = factor * max(way.write_bytes_per_second, way.read_bytes_per_second)
        return dataclasses.replace(way, mixed_bytes_per_second=most)

    places = tuple(dataclasses.replace(p, hops=tuple(map(limited, p.hops))) for p in one.machine.places)
    tight = dataclasses.replace(one, machine=dataclasses.replace(one.machine, places=places))
    formulated = formulate(tight)
    decisions = some_decisions(formulated, seed)
    plan = make_plan(formulated, decisions, **FIELDS)
    assert check(plan, tight) == []
    # No more is lost than one direction alone could have been faster.
    roomy = simulate(formulate(one), decisions).step_seconds
    assert roomy <= plan.step_seconds + 1e-6
    assert plan.step_seconds <= roomy * max(1.0, 2 / factor) + 1e-6


def test_links_are_validated() -> None:
    with pytest.raises(ValueError, match="mixed_bytes_per_second must be finite and > 0, or None, got 0"):
        shared("pcie", 10.0, 5.0, 0.0)
    with pytest.raises(ValueError, match="latency_seconds must be finite and >= 0, got -1"):
        dataclasses.replace(hop("pcie"), latency_seconds=-1.0)
