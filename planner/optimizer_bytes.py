"""Bytes of weights, gradients and optimizer state, from the parameters' shapes alone.

Each rule says what one implementation allocates for a parameter:

- ``adamw``: torch.optim.AdamW, two moments, and a step count of 4 bytes.
- ``sgd-momentum``: torch.optim.SGD with momentum, one buffer.
- ``adafactor``: torch.optim.Adafactor, a row and a column of second moments for a parameter of two and more
  dimensions, one full moment below that; a step count. No first moment.
- ``adam-8bit``: bitsandbytes' Adam8bit, two moments of one byte and an fp32 scale for every 256 of them;
  a parameter of fewer than 4096 elements keeps two fp32 moments. Its two tables of 256 fp32 values exist
  once for the whole optimizer and are not in any unit's bytes.

With master weights a parameter of lower precision has an fp32 copy, and the state follows the copy.

memtrain's own optimizers, of which a name stands for many settings, are in ``grid_bytes``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

_STEP_BYTES = 4
_FP32_BYTES = 4
_BLOCK_8BIT = 256
_LEAST_8BIT = 4096
ADAM_8BIT_TABLE_BYTES = 2 * 256 * _FP32_BYTES
"""The dynamic quantisation maps of the two moments, shared by all parameters."""


class OptimizerRule(str, Enum):
    """An optimizer whose state follows from shapes."""

    ADAMW = "adamw"
    SGD_MOMENTUM = "sgd-momentum"
    ADAFACTOR = "adafactor"
    ADAM_8BIT = "adam-8bit"


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterSpec:
    """One parameter of a model."""

    name: str
    """Qualified."""
    shape: tuple[int, ...]
    dtype: str
    """As torch prints it, without ``torch.``: ``bfloat16``."""
    element_bytes: int
    trainable: bool = True

    def __post_init__(self) -> None:
        if self.element_bytes < 1 or any(size < 0 for size in self.shape):
            raise ValueError(
                f"{self.name}: no parameter has shape {self.shape} of {self.element_bytes} bytes"
            )

    @property
    def elements(self) -> int:
        """1 for a scalar."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Of the weight itself."""
        return self.elements * self.element_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """What parameters need in training, activations apart."""

    weights: int
    gradients: int
    """In the parameters' own dtype; trainable ones only."""
    moments: int
    masters: int
    """fp32 copies of lower-precision weights."""

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.gradients + self.moments + self.masters

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(
            weights=self.weights + other.weights,
            gradients=self.gradients + other.gradients,
            moments=self.moments + other.moments,
            masters=self.masters + other.masters,
        )


class StateRule(Protocol):
    """An optimizer that says itself what it keeps: ``grid_bytes.GridRule``."""

    @property
    def value(self) -> str:
        """Its name."""
        ...

    def state_of(self, parameter: ParameterSpec) -> tuple[int, int]:
        """Bytes kept for a trainable parameter, and of its master."""
        ...


def state_bytes(
    parameters: Iterable[ParameterSpec], rule: OptimizerRule | StateRule, *, master_weights: bool = False
) -> StateBytes:
    """Bytes of ``parameters`` under ``rule``, each parameter once.

    Args:
        master_weights: of an ``OptimizerRule``; a ``StateRule`` knows about its masters.
    """
    weights = gradients = moments = masters = 0
    for parameter in parameters:
        weights += parameter.size_bytes
        if not parameter.trainable:
            continue
        gradients += parameter.size_bytes
        if not isinstance(rule, OptimizerRule):
            kept, master = rule.state_of(parameter)
            moments, masters = moments + kept, masters + master
            continue
        has_master = master_weights and parameter.element_bytes < _FP32_BYTES
        masters += parameter.elements * _FP32_BYTES if has_master else 0
        moments += _moment_bytes(parameter, rule, _FP32_BYTES if has_master else parameter.element_bytes)
    return StateBytes(weights=weights, gradients=gradients, moments=moments, masters=masters)


def _moment_bytes(parameter: ParameterSpec, rule: OptimizerRule, element_bytes: int) -> int:
    elements = parameter.elements
    if rule is OptimizerRule.ADAMW:
        return 2 * elements * element_bytes + _STEP_BYTES
    if rule is OptimizerRule.SGD_MOMENTUM:
        return elements * element_bytes
    if rule is OptimizerRule.ADAFACTOR:
        if len(parameter.shape) < 2:
            return elements * element_bytes + _STEP_BYTES
        *outer, rows, columns = parameter.shape
        return math.prod(outer) * (rows + columns) * element_bytes + _STEP_BYTES
    if elements < _LEAST_8BIT:
        return 2 * elements * _FP32_BYTES
    return 2 * (elements + -(-elements // _BLOCK_8BIT) * _FP32_BYTES)
