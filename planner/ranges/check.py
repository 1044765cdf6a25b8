"""Whether a plan may be trusted: bytes, timeline and dependencies counted again from plan and problem.

Shares no code with what made the plan: it reads ranges, pieces and events, knows what must come before what
and how fast a link is at most, and nothing of formulations or queues' order. Every fault names its rule:

- ``PROBLEM``: a plan of another problem; ``CERTIFICATE``: a bound above the step, a gap or a status that does
  not follow from them, a step shorter than its arithmetic.
- ``CHUNKS``: a chunk without an action, or with two; pieces that do not add up.
- ``ACTION``: an action that the class, the codec or the place does not allow; a recomputed range that is no
  prefix.
- ``ERROR_BUDGET``, ``CAPACITY``, ``WRITE_LIMIT``: a limit exceeded; ``PEAK``: a peak that does not match.
- ``PARTS``: parts of the step that are not those of its micro-batches, or events outside of theirs.
- ``OVERLAP``: two transfers at once in one queue, or two things at once on one processor.
- ``ORDER``: a queue's copies of a kind that do not go through the blocks in their order.
- ``BANDWIDTH``: more over a link at once than both its directions can move.
- ``DURATION``: faster than the link, or than the arithmetic.
- ``DEPENDENCY``: an event missing, or before what it needs (a late prefetch is one), or before its slot is
  free: of saved tensors, parameters, gradients and updates, on the device and in the staging place.
- ``BYTES_MOVED``, ``STEP_SECONDS``: totals that do not match.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from memtrain.planner.ranges.bytes_check import Bill
from memtrain.planner.ranges.model import DEVICE, Block, Problem, TensorClass
from memtrain.planner.ranges.plan import BlockPlan, Range, RangePlan, problem_digest
from memtrain.planner.ranges.timeline_check import timeline_faults

ROUNDING = 1e-9
"""Of an error budget, which is a sum of fractions, and of seconds and gaps, which have nine digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A rule that a plan breaks, with the numbers."""

    rule: str
    message: str


def check(plan: RangePlan, problem: Problem) -> list[Fault]:
    """All faults of ``plan``; of one that is infeasible only those of its decisions."""
    faults = list(_decisions(plan, problem))
    if faults:
        # Bytes and times of broken decisions mean nothing.
        return [Fault(rule=rule, message=message) for rule, message in faults]
    faults += _certificate(plan, problem)
    bill = Bill(plan, problem)
    faults += _bytes(plan, problem, bill)
    if plan.status != "infeasible":
        faults += timeline_faults(plan, problem, bill)
    return [Fault(rule=rule, message=message) for rule, message in faults]


def _certificate(plan: RangePlan, problem: Problem) -> Iterator[tuple[str, str]]:
    """What the plan says about itself."""
    if plan.problem_digest != problem_digest(problem):
        yield "PROBLEM", f"the plan is of {plan.problem_digest}, the problem is {problem_digest(problem)}"
    if plan.status == "infeasible":
        return
    if plan.status not in ("optimal", "gap", "heuristic"):
        yield "CERTIFICATE", f"{plan.status!r} is no status"
    step, bound = plan.step_seconds, plan.lower_bound_seconds
    if bound > step + ROUNDING or step < problem.compute_seconds - ROUNDING * (1 + step):
        least = problem.compute_seconds
        yield "CERTIFICATE", f"the step takes {step} s, its bound is {bound}, its arithmetic {least}"
    gap = (step - bound) / step if step > 0 else 0.0
    if abs(gap - plan.gap) > 2 * ROUNDING * (1 + 1 / max(step, ROUNDING)):
        yield "CERTIFICATE", f"step and bound leave a gap of {gap:.9f}, the plan says {plan.gap}"


def _decisions(plan: RangePlan, problem: Problem) -> Iterator[tuple[str, str]]:
    names = [b.name for b in plan.blocks]
    if names != [b.name for b in problem.blocks]:
        yield "CHUNKS", f"the plan's blocks are {names}"
        return
    # With several micro-batches in flight every slot is taken over.
    last = len(problem.blocks) - (problem.machine.slots if problem.in_flight == 1 else 0)
    for index, (block, decided) in enumerate(zip(problem.blocks, plan.blocks, strict=True)):
        by_class: dict[str, list[Range]] = defaultdict(list)
        for part in decided.ranges:
            by_class[part.tensor].append(part)
        known = {t.name for t in block.classes}
        for name in by_class.keys() - known:
            yield "CHUNKS", f"{block.name} has no class {name}"
        for tensor in block.classes:
            yield from _class(problem, block, tensor, by_class[tensor.name], in_slot=index >= last)
        yield from _pieces(problem, block, decided)


def _class(
    problem: Problem, block: Block, tensor: TensorClass, ranges: list[Range], *, in_slot: bool
) -> Iterator[tuple[str, str]]:
    where = f"{block.name}.{tensor.name}"
    owners = [0] * tensor.chunks
    for part in ranges:
        if not 0 <= part.start < part.stop <= tensor.chunks:
            yield "CHUNKS", f"{where}: range {part.start}-{part.stop} of {tensor.chunks} chunks"
            continue
        for chunk in range(part.start, part.stop):
            owners[chunk] += 1
        yield from _action(problem, tensor, part, where, in_slot=in_slot)
    for chunk, owned in enumerate(owners):
        if owned != 1:
            yield "CHUNKS", f"{where}: chunk {chunk} has {owned} actions"


def _action(
    problem: Problem, tensor: TensorClass, part: Range, where: str, *, in_slot: bool
) -> Iterator[tuple[str, str]]:
    kind, *rest = part.action.split(":")
    places = {p.name for p in problem.machine.places}
    codecs = {c.name: c for c in problem.codecs}
    if kind == "recompute":
        if not tensor.recompute_seconds:
            yield "ACTION", f"{where} cannot be recomputed"
        if part.start != 0:
            yield "ACTION", f"{where}: recomputed chunks {part.start}-{part.stop} are no prefix"
    elif kind in ("compress", "compress-swap"):
        known = bool(rest) and rest[0] in codecs and tensor.lossy
        leaves = kind == "compress-swap"
        if not known or (leaves and (in_slot or rest[1:] not in [[p] for p in codecs[rest[0]].places])):
            yield "ACTION", f"{where}: {part.action} is not allowed"
    elif kind == "swap":
        if len(rest) != 1 or rest[0] not in places or in_slot:
            yield "ACTION", f"{where}: {part.action} is not allowed"
    elif kind == "slot":
        if not in_slot or not places:
            yield "ACTION", f"{where}: its slot is taken over by a later block"
    elif part.action != "keep":
        yield "ACTION", f"{where}: {part.action} is no action"


def _pieces(problem: Problem, block: Block, decided: BlockPlan) -> Iterator[tuple[str, str]]:
    if not block.states:
        return
    allowed = {u.label: u for u in problem.updates}
    total = sum(count for _, count in decided.updates)
    if total != block.pieces:
        yield "CHUNKS", f"{block.name}: {total} of {block.pieces} pieces are updated"
    shares = dict(decided.updates)
    for label in shares:
        if label not in allowed:
            yield "ACTION", f"{block.name}: update {label} is not allowed"
            return
    for state, (label, count) in itertools.product(block.states, shares.items()):
        mine = [h for h in decided.held if h.state == state.name and h.update == label]
        transient = state.role.value == "gradient" and not allowed[label].ahead
        held = sum(h.pieces for h in mine)
        if held != (0 if transient else count):
            yield "CHUNKS", f"{block.name}.{state.name}: {held} of {count} pieces under {label} have a place"
        for part in mine:
            on_cpu = allowed[label].on_cpu and state.role.value != "parameter"
            if part.place not in state.places or (on_cpu and part.place == DEVICE):
                yield "ACTION", f"{block.name}.{state.name} may not lie on {part.place} under {label}"


def _bytes(plan: RangePlan, problem: Problem, bill: Bill) -> Iterator[tuple[str, str]]:
    limits = {DEVICE: problem.machine.device_capacity_bytes}
    limits |= {p.name: p.capacity_bytes for p in problem.machine.places}
    said = {p.place: p.size_bytes for p in plan.peaks}
    for name, limit in limits.items():
        position, peak = bill.peak(name)
        if said.get(name) != peak:
            yield "PEAK", f"{name}: {peak} bytes at {position}, the plan says {said.get(name)}"
        if peak > limit and plan.status != "infeasible":
            yield "CAPACITY", f"{name}: {peak} bytes at {position}, {peak - limit} more than its {limit}"
    for place in problem.machine.places:
        written = bill.written(place.name)
        if place.write_limit_bytes is not None and written > place.write_limit_bytes:
            yield "WRITE_LIMIT", f"{place.name}: {written} bytes a step, {place.write_limit_bytes} allowed"
    if bill.error > problem.error_budget + ROUNDING:
        yield "ERROR_BUDGET", f"error {bill.error} exceeds the budget of {problem.error_budget}"
    if bill.moved != plan.moved_bytes:
        yield "BYTES_MOVED", f"the decisions move {bill.moved} bytes, the plan says {plan.moved_bytes}"
