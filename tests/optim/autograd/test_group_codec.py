"""Groups of saved values in 8 and 4 bits: error, bytes, range, rounding without bias, reproducibility."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtrain.optim.autograd.group_codec import Encoded, GroupCodec


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def round_trip(codec: GroupCodec, values: Tensor) -> Tensor:
    return codec.decode(codec.encode(values), values.shape, values.dtype)


def relative_error(values: Tensor, restored: Tensor) -> float:
    return float((restored.double() - values.double()).norm() / values.double().norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("bits", "stochastic", "expected"),
    # A step is the mean largest magnitude of 64 normal values over 127 or 7; rounding to the nearest loses a
    # step over sqrt(12), at random over sqrt(6): .0060, .108, .153.
    [(8, False, 0.0060), (4, False, 0.108), (4, True, 0.153)],
)
def test_error_is_that_of_the_step(dtype: torch.dtype, bits: int, stochastic: bool, expected: float) -> None:
    values = normal(300, 501, dtype=dtype)
    restored = round_trip(GroupCodec(bits=bits, group=64, stochastic=stochastic), values)
    assert restored.dtype == dtype
    assert restored.shape == values.shape
    rounding = 2.0**-8 / math.sqrt(12) if dtype is torch.bfloat16 else 0.0  # of the result to bf16
    assert relative_error(values, restored) == pytest.approx(math.hypot(expected, rounding), rel=0.08)


@pytest.mark.parametrize("exponent", [4, 0, -6, -8, -20, -30, -36])
@pytest.mark.parametrize("bits", [8, 4])
def test_error_does_not_depend_on_the_magnitude(exponent: int, bits: int) -> None:
    values = normal(64, 256)
    codec = GroupCodec(bits=bits, stochastic=False)
    reference = relative_error(values, round_trip(codec, values))
    small = values * 10.0**exponent
    assert relative_error(small, round_trip(codec, small)) == pytest.approx(reference, rel=0.05)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    numel=st.integers(0, 700),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([64, 128, 256]),
    stochastic=st.booleans(),
)
def test_every_value_is_within_a_step_and_the_bytes_are_the_formulas(
    numel: int, bits: int, group: int, stochastic: bool
) -> None:
    values = normal(numel, seed=numel)
    codec = GroupCodec(bits=bits, group=group, stochastic=stochastic)
    encoded = codec.encode(values)
    assert encoded.codes.nbytes + encoded.scales.nbytes == codec.size_bytes(numel)
    restored = codec.decode(encoded, values.shape, values.dtype)
    steps = encoded.scales.float().repeat_interleave(group)[:numel]
    limit = steps if stochastic else steps / 2
    assert bool(((restored - values).abs() <= limit * (1 + 1e-5)).all())


def test_bytes_worked_out_by_hand() -> None:
    # 1000 values are 8 groups of 128 (4 of 256, 16 of 64), each with a scale of 2 bytes.
    assert GroupCodec(bits=8).size_bytes(1000) == 8 * 130
    assert GroupCodec(bits=4).size_bytes(1000) == 8 * 66
    assert GroupCodec(bits=4, group=256).size_bytes(1000) == 4 * 130
    assert GroupCodec(bits=8, group=64).size_bytes(1000) == 16 * 66
    assert GroupCodec().size_bytes(0) == 0


def test_zeros_stay_zeros_and_the_largest_values_stay_in_range() -> None:
    values = normal(4, 128)
    values[values.abs() < 0.7] = 0.0
    values[2] = 0.0
    for codec in (GroupCodec(bits=8), GroupCodec(bits=4), GroupCodec(bits=8, stochastic=True)):
        restored = round_trip(codec, values)
        assert bool((restored[values == 0] == 0).all())
        # Scales are rounded up: nothing is clipped, and nothing grows by more than bf16's spacing.
        assert float((restored.abs().amax(1) - values.abs().amax(1)).max()) <= 0.01 * float(
            values.abs().max()
        )


def test_what_is_not_finite_comes_back_as_nan_alone() -> None:
    values = normal(3, 128)
    broken = values.clone()
    broken[1, 5], broken[1, 77], broken[2, 0] = math.inf, -math.inf, math.nan
    for bits in (4, 8):
        codec = GroupCodec(bits=bits, stochastic=False)
        restored = round_trip(codec, broken)
        assert torch.equal(restored.isnan(), ~broken.isfinite())
        assert torch.equal(restored[0], round_trip(codec, values)[0])
        assert relative_error(values[broken.isfinite()], restored[broken.isfinite()]) < 0.14


@pytest.mark.parametrize("bits", [4, 8])
def test_random_rounding_has_no_bias(bits: int) -> None:
    # T6: the mean of the draws lies within 4 standard errors; each has another seed.
    values = normal(128, seed=3)
    draws = 4000 if bits == 4 else 1000
    codecs = [GroupCodec(bits=bits, stochastic=True, seed=seed) for seed in range(draws)]
    error = torch.stack([round_trip(codec, values) for codec in codecs]).double().mean(0) - values.double()
    step = float(codecs[0].encode(values).scales[0])
    fraction = (values.double() / step).frac().abs()
    deviation = (fraction * (1 - fraction) / len(codecs)).sqrt() * step
    scores = error / (deviation + 2.0**-17 * step)
    assert float(scores.abs().max()) < 4
    assert abs(float(scores.mean())) < 4 / math.sqrt(len(scores))


def test_the_draw_of_a_tensor_depends_on_its_content_and_the_seed_alone() -> None:
    codec = GroupCodec(bits=4, seed=7)
    values = normal(40, 128)
    state = torch.random.get_rng_state()
    first = codec.encode(values)
    assert torch.equal(torch.random.get_rng_state(), state)
    second = codec.encode(values.clone().t().contiguous().t())
    assert torch.equal(first.codes, second.codes)
    other = GroupCodec(bits=4, seed=8).encode(values)
    assert 0.1 < float((first.codes != other.codes).float().mean()) < 0.9
    changed = values.clone()
    changed[0, 0] += 1e-3
    assert 0.1 < float((codec.encode(changed).codes[1:] != first.codes[1:]).float().mean()) < 0.9


def test_rounding_is_independent_between_neighbours_and_halves() -> None:
    values = torch.full((256, 128), 0.5)
    values[:, 0] = 7.0  # the scale is 1, so every other value is up or down with probability 1/2
    codes = round_trip(GroupCodec(bits=4, seed=1), values)[:, 1:]
    assert set(codes.unique().tolist()) == {0.0, 1.0}
    centred = codes - 0.5
    for shift in (1, 2, 63, 64, 65):
        correlation = (centred[:, shift:] * centred[:, :-shift]).mean() * 4
        assert abs(float(correlation)) < 4 / math.sqrt(centred[:, shift:].numel())


def test_compiled_equals_eager() -> None:
    values = normal(50, 77)
    for codec in (GroupCodec(bits=8), GroupCodec(bits=4, seed=5)):

        def run(x: Tensor, codec: GroupCodec = codec) -> tuple[Encoded, Tensor]:
            encoded = codec.encode(x)
            return encoded, codec.decode(encoded, x.shape, x.dtype)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        (eager_codes, eager), (codes, restored) = run(values), compiled(values)
        assert torch.equal(eager_codes.codes, codes.codes)
        assert torch.equal(eager, restored)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 2}, "87 %"), ({"group": 100}, "64, 128, 256"), ({"seed": -1}, "seed is -1")],
)
def test_refuses_what_it_cannot_do(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupCodec(**options)


def test_refuses_other_dtypes() -> None:
    with pytest.raises(TypeError, match="int64"):
        GroupCodec().encode(torch.arange(5))
