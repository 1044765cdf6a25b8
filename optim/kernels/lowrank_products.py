"""The products of the low-rank optimizers on a CPU with AMX: no cast copy of G, no update in memory.

    R (+)= P^T G
    W = decay W - factor P N [- residual_factor sign(G - P R)] [- scaling G]

and so with a right basis. Torch multiplies bf16 by bf16 into bf16 alone: the gradient has to be cast first,
the product has to be written, read and widened behind it, a pass each. Here both ends happen in the cache
(``native/lowrank_products.cpp``): R and the update keep their fp32 sums, so that this is nearer to the
references of ``lowrank_down`` and ``lowrank_up`` than torch's product is. It differs from them by the order
of sums, a few 1e-7 of the largest term, and takes numbers below 1e-38 for zero, as the hardware does. The
order does not depend on the number of threads.

One core with AMX, rank 256, fp32, least of 150 interleaved calls. 512 x 2048, right basis: down 0.65 ms, up
0.71, with the sign of the residual 1.2, where torch's products alone, on bf16 operands, take 0.79 and 0.69.
2048 x 512, left basis: 0.84, 0.77 and 1.3; 1.14 and 0.57.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from memtrain.optim.kernels import native
from memtrain.optim.storage.random import RandomKey

_SIDE = 32
"""Of a block of the product: two tiles."""
_STEPS, _STRIP, _RUN_BLOCKS = 16, 8, 8
"""STEPS, STRIP and RUN_COLUMNS of ``native/lowrank_products.cpp``: its scratch memory is counted here."""
_BF16_BYTES, _FP32_BYTES = 2, 4
_DTYPES = (torch.float32, torch.bfloat16)


def serves(basis: Tensor, *operands: Tensor) -> bool:
    """Whether this machine and these dtypes have it: a CPU with AMX, a bf16 basis, the rest fp32 or bf16."""
    on_cpu = basis.device.type == "cpu" and basis.dtype == torch.bfloat16
    known = all(each.dtype in _DTYPES for each in operands)
    return on_cpu and known and _has_tiles()


def project_down_(
    low: Tensor,
    gradient: Tensor,
    basis: Tensor,
    *,
    right: bool,
    accumulate: bool,
    squares: Tensor | None = None,
) -> None:
    """``lowrank_down.project_down_`` for operands that it has checked and :func:`serves` has.

    Args:
        squares: fp32, a number for each row of the gradient with a right basis, for each column with a left
            one: its sum of squares is written there.
    """
    strip = 1 if right else _STRIP
    room = strip * (_STEPS * _BF16_BYTES + _blocks(basis.shape[1]) * _FP32_BYTES) * _SIDE * _SIDE
    down = native.function("lowrank_products", "lowrank_down")
    assert down is not None
    product, _kept = _product(gradient.shape, basis, right, room)
    down(
        product,
        native.pointer(low),
        native.gradient(gradient),
        ctypes.c_void_p() if squares is None else native.pointer(squares),
        ctypes.c_int32(accumulate),
    )


def project_up_(
    weight: Tensor,
    basis: Tensor,
    direction: Tensor,
    *,
    right: bool,
    numbers: native.Up,
    gradient: Tensor | None = None,
    low: Tensor | None = None,
    scaling: Tensor | None = None,
    key: RandomKey | None = None,
    correction: Tensor | None = None,
) -> None:
    """As :func:`project_down_`. A bf16 weight has a key or a correction.

    Args:
        gradient: contiguous, of the weight's shape; with one of the next two.
        low: R in fp32, for the sign of the residual.
        scaling: Fira's, fp32: a number for each row with a right basis, for each column with a left one.
    """
    packed = (1 if right else _STRIP) * _blocks(basis.shape[1]) * _SIDE * _SIDE * _BF16_BYTES
    room = 2 * (packed + _RUN_BLOCKS * _SIDE * _SIDE * _FP32_BYTES)
    up = native.function("lowrank_products", "lowrank_up")
    assert up is not None
    product, _kept = _product(weight.shape, basis, right, room)
    up(
        product,
        native.values(weight, key, correction),
        native.gradient(direction),
        native.Gradient() if gradient is None else native.gradient(gradient),
        *(ctypes.c_void_p() if each is None else native.pointer(each) for each in (low, scaling)),
        numbers,
    )


def _product(
    shape: torch.Size, basis: Tensor, right: bool, scratch_bytes: int
) -> tuple[native.Product, tuple[Tensor, Tensor]]:
    """The description, and the memory that it points to."""
    (rows, columns), (length, rank) = shape, basis.shape
    packed = torch.empty(_blocks(length) * _blocks(rank) * _SIDE * _SIDE, dtype=torch.bfloat16, device="cpu")
    scratch = torch.empty(scratch_bytes * torch.get_num_threads(), dtype=torch.uint8, device="cpu")
    pointers = (each.data_ptr() for each in (basis, packed, scratch))
    return native.Product(rows, columns, rank, *pointers, scratch_bytes, right), (packed, scratch)


def _blocks(length: int) -> int:
    return -(-length // _SIDE)


@functools.cache
def _has_tiles() -> bool:
    ask = native.function("lowrank_products", "tiles_serve")
    answer = ctypes.c_int32(0)
    if ask is not None:
        ask(ctypes.byref(answer))
    return bool(answer.value)
