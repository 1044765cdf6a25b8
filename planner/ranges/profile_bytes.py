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

from memtrain.planner.ranges.bytes_check import Bill
from memtrain.planner.ranges.model import DEVICE, Problem
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planner.ranges.schedule import COMPUTE, STATE_SLOTS

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
"""What backward makes again, recomputed or decompressed."""
TRANSIENT = "transients"
CATEGORIES = (RESERVED, WEIGHTS, OPTIMIZER, GRADIENTS, SLOTS, SAVED, RESTORED, TRANSIENT)
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
    every, slots = range(len(blocks)), problem.machine.slots
    always = {
        RESERVED: problem.reserved_bytes,
        WEIGHTS: sum(bill.held(i, "parameter", DEVICE) for i in every),
        OPTIMIZER: sum(bill.held(i, "optimizer", DEVICE) for i in every),
        SLOTS: slots * max(bill.slot)
        + slots * max(bill.held(i, "parameter", away=True) for i in every)
        + STATE_SLOTS * max(_leaving(bill, i) for i in every)
        + STATE_SLOTS * max(bill.streamed(i) for i in every),
    }
    found = {}
    kept = 0
    waiting = sum(bill.held(i, "gradient", DEVICE) for i in every)
    for index, block in enumerate(blocks):
        kept += bill.kept[index]
        base = always | {GRADIENTS: waiting, SAVED: kept}
        found[f"forward {block.name}"] = _present(base | {TRANSIENT: block.forward_transient_bytes})
        found[f"backward {block.name}"] = _present(
            base | {TRANSIENT: block.backward_transient_bytes, RESTORED: bill.restored[index]}
        )
        waiting -= bill.held(index, "gradient", DEVICE)
    return found


def device_moments(plan: RangePlan, problem: Problem) -> tuple[Moment, ...]:
    """The positions in the order of the step, each until the next begins; the first from the step's start.

    Between two passes the device may hold less than at the first of them, never more.
    """
    sizes = device_positions(plan, problem)
    passes = [e for e in plan.events if e.resource == COMPUTE and e.name in sizes]
    passes.sort(key=lambda event: (event.start_seconds, event.end_seconds))
    starts = [0.0, *(event.start_seconds for event in passes[1:]), plan.step_seconds]
    return tuple(
        Moment(position=event.name, start_seconds=start, end_seconds=end, sizes=sizes[event.name])
        for event, start, end in zip(passes, starts, starts[1:], strict=False)
    )


def place_sizes(plan: RangePlan, problem: Problem, place: str) -> Sizes:
    """Bytes that the plan sets aside in ``place``, all step long, by category."""
    bill, machine = Bill(plan, problem), problem.machine
    every = range(len(problem.blocks))
    sizes = {
        WEIGHTS: sum(bill.held(i, "parameter", place) for i in every),
        OPTIMIZER: sum(bill.held(i, "optimizer", place) for i in every),
        GRADIENTS: sum(bill.held(i, "gradient", place) for i in every),
        SAVED: sum(bill.sent[i][place] for i in every),
    }
    if place == machine.staging:
        far = [p.name for p in machine.places if len(p.hops) == 2]
        through = max(sum(bill.sent[i][p] for p in far) for i in every)
        staged = max(
            sum(size for h, _, size in bill.states(i) if h.place in far) + bill.fleeting(i, on_cpu=True)
            for i in every
        )
        sizes[SLOTS] = machine.forwarding_slots * through + STATE_SLOTS * staged
        # New parameters of the device that wait for their block's next forward.
        sizes[WEIGHTS] += sum(bill.new_parameters(i) for i in every)
    return _present(sizes)


def stays(plan: RangePlan, problem: Problem, place: str) -> tuple[Stay, ...]:
    """When each block's saved tensors are in ``place``, in the order of the blocks."""
    bill = Bill(plan, problem)
    link = problem.machine.place(place).hops[-1].link
    out = {e.name: e.start_seconds for e in plan.events if e.resource == f"write:{link}"}
    back = {e.name: e.end_seconds for e in plan.events if e.resource == f"read:{link}"}
    found = []
    for index, block in enumerate(problem.blocks):
        size = bill.sent[index][place]
        if size:
            found.append(
                Stay(
                    block=block.name,
                    size_bytes=size,
                    start_seconds=out[f"write {block.name}"],
                    end_seconds=back[f"read {block.name}"],
                )
            )
    return tuple(found)


def _leaving(bill: Bill, index: int) -> int:
    """Gradients of a block that do not stay on the device."""
    return (
        bill.held(index, "gradient", away=True)
        + bill.fleeting(index, on_cpu=True)
        + bill.fleeting(index, on_cpu=False)
    )


def _present(sizes: dict[str, int]) -> Sizes:
    return {name: sizes[name] for name in CATEGORIES if sizes.get(name)}
