"""State dicts: plain, exact, checked; and what torch.distributed.checkpoint makes of them."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from memtrain.optim.grid import GridOptimizer
from memtrain.optim.named import FRUGAL
from tests.optim.battery import small_model, train

GALORE = dict(projection="power", rank=2, update_gap=3)


def weight_of(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


def run(optimizer, weights, steps, start=0):
    for step in range(start, start + steps):
        for weight in weights:
            generator = torch.Generator().manual_seed(100 + step)
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()


def saved_and_loaded(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_is_plain_loads_exactly_and_is_not_shared(dtype):
    weights = [weight_of(70, 64, dtype=dtype), weight_of(64, dtype=dtype)]
    settings = dict(state_dtype="int8", lazy=True, residual="scaled", spread=True, **GALORE)
    optimizer = GridOptimizer(weights, **settings)
    run(optimizer, weights, 5)
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    other = GridOptimizer(copies, **settings)
    loaded = saved_and_loaded(optimizer.state_dict())
    other.load_state_dict(loaded)
    for weight, copied in zip(weights, copies, strict=True):
        ours, theirs = optimizer.state[weight], other.state[copied]
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert torch.equal(ours[name], theirs[name])
    run(optimizer, weights, 4, 5)
    run(other, copies, 4, 5)
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))
    # Loading copies: the loaded dict has not moved with the four steps.
    assert float(loaded["state"][0]["step"]) == 5


def test_a_copy_goes_on_alone():
    weight = weight_of(6, 5)
    optimizer = GridOptimizer([weight], lr=0.1, **GALORE)
    run(optimizer, [weight], 2)
    twin = copy.deepcopy(optimizer)
    (twin_weight,) = twin.param_groups[0]["params"]
    run(optimizer, [weight], 3, 2)
    run(twin, [twin_weight], 3, 2)
    assert torch.equal(weight, twin_weight)


def test_states_of_other_settings_or_models_are_refused():
    weight = weight_of(6, 5)
    optimizer = GridOptimizer([("w", weight)], **GALORE)
    run(optimizer, [weight], 1)
    saved = optimizer.state_dict()
    other = GridOptimizer([("w", weight_of(7, 5))], **GALORE)
    with pytest.raises(ValueError, match=r"parameter 'w' \(7, 5\): state 'exp_avg.value' is"):
        other.load_state_dict(saved)
    saved["state"][0].pop("exp_avg_sq.value")
    with pytest.raises(ValueError, match=r"differ in \['exp_avg_sq.value'\]"):
        GridOptimizer([("w", weight_of(6, 5))], **GALORE).load_state_dict(saved)


def test_a_state_that_is_refused_changes_nothing():
    weights, twins = [[weight_of(6, 5), weight_of(4)] for _ in range(2)]
    optimizer, twin = (GridOptimizer(each, lr=0.1, **GALORE) for each in (weights, twins))
    for each, parameters in ((optimizer, weights), (twin, twins)):
        run(each, parameters, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1].pop("exp_avg.value")
    saved["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match="differ in"):
        optimizer.load_state_dict(saved)
    for each, parameters in ((optimizer, weights), (twin, twins)):
        run(each, parameters, 3, 2)
    assert all(torch.equal(a, b) for a, b in zip(weights, twins, strict=True))


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoint_s_state_dicts_resume_bitwise(flat):
    """By names of parameters, nested and flat, of bf16 parameters with 8-bit and split states."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = small_model().to(torch.bfloat16)
    settings = dict(update_gap=5, state_dtype="int8", master="split24")
    optimizer = FRUGAL(model.parameters(), **settings)
    train(model, optimizer, 4)
    twin = copy.deepcopy(model)
    other = FRUGAL(twin.parameters(), **settings)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    set_optimizer_state_dict(twin, other, saved, options=options)
    train(model, optimizer, 4)
    train(twin, other, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert other.param_groups[0]["step"] == 8
