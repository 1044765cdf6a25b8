"""Updates without a second moment, in one pass: the sign of the gradient, the gradient itself, and Lion.

    sign: w = keep w - lr sign(g)          sgd: w = keep w - lr g
    lion: w = keep w - lr sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g

Lion is arXiv 2302.06675. ``keep`` is 1 - lr weight_decay. The sign of NaN is 0, as ``torch.sign`` has it: a
NaN gradient leaves its weight to the decay, and makes Lion's moment NaN for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from memtrain.optim.kernels import native
from memtrain.optim.kernels.aot import KernelSpec, KernelVariant
from memtrain.optim.kernels.lazy import triton_kernel
from memtrain.optim.kernels.pointwise import (
    FP32,
    RANDOM_BF16,
    WEIGHT_VARIANTS,
    Keys,
    Operands,
    Stored,
    check_state,
    launch_keys,
    load_values,
    moment_kind,
    operands,
    store_values,
    weight_bytes,
)
from memtrain.optim.storage import master_format, state_format

if TYPE_CHECKING:
    import triton.language as tl

Rule = Literal["sign", "sgd"]
_BLOCK = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainStep:
    """The numbers of one step without a second moment."""

    lr: float
    weight_decay: float = 0.0
    rule: Rule = "sign"

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"PlainStep.{name} must not be negative, got {getattr(self, name)}")
        if self.rule not in ("sign", "sgd"):
            raise ValueError(f"PlainStep.rule must be 'sign' or 'sgd', got {self.rule!r}")

    @property
    def keep(self) -> float:
        """What weight decay leaves of a weight."""
        return 1 - self.lr * self.weight_decay


@dataclass(frozen=True, kw_only=True, slots=True)
class LionStep:
    """The numbers of one Lion step."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"LionStep.{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def plain(self) -> PlainStep:
        """What happens to the weight once the direction is known."""
        return PlainStep(lr=self.lr, weight_decay=self.weight_decay)

    def averages(self) -> tuple[float, float, float, float]:
        """``beta1, 1 - beta1, beta2, 1 - beta2``."""
        return self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2


def reference(o: Operands, direction: Tensor, step: PlainStep) -> None:
    """The arithmetic, plainly; ``direction`` is the gradient, or Lion's average of it."""
    holder, master = master_format("split24" if o.master else "none"), dict(o.master)
    update = direction.sign() if step.rule == "sign" else direction
    value = holder.load(o.weight, master) * step.keep - step.lr * update
    holder.store_(o.weight, master, value, key=o.key("weight"))


def reference_lion(o: Operands, first: Stored, step: LionStep) -> None:
    """The arithmetic, plainly, for a moment in any of the point-wise formats."""
    form = state_format("fp32" if moment_kind(first["value"]) == FP32 else "bf16")
    g, m = o.gradient.float(), form.load(dict(first), o.weight.shape, signed=True)
    reference(o, step.beta1 * m + (1 - step.beta1) * g, step.plain)
    form.store_(dict(first), step.beta2 * m + (1 - step.beta2) * g, signed=True, key=o.key("first"))


@triton_kernel
def plain_update(w, direction, keep, lr, SIGN: tl.constexpr):
    """The new weight."""
    if SIGN:
        direction = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, 0.0))
    return w * keep - lr * direction


@triton_kernel
def _sign_kernel(
    weight_ptr,
    correction_ptr,
    gradient_ptr,
    count,
    keep,
    lr,
    weight_key,
    offset,
    WEIGHT: tl.constexpr,
    SIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    w = load_values(weight_ptr, correction_ptr, at, inside, WEIGHT)
    g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = plain_update(w, g, keep, lr, SIGN)
    store_values(weight_ptr, correction_ptr, at, w, inside, weight_key, offset, WEIGHT)


@triton_kernel
def _lion_kernel(
    weight_ptr,
    correction_ptr,
    gradient_ptr,
    first_ptr,
    count,
    keep,
    lr,
    beta1,
    gain1,
    beta2,
    gain2,
    weight_key,
    first_key,
    offset,
    WEIGHT: tl.constexpr,
    MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    w = load_values(weight_ptr, correction_ptr, at, inside, WEIGHT)
    g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = load_values(first_ptr, first_ptr, at, inside, MOMENT)
    w = plain_update(w, beta1 * m + gain1 * g, keep, lr, True)
    store_values(first_ptr, first_ptr, at, beta2 * m + gain2 * g, inside, first_key, offset, MOMENT)
    store_values(weight_ptr, correction_ptr, at, w, inside, weight_key, offset, WEIGHT)


def plain_(
    weight: Tensor,
    gradient: Tensor,
    step: PlainStep,
    *,
    master: Stored | None = None,
    keys: Keys | None = None,
) -> None:
    """One step of sign or SGD, in place; nothing is kept between steps.

    Args:
        weight: fp32 or bf16, any shape and strides.
        gradient: fp32 or bf16, of the same shape.
        step: the numbers and the rule.
        master: what ``master_format("none" or "split24").empty`` made; None is "none".
        keys: needed for a bf16 weight without a master, optional with ``split24``; of them ``weight`` alone
            is used.

    Raises:
        ValueError, TypeError: operands that do not fit; nothing has been changed.
    """
    with operands(weight, gradient, master, keys) as o:
        (_triton if weight.is_cuda else _cpu)(o, step)


def lion_(
    weight: Tensor,
    gradient: Tensor,
    first: Stored,
    step: LionStep,
    *,
    master: Stored | None = None,
    keys: Keys | None = None,
) -> None:
    """One Lion step, in place. ``first``: what ``state_format("fp32" or "bf16").empty`` made; the rest and
    the errors as for ``plain_``, with ``keys.first`` for a bf16 moment.
    """
    m = first["value"]
    moment_kind(m)
    check_state("first", m, weight.shape, m.dtype)
    with operands(weight, gradient, master, keys, m) as o:
        (_triton_lion if weight.is_cuda else _cpu_lion)(o, m, step)


def _triton(o: Operands, step: PlainStep) -> None:
    if o.weight.numel():
        weight_key, _, _, offset = launch_keys(o.keys)
        _sign_kernel[(-(-o.weight.numel() // _BLOCK),)](
            *o.triton(),
            o.weight.numel(),
            step.keep,
            step.lr,
            weight_key,
            offset,
            WEIGHT=o.kind,
            SIGN=step.rule == "sign",
            BLOCK=_BLOCK,
        )


def _triton_lion(o: Operands, m: Tensor, step: LionStep) -> None:
    if o.weight.numel():
        weight_key, first_key, _, offset = launch_keys(o.keys)
        _lion_kernel[(-(-o.weight.numel() // _BLOCK),)](
            *o.triton(),
            m,
            o.weight.numel(),
            step.plain.keep,
            step.lr,
            *step.averages(),
            weight_key,
            first_key,
            offset,
            WEIGHT=o.kind,
            MOMENT=moment_kind(m),
            BLOCK=_BLOCK,
        )


def native_rest(step: PlainStep) -> native.Rest:
    """For a C++ kernel."""
    return native.Rest(step.keep, step.lr, step.rule == "sign")


def _cpu(o: Operands, step: PlainStep) -> None:
    kernel = native.function("sign", "plain")
    if kernel is None:
        for _, part in o.pieces():
            reference(part, part.gradient.float(), step)
        return
    kernel(*o.native(), native.count(o.weight), native_rest(step))


def _cpu_lion(o: Operands, m: Tensor, step: LionStep) -> None:
    kernel = native.function("sign", "lion")
    if kernel is None:
        for piece, part in o.pieces():
            reference_lion(part, {"value": m.view(-1)[piece]}, step)
        return
    kernel(
        *o.native(),
        native.values(m, o.key("first")),
        native.count(o.weight),
        native_rest(step.plain),
        native.Averages(*step.averages()),
    )


def bytes_per_element(weight: int, gradient: torch.dtype, moment: torch.dtype | None = None) -> int:
    """Bytes that a step moves a parameter; ``moment`` is Lion's."""
    return weight_bytes(weight) + gradient.itemsize + (2 * moment.itemsize if moment else 0)


def _plain_variants() -> Iterator[KernelVariant]:
    for weight in WEIGHT_VARIANTS:
        moved = bytes_per_element(weight.kind, weight.dtype)
        scalars = {"count": "i32:16", "keep": "fp32", "lr": "fp32", "weight_key": "i64", "offset": "i32:16"}
        for rule in ("sign", "sgd"):
            yield KernelVariant(
                label=f"{rule}, {weight.label} weight",
                signature={**weight.signature, **scalars},
                constexprs={"WEIGHT": weight.kind, "SIGN": rule == "sign", "BLOCK": _BLOCK},
                moved_bytes=moved,
                least_bytes=moved,
            )


def _lion_variants() -> Iterator[KernelVariant]:
    for weight in WEIGHT_VARIANTS:
        for moment, code in ((torch.float32, FP32), (torch.bfloat16, RANDOM_BF16)):
            moved = bytes_per_element(weight.kind, weight.dtype, moment)
            scalars = dict.fromkeys("keep lr beta1 gain1 beta2 gain2".split(), "fp32")
            keys = {"weight_key": "i64", "first_key": "i64", "offset": "i32:16"}
            pointer = "*fp32" if code == FP32 else "*bf16"
            yield KernelVariant(
                label=f"{weight.label} weight, {pointer[1:]} moment",
                signature={**weight.signature, "first_ptr": pointer, "count": "i32:16", **scalars, **keys},
                constexprs={"WEIGHT": weight.kind, "MOMENT": code, "BLOCK": _BLOCK},
                moved_bytes=moved,
                least_bytes=moved,
            )


SPECS = (
    KernelSpec(kernel=_sign_kernel, element="parameter", variants=tuple(_plain_variants())),
    KernelSpec(kernel=_lion_kernel, element="parameter", variants=tuple(_lion_variants())),
)
