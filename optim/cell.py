"""All parts that update one parameter, put together: the slow and right path, and the oracle of fast ones.

    load states -> down -> rule -> up and residual -> weight decay -> master -> store states

A cell holds no tensors and is made from settings, shape and dtype alone, so that the bytes of everything it
will keep are known before anything is allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
    basis: int | None = None
    """The number of the parameter whose key names the basis; None: its own."""


class Projected(NamedTuple):
    """What a cell has beside a rule where its gradient is projected."""

    projector: Projector
    refresh: RefreshPolicy
    residual: Residual


class Cell:
    """The parts for parameters of one shape and dtype under one group's settings."""

    def __init__(self, settings: Settings, shape: torch.Size, dtype: torch.dtype) -> None:
        self.settings = settings
        self.own_shape = shape
        """Of what :meth:`own` gives."""
        if settings.split is not None and settings.split > 1 and len(shape) >= 2:
            shape = _split(shape, settings.split)
        self.shape = shape
        """What is worked on: the parameter's own shape, or that of the stack it is split into."""
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
        state: State = {STEP: torch.zeros((), dtype=torch.float32, device="cpu")}
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

    def own(self, tensor: Tensor) -> Tensor:
        """What of the parameter, or of its gradient, this process updates; all other methods take that."""
        return tensor

    is_whole = True
    """Whether this process has all of the parameter."""

    def first_entry(self, moment: str | None) -> int:
        """Where this process's part of a moment, or of the weight, begins in the whole one: random numbers
        belong to places there."""
        return 0

    def norm_group(self, *, low: bool) -> Any:
        """The processes over which the square of a norm of R, or of the gradient, is summed; None: this one
        has all of it."""
        return None

    def exported(self, state: State) -> State:
        """A state as a checkpoint has it; the memory is shared."""
        return state

    def imported(self, state: State) -> State:
        """What :meth:`exported` gave, as it was."""
        return state

    def update_(self, weight: Tensor, gradient: Tensor, state: State, turn: Turn) -> None:
        """One step, after :meth:`refresh_if_due_`."""
        gradient = gradient.reshape(self.shape)
        opened = self.open(state, gradient.device)
        self._move_(weight, self.summed(self.down(opened, gradient)), gradient, opened, state, turn)

    def update_low_(self, weight: Tensor, low: Tensor, state: State, turn: Turn) -> None:
        """One step from what :meth:`summed` gave, in the basis that there is; for residual ``none``."""
        self._move_(weight, low, None, self.open(state, weight.device), state, turn)

    def open(self, state: State, device: torch.device) -> Stored:
        """The basis, for :meth:`down`."""
        return self.projected.projector.open(part(state, "projector"), device) if self.projected else {}

    def down(self, opened: Stored, gradient: Tensor) -> Tensor:
        """R of a gradient of any shape, or the gradient in fp32: linear, so that R of a sum is the sum."""
        gradient = gradient.reshape(self.shape)
        return self.projected.projector.down(opened, gradient) if self.projected else gradient.float()

    def summed(self, low: Tensor) -> Tensor:
        """R of the whole parameter from what :meth:`down` gave: the same, where it is all in this process."""
        return low

    def _move_(
        self, weight: Tensor, low: Tensor, gradient: Tensor | None, opened: Stored, state: State, turn: Turn
    ) -> None:
        state[STEP] += 1
        moments = self.load_moments(state)
        update = self.rule.direction(moments, low, int(state[STEP]))
        if self.projected is not None:
            projector, _, residual = self.projected
            update = residual.combine(gradient, low, update, projector, opened, part(state, "residual"))
        self.store_moments_(state, moments, turn)
        self._apply_(weight.detach().view(self.shape), update, state, turn)

    def _apply_(self, weight: Tensor, update: Tensor, state: State, turn: Turn) -> None:
        stored = part(state, "master")
        value = self.master.load(weight, stored)
        decay = self.settings.weight_decay
        # Of no dimension, which goes with every shape, and with other devices than its own.
        lr = turn.lr.reshape(()) if isinstance(turn.lr, Tensor) else turn.lr
        if decay and self.settings.decay_order == "before":
            value.mul_(1 - lr * decay)
        if isinstance(lr, Tensor):
            value.sub_(update.mul_(lr))
        else:
            value.add_(update, alpha=-lr)
        if decay and self.settings.decay_order == "after":
            value.mul_(1 - lr * decay)
        # Where the weight is its own master it has changed already, and a copy onto itself takes a pass.
        if value.data_ptr() != weight.data_ptr():
            key = self.key(turn).skip(self.first_entry(None))
            self.master.store_(weight, stored, value, key=key)

    def is_due(self, state: State, turn: Turn) -> bool:
        """Whether this step is to begin with a new basis."""
        refresh = self.projected.refresh if self.projected else None
        return refresh is not None and refresh.is_due(part(state, "refresh"), turn.step)

    def refresh_if_due_(self, gradient: Tensor, state: State, turn: Turn) -> bool:
        """A new basis, and the moments carried over into it, where it is time and the gradient is not zero.
        False, and nothing changed, where the gradient is needed and not finite."""
        if self.projected is None or not self.is_due(state, turn):
            return True
        gradient = gradient.reshape(self.shape)
        if self.projected.projector.needs_gradient:
            least, largest = self.extremes(gradient)
            if not (math.isfinite(least) and math.isfinite(largest)):
                return False
            if least == largest == 0:
                return True
        self._refresh_(self.projected, gradient, state, turn)
        return True

    def extremes(self, gradient: Tensor) -> tuple[float, float]:
        """Least and largest entry; NaN if there is one."""
        least, largest = gradient.aminmax()
        return float(least), float(largest)

    def _refresh_(self, projected: Projected, gradient: Tensor, state: State, turn: Turn) -> None:
        projector, policy, _ = projected
        stored = part(state, "projector")
        has_moments = int(state[STEP]) > 0
        old: Stored = {}
        if has_moments and (policy.lazy or policy.moments == "rotate"):
            # refresh_ writes in place, and the old basis is wanted once more.
            old = {k: v.clone() for k, v in projector.open(stored, gradient.device).items()}
        named_by = turn if turn.basis is None else replace(turn, parameter=turn.basis)
        projector.refresh_(stored, gradient, key=self.key(named_by))
        new = projector.open(stored, gradient.device) if old else {}
        cosine = None
        if old and policy.lazy:
            cosine = self.leading_cosine(old, new)
        policy.done_(part(state, "refresh"), turn.step, offset=turn.offset, cosine=cosine)
        if has_moments and policy.moments == "rotate":
            moments = self.load_moments(state)
            overlap = projector.overlap(old, new)
            self.rule.rotate_(moments, overlap, self.low_shape, int(state[STEP]))
            self.store_moments_(state, moments, turn, _ROTATED_STREAM)
        elif has_moments and policy.moments == "reset":
            state[STEP].zero_()
            zeros = {k: torch.zeros_like(v) for k, v in self.load_moments(state).items()}
            self.store_moments_(state, zeros, turn, _ROTATED_STREAM)

    def leading_cosine(self, old: Stored, new: Stored) -> float:
        """Between the leading vectors of two opened bases, of the left ones if there are two sides."""
        side = next(iter(old))
        return leading_cosine(old[side], new[side])

    def load_moments(self, state: State) -> Moments:
        """In fp32; the stored tensors themselves where they are."""
        return {
            name: self.formats[name].load(part(state, name), spec.shape, signed=spec.signed)
            for name, spec in self.moments.items()
        }

    def store_moments_(self, state: State, moments: Moments, turn: Turn, stream: int = MOMENT_STREAM) -> None:
        """What :meth:`load_moments` gave, changed; ``stream`` is that of the rounding."""
        key = self.key(turn)
        for number, (name, spec) in enumerate(self.moments.items()):
            place = key.fold(stream + number).skip(self.first_entry(name))
            self.formats[name].store_(part(state, name), moments[name], signed=spec.signed, key=place)

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
