"""The loss over a head in tiles, against the chunked loss of the whole head and the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memtrain.optim.autograd import TiledEmbedding, TiledLinear, chunked_cross_entropy, tiled_cross_entropy

VOCABULARY, FEATURES, TOKENS = 37, 12, 19


def make(bias: bool, dtype: torch.dtype) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(FEATURES, VOCABULARY, bias=bias).to(dtype)
    hidden = torch.randn(1, TOKENS, FEATURES).to(dtype).mul_(3).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (1, TOKENS))
    labels[0, 3] = -100
    return head, hidden, labels


@pytest.mark.parametrize("rows", [[37], [10, 10, 17], [1, 35, 1]])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"soft_cap": 4.0, "logit_scale": 0.5}, {"num_items": 7}])
def test_equals_the_loss_of_the_whole_head(rows: list[int], bias: bool, options: dict[str, float]) -> None:
    head, hidden, labels = make(bias, torch.float64)
    cut = TiledLinear.over(head, rows)
    chunked_cross_entropy(hidden, head.weight, labels, bias=head.bias, chunk_tokens=8, **options).backward()
    expected = [hidden.grad, head.weight.grad, *([head.bias.grad] if bias else [])]
    hidden.grad = None
    loss = tiled_cross_entropy(hidden, cut, labels, chunk_tokens=5, **options)
    loss.backward()
    got = [hidden.grad, torch.cat([t.weight.grad for t in cut.parts])]
    got += [torch.cat([t.bias.grad for t in cut.parts])] if bias else []
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_in_bf16_within_the_rounding_of_logits() -> None:
    head, hidden, labels = make(False, torch.bfloat16)
    cut = TiledLinear.over(head, [20, 17])
    whole = chunked_cross_entropy(hidden, head.weight, labels)
    whole.backward()
    expected, hidden.grad = hidden.grad.float(), None
    loss = tiled_cross_entropy(hidden, cut, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        hidden.grad.float(), expected, rtol=0, atol=2**-7 * float(expected.abs().max())
    )
    got = torch.cat([tile.weight.grad for tile in cut.parts]).float()
    torch.testing.assert_close(got, head.weight.grad.float(), rtol=0, atol=2**-8 * float(got.abs().max()))


def test_backward_twice_and_frozen_parts() -> None:
    head, hidden, labels = make(True, torch.float64)
    cut = TiledLinear.over(head, [20, 17])
    cut.parts[0].weight.requires_grad_(False)
    loss = tiled_cross_entropy(hidden, cut, labels)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once)
    assert cut.parts[0].weight.grad is None
    assert cut.parts[1].weight.grad is not None
    still = hidden.detach()
    tiled_cross_entropy(still, cut, labels).backward()  # no gradient for the hidden states
    with torch.no_grad():
        assert not tiled_cross_entropy(hidden, cut, labels).requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    head, hidden, labels = make(False, torch.float32)
    with torch.no_grad():
        head.weight[30, 2] = value
    cut = TiledLinear.over(head, [20, 17])
    loss = tiled_cross_entropy(hidden, cut, labels)
    loss.backward()
    whole = chunked_cross_entropy(hidden, head.weight, labels)
    assert not loss.isfinite()
    assert loss.isnan() == whole.isnan()
    assert not hidden.grad.isfinite().all()


def test_faults_are_named() -> None:
    head, hidden, labels = make(False, torch.float64)
    cut = TiledLinear.over(head, [20, 17])
    with pytest.raises(ValueError, match=r"label 37 is outside 0\.\.36"):
        tiled_cross_entropy(hidden, cut, labels.clone().fill_(37))
    with pytest.raises(ValueError, match="must end with the head's 12 features"):
        tiled_cross_entropy(hidden[..., :4], cut, labels)
    with pytest.raises(ValueError, match="columns are cut into 2"):
        tiled_cross_entropy(hidden, TiledLinear(head, out_tiles=2, in_tiles=2), labels)
    with pytest.raises(ValueError, match="cast one"):
        tiled_cross_entropy(hidden.float(), cut, labels)
    loss = tiled_cross_entropy(hidden, cut, labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("padding", [None, 0, 30])
@pytest.mark.parametrize("rows", [[37], [12, 25], [1, 1, 35]])
def test_a_table_in_tiles_is_the_table(rows: list[int], padding: int | None) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(37, 6, padding_idx=padding)
    cut = TiledEmbedding(table, rows)
    ids = torch.randint(0, 37, (3, 50))
    ids[ids == 20] = 21  # a row that nobody uses
    weights = torch.randn(3, 50, 6)
    plain = table(ids)
    assert torch.equal(cut(ids), plain)
    (plain * weights).sum().backward()
    (cut(ids) * weights).sum().backward()
    assert torch.equal(torch.cat([tile.weight.grad for tile in cut.parts]), table.weight.grad)
    assert torch.equal(cut.state_dict()["weight"], table.weight)
    with pytest.raises(IndexError, match="ids 0 to 37 are looked up in a table of 37"):
        cut(torch.tensor([0, 37]))
    with pytest.raises(ValueError, match="sparse=True cannot be cut"):
        TiledEmbedding(nn.Embedding(4, 2, sparse=True), [2, 2])


def test_ids_of_one_tile_alone_still_give_the_others_a_gradient() -> None:
    cut = TiledEmbedding(nn.Embedding(10, 3), [4, 6])
    cut(torch.tensor([1, 1])).sum().backward()
    assert torch.equal(cut.parts[1].weight.grad, torch.zeros(6, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_cut_by_rows_forward_exact_and_backward_within_the_stated_bound(
    dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 640, bias=bias).to(dtype)
    cut = TiledLinear.over(layer, [128, 256, 256])
    x = torch.randn(32, 256).to(dtype).requires_grad_()
    expected = layer(x)
    got = cut(x)
    assert torch.equal(got, expected)  # of these shapes; where a product depends on its columns: not
    gradient = torch.randn(32, 640).to(dtype)
    expected.backward(gradient)
    whole, x.grad = x.grad, None
    got.backward(gradient)
    assert torch.equal(torch.cat([tile.weight.grad for tile in cut.parts]), layer.weight.grad)
    if bias:
        assert torch.equal(torch.cat([tile.bias.grad for tile in cut.parts]), layer.bias.grad)
    bound = gradient.double().abs() @ layer.weight.detach().double().abs()
    assert ((x.grad.double() - whole.double()).abs() <= 2 * 3 * torch.finfo(dtype).eps / 2 * bound).all()
