"""Masters: the split of 24 bits on every bf16, ties and carries; bytes; steps below the resolution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtrain.optim.storage import RandomKey, master_format
from memtrain.optim.storage.masters import join24, split24

KEY = RandomKey(seed=0, parameter=1, step=2)
LOW_HALVES = (0, 1, 127, 128, 129, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8080, 0xFF7F, 0xFF80, 0xFFFF)


def pattern(bits: int) -> Tensor:
    return torch.tensor([bits - ((bits >> 31) << 32)], dtype=torch.int32).view(torch.float32)


def all_patterns() -> Tensor:
    high = torch.arange(65536, dtype=torch.int32) << 16
    return torch.cat([high + low for low in LOW_HALVES]).view(torch.float32)


def test_split_is_the_nearest_of_24_bits_and_idempotent_on_every_bf16() -> None:
    value = all_patterns()
    weight, correction = split24(value)
    joined = join24(weight, correction)
    kept = joined.isfinite() & value.isfinite()
    steps = (joined[kept].view(torch.int32) - value[kept].view(torch.int32)).abs()
    assert steps.max() == 128  # half of the last of 24 bits, in units of the last of 32
    assert value[~kept & value.isfinite()].abs().min() > torch.finfo(torch.bfloat16).max
    again = split24(joined)
    assert torch.equal(again[0][kept], weight[kept])
    assert torch.equal(again[1], correction)


def test_the_weight_is_the_nearest_bf16() -> None:
    value = all_patterns()
    value = value[value.abs() < 1e38]
    weight = split24(value)[0].double()
    nearest = value.bfloat16().double()
    # Only where 24 bits put the value on a tie does it differ, and then by no more than they do.
    excess = (weight - value).abs() - (nearest - value).abs()
    assert (excess <= value.abs().double() * 2**-15 + 2**-141).all()


@pytest.mark.parametrize(
    ("bits", "weight", "correction"),
    [
        (0x3F800000, 1.0, 0),
        (0x3F808000, 1 + 2**-7, -128),  # a tie, 1 + 2^-8: up
        (0x3F807F00, 1.0, 127),  # the last below the tie
        (0x3FFFFF00, 2.0, -1),  # below 2 neighbours are half as far: the carry runs into the exponent
        (0x3FFFFF80, 2.0, 0),  # half a unit of 24 bits below 2: up
        (0xBF808000, -1 - 2**-7, -128),
        (0x00000100, 0.0, 1),  # denormal
        (0x80000000, -0.0, 0),
        (0x7F800000, math.inf, 0),
        (0x7F7FFFFF, math.inf, 0),  # beyond the largest of 24 bits
    ],
)
def test_ties_and_carries_worked_out_by_hand(bits: int, weight: float, correction: int) -> None:
    high, low = split24(pattern(bits))
    assert high.item() == weight
    assert math.copysign(1, high.item()) == math.copysign(1, weight)
    assert low.item() == correction


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_nan_stays_nan(bits: int) -> None:
    high, low = split24(pattern(bits))
    assert high.isnan().all()
    assert low.item() == 0
    assert join24(high, low).isnan().all()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**126), max_value=2.0**126))
@settings(max_examples=200, deadline=None)
def test_split24_is_within_half_of_its_last_bit(number: float) -> None:
    value = torch.tensor([number])
    joined = join24(*split24(value))
    assert abs(joined.item() - number) <= abs(number) * 2**-16 + 2**-142


def test_bytes_and_dtypes() -> None:
    shape = torch.Size((5, 123))
    assert master_format("none").size_bytes(shape, torch.bfloat16) == 0
    assert master_format("split24").size_bytes(shape, torch.bfloat16) == 615
    assert master_format("fp32").size_bytes(shape, torch.float16) == 2460
    with pytest.raises(TypeError, match="'split24' serves weights in bfloat16, got float32"):
        master_format("split24").size_bytes(shape, torch.float32)
    with pytest.raises(TypeError, match="'none' serves weights in float32, bfloat16, got float16"):
        master_format("none").empty(torch.zeros(3, dtype=torch.float16))
    with pytest.raises(ValueError, match="one of none, split24, fp32, got 'split32'"):
        master_format("split32")


@pytest.mark.parametrize("shape", [(0,), (7,), (5, 123)])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("none", torch.float32),
        ("none", torch.bfloat16),
        ("split24", torch.bfloat16),
        ("fp32", torch.bfloat16),
        ("fp32", torch.float16),
        ("fp32", torch.float32),
    ],
)
def test_load_gives_the_weight_and_bytes_are_live(
    name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    master = master_format(name)
    weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    stored = master.empty(weight)
    assert torch.equal(master.load(weight, stored), weight.detach().float())
    assert sum(t.nbytes for t in stored.values()) == master.size_bytes(weight.shape, dtype)
    value = torch.randn(shape).to(dtype).float()  # what the dtype holds, no format may change
    master.store_(weight, stored, value, key=KEY)
    assert torch.equal(weight.detach().float(), value)
    assert torch.equal(master.load(weight, stored), value)


@pytest.mark.parametrize("name", ["none", "split24", "fp32"])
def test_strides_of_the_weight_do_not_matter(name: str) -> None:
    value = torch.randn(40, 30)
    master = master_format(name)
    straight, turned = torch.zeros(40, 30).bfloat16(), torch.zeros(30, 40).bfloat16().t()
    for weight in (straight, turned):
        stored = master.empty(weight)
        master.store_(weight, stored, value, key=KEY)
        if name == "fp32":
            assert torch.equal(master.load(weight, stored), value)
    assert torch.equal(straight, turned)


@pytest.mark.parametrize(
    ("name", "keyed", "moved"), [("none", True, 1.0), ("split24", True, 1.0), ("split24", False, 0.0)]
)
def test_steps_below_the_resolution_count_on_average(name: str, keyed: bool, moved: float) -> None:
    """1,000 steps of 1e-5 on weights of 1: each is .0026 of bf16's unit and a third of the 24 bits'."""
    master = master_format(name)
    weight = torch.ones(2000, dtype=torch.bfloat16)
    stored = master.empty(weight)
    for step in range(1000):
        key = RandomKey(seed=0, parameter=0, step=step) if keyed else None
        master.store_(weight, stored, master.load(weight, stored) + 1e-5, key=key)
    assert (master.load(weight, stored).mean().item() - 1) / 0.01 == pytest.approx(moved, abs=0.05)


def test_a_key_is_asked_for_where_rounding_is_random() -> None:
    weight = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="give a key"):
        master_format("none").store_(weight, {}, torch.ones(3))
