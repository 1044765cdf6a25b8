"""Few distinct values, exactly: codes, saved tensors, rows."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtrain.optim.autograd.apply import EXACT, Rule, apply_to, revert
from memtrain.optim.autograd.lossy_treatments import _EncodedForward
from memtrain.optim.autograd.quantized_saved import SavedTensorCompressor
from memtrain.optim.autograd.soft_palette import initial_centroids, soft_palette
from memtrain.optim.autograd.unique_codec import UniqueCodec, code_bits
from memtrain.optim.autograd.unique_rows import UniqueRows
from memtrain.optim.kernels import native
from memtrain.optim.kernels.unique_values import (
    PATTERNS,
    unique_decode,
    unique_decode_reference,
    unique_encode,
    unique_encode_reference,
)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(PATTERNS[tensor.element_size()])


def few(count: int, numel: int, dtype: torch.dtype) -> Tensor:
    """``numel`` values of at most ``count`` kinds."""
    generator = torch.Generator().manual_seed(count)
    places = torch.randint(0, count, (numel,), generator=generator)
    if dtype == torch.bool:
        return places > 0
    kinds = torch.arange(count).to(PATTERNS[dtype.itemsize])
    return (kinds * (1 if dtype.itemsize == 1 else 37)).view(dtype)[places]


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.int64]
)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 16, 17, 256, 257, 3000])
def test_what_is_encoded_comes_back(dtype: torch.dtype, count: int) -> None:
    count = min(count, {torch.bool: 2, torch.uint8: 256}.get(dtype, count))
    values = few(count, 60_001, dtype).view(1, -1)
    encoded = UniqueCodec().encode(values)
    kinds = bits(values).unique().numel()
    width = code_bits(kinds)
    if width / (8 * dtype.itemsize) > 0.75 or (dtype.itemsize == 2 and kinds > 256):
        assert encoded is None
        return
    assert encoded is not None
    assert encoded.table.numel() == kinds
    assert encoded.codes.nbytes == -(-60_001 * width // 8)
    again = UniqueCodec().decode(encoded, values.shape, dtype)
    assert again.dtype == dtype
    assert again.shape == values.shape
    assert torch.equal(bits(again), bits(values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_payloads_and_signs_come_back(dtype: torch.dtype) -> None:
    pattern = PATTERNS[dtype.itemsize]
    nan = torch.tensor([float("nan")], dtype=dtype).view(pattern)
    special = torch.cat(
        [
            torch.tensor([0.0, -0.0, float("inf"), -float("inf")], dtype=dtype).view(pattern),
            nan,
            nan + 1,
            nan + 5,
        ]
    )
    values = special.repeat(500).view(dtype)
    encoded = UniqueCodec().encode(values)
    assert encoded is not None
    assert encoded.table.numel() == 7
    assert torch.equal(UniqueCodec().decode(encoded, values.shape, dtype).view(pattern), values.view(pattern))


def test_too_many_values_are_left() -> None:
    generator = torch.Generator().manual_seed(0)
    assert UniqueCodec().encode(torch.randn(100_000, generator=generator)) is None
    assert UniqueCodec().encode(torch.randn(100_000, generator=generator).bfloat16()) is None
    # 65,536 values of fp32: places of two bytes, and a table of a quarter of a MiB
    values = few(65_536, 400_000, torch.float32)
    encoded = UniqueCodec().encode(values)
    assert encoded is not None
    assert encoded.codes.dtype == torch.int16
    assert torch.equal(bits(UniqueCodec().decode(encoded, values.shape, values.dtype)), bits(values))
    one_more = torch.cat([values, torch.tensor([1e30]), torch.tensor([2e30])])
    assert bits(values).unique().numel() <= 65_536 - 2 or UniqueCodec().encode(one_more) is None


def test_other_kinds_are_refused_by_name() -> None:
    assert not UniqueCodec().takes(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex64"):
        UniqueCodec().encode(torch.zeros(3, dtype=torch.complex64))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("kinds", [1, 5, 200, 256, 300, 65_536])
def test_the_kernel_agrees_with_its_reference(width: int, kinds: int) -> None:
    assert native.function("unique", "unique_encode") is not None
    kinds = min(kinds, 256) if width == 1 else kinds
    patterns = few(kinds, 130_003, PATTERNS[width])
    kernel, reference = unique_encode(patterns, 1 << 16), unique_encode_reference(patterns, 1 << 16)
    assert kernel is not None
    assert reference is not None
    assert kernel[0].dtype == reference[0].dtype
    assert torch.equal(kernel[1].sort().values, reference[1].sort().values)
    for codes, table in (kernel, reference):
        assert torch.equal(unique_decode(codes, table), patterns)
        assert torch.equal(unique_decode_reference(codes, table), patterns)
    distinct = patterns.unique().numel()
    if distinct > 1:
        assert unique_encode(patterns, distinct - 1) is None
        assert unique_encode_reference(patterns, distinct - 1) is None
    assert unique_encode(patterns, distinct) is not None


class Block(nn.Module):
    """Saves four values, -1, -0, 0 and 1, beside tensors of many."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sin(3.0 * self.up(x))
        return x + self.down(hidden * hidden.round())


def gradients(block: nn.Module, x: Tensor) -> list[Tensor]:
    y = block(x)
    return list(torch.autograd.grad(y.square().sum(), [*block.parameters(), x]))


def test_backward_is_bit_equal_and_what_is_left_is_counted() -> None:
    block, x = Block(), torch.randn(96, 64, requires_grad=True)
    expected = gradients(block, x)
    compressor = SavedTensorCompressor(UniqueCodec())
    attachment = compressor.attach(block)
    found = gradients(block, x)
    attachment.remove()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    counts = compressor.counts
    size = 96 * 256 * 4
    assert (counts.encoded, counts.plain_bytes) == (1, size)
    assert counts.encoded_bytes == 96 * 256 // 4 + 4 * 4  # two bits each, and the table
    # the sine's input and output, and what the second layer is given
    assert (counts.left, counts.left_bytes) == (3, 3 * size)
    gc.collect()
    assert compressor.stored_bytes == 0


def test_a_mask_is_saved_as_bits() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x < 0.0, -3.0) * 1.0

    x = torch.randn(1000, 64, requires_grad=True)
    compressor = SavedTensorCompressor(UniqueCodec())
    masked = Masked()
    compressor.attach(masked)
    y = masked(x)
    assert compressor.stored_bytes == 1000 * 64 // 8 + 2
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, (x >= 0).float())


def test_a_second_derivative_is_that_of_plain_autograd() -> None:
    class Cubed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 1.0).pow(3)

    def second(module: nn.Module) -> Tensor:
        x = few(8, 4096, torch.float32).view(torch.int32).remainder(7).float().requires_grad_()
        (first,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    plain, coded = Cubed(), Cubed()
    compressor = SavedTensorCompressor(UniqueCodec())
    compressor.attach(coded)
    assert torch.equal(second(coded), second(plain))
    assert compressor.counts.encoded


def test_as_a_treatment_of_layers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 64, (2, 33))

    def grads() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = grads()
    policy = EXACT.followed_by(Rule(kind="layer", treatment="unique"))
    applied = apply_to(model, policy, example=lambda: model(input_ids=ids))
    rows = [row for row in applied.rows if row.treatment == "unique"]
    assert len(rows) == 2
    assert all(row.exact for row in rows)
    found = grads()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    forward: Any = model.model.layers[0].__dict__["forward"]
    while not isinstance(forward, _EncodedForward):
        forward = forward.forward
    assert forward.compressor.counts.left  # a language model's activations have too many values
    revert(model)


def palette_gradients(weight: Tensor, *, unique: bool, iterations: int = 3) -> list[Tensor]:
    leaf = weight.detach().clone().requires_grad_()
    centroids = initial_centroids(leaf, 8).requires_grad_()
    soft, ended = soft_palette(leaf, centroids, temperature=0.01, iterations=iterations, unique=unique)
    probe = torch.randn(soft.shape, generator=torch.Generator().manual_seed(3)).to(soft.dtype)
    return [soft.detach(), ended.detach(), *torch.autograd.grad((soft * probe).sum(), [leaf, centroids])]


@pytest.mark.parametrize("shape", [(512, 300), (37, 1111)])
def test_a_palette_has_the_same_bits_with_unique_rows(shape: tuple[int, int]) -> None:
    weight = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).bfloat16()
    plain, coded = (palette_gradients(weight, unique=unique) for unique in (False, True))
    for one, other in zip(plain, coded, strict=True):
        assert torch.equal(bits(one), bits(other))


def test_maps_are_tables_of_distinct_rows_and_one_list_of_places() -> None:
    weight = (0.02 * torch.randn(200_000, generator=torch.Generator().manual_seed(1))).bfloat16()
    leaf, centroids = weight.requires_grad_(), initial_centroids(weight, 8)
    with UniqueRows(leaf) as rows:
        soft, _ = soft_palette(leaf, centroids, temperature=0.01, iterations=3, unique=False)
    assert rows.values == bits(weight).unique().numel() < 10_000
    assert rows.places_bytes == 2 * 200_000
    assert rows.counts.left == 0
    assert rows.counts.plain_bytes >= 4 * 200_000 * 8 * 4  # the four attentions, once each
    assert rows.counts.coded_bytes * 200_000 == rows.counts.plain_bytes * rows.values
    del soft


def test_one_memory_seen_as_two_dtypes_comes_back_as_both() -> None:
    weight = few(3, 400, torch.float32)

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            values = weight.clone()
            ctx.save_for_backward(values, values.view(torch.int32))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            values, patterns = ctx.saved_tensors
            assert torch.equal(values, weight)
            assert patterns.dtype == torch.int32
            assert torch.equal(patterns, weight.view(torch.int32))
            return gradient

    x = torch.ones(3, requires_grad=True)
    with UniqueRows(weight) as rows:
        result = Both.apply(x)  # type: ignore[no-untyped-call]
    result.sum().backward()
    assert rows.counts.coded == 2


def test_a_result_that_its_own_node_saves_does_not_outlive_its_graph() -> None:
    weight = few(3, 64, torch.float32).requires_grad_()
    rows = UniqueRows(weight)
    with rows:
        result = torch.exp(weight * 2).view(8, 8)  # as many rows as no weight has
    watched = weakref.ref(rows)
    del rows, result
    gc.collect()
    assert watched() is None


def test_rows_that_are_not_the_values_are_left_and_counted() -> None:
    weight = few(4, 10_000, torch.bfloat16)
    other = torch.randn(10_000, 3, requires_grad=True)
    with UniqueRows(weight) as rows:
        product = (other * 1.0).square()
    (found,) = torch.autograd.grad(product.sum(), other)
    assert torch.equal(found, 2 * other)
    assert rows.counts.left == 1
    assert rows.counts.left_bytes == 120_000
    assert rows.counts.coded == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"centroids": torch.zeros(1)}, r"centroids must be \[k\] with k >= 2, got shape \(1,\)"),
    ],
)
def test_palettes_that_cannot_be(change: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"centroids": torch.zeros(2), "temperature": 1.0, **change}
    with pytest.raises(ValueError, match=said):
        soft_palette(torch.zeros(3), **arguments)
    with pytest.raises(ValueError, match="at least 2 centroids, got 1"):
        initial_centroids(torch.zeros(3), 1)
