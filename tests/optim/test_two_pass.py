"""Clipping in two backward passes: what keeping all gradients and clipping them gives, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from memtrain.optim import GridOptimizer, NonFiniteGradientWarning, SmallGradients, TwoPassClipping
from tests.optim.small_nets import GAP, batches, flat, make

MAX_NORM = 0.05
"""Gradients of the small net have norms of .1 to .4."""
POINTS: dict[str, dict[str, Any]] = {
    "frugal": {"projection": "power", "residual": "sign"},
    "frugal columns": {"projection": "columns", "residual": "sign"},
    "sgd residual": {"projection": "power", "residual": "sgd"},
    "fira": {"projection": "power", "residual": "scaled"},
    "apollo": {"projection": "gaussian", "residual": "scale_only"},
    "galore": {"projection": "power", "spread": True},
    "adafactor": {"projection": "svd", "rule": "adafactor"},
    "adamw": {"weight_decay": 0.1},
    "int8 states": {"state_dtype": "int8", "rule": "lion"},
}


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """With dropout, whose mask must be the same in both passes."""
    return nn.functional.mse_loss(net(nn.functional.dropout(batch[0], 0.2)), batch[1])


def closure_of(net: nn.Module, *data: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        for batch in data:
            loss = loss_of(net, batch)
            loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("name", POINTS)
def test_bits_are_those_of_kept_gradients_clipped_by_torch(name: str) -> None:
    (net, optimizer), (twin, other) = make(**POINTS[name]), make(**POINTS[name])
    clipping = TwoPassClipping(other, MAX_NORM)
    data = batches(2 * GAP + 1, 1)
    torch.manual_seed(7)
    expected = []
    for (batch,) in data:
        loss = loss_of(net, batch)
        loss.backward()
        norm = clip_grad_norm_(net.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss.item(), norm.item()))
    torch.manual_seed(7)
    found = [(clipping.step(closure_of(twin, batch)).item(), clipping.norm.item()) for (batch,) in data]
    assert found == expected
    assert all(norm > MAX_NORM for _, norm in found)
    assert torch.equal(flat(net), flat(twin))
    assert [group["step"] for group in other.param_groups] == [len(data)]
    assert optimizer.state_dict()["state"].keys() == other.state_dict()["state"].keys()
    assert all(p.grad is None for p in twin.parameters())


def test_bf16_gradients_are_clipped_as_small_gradients_clips_them() -> None:
    settings = {"projection": "columns", "residual": "sign", "master": "split24"}
    (net, optimizer), (twin, other) = (make(torch.bfloat16, **settings) for _ in range(2))
    kept, clipping = SmallGradients(optimizer, whole="keep"), TwoPassClipping(other, MAX_NORM)
    for seed, (batch,) in enumerate(batches(GAP + 1, 1, torch.bfloat16)):
        torch.manual_seed(seed)
        closure_of(net, batch)()
        norm = kept.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        torch.manual_seed(seed)
        clipping.step(closure_of(twin, batch))
        assert torch.equal(clipping.norm, norm)
    assert torch.equal(flat(net), flat(twin))


def test_a_norm_below_the_limit_changes_nothing() -> None:
    (net, optimizer), (twin, other) = (make(projection="power", residual="sign") for _ in range(2))
    clipping = TwoPassClipping(other, 1e6)
    for seed, (batch,) in enumerate(batches(GAP + 1, 1)):
        torch.manual_seed(seed)
        closure_of(net, batch)()
        optimizer.step()
        optimizer.zero_grad()
        torch.manual_seed(seed)
        clipping.step(closure_of(twin, batch))
    assert torch.equal(flat(net), flat(twin))


def test_no_more_than_one_whole_gradient_lives() -> None:
    net = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6)))
    optimizer = GridOptimizer(net.parameters(), projection="power", residual="sign", rank=4)
    clipping, seen = TwoPassClipping(optimizer, 1.0), []

    def look(_: Tensor) -> None:
        seen.append(sum(p.grad.nbytes for p in net.parameters() if p.grad is not None))

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(look)

    def closure() -> Tensor:
        loss = net(torch.randn(4, 32)).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        clipping.step(closure)
    assert seen == [32 * 32 * 4] * 24


def test_frozen_and_unreached_parameters_stay_and_schedulers_see_one_step() -> None:
    net, optimizer = make(projection="columns", residual="sign")
    net.norm.bias.requires_grad_(False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    clipping = TwoPassClipping(optimizer, MAX_NORM)

    def closure() -> Tensor:
        loss = net.norm(net.wide(torch.ones(2, 24))).square().mean()
        loss.backward()
        return loss

    clipping.step(closure)
    scheduler.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"wide.weight", "norm.weight"}
    assert optimizer.param_groups[0]["lr"] == 0.5e-2


def test_a_closure_may_clear_gradients_first() -> None:
    """As closures of torch's optimizers do."""
    (net, optimizer), (twin, other) = (make(projection="power", residual="sign") for _ in range(2))
    ((batch,),) = batches(1, 1)
    torch.manual_seed(0)
    TwoPassClipping(optimizer, MAX_NORM).step(closure_of(net, batch))

    def closure() -> Tensor:
        other.zero_grad()
        return closure_of(twin, batch)()

    torch.manual_seed(0)
    TwoPassClipping(other, MAX_NORM).step(closure)
    assert torch.equal(flat(net), flat(twin))


def refused(optimizer: GridOptimizer, net: nn.Module, closure: Callable[[], Tensor], message: str) -> None:
    """Nothing has changed then."""
    before, hooks = flat(net), [len(p._post_accumulate_grad_hooks or ()) for p in net.parameters()]
    with pytest.raises(RuntimeError, match=message):
        TwoPassClipping(optimizer, MAX_NORM).step(closure)
    assert torch.equal(flat(net), before)
    assert [len(p._post_accumulate_grad_hooks or ()) for p in net.parameters()] == hooks


def test_several_backward_passes_are_refused() -> None:
    net, optimizer = make(projection="power", residual="sign")
    ((first, second),) = batches(1, 2)
    message = r"got a second gradient in one closure.*backward\(\) once.*whole='keep'"
    refused(optimizer, net, closure_of(net, first, second), message)
    # All is as it was: the same step with the losses summed.
    optimizer.zero_grad()

    def closure() -> Tensor:
        loss = loss_of(net, first) + loss_of(net, second)
        loss.backward()
        return loss

    TwoPassClipping(optimizer, MAX_NORM).step(closure)


def test_a_second_pass_over_other_data_is_refused() -> None:
    net, optimizer = make(projection="power", residual="sign")
    draws = iter([batch for (batch,) in batches(2, 1)])
    message = r"in the second backward pass, of norm .* with 0 parameters updated: .*Draw the batch outside"
    refused(optimizer, net, lambda: closure_of(net, next(draws))(), message)


def test_a_second_pass_that_reaches_less_is_refused() -> None:
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = GridOptimizer([("first", first), ("second", second)])
    sums = iter([first.sum() + second.sum(), first.sum()])

    def closure() -> Tensor:
        loss = next(sums)
        loss.backward()
        return loss

    message = "'second'.*gradient of none in the second backward pass, of norm 2 in the first, with 1 param"
    with pytest.raises(RuntimeError, match=message):
        TwoPassClipping(optimizer, MAX_NORM).step(closure)
    assert optimizer.param_groups[0]["step"] == 0


def test_gradients_from_elsewhere_are_refused() -> None:
    net, optimizer = make(projection="power", residual="sign")
    ((batch,),) = batches(1, 1)
    closure_of(net, batch)()
    refused(optimizer, net, closure_of(net, batch), r"has a gradient before step\(closure\).*zero_grad")
    optimizer.zero_grad()
    gradients = SmallGradients(optimizer, whole="keep")
    refused(optimizer, net, closure_of(net, batch), r"has SmallGradients.*remove\(\)")
    gradients.remove()
    TwoPassClipping(optimizer, MAX_NORM).step(closure_of(net, batch))


def test_hooks_that_take_gradients_are_told_of() -> None:
    net, optimizer = make(projection="power", residual="sign")
    SmallGradients(GridOptimizer(net.parameters(), projection="columns", rank=2))
    ((batch,),) = batches(1, 1)
    refused(optimizer, net, closure_of(net, batch), "another hook has taken the gradient of.*SmallGradients")


def test_gradients_that_are_not_finite_do_what_they_do_under_torchs_clipping() -> None:
    (net, optimizer), (twin, other) = (make(projection="columns", residual="sign") for _ in range(2))
    x = torch.full((2, 24), torch.inf)

    def closure(net: nn.Module) -> Tensor:
        loss = net.wide(x).sum()
        loss.backward()
        return loss

    closure(net)
    clip_grad_norm_(net.parameters(), MAX_NORM)
    optimizer.step()
    clipping = TwoPassClipping(other, MAX_NORM)
    clipping.step(lambda: closure(twin))
    assert clipping.norm == torch.inf
    assert torch.equal(flat(net).isnan(), flat(twin).isnan())
    assert flat(twin).isnan().any()
    # A basis that looks at the gradient is not made from such a one.
    last, third = make(projection="power", residual="sign")
    before = flat(last)
    with pytest.warns(NonFiniteGradientWarning):
        TwoPassClipping(third, MAX_NORM).step(lambda: closure(last))
    assert torch.equal(before, flat(last))


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(6, 4, sparse=True)
    optimizer = GridOptimizer(table.parameters())

    def closure() -> Tensor:
        loss = table(torch.tensor([1])).sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="sparse_coo: dense ones are needed"):
        TwoPassClipping(optimizer, MAX_NORM).step(closure)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_the_norm_is_checked(norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm must be > 0, got"):
        TwoPassClipping(make()[1], norm)


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"a SGD: memtrain.optim's own.*clip_grad_norm_"):
        TwoPassClipping(torch.optim.SGD([nn.Parameter(torch.ones(1))]), 1.0)
