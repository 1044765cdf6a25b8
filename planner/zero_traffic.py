"""What ZeRO sends (Rajbhandari et al., arXiv 1910.02054): gradients reduced, sharded weights gathered.

Stages 2 and 3 send unit by unit in every micro-batch (``unit_traffic`` for blocks, ``end_traffic`` for what
stands around them), stages 0 to 2 once a step (``step_traffic``).
"""

from __future__ import annotations

import dataclasses

from memtrain.planner.parallel import Degrees, Group
from memtrain.planner.traffic import Traffic, When

WEIGHTS_GATHERED = "weights gathered"
GRADIENTS_REDUCED = "gradients reduced"


def unit_traffic(
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


def end_traffic(
    degrees: Degrees,
    *,
    parameters: float,
    borrowed: float = 0,
    value_bytes: int = 2,
    gradient_bytes: int = 2,
) -> list[Traffic]:
    """What ZeRO sends for the embedding or the head in every micro-batch.

    The weights are gathered once: the head's backward follows its forward at once, and an embedding's reads
    no weights. Each of them is one matrix, needed whole from the first token on and with a gradient that is
    complete after the last: arithmetic waits. The buffers hold it or the blocks' (``block_traffic``), not
    both, as where every module gathers its own weights (DeepSpeed); FSDP2's root module holds both.

    Args:
        parameters: on one tensor rank.
        borrowed: of those of the other end, which a tied head gathers, too, and whose gradients that end
            reduces.
    """
    own, others = (
        unit_traffic(degrees, degrees.replicas, count, value_bytes, gradient_bytes, at_once=1)
        for count in (parameters, borrowed)
    )
    found = [*own, *(message for message in others if message.name == WEIGHTS_GATHERED)]
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
