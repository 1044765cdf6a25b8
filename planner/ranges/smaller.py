"""The same step with fewer tokens: what a problem becomes with a shorter sequence or a smaller micro-batch.

State, and what is reserved, stay as they are. Everything else is taken to grow with the tokens, but for
attention along a sequence: recomputing the first chunks costs what ``TensorClass.recompute_seconds`` says, so
that forward's share of it is known; backward is taken to have the same share. Bytes are rounded up.
"""

from __future__ import annotations

import dataclasses
import math

from memtrain.planner.ranges.model import Block, Problem, TensorClass


def shortened(problem: Problem, chunks: int, of: int) -> Problem:
    """The step with the first ``chunks`` of ``of`` chunks of its sequence."""

    def tensor(one: TensorClass) -> TensorClass:
        if one.chunks == 1:
            seconds = tuple(s * chunks / of for s in one.recompute_seconds)
            size = _scaled(one.chunk_bytes, chunks, of)
            return dataclasses.replace(one, chunk_bytes=size, recompute_seconds=seconds)
        left = max(1, math.ceil(one.chunks * chunks / of))
        return dataclasses.replace(one, chunks=left, recompute_seconds=one.recompute_seconds[:left])

    def block(one: Block) -> Block:
        classes = tuple(tensor(t) for t in one.classes)
        whole, rest = (
            math.fsum(s for t in of_classes if t.attention for s in t.recompute_seconds)
            for of_classes in (one.classes, classes)
        )
        attention = min(1.0, whole / one.forward_seconds) if one.forward_seconds else 0.0
        linear = (1 - attention) * chunks / of
        share = linear + (attention * rest / whole if whole else 0.0)
        return _block(one, classes, share, chunks, of)

    return dataclasses.replace(problem, blocks=tuple(block(b) for b in problem.blocks))


def fewer_sequences(problem: Problem, sequences: int) -> Problem:
    """The step with micro-batches of ``sequences`` sequences: all of its chunks are smaller."""
    of = problem.sequences

    def tensor(one: TensorClass) -> TensorClass:
        seconds = tuple(s * sequences / of for s in one.recompute_seconds)
        size = _scaled(one.chunk_bytes, sequences, of)
        return dataclasses.replace(one, chunk_bytes=size, recompute_seconds=seconds)

    blocks = tuple(
        _block(b, tuple(tensor(t) for t in b.classes), sequences / of, sequences, of) for b in problem.blocks
    )
    return dataclasses.replace(problem, blocks=blocks, sequences=sequences)


def _block(one: Block, classes: tuple[TensorClass, ...], share: float, part: int, of: int) -> Block:
    """``one`` with ``share`` of its seconds and ``part`` of ``of`` of its transients."""
    return dataclasses.replace(
        one,
        forward_seconds=one.forward_seconds * share,
        backward_seconds=one.backward_seconds * share,
        forward_transient_bytes=_scaled(one.forward_transient_bytes, part, of),
        backward_transient_bytes=_scaled(one.backward_transient_bytes, part, of),
        classes=classes,
    )


def _scaled(size: int, part: int, of: int) -> int:
    return -(-size * part // of)
