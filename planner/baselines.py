"""Plans found without a solver: the uniform ones, and a greedy search around the best of them.

They are computed first and always kept, so that a solver that runs out of time costs nothing but the bound.
Everything is judged by the simulator and the bill, never by a surrogate; the number of simulations is
bounded by a count, not by the clock, so that the same inputs give the same plan.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from memtrain.planner.actions import (
    Action,
    BlockDecision,
    MicroBatchOrder,
    StateDecision,
    Tier,
    UpdateSchedule,
)
from memtrain.planner.bill import tier_peaks
from memtrain.planner.block_parts import is_cut, plan_error
from memtrain.planner.bookkeeping import least_shard
from memtrain.planner.decisions import (
    SLOT_COUNTS,
    Decisions,
    PlannerOptions,
    Space,
    staging_for,
)
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.price import NONE, Cost, cost_of
from memtrain.planner.profile import ModelProfile
from memtrain.planner.simulate import simulate
from memtrain.planner.weight_windows import (
    DEFAULT_WINDOWS,
    FEWEST_WINDOWS,
    WANTED_WINDOWS,
    WantedWindows,
    wanted_of,
)

Blocks = tuple[BlockDecision, ...]
States = tuple[StateDecision, ...]
Knobs = tuple[int, int, WantedWindows, int, UpdateSchedule]
"""saved_slots, input_slots, windows, shard_elements, schedule."""

MAX_TOGETHER = 1000
"""Several changes at once are tried only where they are few: a model of a handful of blocks."""
PLACES = 4
"""Blocks with one decision of which each change is tried: first, last and two between. Every block of 30 used
up the simulations in the first rounds, and plans were up to 0.8 % slower."""
MAX_SIMULATIONS = 600
"""A simulation of 30 blocks and two micro-batches takes 5 ms: three seconds at most."""


ROUNDING = 1e-9
"""Of an error, which is a sum of fractions."""


@dataclass(slots=True)
class Search:
    """What is being planned, and the best choice so far."""

    profile: ModelProfile
    machine: Machine
    budget: Budget
    options: PlannerOptions
    space: Space
    order: MicroBatchOrder = MicroBatchOrder.HORIZONTAL
    best: Decisions | None = None
    """The fastest, from which the search goes on."""
    best_cost: Cost = NONE
    thrifty: Decisions | None = None
    """Takes hardly longer, and moves less, where it is another one (``price``)."""
    thrifty_cost: Cost = NONE
    simulations_left: int = MAX_SIMULATIONS
    deadline: float = float("inf")
    """Monotonic time at which the search stops, on a machine too busy for its count of simulations."""
    _seen: dict[Decisions, Cost] = field(default_factory=dict)

    def excess(self, decisions: Decisions) -> dict[Tier, int]:
        """Bytes above capacity, of the tiers that are overfull; the device also by what preparing took."""
        peaks = tier_peaks(self.profile, decisions, self.space.billed_tiers, self.options.safety_margin)
        peaks[Tier.DEVICE] = max(peaks[Tier.DEVICE], self.profile.prepare_peak_bytes)
        over = {tier: peak - self.budget.capacity(tier) for tier, peak in peaks.items()}
        return {tier: size for tier, size in over.items() if size > 0}

    def excess_error(self, decisions: Decisions) -> float:
        """By how much the chosen forms lose more than the error budget; 0 where they do not."""
        budget = self.options.error_budget
        if budget is None:
            return 0.0
        return max(0.0, plan_error(self.profile.blocks, decisions.blocks) - budget - ROUNDING)

    def build(self, blocks: Blocks, states: States, knobs: Knobs) -> Decisions:
        """A complete choice, with the staging it needs."""
        saved_slots, input_slots, windows, shard, schedule = knobs
        staging = staging_for(
            self.profile,
            blocks,
            states,
            saved_slots=saved_slots,
            input_slots=input_slots,
            shard_elements=shard,
            on_cpu=self.space.on_cpu,
            coded=self.space.coded,
            coded_weights=self.space.coded_weights,
            wanted_windows=windows,
            schedule=schedule,
            held_passes=self.profile.micro_batches if self.order is MicroBatchOrder.VERTICAL else 1,
            overlay=self.space.overlay,
        )
        return Decisions(
            blocks=blocks,
            states=states,
            staging=staging,
            update_schedule=schedule,
            staging_tier=self.space.staging_tier,
            micro_batch_order=self.order,
        )

    def cost(self, decisions: Decisions) -> Cost:
        """Predicted seconds, and what traffic counts beside them."""
        if decisions not in self._seen:
            timeline = simulate(self.profile, self.machine, decisions)
            self._seen[decisions] = cost_of(
                timeline.step_seconds, timeline.bytes_moved, timeline.traffic_seconds, self.options.gap
            )
            self.simulations_left -= 1
        return self._seen[decisions]

    def offer(self, decisions: Decisions) -> bool:
        """Take ``decisions`` if they fit, lose no more than is allowed, and are better; says whether."""
        if self.excess(decisions) or self.excess_error(decisions):
            return False
        cost = self.cost(decisions)
        if cost.priced_seconds < self.thrifty_cost.priced_seconds:
            self.thrifty, self.thrifty_cost = decisions, cost
        if cost >= self.best_cost:
            return False
        self.best, self.best_cost = decisions, cost
        return True


def default_knobs(space: Space, schedule: UpdateSchedule) -> Knobs:
    """Two slots, a window that is read ahead into, and the second smallest shard."""
    return 2, 2, DEFAULT_WINDOWS, space.shards[min(1, len(space.shards) - 1)], schedule


def least_knobs(search: Search, schedule: UpdateSchedule) -> Knobs:
    """Those that take the least memory, where slots of the update lie nowhere but in memory of their own."""
    shard = least_shard(search.profile, search.space.shards, on_cpu=search.space.on_cpu)
    return 1, 1, FEWEST_WINDOWS, shard, schedule


def uniform(search: Search) -> None:
    """The same action for the first m blocks, keep (or what is nearest to it) for the others.

    For every action and every placement of gradients and state the least m that fits is tried: from there
    on more blocks of the same action only cost time. Weights stay, as far as they may; where nothing fits so,
    they go. When the time is up the first that fits is enough.
    """
    for placed in weight_placements(search.space):
        for states in _state_placements(search.space):
            _uniform_blocks(search, placed(states))
        if search.best is not None:
            return
    search.offer(smallest(search))


def _uniform_blocks(search: Search, states: States) -> None:
    space, schedule = search.space, search.space.schedules[-1]
    used = UpdateSchedule.SEQUENTIAL if _all_on_device(states) and len(space.schedules) > 1 else schedule
    tried = dict.fromkeys([used, *(s for s in space.schedules if s is UpdateSchedule.IN_BACKWARD)])
    for wanted, each in itertools.product(_block_wishes(space), tried):
        if search.best is not None and time.monotonic() > search.deadline:
            return
        for knobs in (default_knobs(space, each), least_knobs(search, each)):
            least = _least_prefix(search, wanted, states, knobs)
            if least is not None:
                search.offer(search.build(_prefix(space, wanted, least), states, knobs))
                break


def greedy(search: Search) -> None:
    """Improve the best plan: change one block, one unit or one knob at a time, as long as it gets better."""
    if search.best is None:
        return
    improved = True
    while improved and search.simulations_left > 0:
        improved = False
        for neighbour in _neighbours(search):
            if search.simulations_left <= 0 or time.monotonic() > search.deadline:
                return
            improved |= search.offer(neighbour)


def smallest(search: Search) -> Decisions:
    """The choice that needs the least of the device, then of the other tiers, capacities ignored.

    Used when nothing fits: its excess over the budget is the shortfall.
    """
    space = search.space
    in_backward = UpdateSchedule.IN_BACKWARD  # under which the fewest gradients are there at once
    schedule = in_backward if in_backward in space.schedules else space.schedules[0]
    best = min(small_choices(search, schedule), key=lambda d: _shortness(search, d))
    changed = True
    while changed:
        changed = False
        knobs = least_knobs(search, schedule)
        if best.staging.update_slots:
            knobs = (*knobs[:3], best.staging.update_shard_elements, schedule)
        for blocks, states in _flips(best, space):
            other = search.build(blocks, states, knobs)
            if _shortness(search, other) < _shortness(search, best):
                best, changed = other, True
    return best


def small_choices(search: Search, schedule: UpdateSchedule) -> Iterator[Decisions]:
    """All ``wishes`` with the least knobs, in every size of shards: slots of the update that lie where passes
    were may cost nothing, and then the largest shards take the least."""
    knobs = least_knobs(search, schedule)
    for blocks, states in wishes(search.space):
        for shard in search.space.shards:
            yield search.build(blocks, states, (*knobs[:3], shard, schedule))


def wishes(space: Space) -> Iterator[tuple[Blocks, States]]:
    """Every uniform action with every uniform placement of gradients, state and weights."""
    for placed in weight_placements(space):
        for states in _state_placements(space):
            for wanted in _block_wishes(space):
                yield _prefix(space, wanted, len(space.blocks)), placed(states)


def _shortness(search: Search, decisions: Decisions) -> tuple[float, int, int, int]:
    excess = search.excess(decisions)
    peaks = tier_peaks(search.profile, decisions, search.space.billed_tiers, search.options.safety_margin)
    others = sum(size for tier, size in excess.items() if tier is not Tier.DEVICE)
    short = others + excess.get(Tier.DEVICE, 0)
    return search.excess_error(decisions), short, peaks[Tier.DEVICE], sum(peaks.values())


def _all_on_device(states: States) -> bool:
    return all(s.optimizer_tier is Tier.DEVICE for s in states)


def _block_wishes(space: Space) -> list[BlockDecision]:
    """The distinct kinds of choice over all blocks that cut no tokens, block numbers set to 0.

    A block that is cut lies between one that keeps and one that is computed again, and so does a plan with
    some of each: the uniform plans do without it, unless it alone is open.
    """
    kinds: dict[BlockDecision, None] = {}
    for choices in space.blocks:
        whole = [c for c in choices if not is_cut(c)]
        kinds.update({dataclasses.replace(c, block=0): None for c in whole or choices})
    return list(kinds)


def _state_placements(space: Space) -> list[States]:
    """Gradients in one place and state in one place, as far as each unit allows."""
    kinds = {(c.gradient_tier, c.optimizer_tier): None for choices in space.states for c in choices}
    placements = []
    for gradient, optimizer in kinds:
        placements.append(
            tuple(
                min(
                    choices,
                    key=lambda c: (c.gradient_tier is not gradient) + (c.optimizer_tier is not optimizer),
                )
                for choices in space.states
            )
        )
    return list(dict.fromkeys(placements))


def weight_placements(space: Space) -> list[Callable[[States], States]]:
    """Ways to place weights, given the rest: all on the device, the blocks' on a tier, everybody's on a tier,
    as far as each unit allows."""
    found: dict[tuple[Tier, ...], None] = {}
    kinds = dict.fromkeys([Tier.DEVICE, *(tier for tiers in space.weights for tier in tiers)])
    for wanted, blocks_alone in itertools.product(kinds, (True, False)):
        found[
            tuple(
                wanted if wanted in tiers and (space.in_block[index] or not blocks_alone) else tiers[0]
                for index, tiers in enumerate(space.weights)
            )
        ] = None
    return [partial(_with_weights, tiers=tiers) for tiers in found]


def _with_weights(states: States, tiers: tuple[Tier, ...]) -> States:
    return tuple(dataclasses.replace(d, weight_tier=t) for d, t in zip(states, tiers, strict=True))


def _prefix(space: Space, wanted: BlockDecision, count: int) -> Blocks:
    """``wanted`` for the first ``count`` blocks, the others keep; where a block cannot, its first choice."""
    blocks = []
    for index, choices in enumerate(space.blocks):
        wish = dataclasses.replace(wanted, block=index)
        keep = next((c for c in choices if c.action is Action.KEEP), choices[0])
        blocks.append(wish if index < count and wish in choices else keep)
    return tuple(blocks)


def _least_prefix(search: Search, wanted: BlockDecision, states: States, knobs: Knobs) -> int | None:
    """The least m that fits, or None: beyond the first, which brings a ring, more blocks need less of the
    device and more of the other tiers."""

    def over(count: int) -> dict[Tier, int]:
        return search.excess(search.build(_prefix(search.space, wanted, count), states, knobs))

    if not over(0):
        return 0
    low, high = 1, len(search.space.blocks)
    while low < high:
        middle = (low + high) // 2
        if Tier.DEVICE in over(middle):
            low = middle + 1
        else:
            high = middle
    return None if over(low) else low


def _flips(best: Decisions, space: Space) -> Iterator[tuple[Blocks, States]]:
    """One block or one unit changed, and all units changed at once. Weights of single units only where some
    are away: the first would bring windows and free nothing."""
    for members in _alike(best.blocks, space):
        for index in members:
            for choice in _steps(space.blocks[index], best.blocks[index]):
                if choice != best.blocks[index]:
                    yield (*best.blocks[:index], choice, *best.blocks[index + 1 :]), best.states
    for index, choices in enumerate(space.states):
        for state in choices:
            placed = dataclasses.replace(state, weight_tier=best.states[index].weight_tier)
            if placed != best.states[index]:
                yield best.blocks, (*best.states[:index], placed, *best.states[index + 1 :])
    weights = partial(_with_weights, tiers=tuple(d.weight_tier for d in best.states))
    for states in map(weights, _state_placements(space)):
        if states != best.states:
            yield best.blocks, states
    for placed_states in (placed(best.states) for placed in weight_placements(space)):
        if placed_states != best.states:
            yield best.blocks, placed_states
    if best.staging.weight_windows:
        for index in _weights_alike(best.states, space):
            for tier in space.weights[index]:
                if tier is not best.states[index].weight_tier:
                    one = dataclasses.replace(best.states[index], weight_tier=tier)
                    yield best.blocks, (*best.states[:index], one, *best.states[index + 1 :])


def _weights_alike(states: States, space: Space) -> Iterator[int]:
    """Of units whose weights are in one place and may be in the same ones, ``PLACES`` spread over them."""
    groups: dict[Any, list[int]] = {}
    for index, tiers in enumerate(space.weights):
        if len(tiers) > 1:
            groups.setdefault((space.in_block[index], tiers, states[index].weight_tier), []).append(index)
    for members in groups.values():
        yield from _spread(members)


def _alike(blocks: Blocks, space: Space) -> list[list[int]]:
    """Of the blocks that have one decision and one set of choices, ``PLACES`` spread over the model, the last
    first: in the middle of a run of blocks that are treated alike, one is as good as the next."""
    groups: dict[Any, list[int]] = {}
    for index in reversed(range(len(blocks))):
        kinds = tuple(dataclasses.replace(c, block=0) for c in space.blocks[index])
        groups.setdefault((dataclasses.replace(blocks[index], block=0), kinds), []).append(index)
    return [_spread(members) for members in groups.values()]


def _spread(members: list[int]) -> list[int]:
    count = min(PLACES, len(members))
    return [members[round(n * (len(members) - 1) / max(1, count - 1))] for n in range(count)]


def _steps(choices: tuple[BlockDecision, ...], present: BlockDecision) -> Iterator[BlockDecision]:
    """Every choice that cuts no tokens, and of those that do a step of the grid from the present one; from a
    whole one, the middle of the grid."""
    cut: dict[BlockDecision, list[BlockDecision]] = {}
    for choice in choices:
        if is_cut(choice):
            cut.setdefault(_uncut(choice), []).append(choice)
        else:
            yield choice
    for kind in cut.values():
        place = kind.index(present) if present in kind else None
        around = (len(kind) // 2,) if place is None else (place - 1, place + 1)
        yield from (kind[n] for n in around if 0 <= n < len(kind))


def _uncut(choice: BlockDecision) -> BlockDecision:
    """What choices that differ in numbers of tokens alone share."""
    tokens = None if choice.recomputed_tokens is None else 1
    return dataclasses.replace(choice, recomputed_tokens=tokens, attention_tokens=0)


def _neighbours(search: Search) -> Iterator[Decisions]:
    """Changes of the best plan, re-read as it improves: first the knobs, then blocks and units."""
    space = search.space
    changes: list[Callable[[Knobs], Knobs]] = [
        *(lambda k, n=n: (n, *k[1:]) for n in (1, *SLOT_COUNTS)),
        *(lambda k, n=n: (k[0], n, *k[2:]) for n in (1, *SLOT_COUNTS)),
        *(lambda k, s=s: (*k[:3], s, k[4]) for s in space.shards),
        *(lambda k, s=s: (*k[:4], s) for s in space.schedules),
    ]
    if _best(search).staging.weight_windows:
        changes += [partial(_with_windows, windows=windows) for windows in WANTED_WINDOWS]
    for change in changes:
        best = _best(search)
        yield search.build(best.blocks, best.states, change(knobs_of(best, space)))
    start = _best(search)
    knobs = knobs_of(start, space)
    for blocks, states in _flips(start, space):
        if search.best is not start:
            return
        yield search.build(blocks, states, knobs)
    if math.prod(len(choices) for choices in space.blocks) <= MAX_TOGETHER:
        for ring, blocks in itertools.product((1, *SLOT_COUNTS), itertools.product(*space.blocks)):
            if search.best is not start:
                return
            yield search.build(blocks, start.states, (ring, ring, *knobs[2:]))
    singles = list(_flips(start, space))
    if len(singles) ** 2 > MAX_TOGETHER:
        return
    for (first, states), ring in itertools.product(singles, (1, *SLOT_COUNTS)):
        middle = dataclasses.replace(start, blocks=first, states=states)
        for blocks, placed in _flips(middle, space):
            if search.best is not start:
                return
            yield search.build(blocks, placed, (ring, ring, *knobs[2:]))


def _with_windows(knobs: Knobs, windows: WantedWindows) -> Knobs:
    saved, moved, _, shard, schedule = knobs
    return saved, moved, windows, shard, schedule


def knobs_of(decisions: Decisions, space: Space) -> Knobs:
    """The knobs that ``decisions`` were built with; a default where a ring is unused."""
    staging = decisions.staging
    default = default_knobs(space, decisions.update_schedule)
    return (
        staging.saved_slots or default[0],
        staging.input_slots or default[1],
        wanted_of(staging.weight_windows) or default[2],
        staging.update_shard_elements if staging.update_slots else default[3],
        decisions.update_schedule,
    )


def _best(search: Search) -> Decisions:
    assert search.best is not None
    return search.best
