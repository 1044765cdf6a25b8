"""int8 groups: the codec's bits on every path, and the product that unpacks as it loads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memtrain.optim.autograd.group_codec import GroupCodec
from memtrain.optim.kernels import int8_groups, int8_product, swiglu
from tests.optim.kernels.compare import close
from tests.optim.kernels.traffic import count_traffic

SHAPES = [(5, 123, 123), (1,), (0,), (3, 128), (2, 129)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = ["public", pytest.param("triton", marks=pytest.mark.venv_optim)]
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")


def values_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Scales from 1e-6 to 1e4, some zeros, and an infinity and a NaN where there is room."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator) * torch.logspace(-6, 4, max(1, shape[-1]))
    flat = values.view(-1)
    if len(flat) > 1000:
        flat[300:430] = 0
        flat[777], flat[900] = float("inf"), float("nan")
    return values.to(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [64, 128])
def test_bits_are_the_codecs(path: str, dtype: torch.dtype, shape: tuple[int, ...], group: int) -> None:
    values = values_of(shape, dtype)
    codec = GroupCodec(bits=8, group=group)
    expected = codec.encode(values)
    if path == "triton":
        codes, scales = int8_groups._triton_pack(values, group)
        again = int8_groups._triton_unpack((codes, scales), shape, dtype)
    else:
        codes, scales = int8_groups.int8_pack(values, group=group)
        again = int8_groups.int8_unpack((codes, scales), shape, dtype)
    assert torch.equal(codes, expected.codes)
    assert same(scales, expected.scales)
    decoded = codec.decode(expected, torch.Size(shape), dtype)
    rtol = 2**-7 if path == "triton" else 0  # Triton's interpreter cuts fp32 to bf16 where a GPU rounds
    torch.testing.assert_close(again, decoded, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_packs_what_it_reads(path: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(5, 123, generator=generator).to(dtype) for _ in range(2))
    run = int8_groups._triton_swiglu if path == "triton" else int8_groups.swiglu_forward_int8
    options = (128,) if path == "triton" else ()
    product, gate_packed, up_packed = run(gate, up, *options)  # type: ignore[operator]
    close(product, swiglu.reference_forward(gate, up, 0), rounds=2)
    for packed, values in ((gate_packed, gate), (up_packed, up)):
        codes, scales = int8_groups.reference_pack(values)
        assert torch.equal(packed[0], codes)
        assert same(packed[1], scales)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(123, 37, 256), (1, 1, 128), (70, 200, 128)])
def test_weight_gradient(
    path: str,
    dtype: torch.dtype,
    tokens: int,
    outputs: int,
    inputs: int,
    request: pytest.FixtureRequest,
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, dy = (torch.randn(tokens, size, generator=generator).to(dtype) for size in (inputs, outputs))
    # Magnitudes that are powers of two keep bf16 exact where Triton's interpreter cuts it.
    x = x.float().sign().to(dtype)
    packed = int8_groups.int8_pack(x)
    expected = dy.float().mT @ int8_groups.int8_unpack(packed, tuple(x.shape), dtype).float()
    if path == "triton":
        request.getfixturevalue("bf16_products")
        gradient = int8_product._triton_gradient(dy, packed, inputs)
    else:
        gradient = int8_product.int8_weight_gradient(dy, packed, inputs)
    close(gradient, expected.to(dtype), rounds=4)


@pytest.mark.venv_optim
def test_traffic_is_what_the_specs_say(bf16_products: None) -> None:
    values = torch.randn(4, 1024).bfloat16()
    moved = {spec.name: spec.variants[0].moved_bytes for spec in int8_groups.SPECS}
    with count_traffic() as traffic:
        packed = int8_groups._triton_pack(values, 128)
    assert traffic.moved_bytes() == moved["int8_pack"] * values.numel()
    with count_traffic() as traffic:
        int8_groups._triton_unpack(packed, (4, 1024), torch.bfloat16)
    assert traffic.moved_bytes() == moved["int8_unpack"] * values.numel()
    with count_traffic() as traffic:
        int8_groups._triton_swiglu(values, values, 128)
    assert traffic.moved_bytes() == moved["swiglu_int8"] * values.numel()
    dy = torch.randn(4, 300).bfloat16()
    codes, scales = packed
    with count_traffic(dy=dy, codes=codes, scales=scales) as traffic:
        int8_product._triton_gradient(dy, packed, 1024)
    expected = int8_product._gradient_bytes(4, 300, 1024, group=128, size=2)
    assert traffic.moved_bytes(cached=["dy", "codes", "scales"]) == expected * values.numel()


def test_what_does_not_fit_is_refused() -> None:
    packed = int8_groups.int8_pack(torch.ones(3, 100))
    with pytest.raises(ValueError, match="384 codes in groups of 128 are not 3 tokens of 100 inputs"):
        int8_product.int8_weight_gradient(torch.ones(3, 5), packed, 100)
    with pytest.raises(ValueError, match=r"are not \(400,\) values"):
        int8_groups.int8_unpack(packed, (400,), torch.float32)
    with pytest.raises(ValueError, match="group must be a power of two of at least 16, got 100"):
        int8_groups.int8_pack(torch.ones(3), group=100)
    with pytest.raises(ValueError, match="differ"):
        int8_groups.swiglu_forward_int8(torch.ones(3), torch.ones(2))
