"""What is to be trained, on what, and how it is divided: all that a plan without the hardware is made of.

A ``Job`` is seen from one GPU. ``lowering.problem_of`` makes of it the problem that ``ranges`` solves, and
``forecast`` reads the answer as a user does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from memtrain.planner.actions import MicroBatchOrder, UpdateSchedule
from memtrain.planner.compose import Setup
from memtrain.planner.estimate import ModelEstimate, TracedPart
from memtrain.planner.grid_rule import GridRule
from memtrain.planner.hardware import Interconnect
from memtrain.planner.optimizer_bytes import OptimizerRule
from memtrain.planner.parallel import Degrees, ModelShape, bubble_fraction, in_flight
from memtrain.planner.ranges.model import Codec

CHUNKS = 16
"""Token chunks per tensor class: finer cuts change no plan of ``benchmarks/plan_solver.py`` by more than its
gap, and cost the solver time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One training job."""

    estimate: ModelEstimate
    """One micro-batch of one data rank: whole sequences, nothing divided."""
    shape: ModelShape
    setup: Setup
    degrees: Degrees = field(default_factory=Degrees)
    optimizer: OptimizerRule | GridRule = OptimizerRule.ADAMW
    master_weights: bool = True
    """fp32 copies of weights of lower precision; of a ``GridRule`` its settings say it."""
    micro_batches: int = 1
    """Of one data rank in a step."""
    clipping: bool = True
    """By the global norm: no update can then begin before backward has ended."""
    codecs: tuple[Codec, ...] = ()
    """Lossy compressions that the user allows."""
    error_budget: float | None = None
    """As ``ranges.model.Problem``; None: the choice of codecs is all that bounds the error."""
    nvme_write_limit_bytes: int | None = None
    """That this GPU may write to NVMe in a step, for the flash's sake; None is no limit."""
    chunks: int = CHUNKS
    stage: int = 0
    """The pipeline stage that is planned, from 0."""
    network: Interconnect | None = None
    """Between hosts; None where one host holds all ranks."""
    update_schedule: UpdateSchedule | None = None
    """For all of the state; None: for each piece ahead or in backward, whichever is faster."""
    micro_batch_order: MicroBatchOrder | None = MicroBatchOrder.HORIZONTAL
    """None: whichever ``forecast`` finds to be faster. Vertical is memtrain's own, in one process."""

    def __post_init__(self) -> None:
        self._check_schedule()
        self.degrees.check(self.shape, gpus=self.degrees.gpus, sequence=self.estimate.sequence)
        if self.shape.layers != len(self.estimate.blocks):
            raise ValueError(
                f"shape has {self.shape.layers} layers and the estimate {len(self.estimate.blocks)} blocks: "
                "give both of one configuration"
            )
        for name in ("micro_batches", "chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        divided = self.degrees.zero_stage or self.degrees.tensor > 1 or self.degrees.expert > 1
        if isinstance(self.optimizer, GridRule) and divided:
            raise ValueError(
                f"{self.optimizer.value} has no bytes for divided parameters so far: its states are those of "
                "whole matrices. Plan with ZeRO stage 0 and one tensor and one expert rank"
            )
        if not 0 <= self.stage < self.degrees.pipeline:
            raise ValueError(
                f"stage {self.stage} of a pipeline of {self.degrees.pipeline}: give 0 to "
                f"{self.degrees.pipeline - 1}"
            )
        if self.degrees.gpus % self.setup.gpus and self.setup.gpus % self.degrees.gpus:
            raise ValueError(
                f"{self.degrees.gpus} GPUs do not fill hosts of {self.setup.gpus}: change a degree or gpus"
            )
        if self.degrees.gpus > self.setup.gpus and self.network is None:
            raise ValueError(
                f"{self.degrees.gpus} GPUs need {math.ceil(self.degrees.gpus / self.setup.gpus)} hosts of "
                f"{self.setup.gpus}, and no network between them is given"
            )

    def _check_schedule(self) -> None:
        """Raises ValueError for a schedule that cannot be; ``memtrain plan`` says so in its own words."""
        vertical = self.micro_batch_order is MicroBatchOrder.VERTICAL
        if self.update_schedule is UpdateSchedule.IN_BACKWARD and (self.clipping or self.micro_batches > 1):
            raise ValueError(
                "update_schedule is in_backward, and gradients are clipped by their global norm, or added up "
                f"over {self.micro_batches} micro-batches: weights would be updated before all are there"
            )
        if vertical and (self.micro_batches == 1 or self.degrees.gpus > 1):
            raise ValueError(
                f"micro_batch_order is vertical, with {self.micro_batches} micro-batches on "
                f"{self.degrees.gpus} GPUs: give several micro-batches and one GPU"
            )

    @property
    def may_be_vertical(self) -> bool:
        """Whether there is something to order, and somewhere for weights to come from."""
        return self.micro_batches > 1 and self.degrees.gpus == 1 and bool(self.setup.tiers)

    @property
    def held_batches(self) -> int:
        """Micro-batches that are between forward and backward at once without a pipeline."""
        return self.micro_batches if self.micro_batch_order is MicroBatchOrder.VERTICAL else 1

    @property
    def first(self) -> bool:
        """Whether the stage holds the prologue."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether the stage holds the epilogue."""
        return self.stage == self.degrees.pipeline - 1

    @property
    def blocks(self) -> range:
        """Indices of the stage's blocks among the model's."""
        each = len(self.estimate.blocks) // self.degrees.pipeline
        return range(self.stage * each, (self.stage + 1) * each)

    @property
    def in_flight(self) -> int:
        """Micro-batches whose saved tensors the stage holds at once (1F1B)."""
        return in_flight(self.degrees, stage=self.stage, micro_batches=self.micro_batches)

    @property
    def bubble(self) -> float:
        """Idle time of a pipeline over its useful time."""
        return bubble_fraction(self.degrees, micro_batches=self.micro_batches)

    @property
    def tokens_per_step(self) -> int:
        """Of all data ranks."""
        one = self.estimate.batch * self.estimate.sequence
        return one * self.micro_batches * self.degrees.data

    @property
    def single(self) -> bool:
        """Whether parameters, and so the matrix products, are in fp32."""
        sizes = {p.element_bytes for unit in self.estimate.units for p in unit.parameters}
        return max(sizes, default=2) >= 4

    def attention_share(self, part: TracedPart) -> float:
        """Pairs of tokens that a causal kernel computes, over the sequence squared: what the trace counts.

        Half under a causal mask, fewer under a window.
        """
        tokens = self.estimate.sequence
        window = part.attention_window
        if window is None or window >= tokens:
            return 0.5
        return (tokens * window - window * window / 2) / tokens**2

    @property
    def model_flops_per_step(self) -> float:
        """FLOPs that the model needs, recomputation not counted: the numerator of MFU.

        Matrix products as traced, forward and backward; attention under its mask, twice as much in backward
        as in forward (a kernel that recomputes probabilities does 2.5 times, which is its own affair).
        """
        one = 0.0
        for part in self._parts():
            one += part.flops(backward=False, attention=False) + part.flops(backward=True, attention=False)
            one += 3 * self.attention_share(part) * part.flops(backward=False, attention=True)
        return one * self.micro_batches * self.degrees.data

    def _parts(self) -> Iterator[TracedPart]:
        yield from self.estimate.parts()
