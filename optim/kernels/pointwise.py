"""What the point-wise kernels share: the step's numbers, checks, random keys, and the Triton parts.

A point-wise step reads gradient, weight and moments once, computes in fp32 and writes weight and moments
once. The weight is fp32, bf16 rounded at random (a key), or bf16 with an int8 correction (``split24``);
which one it is, follows from its dtype and from ``master``, the dict that ``master_format(...).empty`` made.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from memtrain.optim.kernels import native
from memtrain.optim.kernels.lazy import triton_kernel
from memtrain.optim.storage import RandomKey

if TYPE_CHECKING:
    import triton.language as tl

Stored = Mapping[str, Tensor]
CHUNK_ELEMENTS = 1 << 16
"""Of the plain-torch path where nothing can be compiled."""
FP32, RANDOM_BF16, SPLIT24 = 0, 1, 2
"""Kinds of values, as the Triton kernels know them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamStep:
    """The numbers of one AdamW step: decay is decoupled and comes first, eps is added to the corrected
    root.
    """

    lr: float
    step: int
    """From 1."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"AdamStep.step counts from 1, got {self.step}")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"AdamStep.{name} must be in [0, 1), got {beta}")
        for name, value in (("lr", self.lr), ("eps", self.eps), ("weight_decay", self.weight_decay)):
            if not value >= 0:
                raise ValueError(f"AdamStep.{name} must not be negative, got {value}")

    @property
    def correction1(self) -> float:
        """1 - beta1 ** step."""
        return 1 - self.beta1**self.step

    @property
    def correction2(self) -> float:
        """1 - beta2 ** step."""
        return 1 - self.beta2**self.step

    def kernel_numbers(self) -> tuple[float, ...]:
        """``keep, rate, beta1, 1 - beta1, beta2, 1 - beta2, root, eps``, as the kernels take them:

        w = w * keep - rate * m / (sqrt(v) * root + eps). Differences are formed here, in fp64: in fp32 1 -
        .999 is wrong by 5e-5.
        """
        rate, root = self.lr / self.correction1, 1 / math.sqrt(self.correction2)
        gains = (self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2)
        return 1 - self.lr * self.weight_decay, rate, *gains, root, self.eps


class Keys(NamedTuple):
    """Of one parameter's step: from which bf16 weights and bf16 moments are rounded at random."""

    weight: RandomKey
    first: RandomKey
    second: RandomKey

    def skip(self, count: int) -> Keys:
        """The keys of what comes ``count`` elements later."""
        return Keys(*(key.skip(count) for key in self))


@dataclass(frozen=True, slots=True)
class Operands:
    """What every step has, checked and contiguous."""

    weight: Tensor
    gradient: Tensor
    master: Stored
    keys: Keys | None

    @property
    def kind(self) -> int:
        """Of the weight: FP32, RANDOM_BF16 or SPLIT24."""
        if self.weight.dtype == torch.float32:
            return FP32
        return SPLIT24 if self.master else RANDOM_BF16

    def key(self, which: Literal["weight", "first", "second"]) -> RandomKey | None:
        """One of the keys, if there are any."""
        return getattr(self.keys, which) if self.keys else None

    def native_moments(self, first: Tensor, second: Tensor) -> tuple[native.Values, native.Values]:
        """Moments in fp32 or bf16, for a C++ kernel."""
        return native.values(first, self.key("first")), native.values(second, self.key("second"))

    def native(self) -> tuple[native.Values, native.Gradient]:
        """For a C++ kernel."""
        described = native.values(self.weight, self.key("weight"), self.master.get("correction"))
        return described, native.gradient(self.gradient)

    def triton(self) -> tuple[Tensor, Tensor, Tensor]:
        """``weight_ptr, correction_ptr, gradient_ptr`` of a Triton kernel."""
        return self.weight, self.master.get("correction", self.weight), self.gradient

    def pieces(self) -> Iterator[tuple[slice, Operands]]:
        """Flat parts that stay in the cache, and where they lie."""
        for start in range(0, self.weight.numel(), CHUNK_ELEMENTS):
            piece = slice(start, start + CHUNK_ELEMENTS)
            master = {name: tensor.view(-1)[piece] for name, tensor in self.master.items()}
            keys = self.keys and self.keys.skip(start)
            yield piece, Operands(self.weight.view(-1)[piece], self.gradient.view(-1)[piece], master, keys)


@contextlib.contextmanager
def operands(
    weight: Tensor, gradient: Tensor, master: Stored | None, keys: Keys | None, *states: Tensor
) -> Iterator[Operands]:
    """Checks everything, lends contiguous operands, and sees to it that ``weight`` changes, for autograd too.

    Raises:
        ValueError, TypeError: what no kernel can serve.
    """
    master = master or {}
    _check(weight, gradient, master, keys, states)
    dense = weight.detach().contiguous()
    yield Operands(dense, gradient.detach().contiguous(), master, keys)
    if dense.data_ptr() == weight.data_ptr():
        torch.autograd.graph.increment_version(weight)
    else:
        weight.detach().copy_(dense)


def _check(
    weight: Tensor, gradient: Tensor, master: Stored, keys: Keys | None, states: tuple[Tensor, ...]
) -> None:
    if gradient.shape != weight.shape:
        raise ValueError(
            f"gradient {tuple(gradient.shape)} must have the shape of weight {tuple(weight.shape)}"
        )
    for name, tensor in (("weight", weight), ("gradient", gradient)):
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"{name} must be float32 or bfloat16, got {tensor.dtype}")
    if master.keys() - {"correction"} or (master and weight.dtype != torch.bfloat16):
        raise ValueError(
            f"master {sorted(master)} of a {weight.dtype} weight: kernels serve 'none' and, for bfloat16, "
            "'split24'; run them on the fp32 master itself"
        )
    for correction in master.values():
        check_state("master correction", correction, weight.shape, torch.int8)
    at_random = weight.dtype == torch.bfloat16 and not master
    if keys is None and (at_random or any(state.dtype == torch.bfloat16 for state in states)):
        raise ValueError(
            "bfloat16 weights without a master, and bfloat16 moments, need keys to be rounded with"
        )
    if weight.device.type not in ("cpu", "cuda"):
        raise ValueError(f"kernels run on a CPU or on CUDA, got {weight.device}")
    for tensor in (gradient, *master.values(), *states):
        if tensor.device != weight.device:
            raise ValueError(f"operands on {weight.device} and {tensor.device}")
    for tensor in (*master.values(), *states):
        if not tensor.is_contiguous():
            raise ValueError("states must be contiguous, as empty() makes them")


def moment_kind(moment: Tensor) -> int:
    """FP32 or RANDOM_BF16. Raises TypeError for any other dtype."""
    if moment.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"moments must be float32 or bfloat16 here, got {moment.dtype}")
    return FP32 if moment.dtype == torch.float32 else RANDOM_BF16


def check_state(name: str, state: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Kernels write to bare addresses: raises ValueError or TypeError for anything else than they expect."""
    if list(state.shape) != list(shape):
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(state.shape)}")
    if state.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {state.dtype}")


def weight_bytes(kind: int) -> int:
    """Bytes that reading and writing a weight and its correction moves."""
    return {FP32: 8, RANDOM_BF16: 4, SPLIT24: 6}[kind]


class WeightVariant(NamedTuple):
    """A kind of weight with a gradient of its dtype, for ahead-of-time compilation."""

    label: str
    kind: int
    dtype: torch.dtype

    @property
    def signature(self) -> dict[str, str]:
        """Types of ``weight_ptr``, ``correction_ptr`` and ``gradient_ptr``."""
        pointer = "*fp32" if self.kind == FP32 else "*bf16"
        correction = "*i8" if self.kind == SPLIT24 else pointer
        return {"weight_ptr": pointer, "correction_ptr": correction, "gradient_ptr": pointer}


WEIGHT_VARIANTS = (
    WeightVariant("fp32", FP32, torch.float32),
    WeightVariant("bf16", RANDOM_BF16, torch.bfloat16),
    WeightVariant("split24", SPLIT24, torch.bfloat16),
)


class MomentVariant(NamedTuple):
    """A format of the moments, for ahead-of-time compilation."""

    label: str
    kind: int
    dtype: torch.dtype

    @property
    def signature(self) -> dict[str, str]:
        """Types of ``first_ptr`` and ``second_ptr``."""
        return dict.fromkeys(("first_ptr", "second_ptr"), f"*{self.label}")


MOMENT_VARIANTS = (
    MomentVariant("fp32", FP32, torch.float32),
    MomentVariant("bf16", RANDOM_BF16, torch.bfloat16),
)
ADAM_SIGNATURE = dict.fromkeys("keep rate beta1 gain1 beta2 gain2 root eps".split(), "fp32")
KEY_SIGNATURE = {"weight_key": "i64", "first_key": "i64", "second_key": "i64", "offset": "i32:16"}


def launch_keys(keys: Keys | None) -> tuple[int, ...]:
    """Three keys, each with both words in one int64, and their offset, for a Triton kernel."""
    if keys is None:
        return 0, 0, 0, 0
    return *map(packed_key, keys), keys.weight.offset


def packed_key(key: RandomKey) -> int:
    """Both words in one int64."""
    first, second = key.words()
    word = first | second << 32
    return word - ((word >> 63) << 64)


@triton_kernel
def mix(x):
    """See storage/random.py; uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton_kernel
def random_word(key, offset):
    """The word of a packed key for int64 offsets; uint32."""
    key = tl.cast(key, tl.int64)  # a launch takes a small number, such as no key, for an int32
    first = (key & 0xFFFFFFFF).to(tl.uint32)
    second = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return mix(mix(low + first) ^ (second + high * 0x9E3779B9))


@triton_kernel
def random_byte(key, offset):
    """One for each int64 offset, of the word that four of them share; int32."""
    shift = (offset & 3).to(tl.uint32) * 8
    return ((random_word(key, offset >> 2) >> shift) & 0xFF).to(tl.int32)


@triton_kernel
def load_values(data_ptr, correction_ptr, offset, inside, KIND: tl.constexpr):
    """fp32 values of any kind; see storage/masters.py."""
    data = tl.load(data_ptr + offset, mask=inside, other=0.0)
    value = data.to(tl.float32)
    if KIND == 2:
        high = data.to(tl.int16, bitcast=True).to(tl.int32)
        low = tl.load(correction_ptr + offset, mask=inside, other=0).to(tl.int32)
        joined = ((high << 16) + (low << 8)).to(tl.float32, bitcast=True)
        value = tl.where((high & 0x7F80) == 0x7F80, value, joined)
    return value


@triton_kernel
def store_values(data_ptr, correction_ptr, offset, value, inside, key, key_offset, KIND: tl.constexpr):
    """Write fp32 values as what they are kept in; see storage/masters.py and random.py."""
    if KIND == 0:
        tl.store(data_ptr + offset, value, mask=inside)
    else:
        bits = value.to(tl.int32, bitcast=True)
        if KIND == 1:
            random = (random_word(key, offset + key_offset) & 0xFFFF).to(tl.int32)
            high = (bits + random) >> 16
        else:
            random = random_byte(key, offset + key_offset)
            top = (bits + tl.where(key == 0, 128, random)) >> 8
            high = (top + 128) >> 8
        high = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, high)
        if KIND == 2:
            lost = (high & 0x7F80) == 0x7F80
            tl.store(correction_ptr + offset, tl.where(lost, 0, top - (high << 8)).to(tl.int8), mask=inside)
        tl.store(data_ptr + offset, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
