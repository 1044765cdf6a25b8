"""What need not leave stays: the search's last step, for room that its plan has left.

The searches change one thing at a time and end after a number of simulations, and the program stops within
the gap of its bound. So a plan may send away what there is room for, where that is hidden behind arithmetic.
Here everything that has left comes back, or to a faster tier, one after the other as far as bytes allow, and
what comes of it is judged as any other plan.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterator
from typing import Any

from memtrain.planner.actions import Action, BlockDecision, StateDecision, Tier
from memtrain.planner.baselines import Blocks, Knobs, Search, States, knobs_of, least_knobs
from memtrain.planner.decisions import Decisions
from memtrain.planner.space import Space

FROM_FAST_TO_SLOW = (Tier.DEVICE, Tier.HOST, Tier.CXL, Tier.NVME)
STATE_FIELDS = ("weight_tier", "gradient_tier", "optimizer_tier")
"""What moves the most for a byte first: weights come for every pass, gradients are written and read, state is
read and written once."""
BLOCK_FIELDS = ("saved_tier", "rest_tier", "input_tier")
ONE_BY_ONE = 64
"""Single moves that are simulated, where all of them together are not better: a third of a second for 30
blocks."""
ROUNDS = 3
"""At most: what has come back may set windows or slots free, or change what is waited for."""
PART = 0.2
"""Of the time limit, what this may take when the searches have used it up: 80 blocks and eight micro-batches
took 23 s."""


def bring_home(search: Search) -> None:
    """Bring back what there is room for, of the plan to take, where the step takes no longer for it."""
    deadline = max(search.deadline, time.monotonic() + PART * search.options.time_limit_seconds)
    for _ in range(ROUNDS):
        start = search.thrifty
        if start is None or time.monotonic() > deadline:
            return
        for knobs in dict.fromkeys(
            [knobs_of(start, search.space), least_knobs(search, start.update_schedule)]
        ):
            search.offer(_brought(search, start, knobs, deadline))
        if search.thrifty is start:
            _one_by_one(search, deadline)
        if search.thrifty is start:
            return


def _one_by_one(search: Search, deadline: float) -> None:
    """Single moves of the plan to take, which may change meanwhile."""
    left = ONE_BY_ONE
    for field in (*STATE_FIELDS, *BLOCK_FIELDS):
        for index in range(_count(search, field)):
            for tier in FROM_FAST_TO_SLOW:
                now = search.thrifty
                assert now is not None
                moved = _moved(now, search.space, field, [index], tier)
                if moved is None:
                    continue
                candidate = search.build(*moved, knobs_of(now, search.space))
                if time.monotonic() > deadline:
                    return
                if not left:
                    return
                before = search.simulations_left
                search.offer(candidate)
                left -= before - search.simulations_left
                if search.thrifty is candidate:
                    break


def _brought(search: Search, start: Decisions, knobs: Knobs, deadline: float) -> Decisions:
    """``start`` with all that fits brought back, as far as time allows. All of a kind is tried first: that
    sets windows or slots free, which one after the other would not."""
    now = search.build(start.blocks, start.states, knobs)
    for field in (*STATE_FIELDS, *BLOCK_FIELDS):
        every = range(_count(search, field))
        for indices in (every, *([index] for index in every)):
            for tier in FROM_FAST_TO_SLOW:
                moved = _moved(now, search.space, field, indices, tier)
                if moved is None:
                    continue
                if time.monotonic() > deadline:
                    return now
                candidate = search.build(*moved, knobs)
                if not search.excess(candidate):
                    now = candidate
                    break
    return now


def _count(search: Search, field: str) -> int:
    return len(search.space.states if field in STATE_FIELDS else search.space.blocks)


def _faster(decisions: Decisions, field: str, index: int) -> Iterator[Tier]:
    """Tiers that are faster than where it is."""
    items = decisions.states if field in STATE_FIELDS else decisions.blocks
    yield from FROM_FAST_TO_SLOW[: FROM_FAST_TO_SLOW.index(getattr(items[index], field))]


def _moved(
    decisions: Decisions, space: Space, field: str, indices: Collection[int], tier: Tier
) -> tuple[Blocks, States] | None:
    """With what is in a slower one moved to ``tier``, where that is open; None where nothing changes."""
    blocks, states = list(decisions.blocks), list(decisions.states)
    for index in indices:
        if tier not in _faster(decisions, field, index):
            continue
        if field in STATE_FIELDS:
            states[index] = _state(states[index], space, index, field, tier)
        else:
            blocks[index] = _block(blocks[index], space, index, field, tier)
    changed = tuple(blocks), tuple(states)
    return None if changed == (decisions.blocks, decisions.states) else changed


def _state(now: StateDecision, space: Space, index: int, field: str, tier: Tier) -> StateDecision:
    moved = dataclasses.replace(now, **{field: tier})
    placed = dataclasses.replace(moved, weight_tier=Tier.DEVICE)  # weights are chosen beside the rest
    is_open = moved.weight_tier in space.weights[index] and placed in space.states[index]
    return moved if is_open else now


def _block(now: BlockDecision, space: Space, index: int, field: str, tier: Tier) -> BlockDecision:
    kept = now.action is Action.SWAP and tier is Tier.DEVICE
    changes: dict[str, Any] = {field: tier, "action": Action.KEEP if kept else now.action}
    moved = dataclasses.replace(now, **changes)
    return moved if moved in space.blocks[index] else now
