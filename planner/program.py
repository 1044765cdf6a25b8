"""The planning problem as a mixed-integer program: what no plan can beat, and a choice worth simulating.

Binary variables choose an action per block, tiers per unit, ring sizes and the shard; continuous ones are
times. Every row is implied by the simulator's rules (docs/plan.md lists them), so that the optimum is a lower
bound of every plan's simulated step; memory and capacity rows are the bill's, exactly. First-in-first-out
queues keep the order of the blocks, so the maxima need no binaries: the objective pushes times down.

PuLP holds the model. Bound and status are read from HiGHS itself: PuLP reports a stopped solver as optimal.

Index letters: ``l`` block, ``u`` unit, ``t`` tier, ``n`` slots of a ring, ``s`` shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import pulp

from memtrain.planner.actions import Action, BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.bill import backward_transient_bytes, forward_bytes, kept_bytes
from memtrain.planner.decisions import (
    GRADIENT_SLOTS,
    PAGE_BYTES,
    SLOT_COUNTS,
    UPDATE_SLOTS,
    PlannerOptions,
    Space,
    gradient_slot_bytes,
    input_slot_bytes,
    recompute_traffic,
    saved_slot_bytes,
    unit_elements,
    update_slot_bytes,
)
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.profile import BlockProfile, ModelProfile, UnitProfile
from memtrain.planner.simulate import MAX_PIECES, mixed_fraction
from memtrain.planner.units import round_up

Expression: TypeAlias = Any
"""An affine expression of PuLP, which is not typed."""
RINGS = (1, *SLOT_COUNTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the program is built from; it travels to the process that solves it."""

    profile: ModelProfile
    machine: Machine
    budget: Budget
    options: PlannerOptions
    space: Space


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What HiGHS proved and found for one schedule."""

    bound_seconds: float
    """No plan with this schedule takes less; ``inf`` if none exists, 0 if nothing was proved."""
    blocks: tuple[BlockDecision, ...] = ()
    """Empty when no choice was found."""
    states: tuple[StateDecision, ...] = ()
    knobs: tuple[int, int, int] = (0, 0, 0)
    """saved_slots, input_slots, shard_elements."""


def need_limit(budget_bytes: int, safety_margin: float) -> int:
    """The largest need that fits ``budget_bytes`` once the margin is added."""
    need = int(budget_bytes / (1 + safety_margin)) + 2
    while need > 0 and need + math.ceil(need * safety_margin) > budget_bytes:
        need -= 1
    return need


class Program:
    """One schedule's program."""

    def __init__(self, request: Request, schedule: UpdateSchedule) -> None:
        self.profile, self.machine, self.space = request.profile, request.machine, request.space
        self.request, self.schedule = request, schedule
        self.ahead = schedule is UpdateSchedule.AHEAD
        self.problem = pulp.LpProblem("memtrain", pulp.LpMinimize)
        on_cpu = self.machine.device == "cpu"
        self.cpu = {k.tier: k.cpu_seconds_per_byte / self.machine.cores * on_cpu for k in self.machine.links}
        self.copy = on_cpu / self.machine.dram_copy_bytes_per_second
        self._times = 0
        self._choices()
        self._memory()
        self._capacities()
        self._objective()

    # -- what is chosen -------------------------------------------------------------------------------

    def _binary(self, name: str) -> pulp.LpVariable:
        return self.problem.add_variable(name, cat=pulp.LpBinary)

    def _time(self) -> pulp.LpVariable:
        self._times += 1
        return self.problem.add_variable(f"time_{self._times:05d}", lowBound=0)

    def _add(self, constraint: pulp.LpConstraint | bool) -> None:
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
        self.shard = {s: self._binary(f"shard_{s}") for s in sorted({0, *self.space.shards})}
        self.gradient_ring = self._binary("gradient_ring")
        self.gradient_fed = self._binary("gradient_ring_feeds_update")
        for one_of in (
            *self.x,
            *self.z,
            list(self.saved_ring.values()),
            list(self.input_ring.values()),
            list(self.shard.values()),
        ):
            self._add(pulp.lpSum(one_of) == 1)
        for index in range(len(self.x)):
            self._add(self.swapped(index) <= 1 - self.saved_ring[0])
            self._add(self.moved(index) <= 1 - self.input_ring[0])
        for index in range(len(self.z)):
            self._add(
                self.unit_sum(index, lambda _, d: d.optimizer_tier is not Tier.DEVICE) <= 1 - self.shard[0]
            )
            self._add(
                self.unit_sum(index, lambda _, d: d.gradient_tier is not Tier.DEVICE) <= self.gradient_ring
            )
            self._add(self.unit_sum(index, _fed_by_gradient_ring) <= self.gradient_fed)

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
        return self.block_sum(index, lambda b, d: float(bool(recompute_traffic(b, d))))

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
        self._add(total >= pulp.lpSum(n * min(sizes) * v for n, v in ring.items()))
        if max(sizes) > min(sizes):
            for index in range(len(self.x)):
                mine = self.block_sum(index, size)
                for n in RINGS:
                    self._add(total >= n * mine - n * max(sizes) * (1 - ring[n]))
        return pulp.LpAffineExpression(total)

    def _memory(self) -> None:
        profile = self.profile
        fixed = profile.baseline_bytes + profile.weight_bytes + profile.allocator_slack_bytes
        fixed += sum(unit.resident_state_bytes for unit in profile.units)
        units = range(len(profile.units))
        always = pulp.lpSum(
            self.unit_sum(u, lambda p, d: p.state_bytes * (d.optimizer_tier is Tier.DEVICE)) for u in units
        )
        always += self._ring_bytes(
            self.saved_ring, lambda b, d: saved_slot_bytes(b) if d.action is Action.SWAP else 0, "saved"
        )
        always += self._ring_bytes(self.input_ring, input_slot_bytes, "input")
        always += GRADIENT_SLOTS * gradient_slot_bytes(profile) * self.gradient_ring
        always += pulp.lpSum(
            UPDATE_SLOTS * update_slot_bytes(profile, s) * v for s, v in self.shard.items() if s
        )
        limit = need_limit(self.request.budget.device_bytes, self.request.options.safety_margin) - fixed

        def row(*parts: Expression | float) -> None:
            # Megabytes keep the coefficients near 1; the choice is checked in bytes afterwards.
            self._add((pulp.lpSum([always, *parts])) * 1e-6 <= limit * 1e-6)

        gradient = [
            self.unit_sum(u, lambda p, d: p.gradient_bytes * (d.gradient_tier is Tier.DEVICE)) for u in units
        ]
        every = pulp.lpSum(gradient)
        many = profile.micro_batches > 1

        def gradients_from(index: int) -> Expression:
            later = [g for g, u in zip(gradient, profile.units, strict=True) if _place(u) >= index]
            return every if many else pulp.lpSum(later)

        def gradients_forward(index: int) -> Expression | float:
            return gradients_from(index) if many or self.ahead else 0.0

        row(gradients_forward(-1), profile.prologue_peak_bytes)
        kept: Expression = pulp.LpAffineExpression()
        before = []
        for index in range(len(self.x)):
            before.append(kept.copy())
            row(kept, gradients_forward(index), self.block_sum(index, forward_bytes))
            kept = kept + self.block_sum(index, kept_bytes)
            row(
                kept,
                gradients_from(index),
                self.block_sum(index, backward_transient_bytes),
                profile.persistent_backward_bytes,
            )
        row(kept, gradients_from(len(self.x)), profile.epilogue_peak_bytes)
        row(every, profile.persistent_backward_bytes + profile.prologue_peak_bytes)
        for u, unit in enumerate(profile.units):
            workspace = math.ceil(profile.update_workspace_bytes_per_element * unit_elements(profile, unit))
            here = workspace * self.unit_sum(u, lambda _, d: d.optimizer_tier is Tier.DEVICE)
            place = _place(unit)
            held: Expression | float = 0.0
            if self.ahead and place >= 0:
                held = kept if place == BEYOND else before[place]
            row(every, here, held)

    def _capacities(self) -> None:
        for tier in self.space.tiers:
            used = [self.block_sum(i, partial(_block_pages, tier)) for i in range(len(self.x))]
            used += [self.unit_sum(u, partial(_unit_pages, tier)) for u in range(len(self.z))]
            self._add(pulp.lpSum(used) * 1e-6 <= self.request.budget.capacity(tier) * 1e-6)

    # -- seconds --------------------------------------------------------------------------------------

    def _objective(self) -> None:
        micro_batches = self.profile.micro_batches
        total = self._micro_batch(first=True)
        if micro_batches > 1:
            total = total + (micro_batches - 1) * self._micro_batch(first=False)
        if not self.ahead:
            total = total + self._sequential_update()
        self.problem.setObjective(total)

    def _work(self, tier: Tier, index: int, *, read: bool) -> Expression:
        """Seconds that a block's traffic occupies one queue of ``tier``."""
        link = self.machine.link(tier)
        rate = link.read_bytes_per_second if read else link.write_bytes_per_second
        return self.block_sum(
            index, lambda b, d: sum(s / rate + link.latency_seconds for w, s in _traffic(b, d) if w is tier)
        )

    def _largest(self, tier: Tier, *, swap: bool, rate: float) -> float:
        sizes = [
            sum(s for w, s in _traffic(b, d) if w is tier)
            for b, choices in zip(self.profile.blocks, self.space.blocks, strict=True)
            for d in choices
            if (d.action is Action.SWAP) is swap
        ]
        link = self.machine.link(tier)
        return max(sizes, default=0) / rate + 2 * link.latency_seconds if any(sizes) else 0.0

    def _slots(self, tier: Tier, rate: float, index: int | None = None) -> Expression:
        """Seconds of traffic that the rings can hold, without the slots that block ``index`` occupies."""
        swap, moved = self._largest(tier, swap=True, rate=rate), self._largest(tier, swap=False, rate=rate)
        held = pulp.lpSum(n * swap * v for n, v in self.saved_ring.items())
        held += pulp.lpSum(n * moved * v for n, v in self.input_ring.items())
        if index is not None:
            held = held - swap * self.swapped(index) - moved * self.moved(index)
        return held

    def _update_work(self, tier: Tier, unit: int, *, read: bool) -> Expression:
        link = self.machine.link(tier)
        if read:
            rate = link.read_bytes_per_second
            return self.unit_sum(
                unit,
                lambda p, d: (
                    (
                        p.state_bytes * (d.optimizer_tier is tier)
                        + p.gradient_bytes * (d.gradient_tier is tier)
                    )
                    / rate
                ),
            )
        rate = link.write_bytes_per_second
        return self.unit_sum(unit, lambda p, d: p.state_bytes * (d.optimizer_tier is tier) / rate)

    def _update_compute(self, unit: int) -> Expression:
        def seconds(p: UnitProfile, d: StateDecision) -> float:
            moved = 2 * p.state_bytes * self.cpu.get(d.optimizer_tier, 0.0)
            return p.update_seconds + moved + p.gradient_bytes * self.cpu.get(d.gradient_tier, 0.0)

        return self.unit_sum(unit, seconds)

    def _update_slots(self, tier: Tier, *, read: bool) -> Expression:
        """Seconds of traffic that the update's slots can hold: what may be read ahead, or written behind."""
        link = self.machine.link(tier)
        rate = link.read_bytes_per_second if read else link.write_bytes_per_second
        held = pulp.LpAffineExpression()
        for shard, chosen in self.shard.items():
            if shard:
                largest = max(
                    (p.state_bytes + p.gradient_bytes * read)
                    / _pieces(unit_elements(self.profile, p) / shard)
                    for p in self.profile.units
                )
                held += UPDATE_SLOTS * (largest / rate + 2 * link.latency_seconds) * chosen
        return held + (self._gradient_piece() / rate + link.latency_seconds) * 2 * read * self.gradient_fed

    def _gradient_piece(self) -> float:
        half = GRADIENT_SLOTS * gradient_slot_bytes(self.profile) // 2
        return max(
            (p.gradient_bytes / _pieces(p.gradient_bytes / half) for p in self.profile.units), default=0.0
        )

    def _busy(self, tier: Tier) -> float:
        """Queue seconds that both directions of a tier together serve in a second, at most."""
        return max(1.0, 2 * mixed_fraction(self.machine, tier))

    def _micro_batch(self, *, first: bool) -> Expression:
        """Seconds of one micro-batch on the computing thread; its queues are empty as it begins."""
        profile, tiers = self.profile, self.space.tiers
        now: Expression = pulp.LpAffineExpression()
        write_end: dict[Tier, Expression] = {t: pulp.LpAffineExpression() for t in tiers}
        read_end: dict[Tier, Expression] = {t: pulp.LpAffineExpression() for t in tiers}
        reads: dict[Tier, Expression] = {t: pulp.LpAffineExpression() for t in tiers}
        writes: dict[Tier, Expression] = {t: pulp.LpAffineExpression() for t in tiers}

        def update(place: int, now: Expression) -> Expression:
            if not (first and self.ahead):
                return now
            for u, unit in enumerate(profile.units):
                if _place(unit) != place:
                    continue
                done = self._time()
                self._add(done >= now + self._update_compute(u))
                for t in tiers:
                    read, write = self._update_work(t, u, read=True), self._update_work(t, u, read=False)
                    fetched, stored = self._time(), self._time()
                    self._add(fetched >= read_end[t] + read)
                    self._add(fetched >= now + read - self._update_slots(t, read=True))
                    self._add(done >= fetched)
                    self._add(stored >= write_end[t] + write)
                    self._add(done >= stored - self._update_slots(t, read=False))
                    reads[t] = reads[t] + read
                    writes[t] = writes[t] + write
                    behind = self._update_slots(t, read=False)
                    self._add(
                        self._busy(t) * done
                        >= reads[t]
                        + writes[t]
                        - behind
                        - self._slots(t, self.machine.link(t).write_bytes_per_second)
                    )
                    read_end[t], write_end[t] = fetched, stored
                now = pulp.LpAffineExpression(done)
            return now

        now = update(-1, now) + profile.prologue_forward_seconds
        for index, block in enumerate(profile.blocks):
            now = update(index, now)
            out = self.block_sum(
                index, lambda b, d: sum(s * (self.copy + self.cpu[w]) for w, s in _traffic(b, d))
            )
            done = self._time()
            self._add(done >= now + block.forward_seconds + out)
            for t in tiers:
                work, rate = self._work(t, index, read=False), self.machine.link(t).write_bytes_per_second
                behind = self._update_slots(t, read=False) if first and self.ahead else 0.0
                free = write_end[t] - self._slots(t, rate, index) - behind
                self._add(done >= free + block.forward_seconds + out)
                stored = self._time()
                self._add(stored >= write_end[t] + work)
                self._add(stored >= done + work)
                writes[t] = writes[t] + work
                write_end[t] = pulp.LpAffineExpression(stored)
            now = pulp.LpAffineExpression(done)
        now = update(BEYOND, now) + profile.epilogue_forward_seconds + profile.epilogue_backward_seconds
        return self._backward(now, first=first)

    def _backward(self, turn: Expression, *, first: bool) -> Expression:
        profile, tiers = self.profile, self.space.tiers
        rates = {t: self.machine.link(t).read_bytes_per_second for t in tiers}
        # What the slots still hold at the turn is not read: neither its time nor its processor time counts.
        now = turn - pulp.lpSum(self._slots(t, rates[t]) * rates[t] * self.cpu[t] for t in tiers)
        read_end = {t: turn - self._slots(t, rates[t]) for t in tiers}
        reads = {t: -1 * self._slots(t, rates[t]) for t in tiers}
        moves = 1 if first else 2

        def store(place: int) -> Expression:
            return pulp.lpSum(
                self.unit_sum(
                    u,
                    lambda p, d: (
                        p.gradient_bytes * (self.copy + self.cpu[d.gradient_tier] * moves)
                        if d.gradient_tier is not Tier.DEVICE
                        else 0.0
                    ),
                )
                for u, unit in enumerate(profile.units)
                if _place(unit) == place
            )

        now = now + store(BEYOND)
        later: Expression | None = None
        for index in reversed(range(len(profile.blocks))):
            block = profile.blocks[index]
            again = self.block_sum(index, _recompute_seconds)
            fetch = self.block_sum(index, lambda b, d: sum(s * self.cpu[w] for w, s in _traffic(b, d)))
            over = self._time()
            self._add(over >= now + block.backward_seconds + again + fetch)
            for t in tiers:
                work = self._work(t, index, read=True)
                fetched = self._time()
                self._add(fetched - read_end[t] - work >= 0)
                if later is not None:
                    self._add(fetched >= later - self._slots(t, rates[t], index + 1) + work)
                self._add(over >= fetched + block.backward_seconds + again)
                read_end[t] = pulp.LpAffineExpression(fetched)
                reads[t] = reads[t] + work
            later = over
            now = over + store(index)
        now = now + profile.prologue_backward_seconds + store(-1)
        end = self._time()
        self._add(end >= now)
        self._gradient_rows(turn, end, reads, first=first)
        return pulp.LpAffineExpression(end)

    def _gradient_rows(
        self, turn: Expression, end: pulp.LpVariable, reads: dict[Tier, Expression], *, first: bool
    ) -> None:
        """After the turn a tier must serve what backward fetches and what gradients come and go."""
        for t in self.space.tiers:
            link = self.machine.link(t)
            gradient = pulp.lpSum(
                self.unit_sum(u, partial(_gradient_bytes_on, t)) for u in range(len(self.z))
            )
            fetched = reads[t] + (0.0 if first else gradient * (1 / link.read_bytes_per_second))
            behind = 2 * self._gradient_piece() / link.write_bytes_per_second * self.gradient_ring
            stored = gradient * (1 / link.write_bytes_per_second) - behind
            self._add(end - turn >= fetched)
            self._add(end - turn >= stored)
            self._add(self._busy(t) * (end - turn) >= fetched + stored)

    def _sequential_update(self) -> Expression:
        end = self._time()
        units = range(len(self.z))
        self._add(end >= pulp.lpSum(self._update_compute(u) for u in units))
        for t in self.space.tiers:
            read = pulp.lpSum(self._update_work(t, u, read=True) for u in units)
            write = pulp.lpSum(self._update_work(t, u, read=False) for u in units)
            self._add(end >= read)
            self._add(end >= write)
            self._add(self._busy(t) * end >= read + write)
        return pulp.LpAffineExpression(end)


BEYOND = 1 << 30
"""The place of the epilogue: after every block."""


def _place(unit: UnitProfile) -> int:
    if unit.block is not None:
        return unit.block
    return BEYOND if unit.name == "epilogue" else -1


def _pieces(parts: float) -> int:
    return max(1, min(MAX_PIECES, math.ceil(parts)))


def _traffic(block: BlockProfile, decision: BlockDecision) -> tuple[tuple[Tier, int], ...]:
    if decision.action is Action.SWAP:
        return ((decision.saved_tier, block.saved_bytes),)
    return recompute_traffic(block, decision)


def _recompute_seconds(block: BlockProfile, decision: BlockDecision) -> float:
    if decision.action is Action.RECOMPUTE:
        return block.forward_seconds
    if decision.action is Action.RECOMPUTE_EXCEPT_ATTENTION:
        return max(0.0, block.forward_seconds - block.attention_seconds)
    return 0.0


def _block_pages(tier: Tier, block: BlockProfile, decision: BlockDecision) -> int:
    return sum(round_up(size, PAGE_BYTES) for where, size in _traffic(block, decision) if where is tier)


def _unit_pages(tier: Tier, unit: UnitProfile, decision: StateDecision) -> int:
    pages = round_up(unit.gradient_bytes, PAGE_BYTES) if decision.gradient_tier is tier else 0
    return pages + (round_up(unit.state_bytes, PAGE_BYTES) if decision.optimizer_tier is tier else 0)


def _gradient_bytes_on(tier: Tier, unit: UnitProfile, decision: StateDecision) -> int:
    return unit.gradient_bytes * (decision.gradient_tier is tier)


def _fed_by_gradient_ring(_: UnitProfile, decision: StateDecision) -> bool:
    return decision.gradient_tier is not Tier.DEVICE and decision.optimizer_tier is Tier.DEVICE


def solve_program(request: Request, schedule: UpdateSchedule, time_limit_seconds: float) -> Answer:
    """Build and solve one schedule's program with HiGHS, in this process."""
    program = Program(request, schedule)
    solver = pulp.HiGHS(
        msg=False,
        gapRel=request.options.gap / 2,
        threads=1,
        timeLimit=time_limit_seconds,
        random_seed=1,
    )
    program.problem.solve(solver)
    highs = program.problem.solverModel
    status = highs.modelStatusToString(highs.getModelStatus())
    if status == "Infeasible":
        return Answer(bound_seconds=math.inf)
    info = highs.getInfo()
    bound = info.mip_dual_bound if math.isfinite(info.mip_dual_bound) else 0.0
    if info.primal_solution_status != 2:  # kSolutionStatusFeasible
        return Answer(bound_seconds=max(0.0, bound))
    values = list(highs.getSolution().col_value)
    chosen = {
        v.name for v in program.problem.variables() if v.cat == pulp.LpInteger and values[v.index] > 0.5
    }
    return Answer(
        # HiGHS proves within its tolerances: 1e-6 of the bound is given away.
        bound_seconds=max(0.0, bound * (1 - 1e-6)),
        blocks=tuple(
            next(d for v, d in zip(row, choices, strict=True) if v.name in chosen)
            for row, choices in zip(program.x, program.space.blocks, strict=True)
        ),
        states=tuple(
            next(d for v, d in zip(row, choices, strict=True) if v.name in chosen)
            for row, choices in zip(program.z, program.space.states, strict=True)
        ),
        knobs=(
            next(n for n, v in program.saved_ring.items() if v.name in chosen),
            next(n for n, v in program.input_ring.items() if v.name in chosen),
            next(s for s, v in program.shard.items() if v.name in chosen),
        ),
    )
