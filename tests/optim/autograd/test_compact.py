"""CompAct: exact parts, unbiased estimate, accumulation, one z per input, optimizers, refresh, refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrain.optim.autograd.compact import (
    CompActInput,
    CompActLinear,
    apply_compact,
    compact_linear,
)
from memtrain.optim.autograd.linears import UnsupportedLinearError
from memtrain.optim.autograd.lossy_backward import LossyBackwardError
from memtrain.optim.compressed_grad import (
    CompressedGradError,
    clear_compressed_grads,
    dense_gradient,
    densify_grads,
)
from memtrain.optim.projection import Projection, ProjectionError

FEATURES, RANK, ROWS = 24, 6, 40


class Attention(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(FEATURES, FEATURES, dtype=dtype)
        self.k = nn.Linear(FEATURES, 8, bias=False, dtype=dtype)
        self.v = nn.Linear(FEATURES, FEATURES, dtype=dtype)
        self.o = nn.Linear(FEATURES, FEATURES, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) + self.v(x)) + self.k(x).sum(-1, keepdim=True)


def batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn(2, ROWS // 2, FEATURES, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.requires_grad_()


def shared_input(rank: int = RANK, seed: int = 0, kind: str = "rademacher") -> CompActInput:
    return CompActInput(FEATURES, Projection(kind=kind, rank=rank, side="right"), seed=seed)  # type: ignore[arg-type]


def exact_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x.grad = None
    model(x).square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    got["x"] = x.grad.clone()
    model.zero_grad()
    x.grad = None
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_input_and_bias_are_exact_and_the_gradient_has_its_shape(dtype: torch.dtype) -> None:
    model, x = Attention(dtype), batch(dtype)
    plain = model(x)
    expected = exact_gradients(model, x)
    apply_compact(model, density=None, rank=RANK)
    y = model(x)
    assert torch.equal(y, plain)
    y.square().sum().backward()
    assert torch.equal(x.grad, expected["x"])
    assert torch.equal(model.q.bias.grad, expected["q.bias"])
    for layer in (model.q, model.k, model.v, model.o):
        assert layer.weight.grad is None
        assert layer.weight.compressed_grad.shape == (layer.out_features, RANK)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        assert layer.weight.compressed_grad.dtype == wide


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_the_compressed_gradient_is_that_of_the_same_projector(kind: str) -> None:
    x, weight = batch(torch.float64), torch.randn(5, FEATURES, dtype=torch.float64, requires_grad=True)
    shared = shared_input(kind=kind)
    compact_linear(x, weight, None, shared).square().sum().backward()
    dense = 2 * (x @ weight.t()).reshape(-1, 5).t() @ x.reshape(-1, FEATURES)
    projector = weight.compressed_projection.bind(weight.shape)
    opened = projector.open(weight.compressed_stored, weight.device)
    expected = projector.down(opened, dense.detach())
    assert torch.allclose(weight.compressed_grad.float(), expected, rtol=1e-5, atol=1e-4)
    assert projector.low_shape == weight.compressed_grad.shape


def test_unbiased_over_seeds_with_the_variance_of_theory() -> None:
    # T6. For signs over sqrt(r) with E[P P^T] = 1, a row g of the gradient has
    # E|g P P^T - g|^2 = |g|^2 (n - 1) / r  (its n - 1 cross terms per output, each of variance 1/r).
    x = batch(torch.float64).detach()
    weight = torch.randn(3, FEATURES, dtype=torch.float64, requires_grad=True)
    dense = 2 * ((x @ weight.t()).reshape(-1, 3).t() @ x.reshape(-1, FEATURES)).detach()
    draws = []
    for seed in range(4000):
        compact_linear(x, weight, None, shared_input(seed=seed)).square().sum().backward()
        draws.append(dense_gradient(weight))
        clear_compressed_grads([weight])
    stacked = torch.stack(draws).double()
    scores = (stacked.mean(0) - dense) / (stacked.std(0) / math.sqrt(len(draws)))
    assert float(scores.abs().max()) < 4
    relative = float((stacked - dense).square().sum((1, 2)).mean() / dense.square().sum())
    assert relative == pytest.approx((FEATURES - 1) / RANK, rel=0.1)


def test_one_projection_for_all_layers_of_an_input() -> None:
    model, x = Attention(), batch()
    apply_compact(model, density=None, rank=RANK)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = model(x)
    weights = {layer.weight.data_ptr() for layer in (model.q, model.k, model.v, model.o)}
    own = {t.data_ptr(): t for t in saved if t.data_ptr() not in weights}
    # T11: one z of [40, 6] for q, k and v, one for o
    assert sum(t.untyped_storage().nbytes() for t in own.values()) == 2 * ROWS * RANK * 4
    assert [t.shape for t in own.values()] == [(ROWS, RANK)] * 2
    del y


def test_micro_batches_and_shared_weights_add_up() -> None:
    # T7
    model, whole = Attention(), batch()
    handle = apply_compact(model, density=0.25)
    model(whole).square().sum().backward()
    expected = model.q.weight.compressed_grad.clone()
    clear_compressed_grads(model.parameters())
    for half in whole.detach().split(1):
        model(half).square().sum().backward()
    assert torch.allclose(model.q.weight.compressed_grad, expected, rtol=1e-5, atol=1e-5)
    handle.undo()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(FEATURES, FEATURES, bias=False)
            self.b = nn.Linear(FEATURES, FEATURES, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    tied, x = Twice(), batch()
    tied(x).sum().backward()
    dense = tied.a.weight.grad.clone()
    tied.zero_grad()
    apply_compact(tied, density=1.0)
    tied(x).sum().backward()
    projector = tied.a.weight.compressed_projection.bind(dense.shape)
    opened = projector.open(tied.a.weight.compressed_stored, dense.device)
    assert torch.allclose(tied.a.weight.compressed_grad, projector.down(opened, dense), rtol=1e-4, atol=1e-4)


def test_bf16_accumulation_keeps_fp32() -> None:
    # T7: 32 micro-batches, a bf16 product each, added up in fp32: .17 % in the reference
    weight = torch.randn(16, FEATURES).bfloat16().requires_grad_()
    shared = shared_input(rank=12)
    exact = torch.zeros(16, 12, dtype=torch.float64)
    basis = shared._projector.open(shared.stored, weight.device)["right"].double()
    for step in range(32):
        x = torch.randn(64, FEATURES, generator=torch.Generator().manual_seed(step)).bfloat16()
        g = torch.randn(64, 16, generator=torch.Generator().manual_seed(100 + step)).bfloat16()
        compact_linear(x, weight, None, shared).backward(g)
        exact += g.double().t() @ (x.double() @ basis)
    assert weight.compressed_grad.dtype == torch.float32
    assert float((weight.compressed_grad.double() - exact).norm() / exact.norm()) < 0.0035


def test_gradient_of_something_else_leaves_weights_alone() -> None:
    model, x = Attention(), batch()
    apply_compact(model)
    torch.autograd.grad(model(x).sum(), x)
    assert not hasattr(model.q.weight, "compressed_grad")
    with pytest.raises(RuntimeError, match="used in the graph"):
        torch.autograd.grad(model(x).sum(), model.q.weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_uses_the_same_seed(reentrant: bool) -> None:
    model, x = Attention(), batch()
    apply_compact(model)
    model(x).square().sum().backward()
    expected = model.q.weight.compressed_grad.clone()
    clear_compressed_grads(model.parameters())
    torch.randn(7)  # the generator's state is of no account
    checkpoint(model, x, use_reentrant=reentrant, preserve_rng_state=False).square().sum().backward()
    assert torch.equal(model.q.weight.compressed_grad, expected)


def test_autocast() -> None:
    model, x = Attention(), batch()
    apply_compact(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        z = model.q.compact_input.project(x, torch.bfloat16)[0]
    assert z.dtype == torch.bfloat16
    y.float().square().sum().backward()
    low = model.q.weight.compressed_grad.clone()
    assert low.dtype == torch.float32
    assert x.grad.dtype == torch.float32
    assert model.q.bias.grad.dtype == torch.float32
    clear_compressed_grads(model.parameters())
    model(x).square().sum().backward()
    full = model.q.weight.compressed_grad
    assert float((low - full).norm() / full.norm()) < 0.02


def test_the_basis_is_exact_in_half_precision() -> None:
    shared = shared_input(rank=6)  # 1/sqrt(6) is not a bf16 number
    identity = torch.eye(FEATURES, dtype=torch.bfloat16)
    z, factor = shared.project(identity, torch.bfloat16)
    expected = shared._projector.open(shared.stored, identity.device)["right"]
    assert torch.allclose(z.float() * factor, expected, rtol=2.0**-9)
    signs = z.float().abs().unique()
    assert len(signs) == 1


def test_scaled_losses_scale_the_gradient_exactly() -> None:
    # T8, with a power of two as GradScaler has
    model, x = Attention(), batch()
    apply_compact(model)
    model(x).sum().backward()
    expected = {n: p.compressed_grad.clone() for n, p in model.named_parameters() if p.dim() == 2}
    clear_compressed_grads(model.parameters())
    (model(x).sum() * 1024).backward()
    assert all(
        torch.equal(p.compressed_grad, 1024 * expected[n])
        for n, p in model.named_parameters()
        if p.dim() == 2
    )


def test_any_optimizer_after_densify_and_none_before() -> None:
    model, x = Attention(), batch()
    handle = apply_compact(model, density=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    before = model.q.weight.detach().clone()
    with pytest.raises(CompressedGradError, match="SGD does not take compressed gradients, and 4"):
        optimizer.step()
    dense = dense_gradient(model.q.weight)
    densify_grads(model.parameters())
    assert not hasattr(model.q.weight, "compressed_grad")
    assert torch.allclose(model.q.weight.grad, dense)
    model(x).square().sum().backward()
    densify_grads(model.parameters())  # added to what is there
    assert torch.allclose(model.q.weight.grad, 2 * dense, rtol=1e-5)
    optimizer.step()
    assert torch.allclose(model.q.weight, before - 0.1 * 2 * dense, rtol=1e-4, atol=1e-5)
    handle.undo()
    optimizer.step()

    class Aware(torch.optim.SGD):
        accepts_compressed_grad = True

    handle = apply_compact(model)
    model.zero_grad()
    model(x).sum().backward()
    Aware(model.parameters(), lr=0.1).step()
    handle.undo()


def test_an_estimate_trains() -> None:
    model, x = Attention(), batch().detach()
    target = Attention(torch.float32)
    with torch.no_grad():
        for p in target.parameters():
            p.mul_(1.5)
        wanted = target(x)
    handle = apply_compact(model, density=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        loss = F.mse_loss(model(x), wanted)
        loss.backward()
        densify_grads(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        handle.refresh(step + 1)
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_a_refresh_changes_the_basis_but_not_under_pending_gradients() -> None:
    model, x = Attention(), batch()
    handle = apply_compact(model)
    saved = handle.state_dict()
    assert sorted(saved) == ["q"]  # o has as many features and is given the same basis
    late = model(x)
    model(x).sum().backward()
    with pytest.raises(LossyBackwardError, match="pending"):
        handle.refresh(1)
    first = model.q.weight.compressed_grad.clone()
    clear_compressed_grads(model.parameters())
    handle.refresh(1)
    model(x).sum().backward()
    assert not torch.allclose(model.q.weight.compressed_grad, first)
    with pytest.raises(CompressedGradError, match="another basis"):
        late.sum().backward()  # its graph keeps the basis of its forward
    clear_compressed_grads(model.parameters())
    handle.load_state_dict(saved)
    model(x).sum().backward()
    assert torch.equal(model.q.weight.compressed_grad, first)
    with pytest.raises(ValueError, match="other layers"):
        handle.load_state_dict({"other": saved["q"]})


def test_second_derivatives_are_refused() -> None:
    model, x = Attention(), batch()
    apply_compact(model)
    with pytest.raises(LossyBackwardError, match="CompAct has no second derivative"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_frozen_weights_no_gradients_and_empty_batches() -> None:
    model = Attention()
    model.q.weight.requires_grad_(False)
    apply_compact(model)
    assert type(model.q) is nn.Linear
    assert isinstance(model.k, CompActLinear)
    with torch.no_grad():
        model(batch())
    model(torch.zeros(0, FEATURES)).sum().backward()
    assert float(model.k.weight.compressed_grad.abs().max()) == 0.0
    clear_compressed_grads(model.parameters())
    model.k.weight.requires_grad_(False)  # after it was applied
    model(batch()).sum().backward()
    assert not hasattr(model.k.weight, "compressed_grad")


def test_a_nan_stays_visible() -> None:
    model, x = Attention(), batch().detach()
    x[0, 0, 0] = math.nan
    apply_compact(model)
    model(x).sum().backward()
    assert bool(model.q.weight.compressed_grad.isnan().any())


def test_copies_pickles_and_undo() -> None:
    model, x = Attention(), batch()
    keys = list(model.state_dict())
    handle = apply_compact(model)
    assert list(model.state_dict()) == keys
    model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.q.compact_input is twin.k.compact_input
        assert twin.q.compact_input is not model.q.compact_input
        twin(x).sum().backward()
        assert not hasattr(model.q.weight, "compressed_grad")
        assert twin.q.weight.compressed_grad.shape == (FEATURES, RANK)
    handle.undo()
    handle.undo()
    assert type(model.q) is nn.Linear
    assert vars(model.q).keys() == vars(nn.Linear(2, 2)).keys()


def test_the_output_embedding_and_half_tied_weights() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, FEATURES)
            self.body = nn.Linear(FEATURES, FEATURES)
            self.head = nn.Linear(FEATURES, 11, bias=False)
            self.head.weight = self.embed.weight

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Model()
    handle = apply_compact(model)
    assert handle.names == ["body"]
    handle.undo()
    with pytest.raises(UnsupportedLinearError, match="head shares its weight with embed"):
        apply_compact(model, select=lambda name, layer: True)
    assert type(model.body) is nn.Linear


def test_a_replaced_weight_is_refused() -> None:
    model, x = Attention(), batch()
    apply_compact(model)
    model.load_state_dict(model.state_dict())  # copies into the same parameter
    model.to("cpu", torch.float64)
    model(x.detach().double()).sum().backward()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    with pytest.raises(LossyBackwardError, match="was replaced"):
        model(x.detach().double())


def test_refuses_wrong_ranks_kinds_and_models() -> None:
    with pytest.raises(ProjectionError, match="rank 25 exceeds 24"):
        apply_compact(Attention(), density=None, rank=25)
    with pytest.raises(ValueError, match="rademacher"):
        CompActInput(8, Projection(kind="svd", rank=2, side="right"))
    with pytest.raises(ValueError, match="side 'right'"):
        CompActInput(8, Projection(kind="rademacher", rank=2))
    with pytest.raises(UnsupportedLinearError, match=r"no torch\.nn\.Linear"):
        apply_compact(nn.Sequential(nn.Conv1d(2, 2, 1)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute:UserWarning")
def test_compiled_models_break_their_graph_or_are_refused() -> None:
    model, x = Attention(), batch()
    apply_compact(model)
    model(x).sum().backward()
    expected = model.q.weight.compressed_grad.clone()
    clear_compressed_grads(model.parameters())
    torch.compile(model, backend="aot_eager")(x).sum().backward()
    assert torch.allclose(model.q.weight.compressed_grad, expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="CompAct hands its gradient"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
