"""Tiles of tokens, and linear layers stored in tiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrain.optim.autograd.saved_bytes import SavedBytes
from memtrain.optim.autograd.tiled import tiled
from memtrain.optim.autograd.tiled_linear import TiledEmbedding, TiledLinear

TILES = [1, 4, 7, 100, None]


class MLP(nn.Module):
    def __init__(self, features: int = 6, hidden: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(features, hidden)
        self.down = nn.Linear(hidden, features)
        self.before, self.after = nn.Dropout(dropout), nn.Dropout(dropout / 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.down(self.before(F.gelu(self.up(x)))))
        return out


def run(module: nn.Module, x: Tensor, call: object, seed: int = 3) -> list[Tensor]:
    """Output, gradient of x, gradients of parameters; and what the generator gives next."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    out = call(x)  # type: ignore[operator]
    drawn = torch.rand(3)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype))
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None), drawn]


@pytest.mark.parametrize("tile_tokens", TILES)
@pytest.mark.parametrize("shape", [(2, 5, 6), (11, 6), (1, 6), (0, 6), (6,)])
def test_equals_the_untiled_module_in_fp64(shape: tuple[int, ...], tile_tokens: int | None) -> None:
    torch.manual_seed(0)
    module, x = MLP().double(), torch.randn(shape, dtype=torch.float64)
    mine = run(module, x, lambda v: tiled(module, v, tile_tokens=tile_tokens))
    for a, b in zip(mine, run(module, x, module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tile_tokens", TILES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_drops_what_the_untiled_module_drops(dtype: torch.dtype, tile_tokens: int | None) -> None:
    torch.manual_seed(0)
    module, x = MLP(dropout=0.4).to(dtype), torch.randn(3, 7, 6).to(dtype)
    mine = run(module, x, lambda v: tiled(module, v, tile_tokens=tile_tokens))
    theirs = run(module, x, module)
    assert torch.equal(mine[0] == 0, theirs[0] == 0)
    assert (mine[0] == 0).any()
    assert torch.equal(mine[-1], theirs[-1]), "the generator stands where it would without tiles"
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_error_of_a_bf16_gradient_does_not_grow_with_tiles() -> None:
    torch.manual_seed(0)
    module, x = MLP(16, 32).bfloat16(), torch.randn(512, 16).bfloat16()
    double = MLP(16, 32).double()
    double.load_state_dict(module.state_dict())
    exact = run(double, x.double(), double)[2:-1]

    def error(results: list[Tensor]) -> float:
        pairs = zip(results[2:-1], exact, strict=True)
        return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)

    untiled = error(run(module, x, module))
    for tile_tokens in (256, 32, 4):
        assert error(run(module, x, lambda v, t=tile_tokens: tiled(module, v, tile_tokens=t))) < 1.3 * untiled


def test_saves_its_input_alone() -> None:
    module, x = MLP(8, 40), torch.randn(64, 8, requires_grad=True)
    with SavedBytes(module.parameters()) as saved:
        kept = tiled(module, x * 1, tile_tokens=16)
    assert saved.total_bytes == 64 * 8 * 4
    assert kept.requires_grad


def test_frozen_and_unused_parameters_and_inputs() -> None:
    module = MLP()
    module.spare = nn.Parameter(torch.zeros(3))
    module.up.weight.requires_grad_(False)
    x = torch.randn(9, 6)
    tiled(module, x, tile_tokens=4).sum().backward()
    assert module.up.weight.grad is None
    assert module.spare.grad is None
    got = module.down.weight.grad
    module.zero_grad()
    module(x).sum().backward()
    torch.testing.assert_close(got, module.down.weight.grad)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert not tiled(module, x).requires_grad


def test_tied_weights_scaled_losses_autocast_and_checkpointing() -> None:
    torch.manual_seed(0)
    module, x = MLP(6, 6, dropout=0.3), torch.randn(9, 6)
    module.down.weight = module.up.weight
    theirs = run(module, x, module)
    for call in (
        lambda v: tiled(module, v, tile_tokens=4),
        lambda v: checkpoint(lambda w: tiled(module, w, tile_tokens=4), v, use_reentrant=False),
    ):
        for a, b in zip(run(module, x, call), theirs, strict=True):
            torch.testing.assert_close(a, b)
    once = run(module, x, lambda v: tiled(module, v, tile_tokens=4))
    quarter = run(module, x, lambda v: tiled(module, v, tile_tokens=4) * 0.25)
    for a, b in zip(once[1:-1], quarter[1:-1], strict=True):
        assert torch.equal(a * 0.25, b)

    def cast(call: object) -> object:
        def inside(v: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return call(v)  # type: ignore[no-any-return,operator]

        return inside

    mine = run(module, x, cast(lambda v: tiled(module, v, tile_tokens=4)))
    for a, b in zip(mine, run(module, x, cast(module)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_gradcheck_and_the_refusal_of_a_second_derivative() -> None:
    module, x = MLP(3, 4).double(), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, *_: tiled(module, v, tile_tokens=2), [x, *module.parameters()])
    with pytest.raises(RuntimeError, match="tiled has no second derivative"):
        torch.autograd.grad(tiled(module, x).sum(), x, create_graph=True)


class Wrong(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)  # type: ignore[operator]


def test_what_cannot_be_tiled_is_refused_by_name() -> None:
    x, outside = torch.randn(8, 3), torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="is not a parameter of its own"):
        tiled(Wrong(lambda v: v * (outside * 2)), x.requires_grad_(), tile_tokens=4).sum().backward()
    with pytest.raises(RuntimeError, match="only one row for each token"):
        tiled(Wrong(lambda v: v * F.dropout(torch.ones(3))), x, tile_tokens=4)
    with pytest.raises(RuntimeError, match="rand_like"):
        tiled(Wrong(lambda v: v + torch.rand_like(v)), x, tile_tokens=4)
    with pytest.raises(ValueError, match=r"must give \[4, features\]"):
        tiled(Wrong(lambda v: v.sum(0)), x, tile_tokens=4)
    with pytest.raises(ValueError, match=r"must give \[4, features\] for a tile, got tuple"):
        tiled(Wrong(lambda v: (v, v)), x, tile_tokens=4)
    with pytest.raises(ValueError, match="tile_tokens must be >= 1, got 0"):
        tiled(MLP(), torch.randn(2, 6), tile_tokens=0)


def _double(module: MLP) -> None:
    with torch.no_grad():
        module.up.weight.mul_(2)


def _replace(module: MLP) -> None:
    module.up.weight = nn.Parameter(module.up.weight.detach() * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_double, "modified by an inplace operation"),
        (_replace, "a parameter was replaced"),
        (lambda module: module.eval(), r"train\(\) or eval\(\) was called between"),
        (lambda module: module.before.eval(), r"train\(\) or eval\(\) was called between"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_change_before_backward_is_noticed(
    change: Callable[[MLP], object], message: str, frozen: bool
) -> None:
    module = MLP(dropout=0.5).requires_grad_(not frozen)
    out = tiled(module, torch.randn(4, 6, requires_grad=True))
    change(module)
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()


def test_torch_compile_is_refused_by_name() -> None:
    module = MLP()
    with pytest.raises(Exception, match=r"torch\.compile does not trace"):
        torch.compile(lambda v: tiled(module, v), backend="aot_eager", fullgraph=True)(torch.randn(4, 6))


@pytest.mark.parametrize(("out_tiles", "in_tiles"), [(1, 1), (3, 1), (1, 4), (3, 4), (7, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_tiled_linear_is_the_linear_layer(out_tiles: int, in_tiles: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(5, 7, bias=bias).double()
    cut = TiledLinear(plain, out_tiles=out_tiles, in_tiles=in_tiles)
    assert len(cut.tiles) == out_tiles * in_tiles
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(cut(x), plain(x), rtol=1e-14, atol=1e-15)
    assert torch.autograd.gradcheck(lambda v, *_: cut(v), [x, *cut.parameters()])
    state = cut.state_dict()
    assert list(state) == (["weight", "bias"] if bias else ["weight"])
    assert torch.equal(state["weight"], plain.weight)
    other = TiledLinear(nn.Linear(5, 7, bias=bias).double(), out_tiles=2, in_tiles=2)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other.merged_weight(), plain.weight)
    plain.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_tiled_linear_inside_a_model_keeps_the_names_of_checkpoints() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6))
    keys = set(model.state_dict())
    reference = {k: v.clone() for k, v in model.state_dict().items()}
    model[1] = TiledLinear(model[1], out_tiles=3)
    assert set(model.state_dict()) == keys
    model.load_state_dict(reference)
    assert torch.equal(model.state_dict()["1.weight"], reference["1.weight"])


def test_tiled_linear_of_a_frozen_weight_stays_frozen() -> None:
    plain = nn.Linear(4, 6)
    plain.weight.requires_grad_(False)
    assert not any(t.requires_grad for t in TiledLinear(plain, out_tiles=2).parameters() if t.dim() == 2)
    with pytest.raises(ValueError, match=r"out_tiles must be in 1..6, got 7"):
        TiledLinear(plain, out_tiles=7)


@pytest.mark.parametrize("rows", [[3, 4], [9, -1], []])
def test_rows_of_tiles_that_are_not_the_weights_are_refused(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="rows for a weight of 8"):
        TiledEmbedding(nn.Embedding(8, 4), rows)
