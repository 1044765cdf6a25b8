"""What depends on all gradients at once, with small ones: clipping by their norm, and loss scaling."""

import math

import pytest
import torch
from torch import nn

from memtrain.optim.small_gradients import SmallGradients
from tests.optim.small_nets import ORTHONORMAL, backward, batches, flat, make, run


@pytest.mark.parametrize("projection", ORTHONORMAL)
def test_clipping_is_by_the_norm_of_what_is_kept(projection: str) -> None:
    net, optimizer = make(projection=projection, spread=True)
    gradients = SmallGradients(optimizer, refresh_from="first")
    ((first, second),) = batches(1, 2)
    backward(net, first)
    backward(net, second)
    twin, _ = make()
    backward(twin, first)
    backward(twin, second)
    squares = []
    for name, parameter in net.named_parameters():
        gradient = twin.get_parameter(name).grad
        if parameter.dim() == 2:
            assert parameter.grad is None
            cell, state, _ = optimizer.situation(parameter)
            opened = cell.open(state, gradient.device)
            gradient = cell.projected.projector.up(opened, cell.down(opened, gradient))
        squares.append(gradient.square().sum())
    before = {p: pending.low for p, pending in optimizer.pending.items() if pending.low is not None}
    before = {p: low.clone() for p, low in before.items()}
    total = gradients.clip_grad_norm_(0.1)
    assert math.isclose(total, math.sqrt(sum(squares)), rel_tol=1e-5)
    assert math.isclose(gradients.clip_grad_norm_(1.0), 0.1, rel_tol=1e-5)
    for parameter, low in before.items():
        torch.testing.assert_close(optimizer.pending[parameter].low, low * (0.1 / total))
    with pytest.raises(RuntimeError, match="between clip_grad_norm_\\(\\) and step"):
        backward(net, first)


def test_a_norm_below_the_limit_changes_nothing() -> None:
    data = batches(4, 2)
    free, clipped = make(projection="power"), make(projection="power")
    SmallGradients(free[1])
    run(*free, data)
    gradients = SmallGradients(clipped[1])
    clipped[1].register_step_pre_hook(lambda *_: gradients.clip_grad_norm_(1e6) and None)
    run(*clipped, data)
    assert torch.equal(flat(free[0]), flat(clipped[0]))


def test_grad_scaler_unscales_and_skips() -> None:
    data = batches(6, 2)
    plain, scaled = make(projection="power"), make(projection="power")
    SmallGradients(plain[1])
    run(*plain, data)
    net, optimizer = scaled
    gradients, scaler = SmallGradients(optimizer), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, step in enumerate(data):
        if number == 4:
            scaler.scale(net(step[0][0]).sum() * float("inf")).backward()
            before = flat(net)
            scaler.step(gradients)
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(before, flat(net))
            assert scaler.get_scale() == 512
        for x, y in step:
            scaler.scale(nn.functional.mse_loss(net(x), y) / 2).backward()
        if number % 2:
            scaler.unscale_(gradients)
        scaler.step(gradients)
        scaler.update()
        optimizer.zero_grad()
    # Powers of two, so that scaling rounds nothing.
    assert torch.equal(flat(plain[0]), flat(net))


def test_grad_scaler_is_told_where_it_cannot_serve() -> None:
    net, optimizer = make(projection="columns")
    SmallGradients(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.ones(1, 24)).sum()).backward()
    with pytest.raises(RuntimeError, match="give its step\\(\\) and unscale_\\(\\) the SmallGradients"):
        scaler.step(optimizer)

    net, optimizer = make(projection="columns")
    gradients = SmallGradients(optimizer, update="backward")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.ones(1, 24)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler with update='backward'.* update='step'"):
        scaler.step(gradients)
    with pytest.raises(RuntimeError, match="GradScaler with update='backward'"):
        scaler.step(optimizer)


def test_clipping_is_refused_in_backward() -> None:
    _, optimizer = make(projection="columns")
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(\) with update='backward'.*update='step'"):
        SmallGradients(optimizer, update="backward").clip_grad_norm_(1.0)
