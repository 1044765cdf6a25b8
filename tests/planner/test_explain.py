from __future__ import annotations

import dataclasses

import pytest

from memtrain.planner.explain import decisions_of, explain, find_block
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import Problem
from memtrain.planner.ranges.plan import RangePlan, make_plan
from memtrain.planner.ranges.simulate import simulate
from memtrain.planner.ranges.solve import SolveOptions, solve
from tests.planner.ranges.small import INT8, block, place, problem, with_state_anywhere

HERE = SolveOptions(isolated=False, seconds=5.0)


def kept() -> tuple[Problem, RangePlan]:
    """Three blocks keep all they save: 60 bytes each, on a device of 185."""
    one = problem(3, 185, place("host", 100), slots=1)
    formulated = formulate(one)
    counts = {
        variable: 2
        for classes in formulated.choices.counts
        for chosen in classes
        for action, variable in chosen.items()
        if action.label == "keep"
    }
    plan = make_plan(
        formulated, formulated.decisions(counts), status="gap", lower_bound_seconds=0, gap=0, solver="hand"
    )
    return one, plan


def test_neighbours_are_simulated_one_by_one() -> None:
    one, plan = kept()
    found = explain(one, plan, "layers.1")
    assert (found.block, found.forward_seconds, found.backward_seconds) == ("layers.1", 4.0, 8.0)
    attention = next(report for report in found.classes if report.tensor == "A")
    assert attention.planned == (("keep", 2),)
    added = {(n.action_after, n.chunks): round(n.added_seconds, 9) for n in attention.neighbours}
    # A chunk of attention costs 1 s the first and 3 s the second. A swapped one takes half a second each way,
    # and with one slot the next forward waits for its write, and its own backward for its read.
    assert added == {
        ("recompute", 1): 1.0,
        ("recompute", 2): 4.0,
        ("swap:host", 1): 1.0,
        ("swap:host", 2): 2.0,
    }
    swapped = next(n for n in attention.neighbours if n.action_after == "swap:host" and n.chunks == 2)
    # 10 bytes leave and 10 of a slot come: the device holds what it held.
    assert swapped.broken == ()


def test_costs_by_themselves() -> None:
    one, plan = kept()
    (report,) = [r for r in explain(one, plan, "1").classes if r.tensor == "O"]
    costs = {cost.action: cost for cost in report.costs}
    assert costs["recompute"].arithmetic_seconds == 2.0
    assert costs["recompute"].device_bytes == 0
    assert costs["swap:host"].transfer_seconds == (("write:host", 4.0), ("read:host", 4.0))
    assert costs["keep"].device_bytes == 40


def test_compression_costs_both_ways() -> None:
    one, plan = kept()
    lossy = dataclasses.replace(one, codecs=(INT8,), error_budget=1.0)
    (report, *_) = explain(lossy, plan, "0").classes
    cost = next(c for c in report.costs if c.action == "compress:int8")
    both = 10 / INT8.compress_bytes_per_second + 10 / INT8.decompress_bytes_per_second
    assert cost.arithmetic_seconds == pytest.approx(both)
    assert cost.device_bytes == 2 * INT8.size(5)


def test_a_full_place_binds_and_a_change_that_does_not_fit_says_why() -> None:
    one, plan = kept()
    # 180 bytes are kept; the largest class of a block takes 40.
    room = dataclasses.replace(one, machine=dataclasses.replace(one.machine, device_capacity_bytes=220))
    assert explain(room, plan, "layers.0").binding == ()
    tight = dataclasses.replace(one, machine=dataclasses.replace(one.machine, device_capacity_bytes=180))
    full = explain(tight, plan, "layers.0")
    assert [(b.place, b.size_bytes) for b in full.binding] == [("device", 180)]
    inputs = next(report for report in full.classes if report.tensor == "X")
    away = next(n for n in inputs.neighbours if n.action_after == "swap:host" and n.chunks == 1)
    # Five bytes leave, and the slot for them takes five: nothing is broken. Recompute needs room to work in.
    assert away.broken == ()
    again = next(n for n in full.classes[2].neighbours if n.action_after == "recompute" and n.chunks == 2)
    assert all(name.endswith("on device") for name, _ in again.broken)


def test_state_is_explained_by_place() -> None:
    one = with_state_anywhere()
    plan = solve(one, HERE)
    found = explain(one, plan, one.blocks[0].name)
    assert {report.state for report in found.states} <= {s.name for s in one.blocks[0].states}
    assert found.states
    for report in found.states:
        planned = dict(report.planned)
        for change in report.neighbours:
            assert change.chunks in (1, planned[change.action_before])
            assert change.step_seconds == pytest.approx(plan.step_seconds + change.added_seconds, abs=1e-6)


def test_decisions_are_read_back() -> None:
    one = with_state_anywhere()
    plan = solve(one, HERE)
    formulated = formulate(one)
    assert simulate(formulated, decisions_of(formulated, plan)).step_seconds == pytest.approx(
        plan.step_seconds
    )


def test_waits_are_what_the_device_stands_idle() -> None:
    one, plan = kept()
    assert explain(one, plan, "layers.2").waits == (("forward", 0.0), ("backward", 0.0))


def test_blocks_by_name_number_and_end() -> None:
    one = problem(2, 100, blocks=(block(0, name="model.layers.0"), block(1, name="model.layers.1")))
    assert [find_block(one, text) for text in ("model.layers.1", "layers.1", "1")] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"'7' is no block of this plan: its blocks are \S+\.0, \S+\.1$"):
        find_block(one, "7")
