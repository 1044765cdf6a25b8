"""The CPU path of ``lowrank_up``: a product by rows into the cache, and one pass that takes it to the weight.

With AMX the two are one (``lowrank_products``). Elsewhere, and with an fp32 basis, the product is torch's.
The pass is compiled (``native/lowrank_up.cpp``) for fp32 and bf16; where it cannot be, and for fp16, it is
plain torch. A weight in the dtype of the basis that is rounded to the nearest goes through the product's
own epilogue.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memtrain.optim.kernels import lowrank_products, native
from memtrain.optim.storage.masters import join24, split24
from memtrain.optim.storage.random import RandomKey, random_bits, random_bytes, stochastic_round

Residual = tuple[Tensor, Tensor, float]
"""gradient, low, residual_factor"""
_CPU_CHUNK = 256
"""Rows at a time. fp32 weight 2048 x 2048, bf16 basis of rank 256, two idle cores, plain torch: 3.1 ms;
3.4 with 128, 4.6 with 64."""
Numbers = tuple[float, float, float]
"""decay, factor, residual_factor"""
Apply = Callable[[Tensor, list[Tensor], "Tensor | None", Numbers, "RandomKey | None", "Tensor | None"], None]


def project_up_on_cpu_(
    weight: Tensor,
    basis: Tensor,
    direction: Tensor,
    right: bool,
    factor: float,
    decay: float,
    residual: Residual | None,
    key: RandomKey | None,
    correction: Tensor | None,
) -> None:
    """``lowrank_up.project_up_`` for operands that it has checked."""
    nearest = key is None and correction is None
    operands = (weight, direction, *(residual[:1] if residual else ()))
    if not (nearest and weight.dtype == torch.bfloat16) and lowrank_products.serves(basis, *operands):
        lowrank_products.project_up_(
            weight,
            basis,
            direction,
            right=right,
            numbers=native.Up(decay, factor, residual[2] if residual else 0.0),
            gradient=residual[0] if residual else None,
            low=residual[1].float() if residual else None,
            key=key,
            correction=correction,
        )
        return
    direction = direction.to(basis.dtype)
    if weight.dtype == basis.dtype and residual is None and nearest:
        # The product's own epilogue, with one rounding.
        first, second = (direction, basis.mT) if right else (basis, direction)
        weight.addmm_(first, second, beta=decay, alpha=-factor)
        return
    gradient, low, residual_factor = residual or (None, None, 0.0)
    low = None if low is None else low.to(basis.dtype)
    rows, columns = weight.shape
    buffers = torch.empty(
        2 if residual else 1, min(rows, _CPU_CHUNK), columns, dtype=basis.dtype, device="cpu"
    )
    apply = _apply_native(weight, basis, gradient, nearest) or _apply_plain
    for start in range(0, rows, _CPU_CHUNK):
        part = slice(start, min(start + _CPU_CHUNK, rows))
        products = [buffer[: part.stop - start] for buffer in buffers]
        for product, small in zip(products, (direction, low), strict=False):
            assert small is not None
            torch.mm(*((small[part], basis.mT) if right else (basis[part], small)), out=product)
        apply(
            weight[part],
            products,
            None if gradient is None else gradient[part],
            (decay, factor, residual_factor),
            None if key is None else key.skip(start * columns),
            None if correction is None else correction[part],
        )


def _apply_native(weight: Tensor, basis: Tensor, gradient: Tensor | None, nearest: bool) -> Apply | None:
    """The compiled pass, for the dtypes that it has; None where there is none."""
    known = {torch.float32, torch.bfloat16}
    operands = {weight.dtype, basis.dtype} | ({gradient.dtype} if gradient is not None else set())
    if not operands <= known or (nearest and weight.dtype != torch.float32):
        return None
    if (run := native.function("lowrank_up", "lowrank_up")) is None:
        return None

    def apply(
        weight: Tensor,
        products: list[Tensor],
        gradient: Tensor | None,
        numbers: Numbers,
        key: RandomKey | None,
        correction: Tensor | None,
    ) -> None:
        run(
            native.values(weight, key, correction),
            native.gradient(products[0]),
            native.gradient(products[1]) if gradient is not None else native.Gradient(),
            native.gradient(gradient) if gradient is not None else native.Gradient(),
            native.count(weight),
            native.Up(*numbers),
        )

    return apply


def _apply_plain(
    weight: Tensor,
    products: list[Tensor],
    gradient: Tensor | None,
    numbers: Numbers,
    key: RandomKey | None,
    correction: Tensor | None,
) -> None:
    decay, factor, residual_factor = numbers
    value = weight.float() if correction is None else join24(weight, correction)  # fp32: the weight itself
    value.mul_(decay).add_(products[0], alpha=-factor)
    if gradient is not None:
        value.add_((gradient - products[1].float()).sign_(), alpha=-residual_factor)
    if correction is not None:
        high, low = split24(value, None if key is None else random_bytes(key, value.numel()))
        weight.copy_(high)
        correction.copy_(low)
    elif value is not weight:
        weight.copy_(value if key is None else stochastic_round(value, random_bits(key, value.numel())))
