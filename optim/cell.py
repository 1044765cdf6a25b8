"""All parts that update one parameter, put together: the slow and right path, and the oracle of fast ones.

    load states -> down -> rule -> up and residual -> weight decay -> master -> store states

A cell holds no tensors and is made from settings, shape and dtype alone, so that the bytes of everything it
will keep are known before anything is allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memtrain.optim.projection import Projector, Stored
from memtrain.optim.refresh import RefreshPolicy, leading_cosine
from memtrain.optim.residual import Residual
from memtrain.optim.rules import Moments
from memtrain.optim.settings import Settings
from memtrain.optim.storage import RandomKey, StateFormat, master_format, state_format

State = dict[str, Tensor]

STEP = "step"
MOMENT_STREAM, _ROTATED_STREAM = 16, 32
"""Streams of a step's key from which the moments are rounded; 0 is the weight's, 1 to 3 the projector's."""
LEAST_QUANTISED_ELEMENTS = 4096
"""Smaller moments stay fp32, as bitsandbytes and torchao have it: they weigh nothing and are often biases
and norms, whose gradients differ most from the rest of a block."""


@dataclass(frozen=True)
class Turn:
    """What one step means for one parameter beside its gradient."""

    lr: float | Tensor
    step: int
    """Of the group, from zero."""
    parameter: int
    """The number of the parameter in the optimizer: part of every random key."""
    offset: int
    """Steps by which its refresh comes later."""


class Projected(NamedTuple):
    """What a cell has beside a rule where its gradient is projected."""

    projector: Projector
    refresh: RefreshPolicy
    residual: Residual


class Cell:
    """The parts for parameters of one shape and dtype under one group's settings."""

    def __init__(self, settings: Settings, shape: torch.Size, dtype: torch.dtype) -> None:
        self.settings = settings
        if settings.split is not None and settings.split > 1 and len(shape) >= 2:
            shape = _split(shape, settings.split)
        self.shape = shape
        """What is worked on: the parameter's own shape, or that of the stack it is split into."""
        self.numel = shape.numel()
        self.dtype = dtype
        self.projected: Projected | None = None
        self.low_shape = shape
        self.rule = settings.rule_part
        if settings.projection is not None and len(shape) >= 2 and shape.numel():
            projector = settings.projection_part.bind(shape)
            settings.residual_part.check(projector)
            self.projected = Projected(projector, settings.refresh_part, settings.residual_part)
            self.low_shape = projector.low_shape
            self.rule = settings.projected_rule_part
        self.moments = self.rule.moments(self.low_shape)
        self.formats: dict[str, StateFormat] = {
            name: state_format(
                settings.state_dtype
                if settings.state_dtype in ("fp32", "bf16") or spec.shape.numel() >= LEAST_QUANTISED_ELEMENTS
                else "fp32"
            )
            for name, spec in self.moments.items()
        }
        self.master = master_format(settings.master)
        # Now, and not at the first step, is the time to learn that the master cannot serve the dtype.
        self.master.size_bytes(shape, dtype)

    def empty_state(self, weight: Tensor) -> State:
        """The state before the first update. Counters and keys lie on the CPU, all else with the weight."""
        device = weight.device
        weight = weight.detach().view(self.shape)
        state: State = {STEP: torch.zeros(())}
        for name, spec in self.moments.items():
            _put(state, name, self.formats[name].empty(spec.shape, signed=spec.signed, device=device))
        _put(state, "master", self.master.empty(weight))
        if self.projected is not None:
            projector, policy, residual = self.projected
            _put(state, "projector", projector.empty(device))
            _put(state, "refresh", policy.empty())
            _put(state, "residual", residual.empty(projector, device))
        return state

    def state_bytes(self) -> dict[str, int]:
        """Bytes that :meth:`empty_state` takes, by part; equal to the live tensors to the byte."""
        counted = {
            "moments": sum(
                self.formats[name].size_bytes(spec.shape, signed=spec.signed)
                for name, spec in self.moments.items()
            ),
            "master": self.master.size_bytes(self.shape, self.dtype),
            "counters": torch.float32.itemsize,
            "projector": 0,
        }
        if self.projected is not None:
            projector, policy, residual = self.projected
            counted["projector"] = projector.size_bytes()
            counted["counters"] += policy.size_bytes() + residual.size_bytes(projector)
        return counted

    def update_(self, weight: Tensor, gradient: Tensor, state: State, turn: Turn) -> bool:
        """One step. False, and nothing changed, where a refresh was due and the gradient is not finite."""
        weight, gradient = weight.detach().view(self.shape), gradient.reshape(self.shape)
        if not self.refresh_if_due_(gradient, state, turn):
            return False
        state[STEP] += 1
        moments = self._load(state)
        if self.projected is None:
            update = self.rule.direction(moments, gradient.float(), int(state[STEP]))
        else:
            projector, _, residual = self.projected
            opened = projector.open(part(state, "projector"), gradient.device)
            low = projector.down(opened, gradient)
            direction = self.rule.direction(moments, low, int(state[STEP]))
            memory = part(state, "residual")
            update = residual.combine(gradient, low, direction, projector, opened, memory)
        self._store_(state, moments, turn, MOMENT_STREAM)
        self._apply_(weight, update, state, turn)
        return True

    def _apply_(self, weight: Tensor, update: Tensor, state: State, turn: Turn) -> None:
        stored = part(state, "master")
        value = self.master.load(weight, stored)
        decay = self.settings.weight_decay
        if decay and self.settings.decay_order == "before":
            value.mul_(1 - turn.lr * decay)
        if isinstance(turn.lr, Tensor):
            value.sub_(update.mul_(turn.lr))
        else:
            value.add_(update, alpha=-turn.lr)
        if decay and self.settings.decay_order == "after":
            value.mul_(1 - turn.lr * decay)
        # Where the weight is its own master it has changed already, and a copy onto itself takes a pass.
        if value.data_ptr() != weight.data_ptr():
            self.master.store_(weight, stored, value, key=self.key(turn))

    def refresh_if_due_(self, gradient: Tensor, state: State, turn: Turn) -> bool:
        """A new basis, and the moments carried over into it, where it is time and the gradient is not zero.
        False, and nothing changed, where the gradient, of this cell's shape, is needed and not finite."""
        if self.projected is None or not self.projected.refresh.is_due(part(state, "refresh"), turn.step):
            return True
        if self.projected.projector.needs_gradient:
            least, largest = map(float, gradient.aminmax())
            if not (math.isfinite(least) and math.isfinite(largest)):
                return False
            if least == largest == 0:
                return True
        self._refresh_(self.projected, gradient, state, turn)
        return True

    def _refresh_(self, projected: Projected, gradient: Tensor, state: State, turn: Turn) -> None:
        projector, policy, _ = projected
        stored = part(state, "projector")
        has_moments = int(state[STEP]) > 0
        old: Stored = {}
        if has_moments and (policy.lazy or policy.moments == "rotate"):
            # refresh_ writes in place, and the old basis is wanted once more.
            old = {k: v.clone() for k, v in projector.open(stored, gradient.device).items()}
        projector.refresh_(stored, gradient, key=self.key(turn))
        new = projector.open(stored, gradient.device) if old else {}
        cosine = None
        if old and policy.lazy:
            side = next(iter(old))
            cosine = leading_cosine(old[side], new[side])
        policy.done_(part(state, "refresh"), turn.step, offset=turn.offset, cosine=cosine)
        if has_moments and policy.moments == "rotate":
            moments = self._load(state)
            overlap = projector.overlap(old, new)
            self.rule.rotate_(moments, overlap, self.low_shape, int(state[STEP]))
            self._store_(state, moments, turn, _ROTATED_STREAM)
        elif has_moments and policy.moments == "reset":
            state[STEP].zero_()
            zeros = {k: torch.zeros_like(v) for k, v in self._load(state).items()}
            self._store_(state, zeros, turn, _ROTATED_STREAM)

    def _load(self, state: State) -> Moments:
        return {
            name: self.formats[name].load(part(state, name), spec.shape, signed=spec.signed)
            for name, spec in self.moments.items()
        }

    def _store_(self, state: State, moments: Moments, turn: Turn, stream: int) -> None:
        key = self.key(turn)
        for number, (name, spec) in enumerate(self.moments.items()):
            self.formats[name].store_(
                part(state, name), moments[name], signed=spec.signed, key=key.fold(stream + number)
            )

    def key(self, turn: Turn) -> RandomKey:
        """Of a parameter's step; its streams tell the uses apart."""
        return RandomKey(seed=self.settings.seed, parameter=turn.parameter, step=turn.step)


def _split(shape: torch.Size, parts: int) -> torch.Size:
    if len(shape) != 2 or shape[0] % parts:
        raise ValueError(
            f"split={parts} is for matrices whose rows it divides, got shape {tuple(shape)}: put the "
            "parameter into a group without split"
        )
    return torch.Size((parts, shape[0] // parts, shape[1]))


def _put(state: State, part: str, stored: Stored) -> None:
    for name, tensor in stored.items():
        state[f"{part}.{name}"] = tensor


def part(state: State, part: str) -> Stored:
    """The tensors of one part; the same tensors, so that writing in place reaches the state."""
    prefix = part + "."
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
