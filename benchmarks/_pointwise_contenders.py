"""The point-wise optimizers of ``optimizers.py`` and their peers; those that project have a module apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from _harness import BenchmarkError
from _lowrank_contenders import LR, WEIGHT_DECAY, Contender, operands
from torch import Tensor

from memtrain.optim.kernels import adamw, adamw8bit, sign
from memtrain.optim.kernels.pointwise import FP32, SPLIT24, AdamStep, Keys
from memtrain.optim.kernels.sign import LionStep
from memtrain.optim.storage import RandomKey, master_format, state_format

FUSED, BNB, ADAMW8BIT = "torch fused AdamW", "bitsandbytes AdamW8bit", "AdamW8bit"


def keys(step: int) -> Keys:
    key = RandomKey(seed=0, parameter=0, step=step)
    return Keys(key, key.fold(16), key.fold(17))


def numbers(step: int) -> AdamStep:
    return AdamStep(lr=LR, step=step, weight_decay=WEIGHT_DECAY)


def torch_fused(shape: tuple[int, int], dtype: torch.dtype, name: str) -> Contender:
    weight, gradient = operands(shape, dtype)
    parameter = torch.nn.Parameter(weight)
    parameter.grad = gradient
    optimizer = torch.optim.AdamW([parameter], lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    return Contender(
        name=name,
        step=lambda step: optimizer.step(),
        tensors=lambda: [parameter, gradient, *(t for t in optimizer.state[parameter].values() if t.dim())],
        formula_bytes=4 * dtype.itemsize * weight.numel(),
        moved_bytes=7 * dtype.itemsize * weight.numel(),
    )


def bitsandbytes_8bit(shape: tuple[int, int]) -> Contender:
    try:
        import bitsandbytes
    except ImportError as error:
        raise BenchmarkError("bitsandbytes is missing: run this with .venv-optim/bin/python") from error
    weight, gradient = operands(shape, torch.float32)
    parameter = torch.nn.Parameter(weight)
    parameter.grad = gradient
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=LR, weight_decay=WEIGHT_DECAY)

    def tensors() -> list[Tensor]:
        state = optimizer.state[parameter]
        # Its two code books of 256 numbers are shared by all parameters.
        return [parameter, gradient, *(state[n] for n in ("state1", "state2", "absmax1", "absmax2"))]

    numel = weight.numel()
    return Contender(
        name=BNB,
        step=lambda step: optimizer.step(),
        tensors=tensors,
        formula_bytes=(4 + 4 + 2) * numel + 2 * 4 * math.ceil(numel / 256),
    )


def ours(
    shape: tuple[int, int],
    name: str,
    state: str,
    run: Callable[..., None],
    bytes_per_element: float,
    *,
    master: str = "none",
    signed_only: bool = False,
) -> Contender:
    """``run(weight, gradient, moments, step, **master and keys)`` on states of our own."""
    dtype = torch.float32 if master == "none" else torch.bfloat16
    weight, gradient = operands(shape, dtype)
    holder, form = master_format(master), state_format(state)
    stored, size = holder.empty(weight), torch.Size(shape)
    signs = (True,) if signed_only else (True, False)
    moments = [form.empty(size, signed=signed, device="cpu") for signed in signs]
    states = [tensor for each in (stored, *moments) for tensor in each.values()]
    return Contender(
        name=name,
        step=lambda step: run(weight, gradient, moments, step, master=stored, keys=keys(step)),
        tensors=lambda: [weight, gradient, *states],
        formula_bytes=2 * dtype.itemsize * weight.numel()
        + holder.size_bytes(weight.shape, dtype)
        + sum(form.size_bytes(size, signed=signed) for signed in signs),
        moved_bytes=bytes_per_element * weight.numel(),
    )


def pointwise(shape: tuple[int, int]) -> list[Contender]:
    """The point-wise ones, on one shape."""
    f32, bf16 = torch.float32, torch.bfloat16

    def dense(kernel: Callable[..., None]) -> Callable[..., None]:
        return lambda w, g, moments, step, **rest: kernel(w, g, *moments, numbers(step), **rest)

    return [
        torch_fused(shape, f32, FUSED),
        torch_fused(shape, bf16, f"{FUSED}, all bf16"),
        bitsandbytes_8bit(shape),
        ours(shape, "AdamW", "fp32", dense(adamw.adamw_), adamw.bytes_per_element(FP32, f32, f32)),
        ours(
            shape,
            "AdamW, bf16 moments, split24",
            "bf16",
            dense(adamw.adamw_),
            adamw.bytes_per_element(SPLIT24, bf16, bf16),
            master="split24",
        ),
        ours(shape, ADAMW8BIT, "int8", dense(adamw8bit.adamw8bit_), adamw8bit.bytes_per_element(FP32, f32)),
        ours(
            shape,
            f"{ADAMW8BIT}, split24",
            "int8",
            dense(adamw8bit.adamw8bit_),
            adamw8bit.bytes_per_element(SPLIT24, bf16),
            master="split24",
        ),
        ours(
            shape,
            "Lion",
            "fp32",
            lambda w, g, moments, step, **rest: sign.lion_(
                w, g, *moments, LionStep(lr=LR, weight_decay=WEIGHT_DECAY), **rest
            ),
            sign.bytes_per_element(FP32, f32, f32),
            signed_only=True,
        ),
    ]
