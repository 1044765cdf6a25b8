"""One pass over the memory has the bits of torch's fused AdamW between a widening and a rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtrain.optim.kernels import fused_adamw, native
from memtrain.optim.kernels.fused_adamw import same_bits
from memtrain.optim.storage import lower_half

GROUPS: dict[str, dict[str, Any]] = {
    "usual": {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "no decay": {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0},
    "no eps": {"lr": 3e-3, "betas": (0.51, 0.99), "eps": 0.0, "weight_decay": 0.3},
    "at rest": {"lr": 0.0, "betas": (0.95, 0.98), "eps": 1e-6, "weight_decay": 0.1},
}
ELEMENTS = (16, 112, 128, 400, 2048, 65536, 70_000)
"""Less than a run of 128, whole runs, a part behind them, and enough for two threads."""

needs_agreement = pytest.mark.skipif(
    not fused_adamw.agrees(), reason="this build of torch rounds in another order, or there is no compiler"
)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random_bits(elements: int, seed: int) -> Tensor:
    """Any fp32 number alike: denormals, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-(2**31), 2**31, (elements,), generator=generator).to(torch.int32).view(torch.float32)
    )


def ordinary(elements: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(elements, generator=generator) * torch.exp(
        3 * torch.randn(elements, generator=generator)
    )


def torch_step(
    master: Tensor, gradient: Tensor, first: Tensor, second: Tensor, number: int, group: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the user's optimizer makes of these."""
    parameter = nn.Parameter(master.clone())
    parameter.grad = gradient
    optimizer = torch.optim.AdamW([parameter], fused=True, **group)
    state = {"exp_avg": first.clone(), "exp_avg_sq": second.clone(), "step": torch.tensor(number - 1.0)}
    optimizer.state[parameter] = state
    optimizer.step()
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


@needs_agreement
@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("narrow", [True, False])
def test_equals_torch_to_the_bit(elements: int, name: str, narrow: bool) -> None:
    for make in (ordinary, random_bits):
        weight, gradient, first, second = (make(elements, seed) for seed in range(4))
        second = second.abs() if make is ordinary else second
        clips = (torch.tensor(0.37), torch.tensor(1.9)) if elements % 3 == 1 else ()
        for number in (1, 2, 1000, 1_000_000):
            given = gradient.bfloat16() if narrow else gradient
            wide = given.float()
            for clip in clips:
                wide = wide * clip
            expected = torch_step(weight, wide, first, second, number, GROUPS[name])
            rounded = torch.empty(elements, dtype=torch.bfloat16) if narrow else None
            kept = given.clone()
            fused_adamw.step(
                weight if rounded is None else rounded, given, None if rounded is None else weight, first,
                second, group=GROUPS[name], number=float(number), clips=clips,
            )  # fmt: skip
            for ours, theirs in zip((weight, first, second), expected, strict=True):
                assert same_bits(ours, theirs)
            assert rounded is None or same_bits(rounded, expected[0].bfloat16())
            assert same_bits(given, kept)


@needs_agreement
def test_one_thread_and_two_give_the_same_bits() -> None:
    results = []
    for alone in (False, True):
        operands = [ordinary(1 << 17, seed) for seed in range(4)]
        weight, gradient, first, second = operands
        if alone:
            with native.one_thread():
                fused_adamw.step(weight, gradient, None, first, second, group=GROUPS["usual"], number=3.0)
        else:
            fused_adamw.step(weight, gradient, None, first, second, group=GROUPS["usual"], number=3.0)
        results.append(operands)
    assert all(same_bits(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"amsgrad": True}, "amsgrad=True"),
        ({"maximize": True}, "maximize=True"),
        ({"betas": (0.5, 0.999)}, "beta1=0.5"),
        ({"lr": torch.tensor(1e-3)}, "plain numbers"),
        ({"fused": False, "foreach": True}, "fused=True was not asked for"),
        ({"fused": None}, "fused=True was not asked for"),
    ],
)
def test_what_is_left_to_torch_is_named(change: dict[str, Any], said: str) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(16))], **{"fused": True, **change})
    refusal = fused_adamw.refusal(optimizer, optimizer.param_groups[0])
    assert refusal is not None
    assert said in refusal


def test_a_group_that_is_adams_is_left_to_torch() -> None:
    group = {"params": [nn.Parameter(torch.zeros(16))], "decoupled_weight_decay": False}
    optimizer = torch.optim.AdamW([group], fused=True)
    assert "decoupled" in str(fused_adamw.refusal(optimizer, optimizer.param_groups[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_trial_does_not_depend_on_the_callers_defaults(dtype: torch.dtype) -> None:
    expected = fused_adamw.agrees()
    fused_adamw.agrees.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert fused_adamw.agrees() == expected
    finally:
        torch.set_default_dtype(before)


def test_another_class_and_a_gradient_scaler_are_left_to_torch() -> None:
    weight = nn.Parameter(torch.zeros(16))
    adam = torch.optim.Adam([weight], fused=True)
    assert fused_adamw.refusal(adam, adam.param_groups[0]) == "Adam is not torch.optim.AdamW"
    scaled = torch.optim.AdamW([weight], fused=True)
    scaled.grad_scale = torch.tensor(2.0)
    assert "scaler" in str(fused_adamw.refusal(scaled, scaled.param_groups[0]))


def test_tails_other_dtypes_and_strides_are_left_to_torch() -> None:
    fp32, bf16 = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
    assert fused_adamw.serves(fp32, fp32, None, ())
    assert fused_adamw.serves(bf16, bf16, fp32, (torch.tensor(0.5),))
    assert not fused_adamw.serves(fp32[:63], fp32[:63], None, ())
    assert not fused_adamw.serves(bf16, bf16, None, ())
    assert not fused_adamw.serves(bf16.half(), bf16.half(), fp32, ())
    assert not fused_adamw.serves(fp32[::2], fp32[::2], None, ())
    assert not fused_adamw.serves(fp32, fp32, None, (torch.tensor(0.5, dtype=torch.float64),))


@needs_agreement
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_torch_that_rounds_otherwise_is_noticed(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = torch._fused_adamw_

    def other(*tensors: list[Tensor], **settings: Any) -> None:
        ours(*tensors, **settings)
        changed = tensors[(0, 2, 3)[wrong]][0]
        changed[1000] = torch.nextafter(changed[1000], torch.tensor(torch.inf))

    monkeypatch.setattr(torch, "_fused_adamw_", other)
    fused_adamw.agrees.cache_clear()
    try:
        assert not fused_adamw.agrees()
    finally:
        fused_adamw.agrees.cache_clear()


@needs_agreement
@pytest.mark.parametrize("elements", ELEMENTS)
@pytest.mark.parametrize("name", GROUPS)
def test_lower_halves_take_the_same_step(elements: int, name: str) -> None:
    """As fp32 masters, step after step: also with ties, numbers that overflow bf16, infinities and NaN."""
    for make in (ordinary, random_bits):
        master, gradient, first, second = (make(elements, seed) for seed in range(4))
        second = second.abs()
        tied = master.view(torch.int32)[::3]
        tied.copy_((tied & ~0xFFFF) | 0x8000)
        master.view(torch.int32)[1] = 0x7F7F_FFFF
        gradient = gradient.bfloat16()
        clips = (torch.tensor(0.37), torch.tensor(1.9)) if elements % 3 == 1 else ()
        weight, other, lower = master.bfloat16(), master.bfloat16(), torch.empty(elements, dtype=torch.int16)
        moments = [first.clone(), second.clone()]
        lower_half.pack(master, lower, moments[1])
        for number in (1.0, 2.0, 1000.0):
            settings: dict[str, Any] = {"group": GROUPS[name], "number": number, "clips": clips}
            fused_adamw.step(weight, gradient, master, first, second, **settings)
            fused_adamw.step(other, gradient, lower, *moments, **settings)
            assert same_bits(weight, other)
            assert same_bits(master, lower_half.unpack(other, lower, moments[1]))
            assert same_bits(first, moments[0])
            assert same_bits(second.abs(), moments[1].abs())


@needs_agreement
@pytest.mark.parametrize("upper", [0, 1, 0x80, 0x3F7F, 0x3F80, 0x7F7F])
@pytest.mark.parametrize("sign", [0, -0x8000])
def test_every_lower_half_is_stepped_as_its_master(upper: int, sign: int) -> None:
    master = (((upper + sign) << 16) + torch.arange(1 << 16)).to(torch.int32).view(torch.float32)
    gradient, first = ordinary(1 << 16, 1).bfloat16(), ordinary(1 << 16, 2)
    second = ordinary(1 << 16, 3).abs()
    second[::5] = 0.0
    weight, other, lower = master.bfloat16(), master.bfloat16(), torch.empty(1 << 16, dtype=torch.int16)
    moments = [first.clone(), second.clone()]
    lower_half.pack(master, lower, moments[1])
    assert fused_adamw.serves(other, gradient, lower, ())
    # Once where nothing moves, so that what is written is what was read, and once in earnest.
    still = {**GROUPS["at rest"], "weight_decay": 0.0}
    for number, group in ((1.0, still), (2.0, GROUPS["usual"])):
        fused_adamw.step(weight, gradient, master, first, second, group=group, number=number)
        fused_adamw.step(other, gradient, lower, *moments, group=group, number=number)
        assert same_bits(weight, other)
        assert same_bits(master, lower_half.unpack(other, lower, moments[1]))
        assert same_bits(second, moments[1].abs())
        again, sides = torch.empty_like(lower), second.clone()
        lower_half.pack(master, again, sides)
        assert torch.equal(again, lower)
        assert same_bits(sides, moments[1])
