"""Clipping and checking of gradients, wherever they are.

With master weights clipping is defined on the fp32 gradient, which exists shard by shard only while it is
used: the factors are left with the narrow gradient until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.errors import OffloadError
from memtrain.offload.gradients import OffloadedGradient
from memtrain.offload.offloaded_grad import OffloadedGrad

_CLIPPED = "_memtrain_clipped"


def clip_float_norm_(grads: Sequence[Tensor], max_norm: float, error_if_nonfinite: bool) -> Tensor:
    """``clip_grad_norm_`` of the fp32 forms of ``grads``; the factor is left with each for ``clips_of``."""
    norms = [_float_norm(grad) for grad in grads]
    total = torch.linalg.vector_norm(torch.stack(norms), 2.0) if norms else torch.tensor(0.0)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"the total norm of the gradients is {total.item()}, so they cannot be clipped: pass "
            f"error_if_nonfinite=False to scale by it anyway"
        )
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for grad in grads:
        setattr(grad, _CLIPPED, (_version(grad), (*clips_of(grad), factor)))
    return total


def clips_of(grad: Tensor) -> tuple[Tensor, ...]:
    """Factors that ``clip_grad_norm_`` has left for the fp32 gradient.

    Raises:
        OffloadError: the gradient changed after it was clipped, so that the factors mean nothing.
    """
    version, factors = getattr(grad, _CLIPPED, (None, ()))
    if factors and version != _version(grad):
        raise OffloadError(
            "a gradient changed between clip_grad_norm_() and step(): clip after the last micro-batch, just "
            "before step()"
        )
    return tuple(factors)


def is_finite(grad: Tensor) -> bool:
    """Whether every element is finite."""
    if isinstance(grad, OffloadedGrad):
        return grad.finite()
    if grad.numel() == 0:
        return True
    # Two numbers instead of a mask as large as the gradient.
    low, high = torch.aminmax(grad)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _float_norm(grad: Tensor) -> Tensor:
    """2-norm of the fp32 gradient, after earlier clippings."""
    clips = clips_of(grad)
    if not clips:
        return torch.linalg.vector_norm(grad, 2.0, dtype=torch.float32)
    wide = (grad.materialize() if isinstance(grad, OffloadedGrad) else grad.clone()).float()
    for factor in clips:
        wide.mul_(factor)
    return torch.linalg.vector_norm(wide, 2.0)


def _version(grad: Tensor) -> tuple[Any, ...]:
    """Changes with every change of the gradient's values."""
    if isinstance(grad, OffloadedGrad):
        home = grad._live()
        assert isinstance(home, OffloadedGradient)
        return home.identity, home.value
    return (grad._version,)
