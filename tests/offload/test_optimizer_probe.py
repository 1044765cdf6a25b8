"""Whether an optimizer may be cut is found out by running it, whatever its learning rate is at the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload.optimizer_probe import is_elementwise


class TrustRatio(torch.optim.SGD):
    """A step as long as the weight's norm says: LARS without momentum."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * group["lr"] * p.norm() / p.grad.norm())


class CautiousAdamW(torch.optim.AdamW):
    """Takes the part of a step that agrees with the gradient, scaled by how much of it does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        before = [p.clone() for group in self.param_groups for p in group["params"]]
        super().step()
        for p, old in zip((p for g in self.param_groups for p in g["params"]), before, strict=True):
            agrees = ((old - p) * p.grad > 0).to(p.dtype)
            p.copy_(old + (p - old) * agrees / agrees.mean().clamp_min(1e-3))


class Idle(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        """Moves nothing."""


@pytest.mark.parametrize("rate", [0.0, 1e-12, 1e-2, torch.tensor(0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (TrustRatio, False),
        (CautiousAdamW, False),
        (Idle, False),  # nothing seen, nothing known
        (lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=False), True),
        (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), True),
    ],
)
def test_a_learning_rate_of_zero_hides_nothing(
    make: Callable[..., torch.optim.Optimizer], expected: bool, dtype: torch.dtype, rate: Any
) -> None:
    optimizer = make([nn.Parameter(torch.ones(4, dtype=dtype))], lr=rate)
    assert is_elementwise(optimizer, optimizer.param_groups[0], dtype) is expected
    now = optimizer.param_groups[0]["lr"]
    assert float(now) == float(rate)
