"""The planning problem as a mixed-integer program: what no plan can beat, and a choice worth simulating.

Binary variables choose an action per block, tiers per unit, ring sizes and the shard; continuous ones are
times. Every row is implied by the simulator's rules (docs/plan.md lists them), so that the optimum is a lower
bound of every plan's simulated step; memory and capacity rows are the bill's, exactly. First-in-first-out
queues keep the order of the blocks, so the maxima need no binaries: the objective pushes times down.

PuLP holds the model. Bound and status are read from HiGHS itself: PuLP reports a stopped solver as optimal.

Index letters: ``l`` block, ``u`` unit, ``t`` tier, ``n`` slots of a ring, ``s`` shard.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pulp

from memtrain.planner.actions import Action, StateDecision, Tier, UpdateSchedule
from memtrain.planner.answer import Answer
from memtrain.planner.block_parts import copied_bytes, joined_bytes, recompute_seconds, traffic
from memtrain.planner.choices import Choices, Request
from memtrain.planner.decisions import (
    GRADIENT_SLOTS,
    gradient_passes,
    gradient_slot_bytes,
    unit_elements,
    update_slots,
)
from memtrain.planner.profile import UnitProfile
from memtrain.planner.program_chains import ReadChains
from memtrain.planner.queues import mixed_fraction
from memtrain.planner.simulate import MAX_PIECES
from memtrain.planner.weight_choices import Expression
from memtrain.planner.weight_windows import BEYOND, place_of


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
        apart = 1 if self.in_backward else 0  # the last one has the updates
        total = self._micro_batch(first=True, last=micro_batches == 1)
        if micro_batches > 1 + apart:
            total = total + (micro_batches - 1 - apart) * self._micro_batch(first=False, last=False)
        if apart and micro_batches > 1:
            total = total + self._micro_batch(first=False, last=True)
        if self.schedule is UpdateSchedule.SEQUENTIAL:
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

        written = (self.weights.written(t, unit).arithmetic for t in self.space.tiers)
        return self.unit_sum(unit, seconds) + pulp.lpSum(written)

    def _held(self, tier: Tier, *, read: bool, in_use: int | None = None) -> Expression:
        """Seconds of a queue that the windows for weights stand for."""
        return self.weights.held(tier, read=read, in_use=in_use).queue

    def _held_arithmetic(self) -> Expression:
        """Seconds of arithmetic that reading what windows hold would take."""
        return pulp.lpSum(self.weights.held(t, read=True).arithmetic for t in self.space.tiers)

    def _unit_before(self, place: int) -> int | None:
        """A unit that is used in the turn before that of ``place`` in a forward."""
        last = len(self.profile.blocks) - 1 if place == BEYOND else place - 1
        return next(iter(self._units_at(last)), None)

    def _units_at(self, place: int) -> list[int]:
        return [u for u, unit in enumerate(self.profile.units) if place_of(unit) == place]

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

    def _micro_batch(self, *, first: bool, last: bool) -> Expression:
        """Seconds of one micro-batch on the computing thread; its queues are empty as it begins."""
        profile, tiers = self.profile, self.space.tiers
        now: Expression = pulp.LpAffineExpression()
        write_end: dict[Tier, Expression] = {t: pulp.LpAffineExpression() for t in tiers}
        writes: dict[Tier, Expression] = {t: pulp.LpAffineExpression() for t in tiers}
        runs_ahead = first and self.ahead
        # What the windows hold as the pass begins is not read.
        reads: dict[Tier, Expression] = {t: -1 * self._held(t, read=True) for t in tiers}
        held = {t: {"weights": self._held(t, read=True)} if self.weights.open_on(t) else {} for t in tiers}
        present = {t: dict(held[t]) for t in tiers}
        for t in tiers if runs_ahead else ():
            held[t]["update"] = self._update_slots(t, read=True)
            present[t]["update"] = pulp.LpAffineExpression()
        chains = {t: ReadChains(self, pulp.LpAffineExpression(), present[t]) for t in tiers}

        def fetch(place: int, now: Expression) -> Expression:
            """Weights that live on a tier come before what needs them."""
            before = self._unit_before(place)
            for u in self._units_at(place):
                for t in tiers:
                    if t not in self.space.weights[u]:
                        continue
                    if runs_ahead and self.profile.units[u].overwritten:
                        continue  # its update makes them anew
                    held[t]["weights"] = self._held(t, read=True, in_use=before)
                    weights, there = self.weights.read(t, u), self.time()
                    self.add(there >= now)
                    for came in chains[t].come("weights", weights.queue, now, held[t]):
                        self.add(there >= came)
                    now = there + weights.arithmetic
                    reads[t] = reads[t] + weights.queue
            return now

        def update(place: int, now: Expression) -> Expression:
            now = fetch(place, now)
            if not runs_ahead:
                return now
            for u in self._units_at(place):
                done = self.time()
                self.add(done >= now + self._update_compute(u))
                for t in tiers:
                    read, write = self._update_work(t, u, read=True), self._update_work(t, u, read=False)
                    weights, stored = self.weights.written(t, u).queue, self.time()
                    for fetched in chains[t].come("update", read, now, held[t]):
                        self.add(done >= fetched)
                    self.add(stored >= write_end[t] + write + weights)
                    behind = self._update_slots(t, read=False) + self._held(t, read=False)
                    self.add(done >= stored - weights - behind)
                    reads[t] = reads[t] + read
                    writes[t] = writes[t] + write + weights
                    self.add(
                        self._busy(t) * done
                        >= reads[t]
                        + writes[t]
                        - behind
                        - self._slots(t, self.machine.link(t).write_bytes_per_second)
                    )
                    write_end[t] = stored
                now = pulp.LpAffineExpression(done)
            return now

        now = update(-1, now) + profile.prologue_forward_seconds
        for index in range(len(profile.blocks)):
            now = update(index, now)
            out = self.block_sum(
                index,
                lambda b, d: copied_bytes(b, d) * self.copy + sum(s * self.cpu[w] for w, s in traffic(b, d)),
            )
            done = self.time()
            arithmetic = self.block_sum(index, lambda b, d: b.in_form(d.form).forward_seconds)
            self.add(done >= now + arithmetic + out)
            for t in tiers:
                work, rate = self._work(t, index, read=False), self.machine.link(t).write_bytes_per_second
                behind = 0.0
                if runs_ahead:
                    behind = self._update_slots(t, read=False) + self._held(t, read=False)
                free = write_end[t] - self._slots(t, rate, index) - behind
                self.add(done >= free + arithmetic + out)
                stored = self.time()
                self.add(stored >= write_end[t] + work)
                self.add(stored >= done + work)
                writes[t] = writes[t] + work
                write_end[t] = pulp.LpAffineExpression(stored)
            now = pulp.LpAffineExpression(done)
        now = update(BEYOND, now) + profile.epilogue_forward_seconds + profile.epilogue_backward_seconds
        updates = last and self.in_backward
        return self._backward(now, first=first, updates=updates) - self._held_arithmetic()

    def _backward(self, turn: Expression, *, first: bool, updates: bool) -> Expression:
        profile, tiers = self.profile, self.space.tiers
        rates = {t: self.machine.link(t).read_bytes_per_second for t in tiers}
        # What the slots still hold at the turn is not read: neither its time nor its processor time counts.
        now = turn - pulp.lpSum(self._slots(t, rates[t]) * rates[t] * self.cpu[t] for t in tiers)
        now = now - self._held_arithmetic()
        head = next(iter(self._units_at(BEYOND)), None)
        held = {
            t: {"weights": self._held(t, read=True, in_use=head)} if self.weights.open_on(t) else {}
            for t in tiers
        }
        present = {t: {"activations": self._slots(t, rates[t])} | held[t] for t in tiers}
        # From ``now``: what is held costs no arithmetic wherever in the pass its turn comes.
        chains = {t: ReadChains(self, now, present[t]) for t in tiers}
        reads = {t: -1 * pulp.lpSum(present[t].values()) for t in tiers}
        moves = 1 if first else 2

        def gradient_seconds(p: UnitProfile, d: StateDecision) -> float:
            passes = gradient_passes(stays=d.gradient_tier is Tier.DEVICE, first=first)
            return p.gradient_bytes * (passes * self.copy + self.cpu.get(d.gradient_tier, 0.0) * moves)

        def store(place: int) -> Expression:
            """Gradients as they come; with ``updates`` also what their units' updates compute."""
            stored = pulp.lpSum(self.unit_sum(u, gradient_seconds) for u in self._units_at(place))
            if updates:
                stored += pulp.lpSum(self._update_compute(u) for u in self._units_at(place))
            return stored

        def weights(tier: Tier, place: int) -> tuple[Expression, Expression]:
            found = [self.weights.read(tier, u) for u in self._units_at(place)]
            return pulp.lpSum(a.queue for a in found), pulp.lpSum(a.arithmetic for a in found)

        now = now + store(BEYOND)
        later: Expression | None = None
        for index in reversed(range(len(profile.blocks))):
            again = self.block_sum(
                index, lambda b, d: recompute_seconds(b, d) + joined_bytes(b, d) * self.copy
            ) + self.block_sum(index, lambda b, d: b.in_form(d.form).backward_seconds)
            fetch = self.block_sum(index, lambda b, d: sum(s * self.cpu[w] for w, s in traffic(b, d)))
            fetch += pulp.lpSum(weights(t, index)[1] for t in tiers)
            over = self.time()
            self.add(over >= now + again + fetch)
            for t in tiers:
                if later is not None:
                    held[t]["activations"] = self._slots(t, rates[t], index + 1)
                work = {"activations": self._work(t, index, read=True)}
                if self.weights.open_on(t):
                    used = next(iter(self._units_at(index + 1)), None)
                    held[t]["weights"] = self._held(t, read=True, in_use=used)
                    work["weights"] = weights(t, index)[0]
                for kind, seconds in work.items():
                    for fetched in chains[t].come(kind, seconds, later, held[t]):
                        self.add(over >= fetched + again)
                    reads[t] = reads[t] + seconds
            later = over
            now = over + store(index)
        last = profile.prologue_backward_seconds + store(-1)
        last += pulp.lpSum(weights(t, -1)[1] for t in tiers)
        end = self.time()
        self.add(end >= now + last)
        for t in tiers:
            if self.weights.open_on(t):
                work_before = weights(t, -1)[0]
                for fetched in chains[t].come("weights", work_before, None, held[t]):
                    self.add(end >= fetched + profile.prologue_backward_seconds)
                reads[t] = reads[t] + work_before
        self._gradient_rows(turn, end, reads, first=first, updates=updates)
        return pulp.LpAffineExpression(end)

    def _gradient_rows(
        self,
        turn: Expression,
        end: pulp.LpVariable,
        reads: dict[Tier, Expression],
        *,
        first: bool,
        updates: bool,
    ) -> None:
        """After the turn a tier must serve what backward fetches, what gradients come and go, and, with
        ``updates``, all that those read and write: the step ends with the last write."""
        units = range(len(self.z))
        for t in self.space.tiers:
            link = self.machine.link(t)
            gradient = pulp.lpSum(
                self.unit_sum(u, partial(_gradient_bytes_on, t)) for u in range(len(self.z))
            )
            fetched = reads[t] + (0.0 if first else gradient * (1 / link.read_bytes_per_second))
            behind = 2 * self._gradient_piece() / link.write_bytes_per_second * self.gradient_ring
            stored = gradient * (1 / link.write_bytes_per_second) - behind
            if updates:
                fetched = fetched + pulp.lpSum(self._update_work(t, u, read=True) for u in units)
                stored = stored + behind + pulp.lpSum(self._update_work(t, u, read=False) for u in units)
                stored = stored + pulp.lpSum(self.weights.written(t, u).queue for u in units)
            self.add(end - turn >= fetched)
            self.add(end - turn >= stored)
            self.add(self._busy(t) * (end - turn) >= fetched + stored)

    def _sequential_update(self) -> Expression:
        end = self.time()
        units = range(len(self.z))
        fetch = [self.weights.read_for_update(t, u).arithmetic for t in self.space.tiers for u in units]
        computing = pulp.lpSum(self._update_compute(u) for u in units) + pulp.lpSum(fetch)
        self.add(end >= computing - self._held_arithmetic())
        for t in self.space.tiers:
            read = pulp.lpSum(self._update_work(t, u, read=True) for u in units) - self._held(t, read=True)
            read += pulp.lpSum(self.weights.read_for_update(t, u).queue for u in units)
            write = pulp.lpSum(self._update_work(t, u, read=False) for u in units)
            write += pulp.lpSum(self.weights.written(t, u).queue for u in units)
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
            dataclasses.replace(
                next(d for v, d in zip(row, choices, strict=True) if v.name in chosen), weight_tier=tier
            )
            for row, choices, tier in zip(
                program.z, program.space.states, program.weights.chosen(chosen), strict=True
            )
        ),
        knobs=(
            next(n for n, v in program.saved_ring.items() if v.name in chosen),
            next(n for n, v in program.input_ring.items() if v.name in chosen),
            program.weights.chosen_windows(chosen),
            next(s for s, v in program.shard.items() if v.name in chosen),
        ),
    )
