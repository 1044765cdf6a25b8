"""Attention by chunks against the matrix of scores."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memtrain.optim.autograd.attention_dropout import keep_mask
from memtrain.optim.autograd.chunked_attention import chunked_attention
from memtrain.optim.autograd.saved_bytes import SavedBytes

B, H, K, N, M, D, E = 2, 4, 2, 11, 13, 5, 3


def operands(dtype: torch.dtype = torch.float64, *, queries: int = N, keys: int = M) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(B, H, queries, D), (B, K, keys, D), (B, K, keys, E)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes
    ]


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    soft_cap: float | None = None,
    kept: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """With all scores; ``kept`` is what dropout keeps."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (scale or 1 / math.sqrt(query.shape[-1]))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -math.inf)
    probabilities = scores.softmax(-1)
    probabilities = probabilities.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    if kept is not None:
        probabilities = probabilities * kept / (1 - dropout)
    return probabilities @ value


def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    return torch.autograd.grad(output, inputs, upstream)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale and soft-cap": {"scale": 0.7, "soft_cap": 1.5},
    "padding": {"mask": torch.arange(M).lt(torch.tensor([[9], [4]]))[:, None, None]},
    "mask of all": {"mask": random(B, H, N, M) > 0, "is_causal": True},
    "bias of heads": {"bias": random(1, H, N, M)},
    "bias of keys": {"bias": random(M)},
    "bias, cap, causal": {"bias": random(B, 1, N, 1), "soft_cap": 2.0, "is_causal": True},
}


@pytest.mark.parametrize("chunks", [(1, 1), (4, 5), (100, 100), (3, None)])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_full_matrix_in_fp64(name: str, chunks: tuple[int, int | None]) -> None:
    options, inputs = dict(OPTIONS[name]), operands()
    if "bias" in options:
        options["bias"] = options["bias"].clone().requires_grad_()
        inputs.append(options["bias"])
    mine = chunked_attention(*inputs[:3], **options, query_chunk=chunks[0], key_chunk=chunks[1])
    theirs = plain(*inputs[:3], **options)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    for a, b in zip(gradients(mine, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_eager_attention(dtype: torch.dtype) -> None:
    """Relative to fp64. (SDPA's CPU kernel does not round scores to bf16; its error is 0.6 of both.)"""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, 2, 96, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    truth = plain(*doubles, is_causal=True)
    mine = chunked_attention(*inputs, is_causal=True, query_chunk=32)
    theirs = plain(*inputs, is_causal=True)
    results = [(x, *gradients(x, t)) for x, t in ((truth, doubles), (mine, inputs), (theirs, inputs))]
    for exact, got, other in zip(*results, strict=True):
        error, allowed = ((t.double() - exact).norm() for t in (got, other))
        assert error <= 1.25 * allowed + 1e-7 * exact.norm()


@pytest.mark.parametrize("chunks", [(1, 3), (4, 5), (100, 100)])
def test_dropout_is_that_of_its_mask_whatever_the_chunks(chunks: tuple[int, int]) -> None:
    inputs = operands()
    torch.manual_seed(7)
    seed = int(torch.randint(1 << 31, ()))
    shape = torch.Size((B, K, H // K, N, M))
    kept = keep_mask(shape, range(N), range(M), seed=seed, dropout=0.3, device=torch.device("cpu"))
    theirs = plain(*inputs, kept=kept.flatten(1, 2), dropout=0.3, is_causal=True)
    torch.manual_seed(7)
    mine = chunked_attention(*inputs, dropout=0.3, is_causal=True, query_chunk=chunks[0], key_chunk=chunks[1])
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    for a, b in zip(gradients(mine, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    part = keep_mask(shape, range(3, 8), range(2, 6), seed=seed, dropout=0.3, device=torch.device("cpu"))
    assert torch.equal(part, kept[..., 3:8, 2:6])


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_keeps_its_share_without_correlation(dropout: float) -> None:
    shape, device = torch.Size((2, 2, 2, 256, 256)), torch.device("cpu")
    masks = [
        keep_mask(shape, range(256), range(256), seed=s, dropout=dropout, device=device).float()
        for s in (1, 2)
    ]
    count, deviation = masks[0].numel(), math.sqrt(dropout * (1 - dropout))
    for mask in masks:
        assert abs(float(mask.mean()) - (1 - dropout)) < 4 * deviation / math.sqrt(count)
    centred = [(mask - mask.mean()) / deviation for mask in masks]
    a = centred[0]
    neighbours = [a * centred[1], a[..., 1:] * a[..., :-1], a[..., 1:, :] * a[..., :-1, :], a[1:] * a[:-1]]
    neighbours += [a[:, 1:] * a[:, :-1], a[:, :, 1:] * a[:, :, :-1], a * a.transpose(-1, -2).triu(1)]
    for product in neighbours:
        assert abs(float(product.mean())) < 4 / math.sqrt(product.numel())


def test_queries_that_may_look_nowhere_give_zeros() -> None:
    inputs = operands()
    mask = torch.ones(N, M, dtype=torch.bool)
    mask[3] = False
    out = chunked_attention(*inputs, mask=mask, key_chunk=4)
    assert (out[:, :, 3] == 0).all()
    query_gradient = gradients(out, inputs)[0]
    assert (query_gradient[:, :, 3] == 0).all()
    assert query_gradient.isfinite().all()
    empty = operands(keys=0)
    assert (chunked_attention(*empty) == 0).all()


def test_nan_is_not_hidden() -> None:
    inputs = [t.detach() for t in operands()]
    inputs[0][0, 0, 2, 0] = math.nan
    out = chunked_attention(*(t.requires_grad_() for t in inputs))
    assert out[0, 0, 2].isnan().all()
    assert gradients(out, inputs)[0][0, 0, 2].isnan().all()


def test_gradcheck_and_the_refusal_of_a_second_derivative() -> None:
    inputs = operands(queries=4, keys=5)
    bias = random(H, 4, 1).requires_grad_()

    def function(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)
        return chunked_attention(q, k, v, bias=b, dropout=0.2, soft_cap=3.0, query_chunk=3, key_chunk=2)

    assert torch.autograd.gradcheck(function, [*inputs, bias])
    with pytest.raises(RuntimeError, match="chunked_attention has no second derivative"):
        torch.autograd.grad(chunked_attention(*inputs).sum(), inputs[0], create_graph=True)


def test_autocast_checkpointing_and_scaled_losses() -> None:
    inputs = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine = chunked_attention(*inputs)
    assert mine.dtype == torch.bfloat16
    assert [g.dtype for g in gradients(mine, inputs)] == [torch.float32] * 3
    torch.testing.assert_close(mine.float(), plain(*inputs), rtol=3e-2, atol=3e-2)

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return chunked_attention(q, k, v, dropout=0.4, is_causal=True)

    torch.manual_seed(3)
    expected = gradients(dropped(*inputs), inputs)
    torch.manual_seed(3)
    out = checkpoint(dropped, *inputs, use_reentrant=False)
    for a, b in zip(gradients(out, inputs), expected, strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(3)
    for a, b in zip(gradients(dropped(*inputs) * 0.25, inputs), expected, strict=True):
        assert torch.equal(a, 0.25 * b)


class LargestTensor(TorchDispatchMode):
    """Bytes of the storages that operators made and that are alive, at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[weakref.ref, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self.alive[weakref.ref(storage, lambda ref: self.alive.pop(ref))] = storage.nbytes()
                self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_memory_grows_with_the_square_root_of_the_keys() -> None:
    """Beside inputs, output, their gradients (fp32 here) and 4 bytes a query: chunks of scores."""
    chunk, width, peaks = 64, 4, {}
    for tokens in (64, 256, 1024):
        inputs = [torch.randn(1, 1, tokens, width, requires_grad=True) for _ in range(3)]
        with LargestTensor() as seen:
            chunked_attention(*inputs, dropout=0.1, query_chunk=chunk).sum().backward()
        linear_bytes = tokens * (4 * width * 4 + 4)
        scores_bytes = chunk * math.isqrt(tokens) * 4
        peaks[tokens] = seen.peak - linear_bytes
        assert seen.peak < linear_bytes + 16 * scores_bytes + 4096
    assert peaks[1024] < 5 * peaks[64]


def test_saved_bytes() -> None:
    inputs = [torch.randn(2, 4, 32, 8, requires_grad=True) for _ in range(3)]
    with SavedBytes() as saved:
        out = chunked_attention(*(t * 1 for t in inputs), dropout=0.1)
    assert saved.total_bytes == 2 * 4 * 32 * (4 * 8 * 4 + 4)
    assert out.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(B, H, N)}, "must be \\[batch, heads, tokens, features\\]"),
        ({"key": torch.zeros(B, K, M, D + 1)}, "must fit"),
        ({"query": torch.zeros(B, 3, N, D)}, "multiple of those of key"),
        ({"query": torch.zeros(B, H, N, D).double()}, "one dtype is wanted"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"soft_cap": 0.0}, "soft_cap must be > 0 or None, got 0.0"),
        ({"query_chunk": 0}, "chunks must be >= 1, got 0 and 4"),
        ({"mask": torch.zeros(N, M)}, "mask must be bool"),
        ({"bias": torch.zeros(N, M + 1)}, "does not broadcast to"),
        ({"bias": torch.zeros(1, B, H, N, M)}, "does not broadcast to"),
    ],
)
def test_wrong_input_is_named(change: dict[str, object], message: str) -> None:
    query, key, value = operands(torch.float32)
    with pytest.raises(ValueError, match=message):
        chunked_attention(**{"query": query, "key": key, "value": value, **change})
