"""Plans of other systems' making, as rules over the same decisions: starting points, and rows of an ablation.

- keep all: plain training. Recompute all: full checkpointing.
- sqrt(n): Chen et al. 2016 store every sqrt(n)-th layer and recompute between. Here every block's input is
  stored; every sqrt(n)-th block keeps all it saves, the others recompute.
- selective: Megatron-LM's selective recompute, the attention output alone.
- uniform alpha: MEMO (arXiv 2407.12117): inputs and attention outputs leave, and a fraction alpha of the
  tokens of all else; the rest is recomputed. Beyond the paper, a full place is followed by the next slower
  one, and every alpha is simulated where MEMO takes the largest that its two inequalities allow.
- greedy: Capuchin's order (ASPLOS'20): least time per byte saved first, chunk by chunk, where a transfer
  costs what does not hide behind its block's forward.
- rotor: the dynamic program of Beaumont et al. for keep or recompute over a chain, memory in slots, blocks
  whole. Rotor may also drop a block's input and restart from an earlier one; here inputs stay.

Recompute all, sqrt(n), selective and rotor are also tried with the blocks' inputs sent to the places.
Each gives decisions that fit, or nothing. State is placed uniformly (``uniform_states``).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from memtrain.planner.ranges.choices import (
    KEEP,
    RECOMPUTE,
    SLOT,
    Action,
    Kind,
    actions,
    in_slots,
    stored_bytes,
)
from memtrain.planner.ranges.formulate import Decisions, Formulated
from memtrain.planner.ranges.model import Place, Problem, TensorClass
from memtrain.planner.ranges.simulate import step_seconds
from memtrain.planner.ranges.states import open_places

Plan = list[list[dict[Action, int]]]
"""Counts by block, class and action."""
ROTOR_SLOTS = 500
"""Memory steps of the dynamic program, as in rotor's own code; bytes are rounded up to them."""
MAX_ALPHAS = 16
SLOT_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of a block's bytes, the most that greedy sends through a slot: each share is tried."""
MAX_STATE_PLACEMENTS = 64
"""Uniform placements of state that are tried; one takes about 10 ms with 80 blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """A row of the ablation."""

    name: str
    decisions: Decisions
    """Empty where the rule finds nothing that fits."""
    step_seconds: float
    """inf where nothing fits."""


def baselines(formulated: Formulated) -> tuple[Baseline, ...]:
    """Every rule, through the same simulator and the same rows."""
    placements = list(itertools.islice(uniform_states(formulated), MAX_STATE_PLACEMENTS))
    rows = []
    for name, rule in RULES.items():
        best, decided = math.inf, Decisions()
        for plan in rule(formulated.problem):
            for placement in placements:
                decisions = formulated.decisions(_counts(formulated, plan) | placement)
                if formulated.excess(decisions):
                    continue
                seconds = step_seconds(formulated, decisions)
                if seconds < best:
                    best, decided = seconds, decisions
        rows.append(Baseline(name=name, decisions=decided, step_seconds=best))
    return tuple(rows)


def uniform_states(formulated: Formulated) -> Iterator[dict[int, int]]:
    """The same update and the same place per class for all blocks; one empty choice without state."""
    problem, states = formulated.problem, formulated.states
    names = list(dict.fromkeys(s.name for b in problem.blocks for s in b.states))
    if not names:
        yield {}
        return
    for update in problem.updates:
        where = {
            name: list(
                dict.fromkeys(
                    p
                    for b in problem.blocks
                    for s in b.states
                    if s.name == name
                    for p in open_places(problem, s, update)
                )
            )
            or [""]
            for name in names
        }
        for places in itertools.product(*where.values()):
            wanted = dict(zip(names, places, strict=True))
            counts: dict[int, int] = {}
            for block, updated, placed in zip(problem.blocks, states.updated, states.placed, strict=True):
                if update in updated:
                    counts[updated[update]] = block.pieces
                for placement, variable in placed.items():
                    if placement.update == update and wanted[placement.state.name] == placement.place:
                        counts[variable] = block.pieces
            yield counts


def _counts(formulated: Formulated, plan: Plan) -> dict[int, int]:
    return {
        variables[action]: count
        for block, chosen in zip(formulated.choices.counts, plan, strict=True)
        for variables, counts in zip(block, chosen, strict=True)
        for action, count in counts.items()
    }


def _each(problem: Problem, rule: Callable[[int, TensorClass], Action]) -> Plan:
    """One action per class."""
    return [
        [{rule(index, tensor): tensor.chunks} for tensor in block.classes]
        for index, block in enumerate(problem.blocks)
    ]


def _recompute_or_keep(tensor: TensorClass) -> Action:
    return RECOMPUTE if tensor.recompute_seconds else KEEP


def _keep_all(problem: Problem) -> Iterator[Plan]:
    yield _each(problem, lambda index, tensor: KEEP)


def _recompute_all(problem: Problem) -> Iterator[Plan]:
    yield from _with_inputs_out(problem, _each(problem, lambda index, tensor: _recompute_or_keep(tensor)))


def _sqrt(problem: Problem) -> Iterator[Plan]:
    stride = math.ceil(math.sqrt(len(problem.blocks)))
    plan = _each(
        problem, lambda index, tensor: KEEP if index % stride == stride - 1 else _recompute_or_keep(tensor)
    )
    yield from _with_inputs_out(problem, plan)


def _selective(problem: Problem) -> Iterator[Plan]:
    plan = _each(problem, lambda index, tensor: RECOMPUTE if _is_attention(tensor) else KEEP)
    yield from _with_inputs_out(problem, plan)


def _with_inputs_out(problem: Problem, plan: Plan) -> Iterator[Plan]:
    """The plan, and again with what cannot be recomputed sent to the places, one after the other."""
    yield plan
    if not problem.machine.places:
        return
    free = {place.name: place.capacity_bytes for place in problem.machine.places}
    moved: Plan = []
    for index, (block, chosen) in enumerate(zip(problem.blocks, plan, strict=True)):
        row = []
        for tensor, counts in zip(block.classes, chosen, strict=True):
            if tensor.recompute_seconds:
                row.append(counts)
            elif in_slots(problem, index):
                row.append({SLOT: tensor.chunks})
            else:
                spread, left = _spread(tensor, tensor.chunks, free)
                row.append(spread | ({KEEP: left} if left else {}))
        moved.append(row)
    yield moved


def _spread(tensor: TensorClass, chunks: int, free: dict[str, int]) -> tuple[dict[Action, int], int]:
    """Chunks to the first places with room, which is taken from ``free``; and how many are left over."""
    counts: dict[Action, int] = {}
    for name, room in free.items():
        fits = min(chunks, room // tensor.chunk_bytes) if tensor.chunk_bytes else chunks
        if fits:
            counts[Action(kind=Kind.SWAP, place=name)] = fits
            free[name] -= fits * tensor.chunk_bytes
            chunks -= fits
    return counts, chunks


def _is_attention(tensor: TensorClass) -> bool:
    """The recomputable class that needs the input alone: attention's output, in the words of the model."""
    return bool(tensor.recompute_seconds) and len(tensor.needs) == 1


def _uniform_alpha(problem: Problem) -> Iterator[Plan]:
    """Alphas in steps of a chunk, or of a 16th where chunks are finer, the largest first."""
    if not problem.machine.places:
        return
    most = min(MAX_ALPHAS, max((t.chunks for b in problem.blocks for t in b.classes), default=1))
    for share in range(most, -1, -1):
        plan = _with_alpha(problem, share / most)
        if plan:
            yield plan


def _with_alpha(problem: Problem, alpha: float) -> Plan:
    free = {place.name: place.capacity_bytes for place in problem.machine.places}
    plan: Plan = []
    for index, block in enumerate(problem.blocks):
        if in_slots(problem, index):
            plan.append([{SLOT: t.chunks} for t in block.classes])
            continue
        row = []
        for tensor in block.classes:
            always = not tensor.recompute_seconds or _is_attention(tensor)
            leaves = tensor.chunks if always else math.floor(alpha * tensor.chunks + 1e-9)
            again: dict[Action, int] = {RECOMPUTE: tensor.chunks - leaves} if leaves < tensor.chunks else {}
            counts, left = _spread(tensor, leaves, free)
            if left:
                return []
            row.append(again | counts)
        plan.append(row)
    return plan


def _greedy(problem: Problem) -> Iterator[Plan]:
    for share in SLOT_SHARES:
        plan = _Greedy(problem, share).run()
        if plan:
            yield plan


class _Greedy:
    """Chunks leave their place on the device one by one, the cheapest per byte first."""

    def __init__(self, problem: Problem, slot_share: float) -> None:
        self.problem = problem
        self.limit = slot_share * max(sum(t.total_bytes for t in b.classes) for b in problem.blocks)
        self.plan = _each(problem, lambda index, tensor: KEEP)
        self.kept = [sum(t.total_bytes for t in b.classes) for b in problem.blocks]
        self.restored = [0] * len(self.kept)
        self.slot = [0] * len(self.kept)
        self.queue: list[float] = [0.0] * len(self.kept)
        self.free = {p.name: p.capacity_bytes for p in problem.machine.places}

    def run(self) -> Plan:
        """The plan as soon as the device suffices; empty when nothing is left to move."""
        heap: list[tuple[float, int, int, int, Action]] = []
        for index, block in enumerate(self.problem.blocks):
            for k, tensor in enumerate(block.classes):
                for rank, action in enumerate(actions(self.problem, index, tensor)):
                    if action != KEEP and not action.codec and tensor.chunk_bytes:
                        heap.append((self._cost(index, tensor, action), index, k, rank, action))
        heapq.heapify(heap)
        later: list[tuple[float, int, int, int, Action]] = []
        reached, first = 0, self._overfull()
        while first is not None:
            if first > reached:
                # What stands behind the first overfull position could not help it, and may help this one.
                for entry in later:
                    heapq.heappush(heap, entry)
                later, reached = [], first
            if not heap:
                return []
            cost, index, k, rank, action = heapq.heappop(heap)
            tensor, counts = self.problem.blocks[index].classes[k], self.plan[index][k]
            if index > first:
                later.append((cost, index, k, rank, action))
            elif counts.get(KEEP) and self._room(index, tensor, action):
                now = self._cost(index, tensor, action)
                if now <= cost + 1e-15:
                    self._move(index, tensor, counts, action)
                    first, now = self._overfull(), self._cost(index, tensor, action)
                heapq.heappush(heap, (now, index, k, rank, action))
        return self.plan

    def _overfull(self) -> int | None:
        """The first block at whose forward or backward the device is too small."""
        problem, total = self.problem, self.problem.reserved_bytes
        total += problem.machine.slots * max(self.slot)
        for index, block in enumerate(problem.blocks):
            total += self.kept[index]
            transient = max(
                block.forward_transient_bytes, block.backward_transient_bytes + self.restored[index]
            )
            if total + transient > problem.machine.device_capacity_bytes:
                return index
        return None

    def _room(self, index: int, tensor: TensorClass, action: Action) -> bool:
        if action.kind is Kind.RECOMPUTE:
            return True
        slot = self.slot[index] + tensor.chunk_bytes <= self.limit
        return slot and (not action.place or self.free[action.place] >= tensor.chunk_bytes)

    def _cost(self, index: int, tensor: TensorClass, action: Action) -> float:
        """Seconds per byte of the next chunk."""
        if action.kind is Kind.SLOT:
            return 0.0
        if action.kind is Kind.RECOMPUTE:
            # Chunks before the next one are recomputed already.
            k = self.problem.blocks[index].classes.index(tensor)
            done = self.plan[index][k].get(RECOMPUTE, 0)
            return tensor.recompute_seconds[min(done, tensor.chunks - 1)] / tensor.chunk_bytes
        took = _transfer_seconds(self.problem.machine.place(action.place), tensor.chunk_bytes)
        window = self.problem.blocks[index].forward_seconds
        exposed = max(0.0, self.queue[index] + took - window) - max(0.0, self.queue[index] - window)
        return exposed / tensor.chunk_bytes

    def _move(self, index: int, tensor: TensorClass, counts: dict[Action, int], action: Action) -> None:
        counts[KEEP] -= 1
        counts[action] = counts.get(action, 0) + 1
        self.kept[index] -= tensor.chunk_bytes
        if action.kind is Kind.RECOMPUTE:
            self.restored[index] += tensor.chunk_bytes
            return
        self.slot[index] += stored_bytes(self.problem, tensor, action)
        if action.place:
            self.free[action.place] -= tensor.chunk_bytes
            place = self.problem.machine.place(action.place)
            self.queue[index] += _transfer_seconds(place, tensor.chunk_bytes)


def _transfer_seconds(place: Place, size: int) -> float:
    """Of the slowest copy on the way out."""
    return size / min(hop.write_bytes_per_second for hop in place.hops)


def _rotor(problem: Problem) -> Iterator[Plan]:
    """Least recompute time with every block kept or recomputed whole; inputs stay, or all leave."""
    for inputs_stay in (True, False):
        chosen = _least_recompute(problem, inputs_stay=inputs_stay)
        if chosen is None:
            continue
        plan = _each(problem, partial(_keep_or_recompute, chosen))
        stays, *out = _with_inputs_out(problem, plan)
        yield from [stays] if inputs_stay else out


def _keep_or_recompute(keeps: tuple[bool, ...], index: int, tensor: TensorClass) -> Action:
    return KEEP if keeps[index] else _recompute_or_keep(tensor)


def _least_recompute(problem: Problem, *, inputs_stay: bool) -> tuple[bool, ...] | None:
    """Which blocks keep everything; None when no choice fits."""
    capacity = problem.machine.device_capacity_bytes - problem.reserved_bytes
    if not inputs_stay:
        inputs = [sum(t.total_bytes for t in b.classes if not t.recompute_seconds) for b in problem.blocks]
        capacity -= problem.machine.slots * max(inputs)
    step = max(1, -(-capacity // ROTOR_SLOTS))
    # By slots of memory kept so far: (seconds, choices).
    found: dict[int, tuple[float, tuple[bool, ...]]] = {0: (0.0, ())}
    for block in problem.blocks:
        again = sum(math.fsum(t.recompute_seconds) for t in block.classes)
        heavy = sum(t.total_bytes for t in block.classes if t.recompute_seconds)
        light = sum(t.total_bytes for t in block.classes if not t.recompute_seconds) * inputs_stay
        after: dict[int, tuple[float, tuple[bool, ...]]] = {}
        for slots, (seconds, chosen) in found.items():
            for keeps in (True, False):
                total = slots - (-(light + heavy * keeps) // step)
                restored = 0 if keeps else heavy
                transient = max(block.forward_transient_bytes, block.backward_transient_bytes + restored)
                if total * step + transient > capacity:
                    continue
                offer = (seconds + (0.0 if keeps else again), (*chosen, keeps))
                if total not in after or offer[0] < after[total][0]:
                    after[total] = offer
        found = after
    return min(found.values())[1] if found else None


RULES: dict[str, Callable[[Problem], Iterator[Plan]]] = {
    "keep all": _keep_all,
    "recompute all": _recompute_all,
    "sqrt(n) (Chen et al.)": _sqrt,
    "selective (Megatron-LM)": _selective,
    "uniform alpha (MEMO)": _uniform_alpha,
    "greedy (Capuchin)": _greedy,
    "rotor": _rotor,
}
