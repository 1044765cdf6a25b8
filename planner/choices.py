"""The choices of the planning problem as binary variables, and the rows that count bytes.

Bytes are the bill's, position by position, exactly; ring sizes and the shard are chosen here too. What the
choices cost in seconds stands in ``program``.

Index letters: ``l`` block, ``u`` unit, ``t`` tier, ``n`` slots of a ring, ``s`` shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pulp

from memtrain.planner import tables
from memtrain.planner.actions import Action, BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.bill import beside_update_bytes, forward_bytes, lasting_bytes, slab_forward_bytes
from memtrain.planner.block_parts import (
    activation_extents,
    backward_bytes,
    groups,
    input_slot_bytes,
    is_recomputed,
    kept_slot_bytes,
    lost_bytes,
    saved_slot_bytes,
    witness_bytes,
)
from memtrain.planner.bookkeeping import bookkeeping_bytes
from memtrain.planner.decisions import (
    GRADIENT_SLOTS,
    MIRRORED_SLOTS,
    SLOT_COUNTS,
    PlannerOptions,
    Space,
    gradient_extent_bytes,
    gradient_slab_bytes,
    gradient_slot_bytes,
    gradients_come_and_go,
    state_extent_bytes,
    streams_update,
    update_slot_bytes,
    update_slots,
    update_workspace_bytes,
)
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import CodedTier
from memtrain.planner.profile import BlockProfile, ModelProfile, UnitProfile
from memtrain.planner.staging import default_shard_elements, overlays, updates_overlay
from memtrain.planner.weight_choices import Expression, WeightChoices
from memtrain.planner.weight_windows import BEYOND, place_of

RINGS = (1, *SLOT_COUNTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the program is built from; it travels to the process that solves it."""

    profile: ModelProfile
    machine: Machine
    budget: Budget
    options: PlannerOptions
    space: Space


def need_limit(budget_bytes: int, safety_margin: float) -> int:
    """The largest need that fits ``budget_bytes`` once the margin is added."""
    need = int(budget_bytes / (1 + safety_margin)) + 2
    while need > 0 and need + math.ceil(need * safety_margin) > budget_bytes:
        need -= 1
    return need


class Choices:
    """Variables and byte rows of one schedule's program."""

    def __init__(self, request: Request, schedule: UpdateSchedule) -> None:
        self.profile, self.machine, self.space = request.profile, request.machine, request.space
        self.request, self.schedule = request, schedule
        self.ahead = schedule is UpdateSchedule.AHEAD
        self.in_backward = schedule is UpdateSchedule.IN_BACKWARD
        self.problem = pulp.LpProblem("memtrain", pulp.LpMinimize)
        self._times = 0
        self._choices()
        self._memory()
        self._capacities()
        self._errors()

    # -- what is chosen -------------------------------------------------------------------------------

    def _binary(self, name: str) -> pulp.LpVariable:
        return self.problem.add_variable(name, cat=pulp.LpBinary)

    def time(self, *, least: float | None = 0) -> pulp.LpVariable:
        """A new variable that is a time in seconds; with ``least`` None one that may lie before the step."""
        self._times += 1
        return self.problem.add_variable(f"time_{self._times:05d}", lowBound=least)

    def add(self, constraint: pulp.LpConstraint | bool) -> None:
        """One more row."""
        # PuLP folds a row without variables to a bool; all such rows hold by construction.
        if not isinstance(constraint, bool):
            self.problem.addConstraint(constraint)

    def _choices(self) -> None:
        self.x = [
            [self._binary(f"x_{index:03d}_{c:02d}") for c in range(len(choices))]
            for index, choices in enumerate(self.space.blocks)
        ]
        self.z = [
            [self._binary(f"z_{index:03d}_{c:02d}") for c in range(len(choices))]
            for index, choices in enumerate(self.space.states)
        ]
        self.saved_ring = {n: self._binary(f"saved_slots_{n}") for n in (0, *RINGS)}
        self.input_ring = {n: self._binary(f"input_slots_{n}") for n in (0, *RINGS)}
        streams = any(streams_update(d) for row in self.space.states for d in row)
        shards = self.space.shards if streams else ()
        self.shard = {s: self._binary(f"shard_{s}") for s in sorted({0, *shards})}
        self.gradient_ring = self._binary("gradient_ring")
        self.weights = WeightChoices(self.request, self.problem)
        for one_of in (
            *self.x,
            *self.z,
            list(self.saved_ring.values()),
            list(self.input_ring.values()),
            list(self.shard.values()),
        ):
            self.add(pulp.lpSum(one_of) == 1)
        for index in range(len(self.x)):
            self.add(self.swapped(index) <= 1 - self.saved_ring[0])
            self.add(self.moved(index) <= 1 - self.input_ring[0])
            if len(self.space.tiers) > 1:  # otherwise the row before says so
                self.add(self.groups(index) <= pulp.lpSum(n * v for n, v in self.input_ring.items()))
        streamed = [self.unit_sum(u, lambda _, d: float(streams_update(d))) for u in range(len(self.z))]
        self.add(pulp.lpSum(streamed) >= 1 - self.shard[0])
        for index in range(len(self.z)):
            self.add(streamed[index] <= 1 - self.shard[0])
            self.add(
                self.unit_sum(index, lambda _, d: d.gradient_tier is not Tier.DEVICE) <= self.gradient_ring
            )

    def block_sum(self, index: int, value: Callable[[BlockProfile, BlockDecision], float]) -> Expression:
        """The value of whichever choice block ``index`` gets."""
        block = self.profile.blocks[index]
        return pulp.LpAffineExpression(
            [
                (v, w)
                for v, d in zip(self.x[index], self.space.blocks[index], strict=True)
                if (w := value(block, d))
            ]
        )

    def unit_sum(self, index: int, value: Callable[[UnitProfile, StateDecision], float]) -> Expression:
        """The value of whichever choice unit ``index`` gets."""
        unit = self.profile.units[index]
        return pulp.LpAffineExpression(
            [
                (v, float(w))
                for v, d in zip(self.z[index], self.space.states[index], strict=True)
                if (w := value(unit, d))
            ]
        )

    def swapped(self, index: int) -> Expression:
        """1 if the block goes through the saved ring."""
        return self.block_sum(index, lambda _, d: float(d.action is Action.SWAP))

    def moved(self, index: int) -> Expression:
        """1 if the block goes through the input ring."""
        return self.block_sum(index, lambda b, d: float(bool(input_slot_bytes(b, d))))

    def groups(self, index: int) -> Expression:
        """Slots that the block takes of the input ring."""
        return self.block_sum(index, lambda b, d: groups(b, d) if is_recomputed(d) else 0)

    # -- bytes ----------------------------------------------------------------------------------------

    def _ring_bytes(
        self, ring: dict[int, pulp.LpVariable], size: Callable[[BlockProfile, BlockDecision], int], name: str
    ) -> Expression:
        """Bytes of a ring: slots times the largest block that uses it."""
        sizes = [
            s
            for b, choices in zip(self.profile.blocks, self.space.blocks, strict=True)
            for d in choices
            if (s := size(b, d))
        ]
        if not sizes:
            return pulp.LpAffineExpression()
        total = self.problem.add_variable(f"{name}_bytes", lowBound=0)
        self.add(total >= pulp.lpSum(n * min(sizes) * v for n, v in ring.items()))
        if max(sizes) > min(sizes):
            for index in range(len(self.x)):
                mine = self.block_sum(index, size)
                for n in RINGS:
                    self.add(total >= n * mine - n * max(sizes) * (1 - ring[n]))
        return pulp.LpAffineExpression(total)

    def _memory(self) -> None:
        profile = self.profile
        fixed = profile.baseline_bytes + profile.weight_bytes + profile.allocator_slack_bytes
        fixed += sum(unit.resident_state_bytes for unit in profile.units) + tables.resident_bytes(profile)
        units = range(len(profile.units))
        always = pulp.lpSum(
            self.unit_sum(u, lambda p, d: p.state_bytes * (d.optimizer_tier is Tier.DEVICE)) for u in units
        )
        on_cpu = self.machine.on_cpu
        coding = sum(each.staging_bytes for each in self.space.coded) + self.weights.coding_bytes()
        of_passes, of_updates = self._pass_rings(), self._update_ring()
        self.rings = of_passes + of_updates + coding
        always += self.weights.window_bytes - self.weights.freed_bytes()
        if on_cpu:
            always += self._slabs(of_passes, of_updates) + coding + self._bookkeeping()
        else:
            always += self._mirrors()
        during_forward = slab_forward_bytes if on_cpu else forward_bytes
        lasting = witness_bytes if on_cpu else lasting_bytes
        limit = need_limit(self.request.budget.device_bytes, self.request.options.safety_margin) - fixed

        def row(*parts: Expression | float) -> None:
            # Megabytes keep the coefficients near 1; the choice is checked in bytes afterwards.
            self.add((pulp.lpSum([always, *parts])) * 1e-6 <= limit * 1e-6)

        gradient = [
            self.unit_sum(u, lambda p, d: p.gradient_bytes * (d.gradient_tier is Tier.DEVICE and not on_cpu))
            for u in units
        ]
        every = pulp.lpSum(gradient)
        many = profile.micro_batches > 1
        alone = gradients_come_and_go(profile, self.schedule)

        def gradients_at(index: int) -> Expression:
            here = [g for g, u in zip(gradient, profile.units, strict=True) if place_of(u) == index]
            return pulp.lpSum(here) if alone else every

        def gradients_from(index: int) -> Expression:
            if alone:
                return gradients_at(index)
            later = [g for g, u in zip(gradient, profile.units, strict=True) if place_of(u) >= index]
            return every if many else pulp.lpSum(later)

        def gradients_forward(index: int) -> Expression | float:
            return gradients_from(index) if many or self.ahead else 0.0

        row(gradients_forward(-1), profile.prologue_peak_bytes)
        kept: Expression = pulp.LpAffineExpression()
        before = []
        for index in range(len(self.x)):
            before.append(kept.copy())
            row(kept, gradients_forward(index), self.block_sum(index, during_forward))
            kept = kept + self.block_sum(index, lasting)
            row(
                kept,
                gradients_from(index),
                self.block_sum(index, backward_bytes),
                profile.persistent_backward_bytes,
            )
        row(kept, gradients_from(BEYOND), profile.epilogue_peak_bytes)
        adding = tables.accumulating_bytes(profile)
        row(gradients_at(-1), profile.persistent_backward_bytes + profile.prologue_peak_bytes + adding)
        row(gradients_at(-1), tables.update_bytes(profile))
        for u, unit in enumerate(profile.units):
            here = self.unit_sum(u, partial(_workspace, profile))
            if self.in_backward:
                here += self.unit_sum(u, partial(beside_update_bytes, profile, in_slab=on_cpu))
            place = place_of(unit)
            held: Expression | float = 0.0
            if (self.ahead or self.in_backward) and place >= 0:
                held = kept if place == BEYOND else before[place]
            row(gradients_at(place), here, held)

    def _gradient_slab(self) -> Expression:
        """Bytes of a CPU's slab for gradients that stay: of all units, or of the largest."""
        each = [
            self.unit_sum(u, partial(gradient_slab_bytes, self.profile))
            for u in range(len(self.profile.units))
        ]
        if not gradients_come_and_go(self.profile, self.schedule):
            return pulp.lpSum(each)
        largest = self.problem.add_variable("gradient_slab_bytes", lowBound=0)
        for size in each:
            self.add(largest >= size)
        return pulp.LpAffineExpression(largest)

    def _overlaid_slab(self) -> Expression:
        """Bytes of the one slab in which gradients come to lie where activations were."""
        slab = self.problem.add_variable("overlaid_slab_bytes", lowBound=0)
        each = [
            self.unit_sum(u, partial(gradient_slab_bytes, self.profile))
            for u in range(len(self.profile.units))
        ]
        self.add(slab * 1e-6 >= pulp.lpSum(each) * 1e-6)
        kept: Expression = pulp.LpAffineExpression()
        for index in range(len(self.x)):
            kept = kept + self.block_sum(index, kept_slot_bytes)
            made = [size for size, u in zip(each, self.profile.units, strict=True) if place_of(u) >= index]
            self.add(slab * 1e-6 >= pulp.lpSum([kept, *made]) * 1e-6)
        return pulp.LpAffineExpression(slab)

    def _slabs(self, of_passes: Expression, of_updates: Expression) -> Expression:
        """Bytes of a CPU's slabs and rings: what passes need, and what an update does, where these take turns
        in one slab the larger of both."""
        overlaid = overlays(self.profile, self.schedule, self.space.overlay)
        gradients = self._gradient_slab()
        of_passes = of_passes + (self._overlaid_slab() if overlaid else self.kept_slabs() + gradients)
        if not updates_overlay(self.schedule, self.space.overlay):
            return of_passes + of_updates
        slab = self.problem.add_variable("pass_and_update_bytes", lowBound=0)
        self.add(slab * 1e-6 >= of_passes * 1e-6)
        self.add(slab * 1e-6 >= (of_updates + gradients) * 1e-6)
        return pulp.LpAffineExpression(slab)

    def kept_slabs(self) -> Expression:
        """Bytes of a CPU's slabs: each block has a place of its own size."""
        return pulp.lpSum(self.block_sum(index, kept_slot_bytes) for index in range(len(self.x)))

    def _pass_rings(self) -> Expression:
        """Bytes of the rings that forward and backward use, wherever they lie."""
        total = self._ring_bytes(self.saved_ring, saved_slot_bytes, "saved")
        total += self._ring_bytes(self.input_ring, input_slot_bytes, "input")
        return total + GRADIENT_SLOTS * gradient_slot_bytes(self.profile) * self.gradient_ring

    def _update_ring(self) -> Expression:
        """Bytes of the ring that updates use."""
        slots = update_slots(self.profile)
        return pulp.lpSum(slots * update_slot_bytes(self.profile, s) * v for s, v in self.shard.items() if s)

    def _bookkeeping(self) -> Expression:
        """Bytes of a session's own objects. Where no update streams, the state is cut into shards all the
        same."""
        cut = ((s or default_shard_elements(self.profile), v) for s, v in self.shard.items())
        return pulp.lpSum(bookkeeping_bytes(self.profile, elements) * v for elements, v in cut)

    def _mirrors(self) -> Expression:
        """Bytes of ``decisions.mirror_bytes``: what a GPU holds of rings in host memory."""
        profile = self.profile
        total: Expression = pulp.LpAffineExpression()
        for name, size in (("saved", saved_slot_bytes), ("input", input_slot_bytes)):
            largest = self.problem.add_variable(f"{name}_mirror_bytes", lowBound=0)
            for index in range(len(self.x)):
                self.add(largest >= self.block_sum(index, size))
            total += MIRRORED_SLOTS * largest
        gradients = GRADIENT_SLOTS * gradient_slot_bytes(profile) + profile.largest_gradient_bytes
        total += gradients * self.gradient_ring
        return total + pulp.lpSum(
            MIRRORED_SLOTS * update_slot_bytes(profile, s) * v for s, v in self.shard.items() if s
        )

    def _capacities(self) -> None:
        for tier in self.space.billed_tiers:
            used = [self.rings + self.weights.window_bytes] if tier is self.space.staging_tier else []
            used += [self.block_sum(i, partial(_block_extents, tier)) for i in range(len(self.x))]
            coded = next((each for each in self.space.coded if each.tier is tier), None)
            in_tier = partial(_unit_extents, self.profile, tier, coded)
            used += [self.unit_sum(u, in_tier) for u in range(len(self.z))]
            used.append(self.weights.extent_bytes(tier))
            room = self.request.budget.capacity(tier) - tables.tier_bytes(self.profile, tier)
            self.add(pulp.lpSum(used) * 1e-6 <= room * 1e-6)

    def _errors(self) -> None:
        """What the chosen forms lose, over all that the blocks save."""
        budget, saved = self.request.options.error_budget, sum(b.saved_bytes for b in self.profile.blocks)
        if budget is not None and saved:
            lost = pulp.lpSum(self.block_sum(index, lost_bytes) for index in range(len(self.x)))
            self.add(lost * (1 / saved) <= budget)


def _workspace(profile: ModelProfile, unit: UnitProfile, decision: StateDecision) -> int:
    return update_workspace_bytes(profile, unit, streamed=decision.optimizer_tier is not Tier.DEVICE)


def _block_extents(tier: Tier, block: BlockProfile, decision: BlockDecision) -> int:
    return sum(size for where, size in activation_extents(block, decision) if where is tier)


def _unit_extents(
    profile: ModelProfile, tier: Tier, coded: CodedTier | None, unit: UnitProfile, decision: StateDecision
) -> int:
    gradients = gradient_extent_bytes(profile, unit) if decision.gradient_tier is tier else 0
    return gradients + (state_extent_bytes(profile, unit, coded) if decision.optimizer_tier is tier else 0)
