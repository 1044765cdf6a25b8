"""Gradients that stay in memory lie in one slab, and are those of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.gradient_slab import GradientSlab
from memtrain.offload.shards import FlatIndex
from memtrain.planner.actions import Tier


def make(width: int = 300) -> tuple[nn.Sequential, FlatIndex]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    units = [(f"{i}", list(layer.named_parameters(prefix=str(i)))) for i, layer in enumerate(model)]
    return model, FlatIndex(units, 1 << 20)


def slab_for(
    index: FlatIndex, tier: Tier = Tier.DEVICE, slab_bytes: int = 1 << 20
) -> tuple[GradientSlab, list[str]]:
    called: list[str] = []
    tiers = {unit: tier for unit in index.shards}
    return GradientSlab(
        index=index, tiers=tiers, slab_bytes=slab_bytes, before_overwrite=called.append
    ), called


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_accumulates_in_the_slab_bit_for_bit() -> None:
    model, index = make()
    x = torch.randn(8, 300)
    for _ in range(2):
        model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    slab, _ = slab_for(index)
    places = []
    for _ in range(3):
        for _ in range(2):
            model(x).square().sum().backward()
        assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))
        places.append((address(model[0].weight.grad), address(model[2].weight.grad)))
        model.zero_grad()
    assert len(set(places)) == 1
    # Two weights of 300 x 300 fp32, each 360,000 bytes rounded up to whole pages; biases are small.
    assert abs(places[0][1] - places[0][0]) == 360448
    slab.close()


def test_a_gradient_that_is_held_is_not_overwritten() -> None:
    model, index = make()
    slab, called = slab_for(index)
    model(torch.randn(8, 300)).sum().backward()
    held = model[0].weight.grad
    value = held.clone()
    model.zero_grad()
    model(torch.randn(8, 300)).sum().backward()
    assert torch.equal(held, value)
    assert address(held) != address(model[0].weight.grad)
    assert called == ["0"]
    slab.close()
    assert torch.equal(held, value)


def test_windows_of_a_flat_buffer_are_accumulated_into_as_by_pytorch() -> None:
    model, index = make()
    x = torch.randn(8, 300)
    model(x).square().sum().backward()
    expected = [2 * layer.weight.grad for layer in (model[0], model[2])]
    model.zero_grad()
    slab, _ = slab_for(index)
    flat = torch.zeros(2, 300, 300)
    model[0].weight.grad, model[2].weight.grad = flat[0], flat[1]
    for _ in range(2):
        model(x).square().sum().backward()
    assert torch.equal(flat, torch.stack(expected))
    assert address(model[0].weight.grad) == address(flat)
    slab.close()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_gradient_with_a_graph_keeps_it() -> None:
    model, index = make()
    slab, _ = slab_for(index)
    weight = model[0].weight
    weight.pow(3).sum().backward(create_graph=True)
    assert weight.grad.requires_grad
    (second,) = torch.autograd.grad(weight.grad.sum(), weight)
    assert torch.equal(second, 6 * weight.detach())
    slab.close()


def test_other_tiers_are_left_alone() -> None:
    model, index = make()
    slab, _ = slab_for(index, Tier.NVME, slab_bytes=0)
    model(torch.randn(8, 300)).sum().backward()
    assert not slab._views
    slab.close()


def test_too_small_a_slab_is_refused() -> None:
    _, index = make()
    with pytest.raises(PlanMismatchError, match="720896 bytes, the plan reserved 4096"):
        slab_for(index, slab_bytes=4096)
