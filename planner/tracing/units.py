"""Groups of parameters that are needed together, and what each holds: gradients, and the optimizer's state.

What the optimizer keeps and takes per element is measured in one step of another one of its class, over a
probe of one tensor: the user's own is not stepped.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.planner.profile import UnitProfile
from memtrain.planner.tracing import clock
from memtrain.planner.tracing.blocks import FirstPass
from memtrain.planner.tracing.live_bytes import LiveBytes, tensors_in

SMALL = 65536
"""Parameters of fewer elements keep gradient and state in memory: moving them would cost more."""
_PAGE_BYTES = 4096
_PROBE_ELEMENTS = 1 << 20
"""For measuring the optimizer: more than the caches hold, less than 20 MiB with gradient and moments."""


@dataclass(frozen=True, kw_only=True)
class OptimizerStep:
    """One step of the optimizer, per element."""

    state: float
    tensors: int
    """Of the state of one parameter, scalars left out."""
    workspace: float
    seconds: float


def measure_optimizer(optimizer: torch.optim.Optimizer, master_weights: bool) -> OptimizerStep:
    """The largest figures over every kind of settings and parameters: groups may run different algorithms."""
    kinds: dict[Any, OptimizerStep] = {}
    elements = probe_elements(optimizer)
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for dtype, device in {(p.dtype, p.device) for p in group["params"]}:
            kind = repr(settings), dtype, device
            if kind not in kinds:
                kinds[kind] = _measure_step(optimizer, settings, dtype, device, master_weights, elements)
    steps = kinds.values()
    return OptimizerStep(
        state=max(step.state for step in steps),
        tensors=max(step.tensors for step in steps),
        workspace=max(step.workspace for step in steps),
        seconds=max(step.seconds for step in steps),
    )


def probe_elements(optimizer: torch.optim.Optimizer) -> int:
    """A power of two, no more than a small model has: measuring it must not take more than training it."""
    elements: int = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return min(_PROBE_ELEMENTS, max(SMALL, 1 << max(0, elements.bit_length() - 1)))


def _measure_step(
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    model_dtype: torch.dtype,
    device: torch.device,
    master_weights: bool,
    elements: int,
) -> OptimizerStep:
    """One step over a probe of ``elements`` elements, a multiple of 1024."""
    master_weights = master_weights and model_dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if master_weights else model_dtype
    # A gradient of lower precision is widened within its slot, for which the slot holds its bytes twice.
    widening = model_dtype.itemsize if master_weights else 0
    weight = torch.zeros(1024, elements // 1024, dtype=dtype, device=device)
    gradient = torch.randn(weight.shape, device=device).to(model_dtype)
    low = weight.to(model_dtype)
    probe = _like(optimizer, settings, weight)
    _step(probe, gradient.to(dtype))
    start = clock.now(device)
    _step(probe, gradient.to(dtype))
    if master_weights:
        low.copy_(weight)
    seconds = clock.now(device) - start
    given = gradient.to(dtype)
    with LiveBytes() as live:
        _step(probe, given)
    kept = [t for t in tensors_in(list(probe.state.values())) if t.dim() > 0]
    return OptimizerStep(
        state=sum(t.nbytes for t in kept) / elements + (4 if master_weights else 0),
        tensors=len(kept) + master_weights,
        # Whole pages: scalars such as the step count do not grow with the shard.
        workspace=live.peak_bytes // _PAGE_BYTES * _PAGE_BYTES / elements + widening,
        seconds=seconds / elements,
    )


def _like(
    optimizer: torch.optim.Optimizer, settings: dict[str, Any], weight: Tensor
) -> torch.optim.Optimizer:
    """The optimizer's class over one tensor, in a group with ``settings``."""
    accepted = inspect.signature(type(optimizer).__init__).parameters
    own = copy.deepcopy(settings)
    defaults = {key: own.get(key, value) for key, value in optimizer.defaults.items() if key in accepted}
    return type(optimizer)([{**own, "params": [nn.Parameter(weight, requires_grad=True)]}], **defaults)


def _step(probe: torch.optim.Optimizer, gradient: Tensor) -> None:
    probe.param_groups[0]["params"][0].grad = gradient
    try:
        probe.step()
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{type(probe).__name__} cannot be measured by a plain step(): {error}") from error


def parameter_units(
    model: nn.Module, blocks: list[tuple[str, nn.Module]], trace: FirstPass, step: OptimizerStep
) -> list[UnitProfile]:
    """Every parameter once, in the first unit that needs it."""
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {id(p) for _, block in blocks for p in block.parameters()}
    others = [p for p in model.parameters() if id(p) not in inside or id(p) in trace.early]
    early = [p for p in others if id(p) in trace.early]
    late = [p for p in others if id(p) not in trace.early]
    members: list[tuple[str, int | None, list[nn.Parameter]]] = [("prologue", None, early)]
    members += [(name, index, list(block.parameters())) for index, (name, block) in enumerate(blocks)]
    members.append(("epilogue", None, late))
    taken: set[int] = set()
    units = []
    for name, index, parameters in members:
        own = [p for p in parameters if id(p) not in taken]
        taken.update(id(p) for p in own)
        large = [p for p in own if p.requires_grad and p.numel() >= SMALL]
        small = [p for p in own if p.requires_grad and p.numel() < SMALL]
        units.append(
            UnitProfile(
                name=name,
                block=index,
                weight_bytes=sum(p.nbytes for p in own),
                gradient_bytes=sum(p.nbytes for p in large),
                state_bytes=round(sum(p.numel() for p in large) * step.state),
                resident_state_bytes=round(sum(p.nbytes + p.numel() * step.state for p in small)),
                update_seconds=sum(p.numel() for p in (*large, *small)) * step.seconds,
                parameters=tuple(names[id(p)] for p in own),
            )
        )
    return units
