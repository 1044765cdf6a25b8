"""Whether an optimizer may be cut is found out by running it, whatever its learning rate is at the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.optimizer_layout import OptimizerLayout
from memtrain.offload.optimizer_probe import is_elementwise, may_be_cut


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


class TrustRatioInHalfPrecision(torch.optim.SGD):
    """Elementwise in fp32, and in bf16 not."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    scale = p.norm() if p.dtype == torch.bfloat16 else 1.0
                    p.sub_(p.grad * group["lr"] * scale)


@pytest.mark.parametrize("apart", [True, False])
def test_every_dtype_that_is_stepped_is_tried(apart: bool) -> None:
    """Also one that is not the first of its group; and no other."""
    wide, narrow = (nn.Parameter(torch.ones(64, 80, dtype=d)) for d in (torch.float32, torch.bfloat16))
    groups = [{"params": [wide]}, {"params": [narrow]}] if apart else [wide, narrow]
    optimizer = TrustRatioInHalfPrecision(groups, lr=1e-2)
    units = [("unit", [("wide", wide), ("narrow", narrow)])]

    def layout(elementwise: bool | None, master_weights: bool = False) -> OptimizerLayout:
        return OptimizerLayout(
            optimizer,
            units,
            4096,
            master_weights=master_weights,
            split_masters=True,
            elementwise=elementwise,
        )

    assert is_elementwise(optimizer, optimizer.param_groups[0], torch.float32)
    assert not may_be_cut(optimizer, master_weights=False)
    assert may_be_cut(optimizer, master_weights=True)
    assert not layout(None).elementwise
    assert not layout(False).elementwise
    assert layout(True, master_weights=True).elementwise
    refusal = rf"InHalfPrecision.*group {int(apart)} steps flat pieces of torch.bfloat16.*elementwise at None"
    with pytest.raises(PlanMismatchError, match=refusal):
        layout(True)
    narrow.requires_grad_(False)
    units[0] = ("unit", [("wide", wide)])
    assert may_be_cut(optimizer, master_weights=False)
    assert layout(True).elementwise
