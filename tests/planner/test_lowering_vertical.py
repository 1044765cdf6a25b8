"""The step in vertical order as a problem: by hand from a toy job, and beside the plan of a recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from memtrain.planner.actions import MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.estimate import EstimatedBlock, EstimatedUnit
from memtrain.planner.forecast import make_forecast
from memtrain.planner.job import Job
from memtrain.planner.lowering import problem_of
from memtrain.planner.lowering.vertical import stacked
from memtrain.planner.parallel import Degrees
from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.model import DEVICE, Problem, Role
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planner.ranges.solve import SolveOptions, solve
from memtrain.planner.weight_windows import WantedWindows, step_turns, weight_windows
from tests.planner.test_weight_windows import everybody, states_of, weighty
from tests.planner.toy_job import ESTIMATE, RESIDUAL, SHAPE, job, parameter

VERTICAL, HORIZONTAL = MicroBatchOrder.VERTICAL, MicroBatchOrder.HORIZONTAL
DEPTH = 6


def deep(**changes: Any) -> Job:
    """Six blocks of the toy's."""
    units = [
        EstimatedUnit(name=f"layers.{i}", block=i, parameters=(parameter(f"w.{i}", 16, 100),))
        for i in range(DEPTH)
    ]
    estimate = dataclasses.replace(
        ESTIMATE,
        blocks=tuple(EstimatedBlock(name=f"layers.{i}", part=0) for i in range(DEPTH)),
        units=(ESTIMATE.units[0], *units, ESTIMATE.units[-1]),
    )
    return job(estimate=estimate, shape=dataclasses.replace(SHAPE, layers=DEPTH), **changes)


def test_a_block_works_for_all_micro_batches_and_holds_the_others_at_its_edge() -> None:
    one = problem_of(job(micro_batches=3))
    all_three = problem_of(job(micro_batches=3, micro_batch_order=VERTICAL))
    assert all_three.micro_batches == 1
    assert all_three.compute_seconds == pytest.approx(one.compute_seconds)
    assert all_three.saved_bytes == 3 * one.saved_bytes
    for before, block in zip(one.blocks, all_three.blocks, strict=True):
        assert block.forward_seconds == 3 * before.forward_seconds
        assert block.backward_seconds == 3 * before.backward_seconds
        assert block.forward_transient_bytes == before.forward_transient_bytes + 2 * RESIDUAL
        assert block.backward_transient_bytes == before.backward_transient_bytes + 2 * RESIDUAL
        assert block.states == before.states
        assert block.device_update_seconds == before.device_update_seconds
        for tensor, other in zip(before.classes, block.classes, strict=True):
            assert (other.chunks, other.chunk_bytes) == (tensor.chunks, 3 * tensor.chunk_bytes)
            assert other.recompute_seconds == tuple(3 * s for s in tensor.recompute_seconds)
    # The prologue's saved tensor, 64 tokens of 8 bf16, is there for each.
    assert all_three.reserved_bytes - one.reserved_bytes == 2 * RESIDUAL
    assert {update.ahead for update in all_three.updates} == {True}


def test_a_pipeline_has_an_order_of_its_own() -> None:
    problem = problem_of(job(micro_batches=2))
    with pytest.raises(ValueError, match="a pipeline has an order of its own"):
        stacked(dataclasses.replace(problem, in_flight=2))


def weights_away(problem: Problem) -> RangePlan:
    """Nothing else leaves the device."""

    def placed(states: Any) -> Any:
        return tuple(
            dataclasses.replace(s, places=("host",) if s.role is Role.PARAMETER else (DEVICE,))
            for s in states
        )

    blocks = tuple(dataclasses.replace(b, states=placed(b.states)) for b in problem.blocks)
    updates = tuple(update for update in problem.updates if update.ahead and not update.on_cpu)
    forced = dataclasses.replace(problem, blocks=blocks, updates=updates)
    plan = solve(forced, SolveOptions(seconds=4.0, gap=0.05))
    assert not check(plan, forced)
    return plan


def test_weights_are_read_as_in_a_step_of_one_micro_batch_by_the_command_and_by_a_recipe() -> None:
    one = weights_away(problem_of(deep())).moved_bytes
    assert weights_away(problem_of(deep(micro_batches=4, micro_batch_order=VERTICAL))).moved_bytes == one
    assert weights_away(problem_of(deep(micro_batches=4))).moved_bytes > 2 * one
    # The planner of recipes: reads of the turns of a step, with two windows.
    profile = weighty(DEPTH)
    four = dataclasses.replace(profile, micro_batches=4)

    def reads(of: Any, order: MicroBatchOrder) -> int:
        states = states_of(of, everybody)
        windows = weight_windows(of, states, WantedWindows(2, sized=False))
        turns = step_turns(of, states, UpdateSchedule.AHEAD, windows, order)
        return sum(len(turn.reads) for turn in turns)

    assert reads(four, VERTICAL) == reads(profile, HORIZONTAL)
    assert reads(four, HORIZONTAL) > 2 * reads(profile, HORIZONTAL)


def test_an_open_order_is_the_horizontal_one_where_weights_stay() -> None:
    options = SolveOptions(seconds=4.0, gap=0.02)
    free = make_forecast(deep(micro_batches=4, micro_batch_order=None), options)
    assert free.job.micro_batch_order is HORIZONTAL  # no weights leave so large a device


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"micro_batch_order": VERTICAL}, "vertical, with 1 micro-batches on 1 GPUs"),
        (
            {"micro_batch_order": VERTICAL, "micro_batches": 2, "degrees": Degrees(data=2)},
            "vertical, with 2 micro-batches on 2 GPUs",
        ),
        ({"update_schedule": UpdateSchedule.IN_BACKWARD}, "clipped by their global norm"),
        (
            {"update_schedule": UpdateSchedule.IN_BACKWARD, "clipping": False, "micro_batches": 2},
            "added up over 2 micro-batches",
        ),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**fields)


@pytest.mark.parametrize(
    ("schedule", "ahead"),
    [
        (None, {True, False}),
        (UpdateSchedule.SEQUENTIAL, {True}),
        (UpdateSchedule.AHEAD, {True}),
        (UpdateSchedule.IN_BACKWARD, {False}),
    ],
)
def test_an_update_comes_when_it_was_asked_for(schedule: UpdateSchedule | None, ahead: set[bool]) -> None:
    problem = problem_of(job(clipping=False, update_schedule=schedule))
    assert {update.ahead for update in problem.updates} == ahead
    assert Tier.HOST.value in {place.name for place in problem.machine.places}
