"""What operations, recomputes and messages of one block take on one GPU.

Operations come from the trace and take what ``roofline`` says, each by itself, divided by the degrees: a
matrix product and attention by tensor and context ranks, all else by the ways in which its bytes are cut.
Messages that arithmetic waits for are added; those that overlap count for what sticks out. What is sent
once a step is in ``step_messages``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from memtrain.planner.communication import block_traffic, stage_traffic
from memtrain.planner.estimate import Operation, TracedPart
from memtrain.planner.hardware import Interconnect
from memtrain.planner.job import Job
from memtrain.planner.lowering.tensors import Division, Fate, fate
from memtrain.planner.optimizer_bytes import ParameterSpec
from memtrain.planner.parallel import Group, group_span
from memtrain.planner.ranges.model import causal_attention_seconds, even_seconds
from memtrain.planner.roofline import attention_seconds, matmul_seconds, memory_seconds
from memtrain.planner.traffic import Traffic, When
from memtrain.planner.zero_traffic import GRADIENTS_REDUCED, WEIGHTS_GATHERED, end_traffic


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSeconds:
    """One part on one GPU, messages included."""

    forward: float
    backward: float


class Clock:
    """Seconds of a job's operations and messages."""

    def __init__(self, job: Job, division: Division) -> None:
        self.job, self.division = job, division
        self.device = job.setup.accelerator
        self._ways = job.degrees.tensor * job.degrees.context

    def operation(self, op: Operation, part: TracedPart, *, backward: bool) -> float:
        """One operation.

        Attention kernels skip what a mask hides; the products of attention without a kernel compute it all.
        """
        if op.flops and "attention" in op.name:
            # Backward's FLOPs follow from forward's: kernels differ in what they compute again.
            flops = sum(o.flops for o in self._forward(part) if o.attention)
            if backward:
                flops = flops * op.flops // max(1, part.flops(backward=True, attention=True))
            else:
                flops = op.flops
            causal = flops * self.job.attention_share(part) / self._ways
            return attention_seconds(self.device, causal, backward=backward)
        moved = op.read_bytes + op.written_bytes
        if op.flops:
            share = op.flops / self._ways
            return matmul_seconds(self.device, share, moved / self._ways, single=self.job.single)
        return memory_seconds(self.device, moved / self.division.ways(op.written_bytes))

    def part(self, part: TracedPart, traffic: Iterable[Traffic]) -> PartSeconds:
        """A part's passes, with the messages of ``traffic`` that belong to a block's pass."""
        found = list(traffic)
        passes = []
        for backward, when in ((False, When.BLOCK_FORWARD), (True, When.BLOCK_BACKWARD)):
            ops = part.operations[part.forward_operations :] if backward else self._forward(part)
            computed = math.fsum(self.operation(op, part, backward=backward) for op in ops)
            sent = [t for t in found if t.when is when]
            passes.append(self.with_messages(computed, sent))
        return PartSeconds(forward=passes[0], backward=passes[1])

    def with_messages(self, computed: float, traffic: Iterable[Traffic]) -> float:
        """Arithmetic, what it waits for, and what sticks out of the messages beside it."""
        waits, beside = 0.0, 0.0
        for message in traffic:
            seconds = message.seconds(self.link(message.group))
            if message.overlaps:
                beside += seconds
            else:
                waits += seconds
        return waits + max(computed, beside)

    def link(self, group: Group) -> Interconnect:
        """What the messages of ``group`` travel over."""
        across = group_span(self.job.degrees, group) > self.job.setup.gpus
        link = self.job.network if across else self.job.setup.interconnect
        assert link is not None
        return link

    def recompute(self, part: TracedPart, kind: Fate, chunks: int) -> tuple[float, ...]:
        """Seconds per chunk of computing a class again; empty where it cannot be.

        What forward waited for of messages is waited for again (``_repeated``).
        """
        if kind in (Fate.INPUT, Fate.ROUTING):
            return ()
        if kind is Fate.ATTENTION:
            ops = [op for op in self._forward(part) if op.attention]
            seconds = math.fsum(self.operation(op, part, backward=False) for op in ops)
            return self._by_prefix(part, seconds, chunks)
        if kind is Fate.NEARLY_FREE:
            return even_seconds(self._nearly_free(part), chunks)
        first, last = self._span(part, kind)
        ops = [op for op in self._forward(part)[first:last] if not op.attention]
        seconds = math.fsum(self.operation(op, part, backward=False) for op in ops)
        waits = (t for t in self.traffic_of_block() if t.when is When.BLOCK_FORWARD and not t.overlaps)
        seconds += math.fsum(self._repeated(t, kind) * t.seconds(self.link(t.group)) for t in waits)
        return even_seconds(seconds, chunks)

    def _repeated(self, message: Traffic, kind: Fate) -> float:
        """Of a message of forward, the share that a recompute sends again.

        With sequence parallelism the input is gathered for ``qkv``; for ``products`` attention's output is
        scattered and the MLP's input gathered; the last product's scattering belongs to the block's output.
        Without, one of two all-reduces lies between ``qkv`` and the MLP. Ulysses exchanges q, k and v, then
        the output, which is half of all or less; tokens go to experts and, counted but not needed, back.
        """
        qkv = kind is Fate.QKV
        if message.group is Group.TENSOR:
            gathered = 0.25 if self.job.degrees.sequence_parallel else 0.0
            return gathered if qkv else 0.5
        if message.group is Group.CONTEXT:
            return 0.75 if qkv else 0.5
        return 0.0 if qkv else 1.0

    def _by_prefix(self, part: TracedPart, seconds: float, chunks: int) -> tuple[float, ...]:
        """Attention's cost by chunk: rising under a causal mask, even under a window.

        Context ranks hold an early and a late piece each (ring), or every rank's first tokens are spread over
        the sequence (Ulysses): a share of a rank's tokens then costs at most that share, which is charged.
        """
        window = part.attention_window
        windowed = window is not None and window < self.job.estimate.sequence
        if windowed or self.job.degrees.context > 1:
            return even_seconds(seconds, chunks)
        return causal_attention_seconds(seconds, 0.0, chunks)

    def _span(self, part: TracedPart, kind: Fate) -> tuple[int, int]:
        """Operations of forward that lead to a class: from behind the class before it to its last tensor."""
        ends = {k: 0 for k in Fate}
        for life in part.lifetimes:
            if life.saved is not None:
                found = fate(part.saved[life.saved])
                ends[found] = max(ends[found], life.start + 1)
        if kind is Fate.QKV:
            return 0, ends[Fate.QKV]
        return max(ends[Fate.QKV], ends[Fate.ATTENTION]), ends[kind]

    def _nearly_free(self, part: TracedPart) -> float:
        moved = 0.0
        for tensor in part.saved:
            if fate(tensor) is Fate.NEARLY_FREE:
                share = self.division.saved(tensor) / max(1, tensor.size_bytes)
                moved += tensor.recompute_moved_bytes * share
        return memory_seconds(self.device, moved)

    def _forward(self, part: TracedPart) -> tuple[Operation, ...]:
        return part.operations[: part.forward_operations]

    def traffic_of_block(self) -> list[Traffic]:
        """What one block sends for one micro-batch."""
        job = self.job
        dense, experts = block_parameters(job)
        return block_traffic(
            job.degrees,
            job.shape,
            batch=job.estimate.batch,
            sequence=job.estimate.sequence,
            block_parameters=dense / job.degrees.tensor,
            expert_parameters=experts / job.degrees.tensor / job.degrees.expert,
            value_bytes=4 if job.single else 2,
            gradient_bytes=4 if job.single else 2,
        )

    def traffic_at(self, index: int) -> list[Traffic]:
        """What block ``index`` of the stage has beside it or waits for: what it sends, and ZeRO's messages.

        There is room for two blocks' weights: while one works, those of the next in its pass are gathered.
        The first in a pass waits for its own (https://docs.pytorch.org/docs/stable/notes/fsdp.html, on
        prefetching). Gradients are reduced while their block's backward goes on, bucket by bucket; what is
        left of them hides behind the block after it. With which backward ends, there is none: it waits.
        """
        first, last = index == self.job.blocks[0], index == self.job.blocks[-1]
        found: list[Traffic] = []
        for message in self.traffic_of_block():
            if message.name == WEIGHTS_GATHERED:
                forward = message.when is When.BLOCK_FORWARD
                begins, ends = (first, last) if forward else (last, first)
                found += [dataclasses.replace(message, overlaps=False)] if begins else []
                found += [] if ends else [message]
            elif message.name == GRADIENTS_REDUCED:
                found.append(dataclasses.replace(message, overlaps=not first))
            else:
                found.append(message)
        return found

    def traffic_of_end(
        self, parameters: Iterable[ParameterSpec], borrowed: Iterable[ParameterSpec]
    ) -> list[Traffic]:
        """What the embedding or the head sends for one micro-batch; ``borrowed`` as in ``end_traffic``."""
        value_bytes = 4 if self.job.single else 2
        return end_traffic(
            self.job.degrees,
            parameters=sum(p.elements for p in parameters) / self.job.degrees.tensor,
            borrowed=sum(p.elements for p in borrowed) / self.job.degrees.tensor,
            value_bytes=value_bytes,
            gradient_bytes=value_bytes,
        )

    def traffic_of_stage(self) -> list[Traffic]:
        """What the stage hands on for one micro-batch."""
        job = self.job
        return stage_traffic(
            job.degrees,
            job.shape,
            batch=job.estimate.batch,
            sequence=job.estimate.sequence,
            value_bytes=4 if job.single else 2,
        )

    def stage_waits(self, index: int) -> tuple[float, float]:
        """What block ``index`` waits for its neighbours: a stage's first in forward, its last in backward.

        The first stage sends where others receive, and waits as long.
        """
        stage = {t.when: t.seconds(self.link(t.group)) for t in self.traffic_of_stage()}
        forward = stage.get(When.STAGE_FORWARD, 0.0) if index == self.job.blocks[0] else 0.0
        backward = stage.get(When.STAGE_BACKWARD, 0.0) if index == self.job.blocks[-1] else 0.0
        return forward, backward


def message_buffer_bytes(traffic: Iterable[Traffic]) -> int:
    """For what a part sends in one of its passes, at the most at once."""
    found = list(traffic)
    passes = (When.BLOCK_FORWARD, When.BLOCK_BACKWARD)
    return math.ceil(max(sum(t.buffer_bytes for t in found if t.when is when) for when in passes))


def block_parameters(job: Job) -> tuple[int, int]:
    """Elements of the largest block, without its experts and in them, undivided."""
    dense = experts = 0
    for unit in job.estimate.units:
        if unit.block is not None:
            inside = sum(p.elements for p in unit.parameters if is_expert(p.name))
            dense = max(dense, sum(p.elements for p in unit.parameters) - inside)
            experts = max(experts, inside)
    return dense, experts


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to one of several experts, by the word that transformers uses."""
    return ".experts." in name
