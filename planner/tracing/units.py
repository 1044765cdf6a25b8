"""Groups of parameters that are needed together, and what each holds: gradients, and the optimizer's state.

What the optimizer keeps and takes per element is measured in one step of another one of its class, over a
probe of one tensor: the user's own is not stepped. Each parameter has the figures of its kind: its group's
settings, its dtype and its device. One that has a method ``stand_ins`` (memtrain's own) is asked what it
keeps for each parameter.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.planner.profile import ParameterUpdate, UnitProfile
from memtrain.planner.tracing import clock
from memtrain.planner.tracing.blocks import FirstPass
from memtrain.planner.tracing.live_bytes import LiveBytes, tensors_in
from memtrain.planner.units import round_up

SMALL = 65536
"""Parameters of fewer elements keep gradient and state in memory: moving them would cost more."""
_PAGE_BYTES = 4096
_PROBE_ELEMENTS = 1 << 20
"""For measuring the optimizer: more than the caches hold, less than 20 MiB with gradient and moments."""


KeepsHalf = Callable[[dict[str, Any], Tensor], bool]
"""Of a parameter group and a large parameter in it: whether its record holds no more of its fp32 master than
the lower half, for the upper one is the weight's."""
WindowBytes = Callable[[Sequence[nn.Parameter]], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class OptimizerStep:
    """One step of the optimizer, per element."""

    state: float
    tensors: int
    """Of the state of one parameter, scalars left out."""
    workspace: float
    """Temporaries of the arithmetic."""
    widening: float
    """What a slot holds of the gradient beyond its own bytes, to widen it."""
    seconds: float
    keeps_half: bool = False
    """Of a master its lower half alone."""


@dataclass(frozen=True)
class OptimizerSteps:
    """One step of each kind of settings and parameters: groups may run different algorithms."""

    of: dict[int, OptimizerStep]
    """By ``id`` of the parameter."""
    state: float
    """Here and below the largest per element: what a plan reckons with where it cuts parameters."""
    tensors: int
    workspace: float
    """With what widening and a refresh take."""


def measure_optimizer(
    optimizer: torch.optim.Optimizer,
    master_weights: bool,
    known: KnownStates | None = None,
    keeps_half: KeepsHalf | None = None,
) -> OptimizerSteps:
    """Measure each kind once."""
    kinds: dict[Any, OptimizerStep] = {}
    moved: dict[Any, OptimizerStep] = {}
    by_parameter: dict[int, OptimizerStep] = {}
    elements = probe_elements(optimizer)
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        shape: tuple[int, ...] = (1024, elements // 1024)
        if known is not None:
            shape = known.matrix_of(group["params"], elements) or shape
        for parameter in group["params"]:
            dtype, device = parameter.dtype, parameter.device
            large = parameter.numel() >= SMALL
            half = keeps_half is not None and large and keeps_half(group, parameter)
            kind = repr(settings), dtype, device, half
            if kind not in kinds:
                kinds[kind] = _measure_step(optimizer, settings, dtype, device, master_weights, half, shape)
            by_parameter[id(parameter)] = kinds[kind]
            if large:
                moved[kind] = kinds[kind]
    steps = (moved or kinds).values()  # small parameters, whose masters are whole, do not leave memory
    widest = max(step.workspace + step.widening for step in steps)
    return OptimizerSteps(
        of=by_parameter,
        state=max([step.state for step in steps] if known is None else [known.state_per_element]),
        tensors=max([step.tensors for step in steps] if known is None else [known.tensors]),
        workspace=widest + (known.refresh_per_element if known else 0.0),
    )


class KnownStates:
    """What an optimizer says that it keeps for each of its trainable parameters.

    The largest figures per element are those of parameters whose state may leave memory.
    """

    def __init__(self, stand_ins: Any, parameters: list[Tensor], master_weights: bool) -> None:
        self.sizes: dict[int, tuple[int, ...]] = {}
        """Of the tensors of each state, masters among them, by ``id`` of the parameter."""
        self.refresh_bytes: dict[int, int] = {}
        self.state_per_element = self.refresh_per_element = 0.0
        self.tensors = 0
        self._projected: set[int] = set()
        for parameter in parameters:
            master = master_weights and parameter.dtype in (torch.bfloat16, torch.float16)
            kept = stand_ins.kept(parameter, torch.float32 if master else parameter.dtype)
            sizes = ((4 * parameter.numel(),) if master else ()) + tuple(kept.sizes)
            self.sizes[id(parameter)] = sizes
            self.refresh_bytes[id(parameter)] = kept.refresh_bytes
            if kept.projected:
                self._projected.add(id(parameter))
            self.tensors = max(self.tensors, len(sizes))
            if parameter.numel() >= SMALL:
                self.state_per_element = max(self.state_per_element, sum(sizes) / parameter.numel())
                self.refresh_per_element = max(
                    self.refresh_per_element, kept.refresh_bytes / parameter.numel()
                )

    def matrix_of(self, parameters: list[Tensor], elements: int) -> tuple[int, ...] | None:
        """The shape to measure a group at that projects: not every one has its rank. The largest matrix that
        has at most so many elements, or else the smallest."""
        matrices = sorted((p for p in parameters if id(p) in self._projected), key=Tensor.numel)
        fitting = [p for p in matrices if p.numel() <= elements]
        return tuple((fitting[-1] if fitting else matrices[0]).shape) if matrices else None

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, master_weights: bool) -> KnownStates | None:
        """None where the optimizer cannot say."""
        make = getattr(optimizer, "stand_ins", None)
        if make is None:
            return None
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        return cls(make(), parameters, master_weights)


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
    keeps_half: bool,
    shape: tuple[int, ...],
) -> OptimizerStep:
    """One step over a probe of this shape."""
    master_weights = master_weights and model_dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if master_weights else model_dtype
    # A gradient of lower precision is widened within its slot, for which the slot holds its bytes twice.
    widening = model_dtype.itemsize if master_weights and not keeps_half else 0
    weight = torch.zeros(shape, dtype=dtype, device=device)
    elements = weight.numel()
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
        state=sum(t.nbytes for t in kept) / elements + (2 if keeps_half else 4 if master_weights else 0),
        tensors=len(kept) + master_weights,
        # Whole pages: scalars such as the step count do not grow with the shard.
        workspace=live.peak_bytes // _PAGE_BYTES * _PAGE_BYTES / elements,
        widening=widening,
        seconds=seconds / elements,
        keeps_half=keeps_half,
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
    model: nn.Module,
    blocks: list[tuple[str, nn.Module]],
    trace: FirstPass,
    steps: OptimizerSteps,
    known: KnownStates | None = None,
    *,
    whole: bool = False,
    master_weights: bool = False,
    window_bytes: WindowBytes | None = None,
    apart: Collection[nn.Parameter] = (),
) -> list[UnitProfile]:
    """Every parameter once, in the first unit that needs it.

    Args:
        master_weights: weights of lower precision are rounded from fp32 copies.
        window_bytes: what of a unit's movable parameters comes by itself; None, or nothing: all together.
        apart: parameters that are in no unit.
        whole: parameters are not cut: what the update of each takes is listed where it is known.
    """

    def state_of(parameter: nn.Parameter) -> float:
        if known is not None:
            return sum(known.sizes.get(id(parameter), ()))
        found = steps.of.get(id(parameter))
        return parameter.numel() * found.state if found is not None else 0.0

    def seconds_of(parameter: nn.Parameter) -> float:
        found = steps.of.get(id(parameter))
        return parameter.numel() * found.seconds if found is not None else 0.0

    names = {id(p): name for name, p in model.named_parameters()}
    inside = {id(p) for _, block in blocks for p in block.parameters()}
    beside = set(map(id, apart))
    others = [p for p in model.parameters() if id(p) not in inside or id(p) in trace.early]
    others = [p for p in others if id(p) not in beside]
    early = [p for p in others if id(p) in trace.early]
    late = [p for p in others if id(p) not in trace.early]
    members: list[tuple[str, int | None, list[nn.Parameter]]] = [("prologue", None, early)]
    members += [(name, index, list(block.parameters())) for index, (name, block) in enumerate(blocks)]
    members.append(("epilogue", None, late))
    unit_of: dict[int, str] = {}
    units = []
    for name, index, parameters in members:
        own = [p for p in parameters if id(p) not in unit_of]
        used = parameters if index is not None else [p for p in others if id(p) in trace.late]
        borrowed = [unit_of[id(p)] for p in used if id(p) in unit_of] if name != "prologue" else []
        unit_of.update((id(p), name) for p in own)
        large = [p for p in own if p.requires_grad and p.numel() >= SMALL]
        small = [p for p in own if p.requires_grad and p.numel() < SMALL]
        units.append(
            UnitProfile(
                name=name,
                block=index,
                weight_bytes=sum(p.nbytes for p in own),
                gradient_bytes=sum(p.nbytes for p in large),
                state_bytes=round(sum(map(state_of, large))),
                movable_elements=sum(p.numel() for p in large),
                resident_state_bytes=round(sum(p.nbytes + state_of(p) for p in small)),
                update_seconds=sum(map(seconds_of, (*large, *small))),
                parameters=tuple(names[id(p)] for p in own),
                updates=_updates(large, steps, known) if whole and known is not None else (),
                borrows=tuple(dict.fromkeys(borrowed)),
                **_movable([p for p in own if p.numel() >= SMALL], steps, master_weights, window_bytes),
            )
        )
    return units


def _movable(
    parameters: list[nn.Parameter],
    steps: OptimizerSteps,
    master_weights: bool,
    window_bytes: WindowBytes | None,
) -> dict[str, Any]:
    """Of a unit's parameters that are large enough to leave the device with it."""
    low = (torch.bfloat16, torch.float16)

    def keeps_half(parameter: nn.Parameter) -> bool:
        found = steps.of.get(id(parameter))
        return found is not None and found.keeps_half  # its new weight depends on the old one

    pieces = () if window_bytes is None else window_bytes(parameters)
    return {
        "window_bytes": max(pieces, default=0),
        "least_window_bytes": min(pieces, default=0),
        "movable_weight_bytes": sum(p.nbytes for p in parameters),
        "weight_extent_bytes": sum(round_up(p.nbytes, _PAGE_BYTES) for p in parameters),
        "written_extent_bytes": sum(round_up(p.nbytes, _PAGE_BYTES) for p in parameters if p.requires_grad),
        "overwritten": bool(parameters)
        and master_weights
        and all(p.requires_grad and p.dtype in low and not keeps_half(p) for p in parameters),
    }


def _updates(
    parameters: list[nn.Parameter], steps: OptimizerSteps, known: KnownStates
) -> tuple[ParameterUpdate, ...]:
    """Of those that are in a group: the optimizer says of the others what it has against them."""
    return tuple(_update(p, steps, known) for p in parameters if id(p) in steps.of)


def _update(parameter: nn.Parameter, steps: OptimizerSteps, known: KnownStates) -> ParameterUpdate:
    step = steps.of[id(parameter)]
    gradient = round_up(parameter.nbytes, _PAGE_BYTES)
    return ParameterUpdate(
        elements=parameter.numel(),
        record_bytes=sum(round_up(size, _PAGE_BYTES) for size in known.sizes[id(parameter)]),
        gradient_bytes=2 * gradient if step.widening else gradient,
        workspace_bytes=math.ceil(parameter.numel() * step.workspace),
        refresh_bytes=known.refresh_bytes[id(parameter)],
    )
