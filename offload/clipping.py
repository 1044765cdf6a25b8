"""Clipping and checking of gradients, wherever they are.

With master weights clipping is defined on the fp32 gradient, which exists shard by shard only while it is
used: the factors are left with the narrow gradient until then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.errors import OffloadError
from memtrain.offload.gradient_home import OffloadedGradient
from memtrain.offload.norms import float_norm
from memtrain.offload.offloaded_grad import OffloadedGrad

_CLIPPED = "_memtrain_clipped"
_FINITE = "_memtrain_finite"


def clip_float_norm_(grads: Sequence[Tensor], max_norm: float, error_if_nonfinite: bool) -> Tensor:
    """``clip_grad_norm_`` of the fp32 forms of ``grads``, with ``float_norm`` for each.

    The factor is left with each gradient for ``clips_of``.
    """
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


def forget_clips(parameters: Iterable[Tensor]) -> None:
    """Remove what clipping left with gradients that outlive their step: cleared in place, or not at all."""
    for parameter in parameters:
        for note in (_CLIPPED, _FINITE):
            if parameter.grad is not None and hasattr(parameter.grad, note):
                delattr(parameter.grad, note)


def note_finite(grads: Iterable[Tensor], total_norm: Tensor, max_norm: float) -> None:
    """``grads`` have just been clipped: where their norm is finite, ``is_finite`` need not look at them.

    Exact: a sum of squares with NaN or inf in it is NaN or inf, and the clipping factor is at most 1. A norm
    that overflowed though every element is finite says nothing.
    """
    if max_norm >= 0 and torch.isfinite(total_norm):
        for grad in grads:
            if type(grad) is Tensor:
                setattr(grad, _FINITE, grad._version)


def is_finite(grad: Tensor) -> bool:
    """Whether every element is finite."""
    if isinstance(grad, OffloadedGrad):
        return grad.finite()
    if grad.layout is torch.sparse_coo:
        return is_finite(grad.coalesce().values())
    if grad.numel() == 0 or getattr(grad, _FINITE, None) == grad._version:
        return True
    # Two numbers instead of a mask as large as the gradient.
    low, high = torch.aminmax(grad)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _float_norm(grad: Tensor) -> Tensor:
    """2-norm of the fp32 gradient, after earlier clippings."""
    clips = clips_of(grad)
    if not clips:
        return home_of(grad).float_norm() if isinstance(grad, OffloadedGrad) else float_norm(grad)
    wide = (grad.materialize() if isinstance(grad, OffloadedGrad) else grad.clone()).float()
    for factor in clips:
        wide.mul_(factor)
    return float_norm(wide)


def home_of(grad: OffloadedGrad) -> OffloadedGradient:
    """Where the gradient's bytes are. Raises OffloadError for a handle that is out of date."""
    home = grad._live()
    assert isinstance(home, OffloadedGradient)
    return home


def _version(grad: Tensor) -> tuple[Any, ...]:
    """Changes with every change of the gradient's values."""
    if isinstance(grad, OffloadedGrad):
        home = home_of(grad)
        return home.identity, home.value
    return (grad._version,)
