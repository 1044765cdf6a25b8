"""Operands of the point-wise kernels in every combination, and how far two paths may differ."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memtrain.optim.kernels.pointwise import Keys, Operands
from memtrain.optim.storage import RandomKey, master_format, state_format

SHAPES = [(1, 1), (0, 8), (3, 401)]
"""The last is one program of the Triton kernels and a bit, and nine 8-bit blocks and a bit."""
WEIGHTS = [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "split24")]
OPERANDS = [
    (torch.float32, "none", torch.float32),
    (torch.float32, "none", torch.bfloat16),
    (torch.bfloat16, "none", torch.bfloat16),
    (torch.bfloat16, "split24", torch.float32),
]
"""Weight, master, gradient: every kind of weight, and gradients of its dtype and of the other."""


def make_keys(step: int = 3) -> Keys:
    key = RandomKey(seed=1, parameter=2, step=step)
    return Keys(key, key.fold(16), key.fold(17))


@dataclass
class Case:
    """A weight with its master, a gradient, and moments of ``moment_shape`` in the format ``state``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    master_name: str
    gradient_dtype: torch.dtype
    state: str
    moment_shape: tuple[int, ...] | None = None
    keys: Keys | None = field(default_factory=make_keys)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(sum(self.shape))
        self.weight = torch.randn(self.shape, generator=generator).to(self.dtype)
        self.gradient = (1e-5 * torch.randn(self.shape, generator=generator)).to(self.gradient_dtype)
        self.master = master_format(self.master_name).empty(self.weight)
        form, size = state_format(self.state), torch.Size(self.moment_shape or self.shape)
        self.first, self.second = (form.empty(size, signed=signed, device="cpu") for signed in (True, False))
        form.store_(self.first, 1e-5 * torch.randn(size, generator=generator), signed=True)
        form.store_(self.second, 1e-10 * torch.rand(size, generator=generator), signed=False)

    def clone(self) -> Case:
        return copy.deepcopy(self)

    def operands(self) -> Operands:
        return Operands(self.weight, self.gradient, self.master, self.keys)

    def value(self) -> Tensor:
        return master_format(self.master_name).load(self.weight, self.master)


def assert_same(ours: Case, expected: Case) -> None:
    """Numbers within a few roundings of fp32; what is rounded to fewer bits, mostly the very same."""
    difference = (ours.value() - expected.value()).abs()
    unit = {"none": 2.0**-7, "split24": 2.0**-15}[ours.master_name] if ours.dtype == torch.bfloat16 else 0
    _mostly_within(difference, expected.value().abs() * unit, _few_roundings(expected.value()))
    for mine, theirs in ((ours.first, expected.first), (ours.second, expected.second)):
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype
            wide = tensor.float()
            unit = 1.0 if name == "codes" else wide.abs() * (2**-7 if tensor.dtype == torch.bfloat16 else 0)
            _mostly_within((mine[name].float() - wide).abs(), unit, _few_roundings(wide))


def _few_roundings(value: Tensor) -> Tensor:
    """Of fp32, relative to the largest number: sums may cancel."""
    return 4e-7 * value.abs().max() if value.numel() else torch.tensor(0.0)


def _mostly_within(difference: Tensor, never_above: Tensor | float, mostly_below: Tensor) -> None:
    assert (difference <= torch.maximum(torch.as_tensor(never_above), mostly_below) * 1.01).all()
    assert (difference > mostly_below).sum() <= max(2, 0.01 * difference.numel())
