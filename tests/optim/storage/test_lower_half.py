"""The lower half of a master and the bf16 weight beside it are the master, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memtrain.optim.kernels.fused_adamw import same_bits
from memtrain.optim.storage import lower_half

UPPERS = (
    *(0x0000, 0x0001, 0x0002, 0x007F, 0x0080, 0x0081),  # zero, denormals, the smallest normal numbers
    *(0x3F7F, 0x3F80, 0x3F81, 0x3FFF, 0x4000),  # about one, and where a binade ends
    *(0x7F7E, 0x7F7F),  # the largest: above them is infinity
)


def every_lower(upper: int) -> Tensor:
    """All 2^16 masters with this upper half."""
    return ((upper << 16) + torch.arange(1 << 16)).to(torch.int32).view(torch.float32)


def packed(master: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight, lower = master.bfloat16(), torch.empty(master.shape, dtype=lower_half.DTYPE)
    kept = second.clone()
    lower_half.pack(master, lower, kept)
    return weight, lower, kept


@pytest.mark.parametrize("upper", [half | sign for half in UPPERS for sign in (0, 0x8000)])
def test_every_lower_half_comes_back(upper: int) -> None:
    master = every_lower(upper if upper < 0x8000 else upper - 0x10000)
    second = torch.rand(1 << 16)
    second[::3] = 0.0  # the sign of nothing is a bit too
    weight, lower, kept = packed(master, second)
    assert torch.equal(weight.float().isinf(), master.bfloat16().isinf())
    assert same_bits(lower_half.unpack(weight, lower, kept), master)
    assert same_bits(kept.abs(), second)
    # Of 65,536 lower halves one is a tie, and goes down where the upper half is odd.
    assert int(kept.signbit().sum()) == upper % 2


def test_infinity_is_one_and_nan_stays_nan() -> None:
    master = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan, 1.0])
    bits = torch.tensor([0x7F80_0001, 0x7FC0_8000, 0x7FFF_FFFF, -1, -0x7F_FFFF], dtype=torch.int32)
    master = torch.cat([master, bits.view(torch.float32)])
    assert master[5:].isnan().all()
    weight, lower, second = packed(master, torch.zeros(10))
    again = lower_half.unpack(weight, lower, second)
    assert same_bits(again, master)
    assert not second.signbit().any()


def test_what_signs_said_before_does_not_count() -> None:
    master = every_lower(0x3F81)
    for signs in (1.0, -1.0):
        lower = torch.empty(master.shape, dtype=lower_half.DTYPE)
        second = torch.zeros(1 << 16).copysign(torch.tensor(signs))
        lower_half.pack(master, lower, second)
        assert same_bits(lower_half.unpack(master.bfloat16(), lower, second), master)


def test_a_negative_second_moment_is_refused_and_nothing_written() -> None:
    lower = torch.full((2,), 7, dtype=lower_half.DTYPE)
    with pytest.raises(ValueError, match="below zero"):
        lower_half.pack(torch.ones(2), lower, torch.tensor([0.5, -1e-45]))
    assert lower.tolist() == [7, 7]


def test_shapes_are_kept() -> None:
    master = torch.randn(3, 5, 7)
    weight, lower, second = packed(master, torch.rand(3, 5, 7))
    assert same_bits(lower_half.unpack(weight, lower, second), master)
    assert lower_half.unpack(weight[:0], lower[:0], second[:0]).shape == (0, 5, 7)
