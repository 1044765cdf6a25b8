"""Plans in vertical order: all micro-batches of a step pass a block before the next block's weights come.

The program (``program``) speaks of micro-batches one after the other. In vertical order plans are found by
the searches without a solver, judged by bill and simulator as ever, and bounded by the arithmetic alone. They
begin with the plan for the horizontal order, where there is one, and with all that its search begins with.
"""

from __future__ import annotations

import dataclasses
import time

from memtrain.planner import baselines
from memtrain.planner.actions import MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.bounding import Bound, compute_seconds
from memtrain.planner.homing import bring_home
from memtrain.planner.price import NONE
from memtrain.planner.weight_windows import DEFAULT_WINDOWS, is_away, wanted_of

FEWEST_SECONDS = 1.0
"""What the search in the other order is given at least, where the first has used up its time."""


class OrderError(ValueError):
    """Vertical order was asked for where it cannot be, or for nothing; the message names the remedy."""


def refuse_pointless(search: baselines.Search) -> None:
    """Raises OrderError where vertical order is asked for with nothing to order, or nothing to gain."""
    if search.profile.micro_batches == 1:
        raise OrderError(
            "micro_batch_order is vertical, but a step has 1 micro-batch: raise micro_batches "
            "(accumulation), or leave the order away"
        )
    if not _may_stream(search):
        raise OrderError(
            "micro_batch_order is vertical, but no weights may leave the device, and it would only take "
            "memory: give a tier for them (nvme, or host beside a GPU), or leave the order away"
        )


def _may_stream(search: baselines.Search) -> bool:
    return any(tier is not Tier.DEVICE for tiers in search.space.weights for tier in tiers)


def search_vertical(search: baselines.Search, deadline: float) -> Bound:
    """Let the searches without a solver find the best plan until ``deadline`` (monotonic)."""
    search.deadline = deadline
    baselines.uniform(search)
    baselines.greedy(search)
    bring_home(search)
    return Bound(seconds=compute_seconds(search), solver="heuristic, bounded by the arithmetic alone")


def faster_order(search: baselines.Search, bound: Bound) -> tuple[baselines.Search, Bound]:
    """The search whose plan is faster: ``search``, which has one, or one in vertical order. The latter is
    made only where the plan streams weights: otherwise it has nothing to gain. Updates in backward are those
    of one micro-batch after the other."""
    best = search.best
    assert best is not None
    schedules = tuple(s for s in search.space.schedules if s is not UpdateSchedule.IN_BACKWARD)
    if search.profile.micro_batches == 1 or not any(map(is_away, best.states)) or not schedules:
        return search, bound
    other = dataclasses.replace(
        search,
        space=dataclasses.replace(search.space, schedules=schedules),
        order=MicroBatchOrder.VERTICAL,
        best=None,
        best_cost=NONE,
        thrifty=None,
        thrifty_cost=NONE,
        simulations_left=baselines.MAX_SIMULATIONS,
        _seen={},
    )
    staging = best.staging
    knobs = (
        max(1, staging.saved_slots),
        max(1, staging.input_slots),
        wanted_of(staging.weight_windows) or DEFAULT_WINDOWS,
        staging.update_shard_elements,
        best.update_schedule if best.update_schedule in schedules else schedules[-1],
    )
    other.offer(other.build(best.blocks, best.states, knobs))
    left_seconds = max(FEWEST_SECONDS, search.deadline - time.monotonic())
    found = search_vertical(other, time.monotonic() + left_seconds)
    if other.thrifty_cost.priced_seconds >= search.thrifty_cost.priced_seconds:
        return search, bound
    return other, found
