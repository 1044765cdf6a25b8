"""What data and context ranks send once a step: gradients beside the last backward, updated weights after it.

Each block's gradients are a bucket (as DDP has them: Li et al., arXiv 2006.15704, section 3.2.3): ready when
the block's backward has ended, sent one after the other in that order. What is still to be sent when backward
is over has nothing to hide behind: at least the bucket of the part with which backward ends, the embedding,
whose gradient is complete only then, and a tied head's with it. Backward is counted without what a plan
computes again or waits for, which would hide more of a backlog, and nothing of the last bucket.

ZeRO's stages 2 and 3 reduce in every micro-batch, so that their gradients are in the blocks' own seconds
(``seconds.Clock.traffic_at``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from memtrain.planner.job import Job
from memtrain.planner.lowering.seconds import Clock, is_expert
from memtrain.planner.lowering.states import stage_units
from memtrain.planner.lowering.tensors import Division
from memtrain.planner.optimizer_bytes import ParameterSpec
from memtrain.planner.zero_traffic import step_traffic


def step_message_seconds(job: Job, backward_seconds: Sequence[float]) -> float:
    """What a step takes longer for them.

    Args:
        job: of one GPU.
        backward_seconds: of each block of ``lowering.problem_of(job)``, in the order of forward.
    """
    clock = Clock(job, Division(estimate=job.estimate, shape=job.shape, degrees=job.degrees))
    sent = [_unit_seconds(clock, unit.parameters) for unit in stage_units(job)]
    buckets = [beside for beside, _ in reversed(sent)]
    return exposed_seconds(backward_seconds[::-1], buckets) + math.fsum(after for _, after in sent)


def exposed_seconds(computing: Iterable[float], sending: Iterable[float]) -> float:
    """Of messages in one queue, each ready when its own arithmetic has ended, what is left after the last.

    Args:
        computing: seconds of arithmetic, one after the other.
        sending: seconds of the message that each of them leads to.
    """
    ready = free = 0.0
    for arithmetic, message in zip(computing, sending, strict=True):
        ready += arithmetic
        free = max(free, ready) + message
    return free - ready


def _unit_seconds(clock: Clock, parameters: Iterable[ParameterSpec]) -> tuple[float, float]:
    """Of one unit: gradients, which are sent beside arithmetic, and updated weights, which are not."""
    job = clock.job
    value_bytes = 4 if job.single else 2
    trained = sorted((p for p in parameters if p.trainable), key=lambda p: is_expert(p.name))
    beside = waits = 0.0
    for experts, group in itertools.groupby(trained, key=lambda p: is_expert(p.name)):
        cut = job.degrees.tensor * (job.degrees.expert if experts else 1)
        for message in step_traffic(
            job.degrees,
            parameters=sum(p.elements for p in group) / cut,
            weight_bytes=value_bytes,
            gradient_bytes=value_bytes,
            experts=experts,
        ):
            seconds = message.seconds(clock.link(message.group))
            beside += seconds if message.overlaps else 0.0
            waits += 0.0 if message.overlaps else seconds
    return beside, waits
