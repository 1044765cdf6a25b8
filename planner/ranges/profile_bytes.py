"""What lies where during a plan's step, category by category: what a picture of its memory is drawn from.

``ledger`` adds up the bytes of a position as one expression, which is all that a solver needs. Here the same
bytes are split by what they are for. The counts are those of the checker (``bytes_check.Bill``), so that a
plan read from a file can be drawn without formulating its problem again.

On the device a category has one size per position of the step (forward and backward of each block); in any
other place the plan sets aside one size for the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from memtrain.planner.ranges.bytes_check import Bill
from memtrain.planner.ranges.model import DEVICE, Problem
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planner.ranges.schedule import COMPUTE

RESERVED = "reserved"
"""Libraries, the allocator's slack, state without a class."""
WEIGHTS = "weights"
OPTIMIZER = "optimizer state"
GRADIENTS = "gradients"
SLOTS = "transfer slots"
"""Staging on either side of a link, whatever passes through it."""
SAVED = "saved tensors"
"""From a block's forward to its backward, compressed or not."""
RESTORED = "recomputed"
"""What backward makes again, recomputed or decompressed, beside what a transfer slot has room for."""
TRANSIENT = "transients"
CATEGORIES = (RESERVED, WEIGHTS, OPTIMIZER, SLOTS, GRADIENTS, SAVED, RESTORED, TRANSIENT)
"""From what stays all step long to what comes and goes."""

Sizes = Mapping[str, int]
"""Bytes by category, those of ``CATEGORIES`` that are there at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """The device from one forward or backward to the next."""

    position: str
    """``forward layers.3``, ``backward layers.3``."""
    start_seconds: float
    end_seconds: float
    sizes: Sizes

    @property
    def total_bytes(self) -> int:
        """Of all categories."""
        return sum(self.sizes.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Stay:
    """Saved tensors of one block in a place, from the start of their way out to the end of the way back."""

    block: str
    size_bytes: int
    start_seconds: float
    end_seconds: float


def device_positions(plan: RangePlan, problem: Problem) -> dict[str, Sizes]:
    """Bytes on the device by position and category; their sum is the simulator's, to the byte."""
    bill, blocks = Bill(plan, problem), problem.blocks
    every = range(len(blocks))
    always = {
        RESERVED: problem.reserved_bytes,
        WEIGHTS: sum(bill.held(i, "parameter", DEVICE) for i in every),
        OPTIMIZER: sum(bill.held(i, "optimizer", DEVICE) for i in every),
    }
    found: dict[str, dict[str, int]] = {}
    kept = (problem.in_flight - 1) * sum(bill.kept)
    waiting = sum(bill.held(i, "gradient", DEVICE) for i in every)
    for index, block in enumerate(blocks):
        kept += bill.kept[index]
        base = always | {GRADIENTS: waiting, SAVED: kept}
        found[f"forward {block.name}"] = base | {TRANSIENT: block.forward_transient_bytes}
        found[f"backward {block.name}"] = base | {
            # New gradients lie beside the sums to which the device adds them.
            GRADIENTS: waiting + bill.summed(index, on_cpu=False),
            TRANSIENT: block.backward_transient_bytes,
            RESTORED: bill.beside_slot(index),
        }
        if problem.micro_batches == 1:
            waiting -= bill.held(index, "gradient", DEVICE)
    fullest, most = bill.peak(DEVICE)
    slots = most - sum(found[fullest].values())
    return {position: _present(sizes | {SLOTS: slots}) for position, sizes in found.items()}


def device_moments(plan: RangePlan, problem: Problem) -> tuple[Moment, ...]:
    """The positions in the order of the timeline, each until the next begins or its part of the step ends.

    Between two passes the device may hold less than at the first of them, never more.
    """
    sizes = device_positions(plan, problem)
    found = []
    for number, part in enumerate(plan.parts):
        passes = [e for e in plan.events if e.part == number and e.resource == COMPUTE and e.name in sizes]
        passes.sort(key=lambda event: (event.start_seconds, event.end_seconds))
        edges = [part.start_seconds, *(e.start_seconds for e in passes[1:]), part.end_seconds]
        found += [
            Moment(position=event.name, start_seconds=start, end_seconds=end, sizes=sizes[event.name])
            for event, (start, end) in zip(passes, pairwise(edges), strict=True)
        ]
    return tuple(found)


def place_sizes(plan: RangePlan, problem: Problem, place: str) -> Sizes:
    """Bytes that the plan sets aside in ``place``, all step long, by category."""
    bill, every = Bill(plan, problem), range(len(problem.blocks))
    sizes = {
        WEIGHTS: sum(bill.held(i, "parameter", place) for i in every),
        OPTIMIZER: sum(bill.held(i, "optimizer", place) for i in every),
        GRADIENTS: sum(bill.held(i, "gradient", place) for i in every),
        SAVED: problem.in_flight * sum(bill.sent[i][place] for i in every),
    }
    if place == problem.machine.staging:
        # New parameters of the device wait here for their block's next forward.
        sizes[WEIGHTS] += sum(bill.new_parameters(i)[0] for i in every)
    _, most = bill.peak(place)
    return _present(sizes | {SLOTS: most - sum(sizes.values())})


def stays(plan: RangePlan, problem: Problem, place: str) -> tuple[Stay, ...]:
    """When each block's saved tensors are in ``place``, part by part and block by block.

    With several micro-batches in flight some are there all the time, and in what order they come and go is
    not in the timeline: what the plan sets aside for them stays from its beginning to its end.
    """
    bill, link = Bill(plan, problem), problem.machine.place(place).hops[-1].link
    sent = [
        (block.name, bill.sent[i][place]) for i, block in enumerate(problem.blocks) if bill.sent[i][place]
    ]
    if problem.in_flight > 1:
        end = plan.parts[-1].end_seconds
        return tuple(
            Stay(block=name, size_bytes=problem.in_flight * size, start_seconds=0.0, end_seconds=end)
            for name, size in sent
        )
    jobs = {(e.part, e.resource, e.name): e for e in plan.events}
    return tuple(
        Stay(
            block=name,
            size_bytes=size,
            start_seconds=jobs[number, f"write:{link}", f"write {name}"].start_seconds,
            end_seconds=jobs[number, f"read:{link}", f"read {name}"].end_seconds,
        )
        for number in range(len(plan.parts))
        for name, size in sent
    )


def _present(sizes: dict[str, int]) -> Sizes:
    return {name: sizes[name] for name in CATEGORIES if sizes.get(name)}
