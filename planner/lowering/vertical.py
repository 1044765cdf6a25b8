"""A step in vertical order as a problem of ``ranges``: all its micro-batches as one that is as much longer.

All pass a block before the next block's weights come. So a block's seconds, and what it saves, are those of
all of them; its weights are fetched once in each direction, and its gradients, added up while it works, leave
once. One micro-batch is worked on at a time: transients are its own, and beside them the others hold what
passes an edge of the block.
"""

from __future__ import annotations

import dataclasses

from memtrain.planner.lowering.tensors import Fate
from memtrain.planner.ranges.model import Block, Problem, TensorClass


def stacked(problem: Problem) -> Problem:
    """``problem``, one of a step's micro-batches, as the whole step in vertical order.

    Raises:
        ValueError: a pipeline, which has an order of its own.
    """
    count = problem.micro_batches
    if problem.in_flight > 1:
        raise ValueError("vertical order is for one stage: a pipeline has an order of its own")
    others = (count - 1) * _boundary_bytes(problem)
    return dataclasses.replace(
        problem,
        blocks=tuple(_stacked(block, count, others) for block in problem.blocks),
        micro_batches=1,
    )


def _boundary_bytes(problem: Problem) -> int:
    """What one micro-batch has between two blocks: what the widest block is given."""
    inputs = (t.total_bytes for block in problem.blocks for t in block.classes if t.name == Fate.INPUT.value)
    return max(inputs, default=0)


def _stacked(block: Block, count: int, others_bytes: int) -> Block:
    return dataclasses.replace(
        block,
        forward_seconds=count * block.forward_seconds,
        backward_seconds=count * block.backward_seconds,
        forward_transient_bytes=block.forward_transient_bytes + others_bytes,
        backward_transient_bytes=block.backward_transient_bytes + others_bytes,
        classes=tuple(_of_all(tensor, count) for tensor in block.classes),
    )


def _of_all(tensor: TensorClass, count: int) -> TensorClass:
    """A chunk of tokens is that chunk of every micro-batch."""
    return dataclasses.replace(
        tensor,
        chunk_bytes=count * tensor.chunk_bytes,
        recompute_seconds=tuple(count * seconds for seconds in tensor.recompute_seconds),
    )
