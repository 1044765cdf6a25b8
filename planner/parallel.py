"""Parallel degrees: what each divides on one GPU, and which degrees a model allows.

Letters: N data x context ranks, t tensor, c context, p pipeline, e expert, m micro-batches, b sequences in a
micro-batch, s tokens of a sequence, h hidden size. Groups lie in a host from the inside out: tensor, context,
data, pipeline. Expert groups are cut out of the data and context ranks, as in Megatron-LM.

Sources: Megatron-LM (arXiv 1909.08053) and its pipeline (2104.04473); sequence parallelism and what tensor
parallelism divides (Korthikanti et al., 2205.05198); ZeRO (1910.02054); Ulysses (2309.14509); ring attention
(2310.01889). What the degrees send is in ``communication.py`` and ``zero_traffic.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of a decoder that degrees have to divide."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    experts: int = 0
    """Routed experts a layer; 0 for a dense model."""
    experts_per_token: int = 0

    @property
    def query_width(self) -> int:
        """Elements of all queries of a token, and of the attention output."""
        return self.heads * self.head_size

    @property
    def key_value_width(self) -> int:
        """Elements of a token's keys and values together."""
        return 2 * self.key_value_heads * self.head_size


class ActivationClass(Enum):
    """Saved tensors by what divides them."""

    RESIDUAL = "residual"
    """Layer inputs, norm inputs and outputs, dropout masks: whole in tensor parallelism, cut with
    sequence parallelism (2205.05198, figures 4 and 5)."""
    HEADS = "heads"
    """Queries, attention output and its log-sum: cut by heads."""
    KEY_VALUE = "key_value"
    """Keys and values: cut by their heads, at most as many ways as there are."""
    INTERMEDIATE = "intermediate"
    """Inside the MLP or the experts: cut by columns."""
    LOGITS = "logits"
    """Cut by vocabulary (1909.08053, section 3)."""


class Group(Enum):
    """Ranks that talk to each other."""

    TENSOR = "tensor"
    CONTEXT = "context"
    DATA = "data"
    """Data and context ranks together: those with the same parameters."""
    PIPELINE = "pipeline"
    EXPERT = "expert"


FIELDS = {name: name for name in ("data", "tensor", "context", "pipeline", "expert")}
"""How messages call the degrees, unless somebody knows them by other names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Degrees:
    """How many ways each thing is split."""

    data: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    """1 shards optimizer state over data and context ranks, 2 gradients too, 3 parameters too."""
    tensor: int = 1
    sequence_parallel: bool = True
    """Cut what tensor parallelism leaves whole along the sequence; without effect where tensor is 1."""
    context: int = 1
    context_method: Literal["ring", "ulysses"] = "ring"
    pipeline: int = 1
    expert: int = 1
    """Of the data x context ranks, how many hold different experts."""

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "context", "pipeline", "expert"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}")
        if self.context_method not in ("ring", "ulysses"):
            raise ValueError(f"context_method must be ring or ulysses, got {self.context_method!r}")
        if self.replicas % self.expert:
            raise ValueError(
                f"expert {self.expert} does not divide data x context = {self.replicas}: "
                f"expert ranks are taken from these; give a divisor"
            )

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.data * self.tensor * self.context * self.pipeline

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters: data x context, over which ZeRO shards."""
        return self.data * self.context

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.replicas // self.expert

    @property
    def sequence_cut(self) -> int:
        """Ways that sequence parallelism cuts the residual stream within a tensor group."""
        return self.tensor if self.sequence_parallel else 1

    def check(
        self, shape: ModelShape, *, gpus: int, sequence: int, names: Mapping[str, str] = FIELDS
    ) -> None:
        """Raise ValueError naming the degree (as ``names`` calls it), the value and the limit it breaks."""
        if self.gpus != gpus:
            product = " x ".join(
                f"{names[field]} {getattr(self, field)}"
                for field in ("data", "tensor", "context", "pipeline")
            )
            raise ValueError(f"{product} = {self.gpus} GPUs, but there are {gpus}: change one of them")
        self._check_tensor(shape, names["tensor"])
        self._check_context(shape, sequence, names)
        _divides(names["pipeline"], self.pipeline, "layers", shape.layers)
        if self.expert > 1:
            if shape.experts == 0:
                raise ValueError(
                    f"{names['expert']} {self.expert} for a model without experts: leave it at 1"
                )
            _divides(names["expert"], self.expert, "experts", shape.experts)

    def _check_tensor(self, shape: ModelShape, name: str) -> None:
        _divides(name, self.tensor, "heads", shape.heads)
        _divides(name, self.tensor, "intermediate", shape.intermediate)
        if shape.key_value_heads % self.tensor and self.tensor % shape.key_value_heads:
            raise ValueError(
                f"{name} {self.tensor} and the model's key_value_heads {shape.key_value_heads}: one must "
                "divide the other"
            )

    def _check_context(self, shape: ModelShape, sequence: int, names: Mapping[str, str]) -> None:
        tensor, context = names["tensor"], names["context"]
        # Under a causal mask a ring gives each rank one early and one late piece, 2c in all.
        pieces = 2 * self.context if self.context > 1 and self.context_method == "ring" else self.context
        cut = math.lcm(pieces, self.context * self.sequence_cut)
        if sequence % cut:
            who = [f"{context} {self.context}, {self.context_method}"] if self.context > 1 else []
            who += [f"{tensor} {self.tensor}, sequence parallelism"] if self.sequence_cut > 1 else []
            raise ValueError(
                f"a sequence of {sequence} tokens cannot be cut {cut} ways ({'; '.join(who)}): pad it to a "
                "multiple"
            )
        if self.context_method == "ulysses":
            for name, heads in (("heads", shape.heads), ("key_value_heads", shape.key_value_heads)):
                _divides(f"{tensor} x {context} (ulysses)", self.tensor * self.context, name, heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """Bytes on one GPU, of a parameter or of many."""

    parameters: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All three."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    degrees: Degrees,
    parameters: float = 1,
    *,
    weight_bytes: float = 2,
    gradient_bytes: float = 2,
    optimizer_bytes: float = 12,
    experts: bool = False,
) -> StateBytes:
    """What ZeRO leaves on one GPU of ``parameters`` that its tensor and pipeline rank holds.

    The defaults are mixed-precision Adam (ZeRO, section 3.1): 2 + 2 + 12 = 16 bytes a parameter, 4 + 12/N
    at stage 1, 2 + 14/N at stage 2, 16/N at stage 3, with N = data x context. The parameters of ``experts``
    that a rank holds have N/e replicas only.
    """
    ranks = degrees.expert_replicas if experts else degrees.replicas
    stage = degrees.zero_stage
    return StateBytes(
        parameters=parameters * weight_bytes / (ranks if stage >= 3 else 1),
        gradients=parameters * gradient_bytes / (ranks if stage >= 2 else 1),
        optimizer=parameters * optimizer_bytes / (ranks if stage >= 1 else 1),
    )


def stage_parameters(
    degrees: Degrees, *, stage: int, layers: int, layer: float, embedding: float, head: float
) -> float:
    """Parameters of pipeline stage ``stage`` (0 first) on one tensor rank.

    ``layer``, ``embedding`` (before the blocks) and ``head`` (after them, 0 where it is tied and there is one
    stage) are counts of the whole model. Small vectors that tensor parallelism repeats are counted as cut.
    """
    if not 0 <= stage < degrees.pipeline:
        raise ValueError(f"stage {stage} of {degrees.pipeline}: give 0 to {degrees.pipeline - 1}")
    held = layer * layers / degrees.pipeline
    held += embedding if stage == 0 else 0
    held += head if stage == degrees.pipeline - 1 else 0
    return held / degrees.tensor


def activation_divisor(kind: ActivationClass, degrees: Degrees, shape: ModelShape) -> int:
    """By how many the bytes that one micro-batch saves of a tensor class are divided on one GPU.

    Context parallelism divides all of them: ring attention along the sequence, Ulysses along the sequence
    outside attention and by heads inside, which is as many bytes. Expert and data degrees and ZeRO divide
    none.
    """
    tensor = {
        ActivationClass.RESIDUAL: degrees.sequence_cut,
        ActivationClass.KEY_VALUE: min(degrees.tensor, shape.key_value_heads),
    }.get(kind, degrees.tensor)
    return degrees.context * tensor


def in_flight(degrees: Degrees, *, stage: int, micro_batches: int) -> int:
    """Micro-batches whose activations a stage holds at once under 1F1B: min(m, p - stage), 2104.04473."""
    if not 0 <= stage < degrees.pipeline:
        raise ValueError(f"stage {stage} of {degrees.pipeline}: give 0 to {degrees.pipeline - 1}")
    return min(micro_batches, degrees.pipeline - stage)


def bubble_fraction(degrees: Degrees, *, micro_batches: int) -> float:
    """Idle time over useful time of 1F1B: (p - 1) / m (2104.04473, section 2.2.1)."""
    return (degrees.pipeline - 1) / micro_batches


def group_span(degrees: Degrees, group: Group) -> int:
    """Adjacent GPUs that a group reaches over, with tensor innermost, then context, data, pipeline.

    A group whose span is more than the GPUs of a host talks over the network. A pipeline stage talks to the
    next one, which is a whole stage away.
    """
    model = degrees.tensor
    spans = {
        Group.TENSOR: model,
        Group.CONTEXT: model * degrees.context,
        Group.EXPERT: model * degrees.expert,
        Group.DATA: model * degrees.replicas,
        Group.PIPELINE: 1 if degrees.pipeline == 1 else model * degrees.replicas + 1,
    }
    return spans[group]


def _divides(degree: str, value: int, name: str, size: int) -> None:
    if size % value:
        raise ValueError(f"{degree} {value} does not divide the model's {name} {size}: give a divisor")
