"""What parallel degrees send: bytes per GPU, how often, over which group, and the buffers it takes.

Bytes are what one GPU *sends* (it receives as many), for ring algorithms: an all-gather or reduce-scatter
of B bytes over n ranks sends (n-1)/n B, an all-reduce twice that, an all-to-all of B local bytes (n-1)/n B
(Thakur et al., IJHPCA 2005). They are divided by an ``Interconnect``'s collective rate, which is measured the
same way. Letters and sources as in ``parallel.py``; each function names the paper of its formula.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

from memtrain.planner.hardware import Interconnect, slower
from memtrain.planner.parallel import Degrees, Group, ModelShape

WEIGHTS_GATHERED = "weights gathered"
GRADIENTS_REDUCED = "gradients reduced"


class When(Enum):
    """How often one item of traffic is sent."""

    BLOCK_FORWARD = "block forward"
    """By every block in every micro-batch's forward pass, and again in each recomputation of it."""
    BLOCK_BACKWARD = "block backward"
    STAGE_FORWARD = "stage forward"
    """By a pipeline stage in every micro-batch."""
    STAGE_BACKWARD = "stage backward"
    STEP = "step"


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """One kind of message of one GPU."""

    name: str
    group: Group
    when: When
    count: int
    """Messages each time."""
    sent_bytes: float
    """By one GPU in all ``count`` messages."""
    buffer_bytes: float
    """Memory that exists only for them, at once."""
    overlaps: bool
    """Whether arithmetic that does not need the result can run meanwhile."""
    to_neighbour: bool = False
    """To one rank and from another; otherwise a collective of the whole group."""

    def seconds(self, link: Interconnect) -> float:
        """Time on ``link``, hidden or not.

        A neighbour is reached over one link where a collective uses all (MI300X), and never faster than a
        collective, whose ranks send and receive at once as well.
        """
        rate = link.collective_bytes_per_second
        if self.to_neighbour:
            rate = slower(rate, link.peer_bytes_per_second)
        return self.sent_bytes / rate.value


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
        *_zero(degrees, degrees.replicas, block_parameters, value_bytes, gradient_bytes, at_once=2),
        *_zero(degrees, degrees.expert_replicas, expert_parameters, value_bytes, gradient_bytes, at_once=2),
    ]


def end_traffic(
    degrees: Degrees, *, parameters: float, value_bytes: int = 2, gradient_bytes: int = 2
) -> list[Traffic]:
    """What ZeRO sends for the embedding or the head, ``parameters`` on one tensor rank, in every micro-batch.

    The weights are gathered once: the head's backward follows its forward at once, and an embedding's reads
    no weights. Each of them is one matrix, needed whole from the first token on and with a gradient that is
    complete after the last; the buffers hold it or the blocks' (``block_traffic``), not both. So arithmetic
    waits, as it does for what FSDP2's root module holds.
    """
    found = _zero(degrees, degrees.replicas, parameters, value_bytes, gradient_bytes, at_once=1)
    # The weights are whole in backward too, beside the gradients: that they are not sent again leaves room.
    return [
        dataclasses.replace(
            message,
            overlaps=False,
            sent_bytes=0.0 if _gathered_again(message) else message.sent_bytes,
        )
        for message in found
    ]


def _gathered_again(message: Traffic) -> bool:
    return message.name == WEIGHTS_GATHERED and message.when is When.BLOCK_BACKWARD


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


def step_traffic(
    degrees: Degrees,
    *,
    parameters: float,
    weight_bytes: int = 2,
    gradient_bytes: int = 2,
    experts: bool = False,
) -> list[Traffic]:
    """What data and context ranks send once a step of ``parameters`` on one tensor and pipeline rank.

    Call it again with ``experts`` for those that a rank holds of the experts: they have N/e replicas.

    ZeRO, section 7: plain data parallelism all-reduces the gradients; stage 1 reduce-scatters them and
    gathers the updated weights, which is as many bytes. Stages 2 and 3 reduce per micro-batch
    (``block_traffic``, since no rank may keep whole gradients), so that stage 2 has the gathering left and
    stage 3 nothing.
    """
    ranks = degrees.expert_replicas if experts else degrees.replicas
    if ranks == 1 or degrees.zero_stage == 3:
        return []
    once = (ranks - 1) / ranks
    reduce = _data(GRADIENTS_REDUCED, When.STEP, once * parameters * gradient_bytes, overlaps=True)
    gather = _data("updated weights gathered", When.STEP, once * parameters * weight_bytes, overlaps=False)
    if degrees.zero_stage == 0:
        both = 2 * once * parameters * gradient_bytes
        return [_data("gradients all-reduced", When.STEP, both, overlaps=True)]
    return [reduce, gather] if degrees.zero_stage == 1 else [gather]


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


def _zero(
    degrees: Degrees, ranks: int, parameters: float, weight_bytes: int, gradient_bytes: int, *, at_once: int
) -> list[Traffic]:
    """ZeRO stages 2 and 3 (1910.02054, section 7.2): gradients are reduce-scattered as a unit's backward
    ends; stage 3 gathers its weights ahead of either pass. The weights of ``at_once`` units are whole, of
    blocks the one at work and the next; and one unit's gradients."""
    stage = degrees.zero_stage
    if ranks == 1 or stage < 2 or parameters == 0:
        return []
    once = (ranks - 1) / ranks
    weights, gradients = parameters * weight_bytes, parameters * gradient_bytes
    reduce = _data(
        GRADIENTS_REDUCED, When.BLOCK_BACKWARD, once * gradients, overlaps=True, buffer_bytes=gradients
    )
    if stage == 2:
        return [reduce]
    gathers = [
        _data(WEIGHTS_GATHERED, when, once * weights, overlaps=True, buffer_bytes=at_once * weights)
        for when in (When.BLOCK_FORWARD, When.BLOCK_BACKWARD)
    ]
    return [*gathers, reduce]


def _data(name: str, when: When, sent_bytes: float, *, overlaps: bool, buffer_bytes: float = 0) -> Traffic:
    return Traffic(
        name=name,
        group=Group.DATA,
        when=when,
        count=1,
        sent_bytes=sent_bytes,
        buffer_bytes=buffer_bytes,
        overlaps=overlaps,
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
