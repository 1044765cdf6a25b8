"""Parameters, gradients and optimizer state of a block as classes of state of one GPU.

ZeRO's stages and the tensor, pipeline and expert degrees divide them (``parallel.state_bytes``). The update
works on the rank's share of the optimizer's state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memtrain.planner.estimate import EstimatedUnit
from memtrain.planner.grid_rule import GridRule
from memtrain.planner.job import Job
from memtrain.planner.lowering.seconds import is_expert
from memtrain.planner.optimizer_bytes import ParameterSpec, StateBytes, state_bytes
from memtrain.planner.parallel import Degrees
from memtrain.planner.ranges.model import DEVICE, Role, StateClass
from memtrain.planner.roofline import matmul_seconds, memory_seconds, update_bytes

PIECES = 64
"""Parts of a block's state that may lie apart. Slots are as large as what one block streams, so that a coarse
piece more in one block costs room for all: Llama-3-70B with tight memory on 8 GPUs was proven to 0.03 % with
64 pieces in 6 s, to 0.4 % with 8, and with 1 or 2 nothing better than the rules was found in 20 s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one GPU holds of a block, in bytes."""

    weights: float
    gradients: float
    masters: float
    moments: float

    def __add__(self, other: Share) -> Share:
        return Share(
            weights=self.weights + other.weights,
            gradients=self.gradients + other.gradients,
            masters=self.masters + other.masters,
            moments=self.moments + other.moments,
        )


def stage_units(job: Job) -> list[EstimatedUnit]:
    """What the stage holds parameters of, in the order of forward."""
    found = [unit for unit in job.estimate.units if unit.block in job.blocks]
    found = [end_unit(job, "prologue"), *found] if job.first else found
    return [*found, end_unit(job, "epilogue")] if job.last else found


def tied_head(job: Job) -> tuple[ParameterSpec, ...]:
    """The embedding's matrix, where the head has none of its own: tied parameters are in the first unit."""
    units = {unit.name: unit for unit in job.estimate.units if unit.block is None}
    matrices = [p for p in units["prologue"].parameters if len(p.shape) > 1]
    if not matrices or any(len(p.shape) > 1 for p in units["epilogue"].parameters):
        return ()
    return (max(matrices, key=lambda p: p.elements),)


def end_unit(job: Job, name: str) -> EstimatedUnit:
    """Parameters of the prologue or the epilogue; a tied head is a copy where the embedding is not."""
    unit = next(unit for unit in job.estimate.units if unit.block is None and unit.name == name)
    if name == "prologue" or job.first:
        return unit
    return dataclasses.replace(unit, parameters=(*tied_head(job), *unit.parameters))


def share_of(job: Job, parameters: Iterable[ParameterSpec]) -> Share:
    """What this GPU holds of ``parameters``."""
    dense: list[ParameterSpec] = []
    experts: list[ParameterSpec] = []
    for parameter in parameters:
        (experts if is_expert(parameter.name) else dense).append(parameter)
    degrees = job.degrees
    return _divided(_bytes(job, dense), degrees, degrees.replicas, degrees.tensor) + _divided(
        _bytes(job, experts), degrees, degrees.expert_replicas, degrees.tensor * degrees.expert
    )


def _bytes(job: Job, parameters: Sequence[ParameterSpec]) -> StateBytes:
    return state_bytes(parameters, job.optimizer, master_weights=job.master_weights)


def _divided(whole: StateBytes, degrees: Degrees, ranks: int, cut: int) -> Share:
    stage = degrees.zero_stage
    return Share(
        weights=whole.weights / cut / (ranks if stage >= 3 else 1),
        gradients=whole.gradients / cut / (ranks if stage >= 2 else 1),
        masters=whole.masters / cut / (ranks if stage >= 1 else 1),
        moments=whole.moments / cut / (ranks if stage >= 1 else 1),
    )


def state_classes(share: Share, places: Sequence[str]) -> tuple[StateClass, ...]:
    """Classes that may lie on the device and in ``places``; without bytes, none."""
    sizes = {
        ("weights", Role.PARAMETER): share.weights,
        ("gradients", Role.GRADIENT): share.gradients,
        ("optimizer", Role.OPTIMIZER): share.masters + share.moments,
    }
    return tuple(
        StateClass(name=name, role=role, piece_bytes=math.ceil(size / PIECES), places=(DEVICE, *places))
        for (name, role), size in sizes.items()
        if size > 0
    )


def update_seconds(job: Job, share: Share, parameters: Iterable[ParameterSpec]) -> float:
    """The optimizer's arithmetic for ``share`` on the device: its bytes through the device's memory.

    Where ZeRO shards state and not gradients or weights, the rank works on its part of these. Gradients that
    are projected cost their products besides.
    """
    ranks = job.degrees.replicas
    stage = job.degrees.zero_stage
    moved = update_bytes(
        gradient_bytes=share.gradients / (ranks if stage == 1 else 1),
        weight_bytes=share.weights / (ranks if stage in (1, 2) else 1),
        master_bytes=share.masters,
        moment_bytes=share.moments,
    )
    return memory_seconds(job.setup.accelerator, moved) + _projection_seconds(job, parameters)


def _projection_seconds(job: Job, parameters: Iterable[ParameterSpec]) -> float:
    if not isinstance(job.optimizer, GridRule):
        return 0.0
    flops = math.fsum(job.optimizer.flops_of(parameter) for parameter in parameters)
    single = job.optimizer.settings.basis_dtype == "fp32"
    return matmul_seconds(job.setup.accelerator, flops, single=single)


def refresh_bytes(job: Job) -> int:
    """What the stage's largest matrix needs while its basis is renewed: parameters take turns."""
    rule = job.optimizer
    if not isinstance(rule, GridRule):
        return 0
    return max((rule.workspace_of(p) for unit in stage_units(job) for p in unit.parameters), default=0)
