"""State formats: bytes, round trips, and what Adam's update loses by them (T5)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtrain.optim.storage import RandomKey, blocks, state_format
from memtrain.optim.storage.formats import Stored

NAMES = ["fp32", "bf16", "int8", "int4"]
SHAPES = [(), (3, 0, 5), (128,), (5, 123)]
SIGNED = pytest.mark.parametrize("signed", [True, False])


def stored(name: str, value: Tensor, signed: bool) -> Stored:
    form = state_format(name)
    made = form.empty(value.shape, signed=signed, device="cpu")
    form.store_(made, value, signed=signed)
    return made


def round_trip(name: str, value: Tensor, signed: bool) -> Tensor:
    return state_format(name).load(stored(name, value, signed), value.shape, signed=signed)


def samples(shape: tuple[int, ...], signed: bool) -> Tensor:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return value if signed else value.square()


@pytest.mark.parametrize(
    ("name", "shape", "size_bytes"),
    [
        ("fp32", (5, 123), 4 * 615),
        ("bf16", (5, 123), 2 * 615),
        ("int8", (5, 123), 615 + 4 * 5),  # 615 codes, scales of 5 blocks of 128
        ("int4", (5, 123), 308 + 4 * 5),
        ("int8", (128,), 128 + 4),
        ("int8", (129,), 129 + 8),
        ("int4", (), 1 + 4),
        ("int8", (0,), 0),
    ],
)
def test_bytes_worked_out_by_hand(name: str, shape: tuple[int, ...], size_bytes: int) -> None:
    assert state_format(name).size_bytes(torch.Size(shape), signed=True) == size_bytes


@SIGNED
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_live_tensors_and_empty_loads_as_zeros(
    name: str, shape: tuple[int, ...], signed: bool
) -> None:
    form, size = state_format(name), torch.Size(shape)
    made = form.empty(size, signed=signed, device="cpu")
    assert sum(t.untyped_storage().nbytes() for t in made.values()) == form.size_bytes(size, signed=signed)
    loaded = form.load(made, size, signed=signed)
    assert loaded.dtype == torch.float32
    assert loaded.shape == size
    assert (loaded == 0).all()


@SIGNED
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_what_was_loaded_is_stored_as_it_was(name: str, shape: tuple[int, ...], signed: bool) -> None:
    made = stored(name, samples(shape, signed), signed)
    before = {key: tensor.clone() for key, tensor in made.items()}
    form = state_format(name)
    form.store_(made, form.load(made, torch.Size(shape), signed=signed), signed=signed)
    for key, tensor in before.items():
        assert torch.equal(made[key], tensor), key


@SIGNED
@given(
    numel=st.integers(1, 300),
    exponent=st.integers(-36, 30),
    spread=st.floats(0, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_block_formats_keep_within_half_a_code(
    signed: bool, numel: int, exponent: int, spread: float, seed: int
) -> None:
    """Of any values: idempotent, and y off by at most half a code; an unsigned one never zero."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(numel, generator=generator) * torch.exp(
        spread * torch.randn(numel, generator=generator)
    )
    value = (value if signed else value.abs()) * 10.0**exponent
    scale = value.abs().amax().item() if numel <= blocks.BLOCK else None
    for bits, power in ((8, 2 if signed else 3), (4, 2 if signed else 1)):
        loaded = round_trip(f"int{bits}", value, signed)
        assert torch.equal(round_trip(f"int{bits}", loaded, signed), loaded)
        if scale is None or scale < blocks.SMALLEST_SCALE:
            continue
        y = (value.double() / scale).abs().pow(1 / power).copysign(value)
        off = (loaded.double() / scale).abs().pow(1 / power).copysign(loaded) - y
        least = 0 if signed else 1 / blocks.LEVELS[bits, signed]  # below the first code: raised to it
        most = torch.maximum(least - y, torch.tensor(0.501 / blocks.LEVELS[bits, signed]))
        assert (off.abs() <= most * (1 + 1e-5)).all()  # codes are fp32
        if not signed:
            assert (loaded > 0).all()


def test_codes_worked_out_by_hand() -> None:
    value = torch.tensor([1.0, -0.25, 0.0, 1e-9])
    made = stored("int8", value, True)
    assert made["scales"].tolist() == [1.0]
    assert made["codes"].tolist() == [127, -64, 0, 0]  # 127 * sqrt(.25) = 63.5, up
    made = stored("int8", torch.tensor([8.0, 1.0, 0.0]), False)
    assert made["scales"].tolist() == [8.0]
    assert made["codes"].tolist() == [255, 127, 0]  # cube roots 1 and 1/2 of 256 levels, from 1
    made = stored("int4", torch.tensor([1.0, -1.0, 0.25]), True)
    assert made["codes"].tolist() == [0x97, 0x04]  # -7 is 9 in four bits; 7 * sqrt(.25) = 3.5, up
    made = stored("int4", torch.tensor([16.0, 4.0, 0.0]), False)
    assert made["codes"].tolist() == [0x3F, 0x00]
    assert round_trip("int4", torch.tensor([16.0, 4.0, 0.0]), False).tolist() == [16.0, 4.0, 1.0]


@given(st.lists(st.integers(-8, 7), max_size=40))
@settings(max_examples=50, deadline=None)
def test_nibbles_come_back(codes: list[int]) -> None:
    packed = blocks.pack_nibbles(torch.tensor(codes, dtype=torch.float32))
    assert packed.numel() == (len(codes) + 1) // 2
    assert blocks.unpack_nibbles(packed, len(codes), signed=True).tolist() == codes
    assert blocks.unpack_nibbles(packed, len(codes), signed=False).tolist() == [c & 15 for c in codes]


@SIGNED
@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name: str, signed: bool) -> None:
    value = samples((40, 30), signed)
    assert torch.equal(round_trip(name, value.t(), signed), round_trip(name, value.t().contiguous(), signed))


@SIGNED
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(name: str, bad: float, signed: bool) -> None:
    value = samples((300,), signed)
    clean = round_trip(name, value, signed)
    value[200] = bad
    loaded = round_trip(name, value, signed)
    assert loaded[128:256].isnan().all()
    assert torch.equal(loaded[:128], clean[:128])
    assert torch.equal(loaded[256:], clean[256:])
    assert (stored(name, value, signed)["codes"].view(-1)[64 if name == "int4" else 128] == 0).all()


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_what_is_not_finite_stays_its_own_in_plain_formats(name: str) -> None:
    value = torch.tensor([1.0, math.nan, math.inf])
    loaded = round_trip(name, value, True)
    assert loaded[0] == 1
    assert loaded[1].isnan()
    assert loaded[2].isinf()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_blocks_below_the_least_normal_number_are_zeros(name: str) -> None:
    assert (round_trip(name, torch.full((130,), 1e-39), False) == 0).all()
    assert (round_trip(name, torch.full((130,), 2e-38), False) > 0).all()


def update_error(
    name: str, gradient_scale: float | Tensor, *, steps: int = 300, numel: int = 4096
) -> tuple[float, float]:
    """Adam's update with stored moments against fp32: mean relative and largest error from step 100 on."""
    generator = torch.Generator().manual_seed(0)
    form, shape = state_format(name), torch.Size((numel,))
    first, second = (form.empty(shape, signed=signed, device="cpu") for signed in (True, False))
    m32, v32 = torch.zeros(shape), torch.zeros(shape)
    errors, largest = [], 0.0
    for step in range(1, steps + 1):
        g = torch.randn(shape, generator=generator) * gradient_scale
        m = form.load(first, shape, signed=True) * 0.9 + 0.1 * g
        v = form.load(second, shape, signed=False) * 0.999 + 0.001 * g * g
        m32, v32 = m32 * 0.9 + 0.1 * g, v32 * 0.999 + 0.001 * g * g
        exact, ours = (a / b.sqrt() for a, b in ((m32, v32), (m, v)))
        if step >= 100:
            errors.append(((ours - exact).norm() / exact.norm()).item())
            largest = max(largest, (ours - exact).abs().max().item())
        key = RandomKey(seed=0, parameter=0, step=step)
        form.store_(first, m, signed=True, key=key)
        form.store_(second, v, signed=False, key=key.fold(1))
    return sum(errors) / len(errors), largest


@pytest.mark.parametrize("exponent", range(-8, -2))
def test_int8_updates_are_within_two_percent_at_every_gradient_scale(exponent: int) -> None:
    """T5: gradients of 1e-3 to 1e-8."""
    assert update_error("int8", 10.0**exponent)[0] <= 0.02


@pytest.mark.parametrize(("name", "limit"), [("bf16", 0.02), ("int4", 0.35)])
@pytest.mark.parametrize("exponent", [-3, -8])
def test_the_other_formats_do_not_depend_on_the_gradient_scale(
    name: str, limit: float, exponent: int
) -> None:
    assert update_error(name, 10.0**exponent)[0] <= limit


def test_scales_in_fp16_fail_where_ours_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What T5 is for: the same codes with fp16 scales, whose second moments vanish."""
    fp32_scales: Callable[[Tensor], Tensor] = blocks.block_scales
    monkeypatch.setattr(blocks, "block_scales", lambda cut: fp32_scales(cut).half().float())
    assert update_error("int8", 1e-6, steps=110)[0] > 1


@pytest.mark.parametrize(("name", "mean", "largest"), [("int8", 0.12, 3.0), ("int4", 0.8, 3.0)])
def test_neighbours_of_different_size_do_not_make_updates_explode(
    name: str, mean: float, largest: float
) -> None:
    """Standard deviations log-normal within a block; a second moment with a zero code would err by 100."""
    spread = torch.exp(torch.randn(4096, generator=torch.Generator().manual_seed(5))) * 1e-5
    error = update_error(name, spread)
    assert error[0] < mean
    assert error[1] < largest * (7 if name == "int4" else 1)


def test_a_bf16_second_moment_follows_a_falling_gradient_only_with_a_key() -> None:
    form, shape = state_format("bf16"), torch.Size((2048,))
    ratios = []
    for seeded in (True, False):
        generator = torch.Generator().manual_seed(2)
        stored_v = form.empty(shape, signed=False, device="cpu")
        exact = torch.zeros(shape)
        for step in range(2000):
            g = torch.randn(shape, generator=generator) * (1.0 if step < 500 else 0.03)
            v = 0.999 * form.load(stored_v, shape, signed=False) + 0.001 * g * g
            exact = 0.999 * exact + 0.001 * g * g
            key = RandomKey(seed=0, parameter=0, step=step) if seeded else None
            form.store_(stored_v, v, signed=False, key=key)
        ratios.append((form.load(stored_v, shape, signed=False) / exact).sqrt().mean().item())
    assert ratios[0] == pytest.approx(1, abs=0.01)
    assert ratios[1] > 1.5


def test_bf16_rounds_by_the_key() -> None:
    form, value = state_format("bf16"), samples((500,), True)
    made = [form.empty(value.shape, signed=True, device="cpu") for _ in range(3)]
    for stored_value, step in zip(made, (4, 4, 5), strict=True):
        form.store_(stored_value, value, signed=True, key=RandomKey(seed=0, parameter=0, step=step))
    assert torch.equal(made[0]["value"], made[1]["value"])
    assert not torch.equal(made[0]["value"], made[2]["value"])


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="one of fp32, bf16, int8, int4, got 'fp16'"):
        state_format("fp16")
