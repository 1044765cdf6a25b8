"""Few-bit bins and levels: the bytes of ``bitpack`` and ``fewbit`` on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memtrain.optim.autograd.bitpack import pack, unpack
from memtrain.optim.kernels import fewbit_pack
from tests.optim.kernels.compare import close
from tests.optim.kernels.traffic import count_traffic

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8), (5, 123, 8), (0, 8)]
BITS = [1, 2, 3, 4]
PATHS = ["public", pytest.param("triton", marks=pytest.mark.venv_optim)]


def table(bits: int) -> tuple[Tensor, Tensor]:
    count = 1 << bits
    return torch.linspace(-1.5, 1.7, count + 1)[1:-1].clone(), torch.linspace(-0.1, 1.1, count)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_and_gradients(path: str, bits: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    values, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    borders, levels = table(bits)
    even = bits == 2
    codes = fewbit_pack.reference_bins(values, borders, even=even)
    if path == "triton":
        output, packed = fewbit_pack._triton_forward(values, borders, bits, even, "gelu")
        result = fewbit_pack._triton_backward(packed, levels, gradient, bits)
    else:
        output, packed = fewbit_pack.fewbit_forward(values, borders, bits=bits, even=even, activation="gelu")
        result = fewbit_pack.fewbit_backward(packed, levels, gradient, bits=bits)
    assert torch.equal(packed, pack(codes, bits))
    assert torch.equal(unpack(packed, bits, values.numel()), codes)
    close(output, torch.nn.functional.gelu(values), rounds=2)
    close(result, fewbit_pack.reference_backward(packed, levels, gradient, bits), rounds=2)


@pytest.mark.parametrize("bits", BITS)
def test_any_number_of_values_is_packed_on_a_cpu(bits: int) -> None:
    borders, levels = table(bits)
    for numel in range(1, 18):
        values = torch.linspace(-2, 2, numel)
        same, packed = fewbit_pack.fewbit_forward(values, borders, bits=bits)
        assert same is values
        codes = fewbit_pack.reference_bins(values, borders, even=False)
        assert torch.equal(packed, pack(codes, bits))
        result = fewbit_pack.fewbit_backward(packed, levels, torch.ones(numel), bits=bits)
        assert torch.equal(result, levels[codes.long()])


@pytest.mark.venv_optim
def test_traffic_is_what_the_specs_say() -> None:
    values = torch.randn(16, 64).bfloat16()
    borders, levels = table(3)
    forward, backward = (spec.variants[0] for spec in fewbit_pack.SPECS)
    with count_traffic(borders=borders) as traffic:
        _, packed = fewbit_pack._triton_forward(values, borders, 3, False, "gelu")
    moved_bytes = traffic.moved_bytes() - traffic.read_bytes("borders")
    assert moved_bytes == forward.moved_bytes * values.numel()
    with count_traffic(levels=levels) as traffic:
        fewbit_pack._triton_backward(packed, levels, values, 3)
    assert traffic.moved_bytes() - traffic.read_bytes("levels") == backward.moved_bytes * values.numel()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 8 bits for up to"):
        fewbit_pack.fewbit_forward(torch.ones(8), torch.ones(4), bits=2)
    with pytest.raises(ValueError, match="activation must be one of silu, gelu, gelu_tanh or None"):
        fewbit_pack.fewbit_forward(torch.ones(8), torch.ones(1), bits=2, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="8 values of 2 bits take 2 bytes, got 3"):
        fewbit_pack.fewbit_backward(torch.zeros(3, dtype=torch.uint8), torch.ones(4), torch.ones(8), bits=2)


def test_more_levels_than_bins_are_refused():
    packed, gradient = torch.zeros(4, dtype=torch.uint8), torch.zeros(16)
    with pytest.raises(ValueError, match="400 levels for 2 bits"):
        fewbit_pack.fewbit_backward(packed, torch.zeros(400), gradient, bits=2)
