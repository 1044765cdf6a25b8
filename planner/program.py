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
from functools import partial

import pulp

from memtrain.planner.actions import Action, StateDecision, Tier, UpdateSchedule
from memtrain.planner.answer import Answer
from memtrain.planner.block_parts import copied_bytes, joined_bytes, recompute_seconds, traffic
from memtrain.planner.choices import BEYOND, Choices, Expression, Request, place_of
from memtrain.planner.decisions import (
    GRADIENT_SLOTS,
    gradient_passes,
    gradient_slot_bytes,
    unit_elements,
    update_slots,
)
from memtrain.planner.profile import UnitProfile
from memtrain.planner.queues import mixed_fraction
from memtrain.planner.simulate import MAX_PIECES


class Program(Choices):
    """One schedule's program: the choices, and the least seconds they can take."""

    def __init__(self, request: Request, schedule: UpdateSchedule) -> None:
        super().__init__(request, schedule)
        on_cpu = self.machine.on_cpu
        self.cpu = {k.tier: k.cpu_seconds_per_byte * on_cpu for k in self.machine.links}
        self.state_cpu = {k.tier: k.state_cpu_seconds_per_byte * on_cpu for k in self.machine.links}
        self.copy = on_cpu / self.machine.dram_copy_bytes_per_second
        self._objective()

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
            index, lambda b, d: sum(s / rate + link.latency_seconds for w, s in traffic(b, d) if w is tier)
        )

    def _largest(self, tier: Tier, *, swap: bool, rate: float) -> float:
        sizes = [
            sum(s for w, s in traffic(b, d) if w is tier)
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
            held = held - swap * self.swapped(index) - moved * self.groups(index)
        return held

    def _update_work(self, tier: Tier, unit: int, *, read: bool) -> Expression:
        link = self.machine.link(tier)
        if read:
            rate = link.read_bytes_per_second
            return self.unit_sum(
                unit,
                lambda p, d: (
                    (
                        link.state_load(p.state_bytes, read=True) * (d.optimizer_tier is tier)
                        + p.gradient_bytes * (d.gradient_tier is tier)
                    )
                    / rate
                ),
            )
        rate = link.write_bytes_per_second
        return self.unit_sum(
            unit, lambda p, d: link.state_load(p.state_bytes, read=False) * (d.optimizer_tier is tier) / rate
        )

    def _update_compute(self, unit: int) -> Expression:
        def seconds(p: UnitProfile, d: StateDecision) -> float:
            moved = 2 * p.state_bytes * self.state_cpu.get(d.optimizer_tier, 0.0)
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
                    (link.state_load(p.state_bytes, read=read) + p.gradient_bytes * read)
                    / _pieces(unit_elements(self.profile, p) / shard)
                    for p in self.profile.units
                )
                held += update_slots(self.profile) * (largest / rate + 2 * link.latency_seconds) * chosen
        return held

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
                if place_of(unit) != place:
                    continue
                done = self.time()
                self.add(done >= now + self._update_compute(u))
                for t in tiers:
                    read, write = self._update_work(t, u, read=True), self._update_work(t, u, read=False)
                    fetched, stored = self.time(), self.time()
                    self.add(fetched >= read_end[t] + read)
                    self.add(fetched >= now + read - self._update_slots(t, read=True))
                    self.add(done >= fetched)
                    self.add(stored >= write_end[t] + write)
                    self.add(done >= stored - self._update_slots(t, read=False))
                    reads[t] = reads[t] + read
                    writes[t] = writes[t] + write
                    behind = self._update_slots(t, read=False)
                    self.add(
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
                index,
                lambda b, d: copied_bytes(b, d) * self.copy + sum(s * self.cpu[w] for w, s in traffic(b, d)),
            )
            done = self.time()
            self.add(done >= now + block.forward_seconds + out)
            for t in tiers:
                work, rate = self._work(t, index, read=False), self.machine.link(t).write_bytes_per_second
                behind = self._update_slots(t, read=False) if first and self.ahead else 0.0
                free = write_end[t] - self._slots(t, rate, index) - behind
                self.add(done >= free + block.forward_seconds + out)
                stored = self.time()
                self.add(stored >= write_end[t] + work)
                self.add(stored >= done + work)
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

        def gradient_seconds(p: UnitProfile, d: StateDecision) -> float:
            passes = gradient_passes(stays=d.gradient_tier is Tier.DEVICE, first=first)
            return p.gradient_bytes * (passes * self.copy + self.cpu.get(d.gradient_tier, 0.0) * moves)

        def store(place: int) -> Expression:
            here = (u for u, unit in enumerate(profile.units) if place_of(unit) == place)
            return pulp.lpSum(self.unit_sum(u, gradient_seconds) for u in here)

        now = now + store(BEYOND)
        later: Expression | None = None
        for index in reversed(range(len(profile.blocks))):
            block = profile.blocks[index]
            again = self.block_sum(
                index, lambda b, d: recompute_seconds(b, d) + joined_bytes(b, d) * self.copy
            )
            fetch = self.block_sum(index, lambda b, d: sum(s * self.cpu[w] for w, s in traffic(b, d)))
            over = self.time()
            self.add(over >= now + block.backward_seconds + again + fetch)
            for t in tiers:
                work = self._work(t, index, read=True)
                fetched = self.time()
                self.add(fetched - read_end[t] - work >= 0)
                if later is not None:
                    self.add(fetched >= later - self._slots(t, rates[t], index + 1) + work)
                self.add(over >= fetched + block.backward_seconds + again)
                read_end[t] = pulp.LpAffineExpression(fetched)
                reads[t] = reads[t] + work
            later = over
            now = over + store(index)
        now = now + profile.prologue_backward_seconds + store(-1)
        end = self.time()
        self.add(end >= now)
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
            self.add(end - turn >= fetched)
            self.add(end - turn >= stored)
            self.add(self._busy(t) * (end - turn) >= fetched + stored)

    def _sequential_update(self) -> Expression:
        end = self.time()
        units = range(len(self.z))
        self.add(end >= pulp.lpSum(self._update_compute(u) for u in units))
        for t in self.space.tiers:
            read = pulp.lpSum(self._update_work(t, u, read=True) for u in units)
            write = pulp.lpSum(self._update_work(t, u, read=False) for u in units)
            self.add(end >= read)
            self.add(end >= write)
            self.add(self._busy(t) * end >= read + write)
        return pulp.LpAffineExpression(end)


def _pieces(parts: float) -> int:
    return max(1, min(MAX_PIECES, math.ceil(parts)))


def _gradient_bytes_on(tier: Tier, unit: UnitProfile, decision: StateDecision) -> int:
    return unit.gradient_bytes * (decision.gradient_tier is tier)


def solve_program(request: Request, schedule: UpdateSchedule, time_limit_seconds: float) -> Answer:
    """Build and solve one schedule's program with HiGHS, in this process."""
    program = Program(request, schedule)
    solver = pulp.HiGHS(
        msg=False,
        gapRel=request.options.gap,
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
