"""What every optimizer has to do, whatever it is (battery.py); after optax' common tests."""

import copy
import io

import pytest
import torch

from tests.optim.battery import BATTERY, GAP, small_loss, small_model, train

pytestmark = pytest.mark.parametrize("entry", BATTERY, ids=lambda entry: entry.name)


def fp32_only(entry):
    return entry.settings.get("compat") is not None


def snapshot(optimizer):
    return [
        {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in state.items()}
        for state in optimizer.state.values()
    ]


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_learns(entry):
    model = small_model()
    losses = train(model, entry(model.parameters()), 50)
    assert losses[-1] < 0.6 * losses[0]


def test_the_first_step_goes_downhill(entry):
    model = small_model()
    optimizer = entry(model.parameters(), lr=entry.lr / 100)
    first, second = train(model, optimizer, 2)
    assert second < first


def test_it_is_deterministic(entry):
    runs = []
    for _ in range(2):
        model = small_model()
        train(model, entry(model.parameters()), GAP + 2)
        runs.append(weights_of(model))
    assert equal(*runs)


def test_states_keep_shape_dtype_and_predicted_bytes(entry):
    model = small_model()
    optimizer = entry(model.parameters())
    train(model, optimizer, 1)
    first = snapshot(optimizer)
    train(model, optimizer, GAP + 1)
    assert snapshot(optimizer) == first
    live = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    assert live == sum(optimizer.state_bytes().values())


@pytest.mark.parametrize("master", ["none", "split24"])
def test_bf16_weights_learn_and_stay_bf16(entry, master):
    model = small_model().to(torch.bfloat16)
    if fp32_only(entry):
        with pytest.raises(ValueError, match="is for fp32 parameters"):
            entry(model.parameters(), master=master)
        return
    optimizer = entry(model.parameters(), master=master)
    losses = train(model, optimizer, 40)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert losses[-1] < 0.75 * losses[0]
    assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}


def test_lr_zero_moves_nothing(entry):
    model = small_model()
    before = weights_of(model)
    train(model, entry(model.parameters(), lr=0.0, weight_decay=0.1), GAP + 2)
    assert equal(before, weights_of(model))


def test_weight_decay_is_decoupled_and_exact_for_zero_gradients(entry):
    """(1 - .5 * .2)^3 = .729, whatever the rule does with gradients of zero."""
    model = small_model()
    before = weights_of(model)
    optimizer = entry(model.parameters(), lr=0.5, weight_decay=0.2)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new, 0.729 * old, rtol=1e-5, atol=1e-7)


def takes_eps(entry):
    return entry.settings.get("rule", "adam") in ("adam", "adam_mini")


def test_gradients_are_not_touched(entry):
    model = small_model()
    optimizer = entry(model.parameters())
    for _ in range(GAP + 1):
        optimizer.zero_grad()
        small_loss(model).backward()
        before = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        assert equal(before, [parameter.grad for parameter in model.parameters()])


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_gradients_of_any_size_make_steps(entry, scale):
    model = small_model()
    changes = dict(eps=1e-20) if takes_eps(entry) else {}
    if entry.settings.get("rule") == "momentum":
        changes = dict(lr=entry.lr / scale)  # the one rule whose steps grow with the gradient
    optimizer = entry(model.parameters(), **changes)
    before = weights_of(model)
    for _ in range(GAP + 2):
        optimizer.zero_grad()
        (scale * small_loss(model)).backward()
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert bool(torch.isfinite(new).all())
        assert not torch.equal(old, new)


def test_parameters_without_gradient_stay_and_keep_no_state(entry):
    model = small_model()
    optimizer = entry(model.parameters(), weight_decay=0.1)
    model.experts.requires_grad_(False)
    before = model.experts.detach().clone()
    train(model, optimizer, 2)
    assert torch.equal(model.experts, before)
    assert model.experts not in optimizer.state


def test_state_dict_round_trip_is_bitwise(entry):
    """Through torch.save and weights_only=True, into an optimizer of a copy of the model."""
    model = small_model()
    optimizer = entry(model.parameters())
    train(model, optimizer, GAP - 1)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(model)
    other = entry(twin.parameters())
    other.load_state_dict(torch.load(buffer, weights_only=True))
    train(model, optimizer, 4)
    train(twin, other, 4)
    assert equal(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torch_s_default_dtype_makes_no_difference(entry, dtype):
    """With bf16 for the default a counter would stop at 256."""
    ends = []
    for default in (torch.float32, dtype):
        model, generator = small_model(), torch.Generator().manual_seed(3)
        optimizer = entry(model.parameters())
        torch.set_default_dtype(default)
        try:
            for _ in range(GAP + 2):
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float32)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append((weights_of(model), snapshot(optimizer)))
    assert equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_torch_s_default_device_makes_no_difference(entry):
    """Counters, keys and what kernels work in lie on the CPU all the same."""
    ends = []
    for default in (None, "meta"):
        model, generator = small_model(), torch.Generator().manual_seed(3)
        optimizer = entry(model.parameters())
        gradients = [
            [torch.randn(p.shape, generator=generator) for p in model.parameters()] for _ in range(GAP + 2)
        ]
        torch.set_default_device(default)
        try:
            for step in gradients:
                for p, gradient in zip(model.parameters(), step, strict=True):
                    p.grad = gradient
                optimizer.step()
        finally:
            torch.set_default_device(None)
        ends.append((weights_of(model), snapshot(optimizer)))
    assert equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_groups_make_no_difference(entry):
    """Four groups of one parameter are one group of four, as far as nothing is spread over a group."""
    one, four = small_model(), small_model()
    settings = dict(spread=False) if "spread" in entry.settings else {}
    first = entry(one.parameters(), **settings)
    second = entry([{"params": [parameter]} for parameter in four.parameters()], **settings)
    train(one, first, GAP + 2)
    train(four, second, GAP + 2)
    assert equal(weights_of(one), weights_of(four))
