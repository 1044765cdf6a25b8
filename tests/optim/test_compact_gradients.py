"""CompAct's gradients in a low-rank optimizer: as whole gradients in the same bases; what is refused."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memtrain.optim import FRUGAL, Apollo, Fira, GaLore, GridOptimizer, SmallGradients
from memtrain.optim.autograd import lossy_treatments  # noqa: F401  (registers the entries)
from memtrain.optim.autograd.apply import Policy, Rule, apply_to
from memtrain.optim.autograd.compact import (
    CompActHandle,
    apply_compact,
    clear_compressed_grads,
    compact_layers,
)
from memtrain.optim.autograd.lossy_backward import LossyBackwardError
from memtrain.optim.compact_gradients import FeedError, feed_compact, feedable
from memtrain.optim.compressed_grad import CompressedGradError

FEATURES, RANK, GAP = 24, 6, 3
SEEDED: dict[str, Any] = {
    "projection": "rademacher",
    "rank": RANK,
    "proj_type": "right",
    "update_proj_gap": GAP,
    "path": "reference",
}


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(FEATURES, dtype=dtype)
        self.q = nn.Linear(FEATURES, FEATURES, dtype=dtype)
        self.k = nn.Linear(FEATURES, 8, bias=False, dtype=dtype)
        self.mlp = nn.Sequential(nn.Linear(FEATURES, 40, dtype=dtype), nn.GELU())
        self.down = nn.Linear(40, FEATURES, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = self.q(x) * self.k(x).sum(-1, keepdim=True)
        return self.down(self.mlp(x))


def galore(net: nn.Module, **settings: Any) -> GaLore:
    return GaLore(net.named_parameters(), lr=1e-2, **{**SEEDED, **settings})


def compact(**settings: Any) -> tuple[Net, GaLore, SmallGradients, CompActHandle]:
    net = Net()
    optimizer = galore(net, **settings)
    gradients = SmallGradients(optimizer)
    handle = apply_compact(net, density=None, rank=RANK, kind=settings.get("projection", "rademacher"))
    feed_compact(net, gradients)
    return net, optimizer, gradients, handle


def whole(**settings: Any) -> tuple[Net, GaLore]:
    """Whole gradients, projected with the bases that CompAct's layers share."""
    net = Net()
    optimizer = galore(net, **settings)
    optimizer.share_basis([net.q.weight, net.k.weight])
    return net, optimizer


def batches(steps: int, micro: int = 1, seed: int = 1) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(2, 5, FEATURES, generator=generator) for _ in range(micro)] for _ in range(steps)]


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().mean()


def train(net: nn.Module, optimizer: GridOptimizer, data: list[list[Tensor]]) -> None:
    for step in data:
        for x in step:
            (loss_of(net, x) / len(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("refresh", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("micro", [1, 4])
def test_as_whole_gradients_projected_with_the_same_bases(kind: str, refresh: str, micro: int) -> None:
    data = batches(7, micro)
    settings = {"projection": kind, "refresh": refresh, "spread": True}
    plain, plain_optimizer = whole(**settings)
    start = flat(plain)
    net, optimizer, _, _ = compact(**settings)
    train(plain, plain_optimizer, data)
    train(net, optimizer, data)
    assert float((flat(net) - flat(plain)).norm() / (flat(plain) - start).norm()) < 1e-5
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        seeds = [o.state[p].get("projector.seed") for o, p in ((optimizer, mine), (plain_optimizer, theirs))]
        assert (seeds[0] is None) == (seeds[1] is None)
        assert seeds[0] is None or torch.equal(seeds[0], seeds[1])


@pytest.mark.parametrize("rule", ["adam", "adafactor", "lion", "momentum"])
def test_one_step_is_that_of_the_projected_whole_gradient(rule: str) -> None:
    """The projection itself by hand: R = G P with P from the optimizer's seed."""
    ((x,),) = batches(1)
    net = Net()
    plain = copy.deepcopy(net)
    settings = {"rule": rule, "projection": "rademacher", "rank": RANK, "side": "right"}
    optimizer = GridOptimizer(net.parameters(), lr=1e-2, **settings)
    gradients = SmallGradients(optimizer)
    apply_compact(net, density=None, rank=RANK)
    feed_compact(net, gradients)
    loss_of(net, x).backward()
    loss_of(plain, x).backward()
    for name in ("q", "k", "down"):
        layer, reference = net.get_submodule(name), plain.get_submodule(name)
        assert layer.weight.grad is None
        cell, state, _ = optimizer.situation(layer.weight)
        projected = cell.down(cell.open(state, torch.device("cpu")), reference.weight.grad)
        torch.testing.assert_close(optimizer.pending[layer.weight].low, projected, rtol=1e-5, atol=1e-7)


def test_inputs_share_their_basis_and_others_do_not() -> None:
    net, optimizer, _, _ = compact()
    train(net, optimizer, batches(1))
    seed = {
        name: tuple(optimizer.state[layer.weight]["projector.seed"].tolist())
        for name, (layer, _) in compact_layers(net).items()
    }
    assert seed["q"] == seed["k"]
    assert len({seed["q"], seed["mlp.0"], seed["down"]}) == 3


def test_bases_change_between_steps_alone() -> None:
    net, optimizer, _, _ = compact(update_proj_gap=1)
    seen = []
    for step in batches(3, 4):
        for x in step:
            loss_of(net, x).backward()
            seen.append(tuple(net.q.compact_input.stored["seed"].tolist()))
        optimizer.step()
    assert [len(set(seen[at : at + 4])) for at in (0, 4, 8)] == [1, 1, 1]
    assert len(set(seen)) == 3
    assert [words[2] for words in seen[::4]] == [0, 1, 2]  # the step is part of the key


@pytest.mark.parametrize("at", [2, 3, 4])
def test_resuming_is_bit_equal(at: int) -> None:
    data = batches(7, 2)
    net, optimizer, _, _ = compact(state_dtype="bf16")
    train(net, optimizer, data)
    other, half, _, _ = compact(state_dtype="bf16")
    train(other, half, data[:at])
    file = io.BytesIO()
    torch.save({"model": other.state_dict(), "optimizer": half.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, third, _, _ = compact(state_dtype="bf16")
    resumed.load_state_dict(saved["model"])
    third.load_state_dict(saved["optimizer"])
    train(resumed, third, data[at:])
    assert torch.equal(flat(net), flat(resumed))


def test_taking_over_a_run_without_compact() -> None:
    """Its bases differ within an input, so they are renewed together at the first forward pass."""
    data = batches(4)
    plain = Net()
    optimizer = galore(plain)
    train(plain, optimizer, data)
    gradients = SmallGradients(optimizer)
    apply_compact(plain, density=None, rank=RANK)
    feed_compact(plain, gradients)
    loss_of(plain, data[0][0]).backward()
    words = [tuple(optimizer.state[w]["projector.seed"].tolist()) for w in (plain.q.weight, plain.k.weight)]
    assert words[0] == words[1]
    assert words[0][2] == 4
    optimizer.step()


def test_no_whole_gradient_is_made() -> None:
    class Outputs(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: set[torch.Size] = set()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.shapes.add(result.shape)
            return result

    def made_in_backward(net: nn.Module) -> set[torch.Size]:
        loss = loss_of(net, batches(1)[0][0])
        with Outputs() as made:
            loss.backward()
        return made.shapes

    weights = {torch.Size((8, FEATURES)), torch.Size((FEATURES, 40)), torch.Size((40, FEATURES))}
    assert weights <= made_in_backward(Net())
    made = made_in_backward(compact()[0])
    assert not made & weights
    assert torch.Size((FEATURES, RANK)) in made


def test_clipping_is_of_what_was_accumulated() -> None:
    net, optimizer, gradients, _ = compact()
    for x in batches(1, 3)[0]:
        (100 * loss_of(net, x)).backward()
    lows = [optimizer.pending[p].low for p in net.parameters() if p in optimizer.pending]
    lows = [low for low in lows if low is not None]
    assert len(lows) == 4
    wholes = [p.grad for p in net.parameters() if p.grad is not None]
    expected = torch.stack([t.square().sum() for t in (*lows, *wholes)]).sum().sqrt()
    before = lows[0].clone()
    norm = gradients.clip_grad_norm_(0.5)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(lows[0], before * (0.5 / (expected + 1e-6)))
    with pytest.raises(RuntimeError, match="after the last backward"):
        loss_of(net, batches(1)[0][0]).backward()


def test_gradient_scaling_is_exact_and_skips_overflows() -> None:
    (x,) = batches(1)[0]
    plain, plain_optimizer, _, _ = compact()
    train(plain, plain_optimizer, [[x]])
    net, optimizer, gradients, _ = compact()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(net, x)).backward()
    scaler.unscale_(gradients)
    scaler.step(gradients)
    scaler.update()
    optimizer.zero_grad()
    assert torch.equal(flat(net), flat(plain))
    before = flat(net)
    scaler.scale(loss_of(net, x * torch.inf)).backward()
    scaler.step(gradients)
    scaler.update()
    optimizer.zero_grad()
    assert torch.equal(flat(net), before)
    assert scaler.get_scale() == 2.0**9


def test_a_shared_weight_of_one_input_adds_up() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(FEATURES, FEATURES, bias=False)
            self.b = nn.Linear(FEATURES, FEATURES, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    net, plain, data = Tied(), Tied(), batches(4)
    optimizer, reference = galore(net), galore(plain)
    apply_compact(net, density=None, rank=RANK)
    feed_compact(net, SmallGradients(optimizer))
    train(net, optimizer, data)
    train(plain, reference, data)
    torch.testing.assert_close(flat(net), flat(plain), rtol=1e-5, atol=1e-6)


class TwoInputs(nn.Module):
    """One weight behind two norms; ``outside``: used once more, untreated."""

    def __init__(self, outside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        self.a = nn.Linear(FEATURES, FEATURES, bias=False)
        self.b = nn.Linear(FEATURES, FEATURES, bias=False)
        self.b.weight = self.a.weight
        self.outside = outside

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.first(x))
        return y @ self.b.weight if self.outside else self.b(self.second(y))


def treated(outside: bool) -> TwoInputs:
    net = TwoInputs(outside)
    policy = Policy(rules=(Rule(kind="linear", treatment="compact"),))
    apply_to(net, policy, example=lambda: net(torch.ones(2, FEATURES)))
    return net


def test_two_inputs_of_one_weight_are_refused() -> None:
    net = treated(outside=False)
    with pytest.raises(CompressedGradError, match="another basis"):
        loss_of(net, batches(1)[0][0]).backward()
    clear_compressed_grads(net.parameters())
    with pytest.raises(FeedError, match=r"b shares its weight with a layer that reads another input"):
        feed_compact(net, SmallGradients(galore(net)))


def test_treated_and_untreated_uses_add_up() -> None:
    data = batches(3)
    net, plain = treated(outside=True), TwoInputs(outside=True)
    optimizer, reference = galore(net), galore(plain)
    feed_compact(net, SmallGradients(optimizer))
    train(net, optimizer, data)
    train(plain, reference, data)
    torch.testing.assert_close(flat(net), flat(plain), rtol=1e-5, atol=1e-6)


def test_a_penalty_on_the_weight_is_projected_too() -> None:
    (x,) = batches(1)[0]
    net, optimizer, _, _ = compact()
    plain, reference = whole()
    for model in (net, plain):
        (loss_of(model, x) + model.q.weight.square().sum()).backward()
    optimizer.step()
    reference.step()
    torch.testing.assert_close(flat(net), flat(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant: bool) -> None:
    x = batches(1)[0][0].requires_grad_()
    net, optimizer, _, _ = compact()
    loss_of(net, x).backward()
    expected = optimizer.pending[net.q.weight].low
    optimizer.zero_grad()
    checkpoint(net, x, use_reentrant=reentrant).square().mean().backward()
    assert torch.equal(optimizer.pending[net.q.weight].low, expected)


def test_under_autocast() -> None:
    net, optimizer, _, _ = compact()
    x = batches(1)[0][0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(net, x)
    loss.backward()
    low = optimizer.pending[net.q.weight].low.clone()
    assert low.dtype == torch.float32
    optimizer.zero_grad()
    loss_of(net, x).backward()
    exact = optimizer.pending[net.q.weight].low
    assert float((low - exact).norm() / exact.norm()) < 0.02


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute:UserWarning")
def test_in_a_compiled_model() -> None:
    data = batches(4)
    plain, plain_optimizer, _, _ = compact()
    train(plain, plain_optimizer, data)
    net, optimizer, _, _ = compact()
    train(torch.compile(net, backend="aot_eager"), optimizer, data)  # type: ignore[arg-type]
    torch.testing.assert_close(flat(net), flat(plain), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_second_derivatives_are_refused() -> None:
    net, _, _, _ = compact()
    x = batches(1)[0][0].requires_grad_()
    with pytest.raises(LossyBackwardError, match="CompAct has no second derivative"):
        torch.autograd.grad(loss_of(net, x), x, create_graph=True)


def test_a_backward_after_the_refresh_is_refused() -> None:
    net = nn.Linear(FEATURES, 8)  # whose backward does not need its weight, which has changed
    optimizer = galore(net, update_proj_gap=1)
    apply_compact(net, density=None, rank=RANK)
    feed_compact(net, SmallGradients(optimizer))
    (x,) = batches(1)[0]
    late = loss_of(net, x)
    loss_of(net, x).backward()
    optimizer.step()
    loss_of(net, x).backward()
    with pytest.raises(CompressedGradError, match="before the last refresh"):
        late.backward()


def test_passes_without_gradients_change_nothing() -> None:
    net, optimizer, _, _ = compact()
    with torch.no_grad():
        net(batches(1)[0][0])
    assert not optimizer.state
    assert not optimizer.pending


def test_copies_are_not_fed_and_removing_goes_back() -> None:
    net, optimizer, gradients, handle = compact()
    (x,) = batches(1)[0]
    loss_of(net, x).backward()
    twin = copy.deepcopy(net)
    optimizer.step()
    loss_of(twin, x).backward()
    assert twin.q.weight.compressed_grad.shape == (FEATURES, RANK)
    with pytest.raises(LossyBackwardError, match="its update_gap renews them"):
        handle.refresh(1)
    with pytest.raises(LossyBackwardError, match="state_dict"):
        handle.state_dict()
    feeds = feed_compact(net, gradients)
    feeds.remove()
    feeds.remove()
    loss_of(net, x).backward()
    assert net.q.weight.compressed_grad.shape == (FEATURES, RANK)
    with pytest.raises(CompressedGradError, match="4 weights hold"):
        feed_compact(net, gradients)
    with pytest.raises(CompressedGradError, match="feed_compact"):
        optimizer.step()
    clear_compressed_grads(net.parameters())
    feed_compact(net, gradients)
    optimizer.zero_grad()
    gradients.remove()
    with pytest.raises(RuntimeError, match=r"after remove\(\)"):
        loss_of(net, x).backward()


def _optimizer(cls: Callable[..., GridOptimizer], **settings: Any) -> Callable[[nn.Module], GridOptimizer]:
    return lambda net: cls(net.named_parameters(), **settings)


RIGHT: dict[str, Any] = {"rank": RANK, "projection": "rademacher", "proj_type": "right"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_optimizer(FRUGAL, rank=RANK, side="right"), "residual 'sign' needs"),
        (_optimizer(Fira, rank=RANK, proj_type="right"), "residual 'scaled' needs the whole gradient"),
        (_optimizer(Apollo, rank=RANK, proj="rademacher", proj_type="right"), "residual 'scale_only' needs"),
        (_optimizer(GaLore, rank=RANK, proj_type="right"), "projection 'power' is not one that CompAct has"),
        (_optimizer(GaLore, **{**RIGHT, "proj_type": "left"}), "shortens left of it, CompAct its inputs"),
        (_optimizer(GaLore, **{**RIGHT, "rank": 5}), "rank 5, CompAct with 6"),
        (_optimizer(GaLore, **{**RIGHT, "projection": "gaussian"}), "kind gaussian, CompAct with rademacher"),
        (_optimizer(GaLore, basis_dtype="bf16", **RIGHT), "basis in torch.bfloat16, CompAct with"),
        (_optimizer(GaLore, split=2, **RIGHT), "stack of matrices"),
        (_optimizer(GaLore), "the optimizer does not project it"),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(make: Callable[[nn.Module], Any], says: str) -> None:
    net = Net()
    gradients = SmallGradients(make(net), whole="keep")
    apply_compact(net, density=None, rank=RANK)
    with pytest.raises(FeedError, match=says) as caught:
        feed_compact(net, gradients)
    assert "q" in str(caught.value)
    assert net.q.compact_input.feed is None


def test_other_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    optimizer = galore(net)
    with pytest.raises(FeedError, match="no CompAct layers"):
        feed_compact(net, SmallGradients(optimizer))
    apply_compact(net, density=None, rank=RANK)
    in_backward = SmallGradients(galore(net), update="backward")
    with pytest.raises(FeedError, match="leave update at 'step'"):
        feed_compact(net, in_backward)
    with pytest.raises(FeedError, match=r"q is not in the optimizer"):
        feed_compact(net, SmallGradients(galore(Net())))
    groups = [{"params": [p]} for p in net.parameters()]
    with pytest.raises(FeedError, match=r"in different groups.*read one input"):
        feed_compact(net, SmallGradients(GaLore(groups, lr=1e-2, **SEEDED)))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(FeedError, match="2 processes"):
        feed_compact(net, SmallGradients(galore(net)))


def test_layers_that_can_be_fed_are_found() -> None:
    net = Net()
    optimizer = GaLore(net.named_parameters(), **{**SEEDED, "proj_type": "std"})  # k is wide: left
    gradients = SmallGradients(optimizer)
    handle = apply_compact(net, density=None, rank=RANK, select=feedable(gradients))
    assert handle.names == ["q", "mlp.0"]
    feed_compact(net, gradients)
    train(net, optimizer, batches(2))
    assert not any(hasattr(layer.weight, "compressed_grad") for layer, _ in compact_layers(net).values())


def test_the_example_of_the_documentation_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
    (example,) = re.findall(
        r"```python\n(from memtrain.optim import GaLore, SmallGradients\n.*?)```", text, re.S
    )
    net = Net()
    names: dict[str, Any] = {"model": net, "loss": lambda x: loss_of(net, x), "data": batches(3, 2)}
    before = flat(net)
    exec(example, names)
    assert not torch.equal(before, flat(net))
    assert names["optimizer"].param_groups[0]["step"] == 3
