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
  whole (``rotor``).

Recompute all, sqrt(n), selective and rotor are also tried with the blocks' inputs sent to the places.
Each gives decisions that fit, or nothing. State is placed uniformly (``uniform_states``), and rules see the
machine without what it takes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from memtrain.planner.ranges.choices import (
    KEEP,
    RECOMPUTE,
    SLOT,
    Action,
    Kind,
    in_slots,
)
from memtrain.planner.ranges.formulate import Decisions, Formulated
from memtrain.planner.ranges.greedy import Greedy, Plan
from memtrain.planner.ranges.model import Problem, TensorClass
from memtrain.planner.ranges.rotor import least_recompute
from memtrain.planner.ranges.simulate import step_seconds
from memtrain.planner.ranges.uniform_states import MAX_STATE_PLACEMENTS, beside, uniform_states

BEST_STATE_PLACEMENTS = 4
"""Of the uniform placements of state, what every rule is tried with."""
MAX_ALPHAS = 16
"""Values of alpha above 0 that are tried."""
SLOT_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of a block's bytes, the most that greedy sends through a slot: each share is tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """A row of the ablation."""

    name: str
    decisions: Decisions
    """Empty where the rule finds nothing that fits."""
    step_seconds: float
    """inf where nothing fits."""


def baselines(formulated: Formulated, *, deadline: float = math.inf) -> tuple[Baseline, ...]:
    """Every rule, through the same simulator and the same rows; ``deadline`` (monotonic) cuts them short."""
    placements = [(placement, beside(formulated, placement)) for placement in _placements(formulated)]
    rows = []
    for name, rule in RULES.items():
        best, decided = math.inf, Decisions()
        for placement, rest in placements:
            for plan in rule(rest):
                if time.monotonic() > deadline:
                    break
                decisions, seconds = _judge(formulated, plan, placement)
                if seconds < best:
                    best, decided = seconds, decisions
        rows.append(Baseline(name=name, decisions=decided, step_seconds=best))
    return tuple(rows)


def _judge(formulated: Formulated, plan: Plan, placement: dict[int, int]) -> tuple[Decisions, float]:
    """The decisions and their step, inf where they do not fit."""
    decisions = formulated.decisions(_counts(formulated, plan) | placement)
    if formulated.excess(decisions):
        return decisions, math.inf
    return decisions, step_seconds(formulated, decisions)


def _placements(formulated: Formulated) -> list[dict[int, int]]:
    """The uniform placements of state that are fastest where activations need the least."""
    found = list(itertools.islice(uniform_states(formulated), MAX_STATE_PLACEMENTS))
    if len(found) <= BEST_STATE_PLACEMENTS:
        return found
    *_, light = _recompute_all(formulated.problem)
    return sorted(found, key=lambda placement: _judge(formulated, light, placement)[1])[
        :BEST_STATE_PLACEMENTS
    ]


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
    plan = _each(
        problem, lambda index, tensor: RECOMPUTE if tensor.attention and tensor.recompute_seconds else KEEP
    )
    yield from _with_inputs_out(problem, plan)


def _with_inputs_out(problem: Problem, plan: Plan) -> Iterator[Plan]:
    """The plan, and again with what cannot be recomputed sent to the places, one after the other."""
    yield plan
    if not problem.machine.places:
        return
    inputs = [sum(t.total_bytes for t in b.classes if not t.recompute_seconds) for b in problem.blocks]
    for free in _rooms(problem, max(inputs)):
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


def _rooms(problem: Problem, slot_bytes: int) -> Iterator[dict[str, int]]:
    """Free bytes by place: without those two hops away, and with them and slots for the way there."""
    machine = problem.machine
    yield {p.name: p.capacity_bytes for p in machine.places if len(p.hops) == 1}
    if machine.staging is not None and any(len(p.hops) == 2 for p in machine.places):
        room = {p.name: p.capacity_bytes for p in machine.places}
        room[machine.staging] = max(0, room[machine.staging] - machine.forwarding_slots * slot_bytes)
        yield room


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


def _uniform_alpha(problem: Problem) -> Iterator[Plan]:
    """Alphas in steps of a chunk, or of a 16th where chunks are finer, the largest first."""
    if not problem.machine.places:
        return
    most = min(MAX_ALPHAS, max((t.chunks for b in problem.blocks for t in b.classes), default=1))
    heaviest = max(sum(t.total_bytes for t in b.classes) for b in problem.blocks)
    for share in range(most, -1, -1):
        for free in _rooms(problem, heaviest):
            plan = _with_alpha(problem, share / most, free)
            if plan:
                yield plan


def _with_alpha(problem: Problem, alpha: float, free: dict[str, int]) -> Plan:
    plan: Plan = []
    for index, block in enumerate(problem.blocks):
        if in_slots(problem, index):
            plan.append([{SLOT: t.chunks} for t in block.classes])
            continue
        row = []
        for tensor in block.classes:
            always = not tensor.recompute_seconds or tensor.attention
            leaves = tensor.chunks if always else math.floor(alpha * tensor.chunks + 1e-9)
            again: dict[Action, int] = {RECOMPUTE: tensor.chunks - leaves} if leaves < tensor.chunks else {}
            counts, left = _spread(tensor, leaves, free)
            if left:
                return []
            row.append(again | counts)
        plan.append(row)
    return plan


def _greedy(problem: Problem) -> Iterator[Plan]:
    heaviest = max(sum(t.total_bytes for t in b.classes) for b in problem.blocks)
    for share in SLOT_SHARES:
        for room in _rooms(problem, math.ceil(share * heaviest)):
            plan = Greedy(problem, share * heaviest, room).run()
            if plan:
                yield plan


def _rotor(problem: Problem) -> Iterator[Plan]:
    """Least recompute time with every block kept or recomputed whole; inputs stay, or all leave."""
    for inputs_stay in (True, False):
        chosen = least_recompute(problem, inputs_stay=inputs_stay)
        if chosen is None:
            continue
        plan = _each(problem, partial(_keep_or_recompute, chosen))
        stays, *out = _with_inputs_out(problem, plan)
        yield from [stays] if inputs_stay else out


def _keep_or_recompute(keeps: tuple[bool, ...], index: int, tensor: TensorClass) -> Action:
    return KEEP if keeps[index] else _recompute_or_keep(tensor)


RULES: dict[str, Callable[[Problem], Iterator[Plan]]] = {
    "keep all": _keep_all,
    "recompute all": _recompute_all,
    "sqrt(n) (Chen et al.)": _sqrt,
    "selective (Megatron-LM)": _selective,
    "uniform alpha (MEMO)": _uniform_alpha,
    "greedy (Capuchin)": _greedy,
    "rotor": _rotor,
}
