"""What every target is made from, and what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memtrain.planner.actions import MicroBatchOrder
from memtrain.planner.compose import SWAP_PLACE
from memtrain.planner.forecast import Forecast
from memtrain.planner.parallel import Degrees
from memtrain.planner.ranges.choices import Kind
from memtrain.planner.ranges.model import DEVICE, Role
from memtrain.planning.request import PlanRequest
from memtrain.planning.usage import Usage

PLACEHOLDER_LR = 1e-5
"""A plan says nothing about learning rates, and the tools want one."""
MOST = 0.5
"""Where a tool knows all or nothing, what the plan does with most of the bytes decides."""


CHUNKED_LOSS_NOTE = (
    "the plan counts on a loss by chunks of tokens (memtrain's, or a fused one such as Liger's)"
)
SOME = 0.005
"""Shares below it are not worth a note: they would be printed as 0 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One file, how to start it, and how far it is from the plan."""

    tool: str
    filename: str
    text: str
    command: str
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """A plan and what it was asked for."""

    request: PlanRequest
    forecast: Forecast
    usage: Usage
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of the model's configuration."""

    @property
    def degrees(self) -> Degrees:
        """How the job is divided."""
        return self.request.degrees

    def share(self, role: Role, *places: str) -> float:
        """Of a role's bytes, the part that lies in ``places``; without places, off the device."""
        shares = self.usage.state.get(role, {})
        wanted = places or tuple(place for place in shares if place != DEVICE)
        return sum(shares.get(place, 0.0) for place in wanted)

    @property
    def swap_directory(self) -> str:
        """As given, or a placeholder."""
        return self.forecast.job.setup.budget.nvme_directory or SWAP_PLACE

    @property
    def recomputes(self) -> bool:
        """Whether most of what blocks save is not kept as it is."""
        return 1 - self.usage.actions.get(Kind.KEEP.value, 0.0) > MOST

    @property
    def swaps(self) -> bool:
        """Whether saved tensors leave the device to speak of."""
        return sum(self.usage.swapped_to.values()) >= SOME

    def unrepresented(self, tool: str) -> tuple[str, ...]:
        """Parts of the plan that no other tool than memtrain knows."""
        found = []
        if self.usage.splits_tokens:
            found.append(
                f"{tool} cannot split token ranges: a class of tensors has one fate in all of a block"
            )
        if self.swaps:
            places = ", ".join(self.usage.swapped_to)
            found.append(
                f"the plan sends {sum(self.usage.swapped_to.values()):.0%} of the saved tensors to {places}; "
                f"{tool} can offload inputs of checkpointed blocks to host memory, and nothing else of them"
            )
        if self.forecast.job.micro_batch_order is MicroBatchOrder.VERTICAL:
            found.append(
                f"the plan has all micro-batches pass a block together; {tool} runs one after the other, and "
                "reads weights for each"
            )
        if self.usage.codecs:
            found.append(f"{tool} has no {', '.join(self.usage.codecs)} codec for saved tensors")
        if self.share(Role.OPTIMIZER, "cxl") + self.share(Role.PARAMETER, "cxl") > 0:
            found.append(f"{tool} has no CXL tier: bind the process to the node (numactl) or leave cxl out")
        return tuple(found)


def torchrun(context: Context, script: str) -> str:
    """The launch of ``script`` on all hosts."""
    hardware = context.request.hardware
    if hardware.nodes == 1:
        return f"torchrun --standalone --nproc-per-node {hardware.gpus} {script}"
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint $HEAD:29500"
    return f"torchrun --nnodes {hardware.nodes} --nproc-per-node {hardware.gpus} {rendezvous} {script}"
