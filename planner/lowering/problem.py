"""One GPU's step as a problem of ``ranges``: a chain of the stage's blocks on the set-up's machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memtrain.planner.actions import MicroBatchOrder, UpdateSchedule
from memtrain.planner.estimate import EstimatedUnit, TracedPart
from memtrain.planner.grid_rule import GridRule
from memtrain.planner.hardware import Quoted
from memtrain.planner.job import Job
from memtrain.planner.lowering.places import machine_of
from memtrain.planner.lowering.seconds import Clock, message_buffer_bytes
from memtrain.planner.lowering.states import (
    PIECES,
    refresh_bytes,
    share_of,
    stage_units,
    state_classes,
    tied_head,
    update_seconds,
)
from memtrain.planner.lowering.tensors import (
    Division,
    Fate,
    class_bytes,
    held_bytes,
    shared_bytes,
    tied_gradient_bytes,
    transient_bytes,
)
from memtrain.planner.lowering.vertical import stacked
from memtrain.planner.ranges.model import (
    ALL_UPDATES,
    SEQUENTIAL_UPDATES,
    Block,
    Machine,
    Problem,
    TensorClass,
)

SLACK = Quoted(
    value=0.02,
    source="assumption: of the device's budget, for the allocator's rounding and gaps; addresses planned "
    "ahead need 0.01 % (benchmarks/addresses.py), PyTorch's allocator more",
)
_NEEDS = {
    Fate.INPUT: (),
    Fate.ROUTING: (),
    Fate.QKV: (Fate.INPUT,),
    Fate.ATTENTION: (Fate.QKV,),
    Fate.PRODUCTS: (Fate.INPUT, Fate.ATTENTION),
    Fate.NEARLY_FREE: (Fate.INPUT, Fate.PRODUCTS),
}
_LOSSY = (Fate.QKV, Fate.PRODUCTS, Fate.NEARLY_FREE)
"""What a codec may touch: inputs would carry its error into every recompute, and attention's output into the
gradient of its own softmax."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Context:
    job: Job
    division: Division
    clock: Clock
    machine: Machine

    @property
    def places(self) -> tuple[str, ...]:
        """Beside the device."""
        return tuple(place.name for place in self.machine.places)


def problem_of(job: Job) -> Problem:
    """What one GPU of ``job`` decides about.

    One micro-batch's forward and backward, and the update; ``micro_batches`` and ``in_flight`` say how often
    and how many at once. In vertical order all of them are one (``lowering.vertical``). Idle time of a
    pipeline is no decision and is added by ``forecast``.

    Raises:
        ValueError: degrees, model and machine do not go together.
    """
    division = Division(estimate=job.estimate, shape=job.shape, degrees=job.degrees)
    clock = Clock(job, division)
    context = _Context(
        job=job,
        division=division,
        clock=clock,
        machine=machine_of(job.setup, chunks=job.chunks, write_limit_bytes=job.nvme_write_limit_bytes),
    )
    blocks, buffers = [], message_buffer_bytes(clock.traffic_of_block())
    for unit in stage_units(job):
        if unit.block is None:
            block, of_messages = _end(context, unit)
            buffers = max(buffers, of_messages)
        else:
            block = _block(context, unit, unit.block)
        blocks.append(block)
    updates = ALL_UPDATES
    if job.clipping or job.micro_batches > 1 or job.update_schedule is UpdateSchedule.AHEAD:
        updates = tuple(update for update in ALL_UPDATES if update.ahead)
    if job.update_schedule is UpdateSchedule.IN_BACKWARD:
        updates = tuple(update for update in ALL_UPDATES if not update.ahead)
    if job.update_schedule is UpdateSchedule.SEQUENTIAL:
        updates = SEQUENTIAL_UPDATES
    if isinstance(job.optimizer, GridRule):
        updates = tuple(update for update in updates if not update.on_cpu)  # products belong on the device
    problem = Problem(
        blocks=tuple(blocks),
        machine=context.machine,
        codecs=job.codecs,
        error_budget=_error_budget(job),
        reserved_bytes=_reserved(context, buffers),
        updates=updates,
        micro_batches=job.micro_batches,
        in_flight=job.in_flight,
        sequences=job.estimate.batch,
    )
    return stacked(problem) if job.micro_batch_order is MicroBatchOrder.VERTICAL else problem


def _block(context: _Context, unit: EstimatedUnit, index: int) -> Block:
    """A transformer block."""
    estimate = context.job.estimate
    part = estimate.classes[estimate.blocks[index].part]
    seconds = context.clock.part(part, context.clock.traffic_at(index))
    forward_waits, backward_waits = context.clock.stage_waits(index)
    sizes = class_bytes(part, context.division)
    return _with_states(
        context,
        estimate.blocks[index].name,
        (seconds.forward + forward_waits, seconds.backward + backward_waits),
        unit,
        transients=transient_bytes(part, context.division),
        classes=tuple(_tensor_class(context, part, kind, size) for kind, size in sizes.items()),
    )


def _tensor_class(context: _Context, part: TracedPart, kind: Fate, size_bytes: int) -> TensorClass:
    chunks = 1 if kind is Fate.ROUTING else context.job.chunks
    return TensorClass(
        name=kind.value,
        chunk_bytes=math.ceil(size_bytes / chunks),
        chunks=chunks,
        recompute_seconds=context.clock.recompute(part, kind, chunks),
        needs=tuple(needed.value for needed in _NEEDS[kind]),
        lossy=kind in _LOSSY,
        attention=kind is Fate.ATTENTION,
    )


def _end(context: _Context, unit: EstimatedUnit) -> tuple[Block, int]:
    """What stands before or after the blocks, and the buffers of its messages.

    What the epilogue saves is needed at once; what the prologue saves is held all step long (``_reserved``).
    """
    estimate, at_once = context.job.estimate, unit.name == "epilogue"
    part = estimate.epilogue if at_once else estimate.prologue
    borrowed = tied_head(context.job) if at_once and context.job.first else ()
    traffic = context.clock.traffic_of_end(unit.parameters, borrowed)
    seconds = context.clock.part(part, traffic)
    block = _with_states(
        context,
        unit.name,
        (seconds.forward, seconds.backward),
        unit,
        transients=transient_bytes(part, context.division, saved_too=at_once, input_too=True),
    )
    return block, message_buffer_bytes(traffic)


def _with_states(
    context: _Context,
    name: str,
    seconds: tuple[float, float],
    unit: EstimatedUnit,
    *,
    transients: tuple[int, int],
    classes: tuple[TensorClass, ...] = (),
) -> Block:
    share = share_of(context.job, unit.parameters)
    states = state_classes(share, context.places)
    return Block(
        name=name,
        forward_seconds=seconds[0],
        backward_seconds=seconds[1],
        forward_transient_bytes=transients[0],
        backward_transient_bytes=transients[1],
        classes=classes,
        states=states,
        pieces=PIECES if states else 1,
        device_update_seconds=update_seconds(context.job, share, unit.parameters),
    )


def _error_budget(job: Job) -> float:
    if job.error_budget is not None:
        return job.error_budget
    return max((codec.error for codec in job.codecs), default=0.0)


def _reserved(context: _Context, message_bytes: int) -> int:
    """On the device whatever is decided: what the ends hold, shared tables, buffers of messages and of an
    optimizer's refresh, slack.

    What the model itself refers to in forward, and tied gradients in backward, are never there together.
    """
    job = context.job
    first = sum(map(context.division.saved, job.estimate.prologue.saved)) if job.first else 0
    tables = shared_bytes(job.estimate.shared, context.division) + job.estimate.buffer_bytes
    together = job.held_batches
    waiting = held_bytes(job.estimate, context.division) * together if job.first else 0
    if job.first and job.last:
        waiting = max(waiting, tied_gradient_bytes(job.estimate, job.degrees) * together)
    stage = math.ceil(sum(t.buffer_bytes for t in context.clock.traffic_of_stage()))
    return (
        first * max(job.in_flight, together)
        + tables
        + waiting
        + message_bytes
        + stage
        + refresh_bytes(job)
        + math.ceil(context.machine.device_capacity_bytes * SLACK.value)
    )
