"""Lossy functions through Triton's kernels, in its interpreter, and through C++, beside the plain paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtrain.optim.autograd.compact import CompActInput, clear_compressed_grads, compact_linear
from memtrain.optim.autograd.fewbit import ACTIVATIONS, fewbit
from memtrain.optim.autograd.group_codec import GroupCodec
from memtrain.optim.autograd.int8_linear import Int8Input, int8_linear
from memtrain.optim.autograd.quantized_saved import SavedTensorCompressor
from memtrain.optim.autograd.wtacrs import WTAInput, wta_linear
from memtrain.optim.kernels import group_codes, int8_groups, lazy, native
from memtrain.optim.projection import Projection

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Of sums of products: the interpreter adds up in another order, and cuts fp32 to bf16 where a GPU rounds."""
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")


@pytest.fixture(params=["cpp", pytest.param("triton", marks=pytest.mark.venv_optim)])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """``kernels(True)``: from here on the kernels; ``kernels(False)``: plain torch."""
    if request.param == "triton":
        request.getfixturevalue("bf16_products")

    def choose(on: bool) -> None:
        monkeypatch.setattr(lazy, "takes_triton", lambda tensor: on and request.param == "triton")
        if not on or request.param == "triton":
            monkeypatch.setattr(native, "function", lambda *_: None)

    compiled = native.function

    def again(on: bool) -> None:
        monkeypatch.setattr(native, "function", compiled)
        choose(on)

    return again


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def both(kernels: Callable[[bool], None], run: Callable[[], Any]) -> tuple[Any, Any]:
    kernels(False)
    plain = run()
    kernels(True)
    return plain, run()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 123, 40), (3, 7), (0, 8)])
@pytest.mark.parametrize(
    ("name", "bits"), [("gelu", 1), ("gelu", 2), ("gelu", 3), ("gelu", 4), ("gelu", 6), ("sigmoid", 2)]
)
def test_fewbit(
    kernels: Callable[[bool], None], bits: int, dtype: torch.dtype, shape: tuple[int, ...], name: str
) -> None:
    activation = ACTIVATIONS[name]
    table = activation.table(bits)
    given, gradient = numbers(shape, dtype), numbers(shape, dtype, 1)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        values = given.clone().requires_grad_()
        result = fewbit(values, activation.function, table)
        (packed, _) = result.grad_fn.saved_tensors  # type: ignore[union-attr]
        (got,) = torch.autograd.grad(result, values, gradient)
        return result.detach(), packed, got

    (plain, plain_packed, expected), (result, packed, got) = both(kernels, run)
    assert torch.equal(result, plain)
    assert torch.equal(packed, plain_packed)
    # Triton's interpreter cuts fp32 to bf16 where a GPU, torch and C++ round.
    cuts = dtype == torch.bfloat16 and native.function("fewbit", "fewbit_pack") is None
    torch.testing.assert_close(got, expected, rtol=2**-7 if cuts else 0, atol=0)


@pytest.mark.parametrize(("bits", "stochastic"), [(8, False), (8, True), (4, False), (4, True)])
@pytest.mark.parametrize("group", [64, 128, 256])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7), (0, 8), (4, 1000)])
def test_codes(
    kernels: Callable[[bool], None],
    bits: int,
    stochastic: bool,
    group: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    codec = GroupCodec(bits=bits, group=group, stochastic=stochastic, seed=5)
    values = numbers(shape, dtype) * torch.logspace(-6, 2, shape[-1]).to(dtype)
    if values.numel() > 3000:
        values.view(-1)[300:900] = 0
        values.view(-1)[[1777, 2900, 2901]] = torch.tensor([torch.inf, torch.nan, -torch.inf], dtype=dtype)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        encoded = codec.encode(values)
        return *encoded, codec.decode(encoded, values.shape, dtype)

    (plain_codes, plain_scales, plain), (codes, scales, decoded) = both(kernels, run)
    assert torch.equal(codes, plain_codes)
    assert codes.dtype == plain_codes.dtype
    assert torch.equal(scales.view(torch.int16), plain_scales.view(torch.int16))
    cuts = dtype == torch.bfloat16 and native.function("groups", "encode_groups") is None
    torch.testing.assert_close(decoded, plain, rtol=2**-7 if cuts else 0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_block_saves(kernels: Callable[[bool], None], dtype: torch.dtype) -> None:
    given = numbers((3, 50, 64), dtype)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).to(dtype)
        x = given.clone().requires_grad_()
        attachment = SavedTensorCompressor().attach(block)
        block(x * 1).square().mean().backward()
        attachment.remove()
        return [x.grad, *(p.grad for p in block.parameters())]

    plain, got = both(kernels, run)
    for mine, theirs in zip(got, plain, strict=True):
        assert float((mine - theirs).norm()) <= ROUNDING[dtype] * float(theirs.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("rank", [5, 32, 64])
def test_compact(kernels: Callable[[bool], None], dtype: torch.dtype, kind: Any, rank: int) -> None:
    given, gradient = numbers((3, 11, 72), dtype), numbers((3, 11, 10), dtype, 1)
    shared = CompActInput(72, Projection(kind=kind, rank=rank, side="right"), seed=3)

    def run() -> tuple[Tensor, ...]:
        x, weight = given.clone().requires_grad_(), numbers((10, 72), dtype, 2).requires_grad_()
        y = compact_linear(x, weight, None, shared)
        y.backward(gradient)
        low: Tensor = weight.compressed_grad  # type: ignore[attr-defined]
        clear_compressed_grads([weight])
        return y.detach(), x.grad, low

    (plain, plain_dx, plain_low), (y, dx, low) = both(kernels, run)
    assert torch.equal(y, plain)
    assert torch.equal(dx, plain_dx)
    assert float((low - plain_low).norm()) <= ROUNDING[dtype] * float(plain_low.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(37, 19, 5), (4, 130, 70), (64, 1, 3)])
def test_wta(
    kernels: Callable[[bool], None], dtype: torch.dtype, rows: int, inputs: int, outputs: int
) -> None:
    given, gradient = numbers((rows, inputs), dtype), numbers((rows, outputs), dtype, 1)

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        x, weight = given.clone().requires_grad_(), numbers((outputs, inputs), dtype, 2).requires_grad_()
        y = wta_linear(x, weight, None, WTAInput(0.5))
        y.backward(gradient)
        return y.detach(), x.grad, weight.grad

    (plain, plain_dx, plain_dw), (y, dx, dw) = both(kernels, run)
    assert torch.equal(y, plain)
    assert torch.equal(dx, plain_dx)
    assert float((dw - plain_dw).norm()) <= ROUNDING[dtype] * float(plain_dw.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "outputs"), [((2, 15, 128), 37), ((7, 256), 5), ((3, 100), 6)])
def test_int8_linear(
    kernels: Callable[[bool], None], dtype: torch.dtype, shape: tuple[int, ...], outputs: int
) -> None:
    given, gradient = numbers(shape, dtype).sign(), numbers((*shape[:-1], outputs), dtype, 1)

    def run() -> tuple[Tensor, ...]:
        x, weight = given.clone().requires_grad_(), numbers((outputs, shape[-1]), dtype, 2).requires_grad_()
        y = int8_linear(x, weight, None, Int8Input())
        y.backward(gradient)
        return y.detach(), x.grad, weight.grad

    (plain, plain_dx, plain_dw), (y, dx, dw) = both(kernels, run)
    assert torch.equal(y, plain)
    assert torch.equal(dx, plain_dx)
    assert float((dw - plain_dw).norm()) <= ROUNDING[dtype] * float(plain_dw.norm())


@pytest.mark.venv_optim
def test_the_kernels_are_the_ones_that_run(bf16_products: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()
    plain = lazy.TritonKernel.__getitem__

    def launcher(self: lazy.TritonKernel, grid: Any) -> Any:
        launched.add(self.name.strip("_").removesuffix("_kernel"))
        return plain(self, grid)

    monkeypatch.setattr(lazy.TritonKernel, "__getitem__", launcher)
    monkeypatch.setattr(lazy, "takes_triton", lambda tensor: True)
    x, weight = numbers((8, 128), torch.bfloat16), numbers((4, 128), torch.bfloat16).requires_grad_()
    fewbit(x.clone().requires_grad_(), F.gelu, ACTIVATIONS["gelu"].table(3)).sum().backward()
    int8_linear(x, weight, None, Int8Input()).sum().backward()
    wta_linear(x, weight, None, WTAInput(0.5)).sum().backward()
    compact_linear(x, weight, None, CompActInput(128, Projection(kind="rademacher", rank=32, side="right")))
    codec = GroupCodec()
    codec.decode(codec.encode(x), x.shape, x.dtype)
    assert launched == {
        *("fewbit_forward", "fewbit_backward", "int8_pack", "int8_unpack", "int8_weight_gradient"),
        *("wta_gradient", "rademacher_project"),
    }


def test_what_has_no_memory_of_its_own_goes_the_plain_way() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        values = torch.randn(4, 128)
        assert not group_codes.serves(values, 128)
        encoded = GroupCodec().encode(values)
        assert GroupCodec().decode(encoded, values.shape, values.dtype).shape == (4, 128)
        result = fewbit(values.requires_grad_(), F.gelu, ACTIVATIONS["gelu"].table(3))
        assert result.shape == (4, 128)
    assert not group_codes.serves(torch.ones(4, 96), 96)
    assert int8_groups.int8_pack(torch.ones(4, 100), group=32)[0].shape == (13, 32)
