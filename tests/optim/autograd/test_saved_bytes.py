"""What counts saved tensors must not keep their graph alive: every probe would stay in memory."""

import gc
import weakref

import pytest
import torch

from memtrain.optim.autograd.saved_bytes import SavedBytes


@pytest.mark.parametrize("function", [torch.rsqrt, torch.exp, torch.sigmoid, torch.tanh])
def test_a_node_that_saves_its_own_result_dies_with_it(function) -> None:
    x = torch.rand(3, 5).requires_grad_()
    with SavedBytes([x]) as saved:
        result = function(x * 1)
    assert saved.total_bytes >= result.nbytes
    counter = weakref.ref(saved)
    del saved, result
    gc.collect()
    assert counter() is None


def test_gradients_of_both_orders_are_those_of_plain_autograd() -> None:
    x = torch.rand(3, 5, dtype=torch.float64).requires_grad_()
    found = []
    for counted in (False, True):
        if counted:
            with SavedBytes():
                result = torch.rsqrt(x.exp()) * torch.tanh(x)
        else:
            result = torch.rsqrt(x.exp()) * torch.tanh(x)
        (first,) = torch.autograd.grad(result.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        found.append((first.detach(), second))
    for plain, counted in zip(*found, strict=True):
        assert torch.equal(plain, counted)
