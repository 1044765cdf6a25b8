"""Gradients that exist only in a projector's low-dimensional form, and what optimizers do with them.

After backward a weight that makes such gradients (``autograd/compact.py``) has

    weight.compressed_grad         R, [m, r], fp32
    weight.compressed_projection   its ``memtrain.optim.projection.Projection`` (side "right")
    weight.compressed_stored       that projector's stored state: the words of the seed

and ``weight.grad`` stays None. They add up over micro-batches and over uses of the weight, like ``.grad``.

Optimizers of the grid are given R itself, and nothing of this is needed (``compact_gradients.py``). For every
other optimizer, and before clipping, ``GradScaler.unscale_`` and an all-reduce, ``densify_grads`` makes
``weight.grad`` of them; one of somebody's own that takes them says so by a class attribute
``accepts_compressed_grad = True``, and deletes them after its step (``clear_compressed_grads``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from memtrain.optim.projection import Projection, Projector, Stored

_ATTRIBUTES = ("compressed_grad", "compressed_projection", "compressed_stored")


class CompressedGradError(RuntimeError):
    """A compressed gradient would be mixed with one in another basis, or be overlooked."""


def add_compressed_grad(weight: Any, low: Tensor, projection: Projection, stored: Stored) -> None:
    """Put ``low`` into ``weight.compressed_grad``, or add it to what is there.

    Raises:
        CompressedGradError: what is there is in another basis.
    """
    _watch_optimizers()
    pending: Tensor | None = getattr(weight, "compressed_grad", None)
    if pending is None:
        weight.compressed_grad, weight.compressed_projection, weight.compressed_stored = (
            low,
            projection,
            stored,
        )
        return
    same = all(torch.equal(weight.compressed_stored[name], value) for name, value in stored.items())
    if weight.compressed_projection != projection or not same:
        raise CompressedGradError(
            f"a weight of shape {tuple(weight.shape)} holds a compressed gradient in another basis: refresh "
            "between optimizer steps, when compressed gradients have been used and cleared"
        )
    pending.add_(low)


def compressed_grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those of ``parameters`` that hold a compressed gradient."""
    return [p for p in parameters if getattr(p, "compressed_grad", None) is not None]


def dense_gradient(weight: Any) -> Tensor:
    """``R P^T`` [m, n] in fp32, the unbiased estimate of the gradient that ``weight.compressed_grad``
    stands for."""
    projector: Projector = weight.compressed_projection.bind(weight.shape)
    return projector.up(projector.open(weight.compressed_stored, weight.device), weight.compressed_grad)


@torch.no_grad()
def densify_grads(parameters: Iterable[Tensor]) -> None:
    """Turn compressed gradients into ordinary ``.grad`` in the weight's dtype, added to what is there.

    Call it after backward and before anything that looks at ``.grad``: ``GradScaler.unscale_``, clipping, an
    all-reduce, ``optimizer.step``. Give it one layer's parameters at a time where memory is short.
    """
    for weight in compressed_grads(parameters):
        gradient = dense_gradient(weight).to(weight.dtype)
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        clear_compressed_grads([weight])


def clear_compressed_grads(parameters: Iterable[Tensor]) -> None:
    """What ``zero_grad`` is to ``.grad``."""
    for weight in compressed_grads(parameters):
        for name in _ATTRIBUTES:
            delattr(weight, name)


@functools.cache
def _watch_optimizers() -> None:
    """From the first compressed gradient on: before then there is nothing that a step could overlook."""
    register_optimizer_step_pre_hook(_refuse_unaware)


def _refuse_unaware(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """A hook before every step: raises CompressedGradError where the optimizer would leave weights behind."""
    if getattr(optimizer, "accepts_compressed_grad", False):
        return
    for group in optimizer.param_groups:
        if waiting := compressed_grads(group["params"]):
            raise CompressedGradError(
                f"{type(optimizer).__name__} does not take compressed gradients, and {len(waiting)} of its "
                "parameters have one: call memtrain.optim.compressed_grad.densify_grads first, or give them "
                "to an optimizer of the grid (memtrain.optim.compact_gradients.feed_compact)"
            )
