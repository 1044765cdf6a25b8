"""What parallel degrees send: the messages of one block in its passes, and of one pipeline stage.

Letters and sources as in ``parallel.py``; each function names the paper of its formula. ``zero_traffic`` is
what data and context ranks send of weights and gradients.
"""

from __future__ import annotations

from memtrain.planner.parallel import Degrees, Group, ModelShape
from memtrain.planner.traffic import Traffic, When
from memtrain.planner.zero_traffic import unit_traffic


def block_traffic(
    degrees: Degrees,
    shape: ModelShape,
    *,
    batch: int,
    sequence: int,
    block_parameters: float,
    expert_parameters: float = 0,
    value_bytes: int = 2,
    gradient_bytes: int = 2,
) -> list[Traffic]:
    """What one block sends for one micro-batch of ``batch`` sequences of ``sequence`` tokens.

    Args:
        block_parameters: of one block on one tensor rank without its experts, for ZeRO.
        expert_parameters: of the experts of one block that one rank holds.
        value_bytes: of an activation's or a weight's element.
        gradient_bytes: of a gradient's element as it is reduced.
    """
    tokens = batch * sequence // degrees.context
    return [
        *_tensor(degrees, tokens * shape.hidden * value_bytes),
        *_context(degrees, shape, tokens, value_bytes),
        *_expert(degrees, shape, tokens, value_bytes),
        *unit_traffic(degrees, degrees.replicas, block_parameters, value_bytes, gradient_bytes, at_once=2),
        *unit_traffic(
            degrees, degrees.expert_replicas, expert_parameters, value_bytes, gradient_bytes, at_once=2
        ),
    ]


def stage_traffic(
    degrees: Degrees, shape: ModelShape, *, batch: int, sequence: int, value_bytes: int = 2
) -> list[Traffic]:
    """What a pipeline stage hands on for one micro-batch: b s h / c elements each way (2104.04473, section
    3.2), cut by t under sequence parallelism. The buffer is the neighbour's message."""
    if degrees.pipeline == 1:
        return []
    tokens = batch * sequence // degrees.context // degrees.sequence_cut
    message = tokens * shape.hidden * value_bytes
    return [
        Traffic(
            name=name,
            group=Group.PIPELINE,
            when=when,
            count=1,
            sent_bytes=message,
            buffer_bytes=message,
            overlaps=False,
            to_neighbour=True,
        )
        for name, when in (
            ("activations to the next stage", When.STAGE_FORWARD),
            ("gradients to the stage before", When.STAGE_BACKWARD),
        )
    ]


def _tensor(degrees: Degrees, residual_bytes: float) -> list[Traffic]:
    """2205.05198, section 4.2.2: two all-reduces a pass, or an all-gather and a reduce-scatter in the place
    of each, which send as much. Backward of the latter gathers its two inputs once more for the weights'
    gradients, beside the input's gradient. The gathered tensor is the buffer."""
    ranks = degrees.tensor
    if ranks == 1:
        return []
    once = (ranks - 1) / ranks * residual_bytes
    cut = degrees.sequence_parallel
    name = "all-gather and reduce-scatter of the residual" if cut else "all-reduce of the residual"
    passes = _each_pass(
        name,
        Group.TENSOR,
        count=4 if cut else 2,
        sent_bytes=4 * once,
        buffer_bytes=residual_bytes if cut else 0,
    )
    if cut:
        again = Traffic(
            name="inputs gathered again for the weights' gradients",
            group=Group.TENSOR,
            when=When.BLOCK_BACKWARD,
            count=2,
            sent_bytes=2 * once,
            buffer_bytes=residual_bytes,
            overlaps=True,
        )
        passes.append(again)
    return passes


def _context(degrees: Degrees, shape: ModelShape, tokens: int, value_bytes: int) -> list[Traffic]:
    if degrees.context == 1:
        return []
    key_value = tokens * shape.key_value_width * value_bytes / min(degrees.tensor, shape.key_value_heads)
    if degrees.context_method == "ring":
        return _ring(degrees.context, key_value)
    query = tokens * shape.query_width * value_bytes / degrees.tensor
    return _ulysses(degrees.context, query, key_value)


def _ring(ranks: int, key_value_bytes: float) -> list[Traffic]:
    """Ring attention (2310.01889, section 3): each rank's keys and values travel to the c - 1 others while
    blocks are computed; in backward their gradients travel with them (c times: at the end they return
    home). Two buffers of what travels: one is computed on while the other fills."""
    return [
        Traffic(
            name="keys and values round the ring",
            group=Group.CONTEXT,
            when=When.BLOCK_FORWARD,
            count=ranks - 1,
            sent_bytes=(ranks - 1) * key_value_bytes,
            buffer_bytes=2 * key_value_bytes,
            overlaps=True,
            to_neighbour=True,
        ),
        Traffic(
            name="keys, values and their gradients round the ring",
            group=Group.CONTEXT,
            when=When.BLOCK_BACKWARD,
            count=2 * ranks - 1,
            sent_bytes=(ranks - 1) * key_value_bytes + ranks * key_value_bytes,
            buffer_bytes=4 * key_value_bytes,
            overlaps=True,
            to_neighbour=True,
        ),
    ]


def _ulysses(ranks: int, query_bytes: float, key_value_bytes: float) -> list[Traffic]:
    """DeepSpeed-Ulysses (2309.14509, section 3.2): all-to-all of q, k, v into heads and of the output back;
    backward the same with gradients. Each rank sends (c-1)/c of its part. The received q, k and v are the
    buffer."""
    return _each_pass(
        "all-to-all of q, k, v and the output",
        Group.CONTEXT,
        count=4,
        sent_bytes=(ranks - 1) / ranks * (2 * query_bytes + key_value_bytes),
        buffer_bytes=query_bytes + key_value_bytes,
    )


def _expert(degrees: Degrees, shape: ModelShape, tokens: int, value_bytes: int) -> list[Traffic]:
    """GShard (2006.16668, section 3.2): tokens go to the ranks of their experts and come back, in each
    pass; balanced routing is assumed. The buffer is what arrives and what goes back."""
    ranks = degrees.expert
    if ranks == 1:
        return []
    routed = tokens // degrees.sequence_cut * shape.experts_per_token * shape.hidden * value_bytes
    return _each_pass(
        "tokens to experts and back",
        Group.EXPERT,
        count=2,
        sent_bytes=2 * (ranks - 1) / ranks * routed,
        buffer_bytes=2 * routed,
    )


def _each_pass(
    name: str, group: Group, *, count: int, sent_bytes: float, buffer_bytes: float
) -> list[Traffic]:
    """The same in a block's forward and backward pass, where arithmetic waits for it."""
    return [
        Traffic(
            name=name,
            group=group,
            when=when,
            count=count,
            sent_bytes=sent_bytes,
            buffer_bytes=buffer_bytes,
            overlaps=False,
        )
        for when in (When.BLOCK_FORWARD, When.BLOCK_BACKWARD)
    ]
