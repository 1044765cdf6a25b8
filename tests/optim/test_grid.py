"""GridOptimizer as a torch.optim.Optimizer, and the parameters that break optimizers."""

import re

import pytest
import torch
from torch import nn

from memtrain.optim.grid import GridOptimizer, NonFiniteGradientWarning
from memtrain.optim.projection import ProjectionError
from memtrain.optim.settings import Settings

GALORE = dict(projection="power", rank=2, update_gap=3)


def weight_of(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def give_gradient(weight, step=0):
    generator = torch.Generator().manual_seed(100 + step)
    weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)


def run(optimizer, weights, steps, start=0):
    for step in range(start, start + steps):
        for weight in weights:
            give_gradient(weight, step)
        optimizer.step()


def live_bytes(optimizer):
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())


def test_the_fused_path_is_torch_adamw_bit_for_bit():
    ours, theirs = [[weight_of(5, 4), weight_of(7)] for _ in range(2)]
    settings = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    run(GridOptimizer(ours, **settings), ours, 5)
    run(torch.optim.AdamW(theirs, fused=True, **settings), theirs, 5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_reference_path_is_torch_adamw():
    ours, theirs = [[weight_of(5, 4), weight_of(7)] for _ in range(2)]
    settings = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    run(GridOptimizer(ours, path="reference", **settings), ours, 20)
    run(torch.optim.AdamW(theirs, **settings), theirs, 20)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("path", ["auto", "reference"])
@pytest.mark.parametrize("extra", [{}, GALORE])
def test_lr_as_tensor_and_schedulers(extra, path):
    """A tensor is read at every step, and a scheduler that halves it is followed."""
    by_float, by_tensor = weight_of(6, 5), weight_of(6, 5)
    first = GridOptimizer([by_float], lr=0.1, weight_decay=0.5, path=path, **extra)
    second = GridOptimizer([by_tensor], lr=torch.tensor(0.1), weight_decay=0.5, path=path, **extra)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (first, second)]
    for step in range(5):
        run(first, [by_float], 1, step)
        run(second, [by_tensor], 1, step)
        for scheduler in schedulers:
            scheduler.step()
    assert first.param_groups[0]["lr"] == pytest.approx(0.1 / 32)
    torch.testing.assert_close(by_float, by_tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_lr_as_tensor_of_one_dimension(path):
    """torch's optimizers take it, for parameters of any shape."""
    weights = [nn.Parameter(torch.ones(shape)) for shape in ((), (5,), (6, 5))]
    optimizer = GridOptimizer(weights, lr=torch.tensor([0.1]), weight_decay=0.5, path=path)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for weight in weights:  # 1 - .1 * .5 of it, and a step of .1
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.85))


def test_one_cycle_moves_betas_or_momentum():
    weight = weight_of(6, 5)
    for settings, key in ((dict(), "betas"), (dict(rule="momentum"), "momentum")):
        optimizer = GridOptimizer([weight], lr=0.1, **GALORE, **settings)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
        before = optimizer.param_groups[0][key]
        for step in range(4):
            run(optimizer, [weight], 1, step)
            scheduler.step()
        assert optimizer.param_groups[0][key] != before


def test_closure_is_called_with_gradients_on():
    weight = weight_of(4, 4)
    optimizer = GridOptimizer([weight], lr=0.1, **GALORE)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_groups_differ_and_join_later():
    first, second, third = weight_of(6, 5), weight_of(6, 5), weight_of(6, 5)
    optimizer = GridOptimizer(
        [{"params": [first]}, {"params": [second], "projection": None, "rule": "lion"}],
        lr=0.1,
        betas=(0.8, 0.9),
        **GALORE,
    )
    run(optimizer, [first, second], 2)
    optimizer.add_param_group({"params": [third], "rank": 3, "lr": 0.0})
    run(optimizer, [first, second, third], 1, 2)
    assert optimizer.state[first]["exp_avg.value"].shape == (6, 2)
    assert optimizer.state[second]["momentum.value"].shape == (6, 5)
    assert optimizer.state[third]["exp_avg.value"].shape == (6, 3)
    assert torch.equal(third, weight_of(6, 5))
    assert [group["step"] for group in optimizer.param_groups] == [3, 3, 1]
    # Lion's own betas, not those of the constructor's Adam.
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9), (0.9, 0.99), (0.8, 0.9)]


def test_a_group_that_is_refused_is_not_added():
    optimizer = GridOptimizer([weight_of(6, 5)], **GALORE)
    with pytest.raises(ProjectionError, match=r"parameter 0 of its group, \(3, 2\): rank 5 exceeds 2"):
        optimizer.add_param_group({"params": [weight_of(3, 2)], "rank": 5})
    assert len(optimizer.param_groups) == 1
    run(optimizer, optimizer.param_groups[0]["params"], 1)


def test_vectors_stacks_empty_frozen_and_unused_parameters():
    named = {
        "matrix": weight_of(6, 5),
        "vector": weight_of(5),
        "scalar": weight_of(),
        "experts": weight_of(3, 6, 5),
        "empty": weight_of(0, 5),
        "frozen": weight_of(6, 5).requires_grad_(False),
        "unused": weight_of(6, 5),
    }
    before = {name: weight.detach().clone() for name, weight in named.items()}
    optimizer = GridOptimizer(named.items(), lr=0.1, weight_decay=0.1, **GALORE)
    used = [named[name] for name in ("matrix", "vector", "scalar", "experts", "empty")]
    run(optimizer, used, 4)
    changed = {name for name, weight in named.items() if not torch.equal(weight, before[name])}
    assert changed == {"matrix", "vector", "scalar", "experts"}
    assert optimizer.state[named["experts"]]["exp_avg.value"].shape == (3, 6, 2)
    assert optimizer.state[named["vector"]]["exp_avg.value"].shape == (5,)
    assert set(optimizer.state) == {named[name] for name in changed}
    # And the unused one, once it is used, starts with a bias correction of its own.
    give_gradient(named["unused"])
    optimizer.step()
    assert float(optimizer.state[named["unused"]]["step"]) == 1
    assert float(optimizer.state[named["matrix"]]["step"]) == 5


def test_experts_are_updated_as_single_matrices():
    stack, single = weight_of(3, 8, 6), None
    singles = [nn.Parameter(stack.detach()[i].clone()) for i in range(3)]
    settings = dict(lr=0.1, projection="svd", rank=2, update_gap=2, residual="scaled", rule="adafactor")
    together = GridOptimizer([stack], **settings)
    apart = GridOptimizer(singles, **settings)
    for step in range(5):
        give_gradient(stack, step)
        for index, single in enumerate(singles):
            single.grad = stack.grad[index].clone()
        together.step()
        apart.step()
    for index, single in enumerate(singles):
        torch.testing.assert_close(stack[index], single, rtol=1e-4, atol=1e-5)


def test_split_projects_the_parts_of_a_fused_matrix_apart():
    fused = weight_of(12, 5)
    parts = [nn.Parameter(fused.detach()[4 * i : 4 * i + 4].clone()) for i in range(3)]
    settings = dict(lr=0.1, projection="svd", rank=2, update_gap=2)
    together, apart = GridOptimizer([fused], split=3, **settings), GridOptimizer(parts, **settings)
    for step in range(4):
        give_gradient(fused, step)
        for index, part in enumerate(parts):
            part.grad = fused.grad[4 * index : 4 * index + 4].clone()
        together.step()
        apart.step()
    torch.testing.assert_close(fused, torch.cat(parts), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"split=3 is for matrices whose rows it divides, got .*\(10, 5\)"):
        GridOptimizer([weight_of(10, 5)], split=3, **settings)


def test_weights_and_gradients_of_any_strides():
    straight, turned = weight_of(6, 5), nn.Parameter(weight_of(6, 5).detach().T.contiguous().T)
    assert not turned.is_contiguous()
    for extra in ({}, GALORE):
        first, second = GridOptimizer([straight], lr=0.1, **extra), GridOptimizer([turned], lr=0.1, **extra)
        for step in range(4):
            give_gradient(straight, step)
            turned.grad = straight.grad.T.contiguous().T
            first.step()
            second.step()
        torch.testing.assert_close(straight, turned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["auto", "reference"])
def test_sparse_gradients_are_refused_by_name_before_anything_is_updated(path):
    first, embedding = weight_of(6, 5), nn.Embedding(6, 4, sparse=True)
    before = first.detach().clone()
    optimizer = GridOptimizer([("first", first), *embedding.named_parameters()], path=path)
    optimizer.add_param_group({"params": [("other", other := weight_of(6, 5))]})
    for weight in (first, other):
        weight.grad = torch.ones(6, 5)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.param_groups.reverse()
    with pytest.raises(ValueError, match=r"parameter 'weight' \(6, 4\) has a gradient of layout"):
        optimizer.step()
    assert torch.equal(first, before)
    assert torch.equal(other, before)
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_at_a_refresh(value):
    """Basis and weight stay, it is said and counted, and the next finite gradient refreshes."""
    weight = weight_of(6, 5)
    optimizer = GridOptimizer([("w", weight)], lr=0.1, **GALORE)
    run(optimizer, [weight], 3)
    basis = optimizer.state[weight]["projector.right"].clone()
    before = weight.detach().clone()
    weight.grad = torch.full((6, 5), value)
    with pytest.warns(NonFiniteGradientWarning, match=r"parameter 'w' \(6, 5\) has a gradient") as warned:
        optimizer.step()
    assert warned[0].filename == __file__
    assert torch.equal(optimizer.state[weight]["projector.right"], basis)
    assert torch.equal(weight, before)
    assert optimizer.param_groups[0]["skipped_refreshes"] == 1
    run(optimizer, [weight], 1, 4)
    assert not torch.equal(optimizer.state[weight]["projector.right"], basis)
    assert bool(torch.isfinite(weight).all())


@pytest.mark.parametrize("extra", [GALORE, dict(projection="randk", density=0.5, residual="sign")])
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(
    ("dtype", "master"),
    [
        (torch.float32, "none"),
        (torch.float32, "fp32"),
        (torch.bfloat16, "none"),
        (torch.bfloat16, "split24"),
        (torch.bfloat16, "fp32"),
        (torch.float16, "fp32"),
    ],
)
def test_predicted_bytes_are_the_live_bytes(extra, state_dtype, dtype, master):
    weights = [weight_of(80, 60, dtype=dtype), weight_of(60, dtype=dtype), weight_of(2, 9, 7, dtype=dtype)]
    optimizer = GridOptimizer(weights, state_dtype=state_dtype, master=master, **extra)
    predicted = optimizer.state_bytes()
    run(optimizer, weights, 4)
    assert live_bytes(optimizer) == sum(predicted.values())
    assert all(bool(torch.isfinite(weight).all()) for weight in weights)


@pytest.mark.parametrize("projection", ["svd", "eigh", "power"])
def test_a_gradient_of_zeros_does_not_make_a_basis(projection):
    """As behind layers that start at zero: the refresh waits for the first gradient that says something."""
    weight = weight_of(6, 5)
    optimizer = GridOptimizer([weight], lr=0.1, projection=projection, rank=2, update_gap=4)
    for _ in range(2):
        weight.grad = torch.zeros(6, 5)
        optimizer.step()
    assert torch.equal(weight, weight_of(6, 5))
    assert not optimizer.state[weight]["projector.right"].any()
    run(optimizer, [weight], 1)
    basis = optimizer.state[weight]["projector.right"].clone()
    torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-5, rtol=0)
    weight.grad = torch.zeros(6, 5)
    for _ in range(4):
        optimizer.step()  # one of them at the next refresh
    assert torch.equal(optimizer.state[weight]["projector.right"], basis)


@pytest.mark.parametrize("projection", ["svd", "eigh", "power"])
def test_experts_without_tokens_keep_their_basis(projection):
    stack = weight_of(2, 6, 5)
    optimizer = GridOptimizer([stack], lr=0.1, projection=projection, rank=2, update_gap=1)
    run(optimizer, [stack], 1)
    before = optimizer.state[stack]["projector.right"].clone()
    give_gradient(stack, 1)
    stack.grad[0] = 0
    optimizer.step()
    after = optimizer.state[stack]["projector.right"]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_zero_grad_and_repr_are_torch_s():
    weight = weight_of(6, 5)
    optimizer = GridOptimizer([weight], **GALORE)
    give_gradient(weight)
    optimizer.zero_grad()
    assert weight.grad is None
    assert "projection: power" in repr(optimizer)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(rate=1), TypeError, r"unknown settings \['rate'\]: there are basis_dtype"),
        (dict(lr=-1.0), ValueError, "lr must be >= 0, got -1.0"),
        (dict(rule="adagrad"), ValueError, "rule 'adagrad' is unknown: one of adam"),
        (dict(rule="momentum", betas=(0.9, 0.9)), ValueError, r"betas=.*rule 'momentum' has no such number"),
        (dict(momentum=0.9), ValueError, "momentum=0.9: rule 'adam' has no such number"),
        (dict(weight_decay=-1), ValueError, "weight_decay must be >= 0"),
        (dict(rank=4), ValueError, "rank=4: the group has no projection"),
        (dict(residual="sign"), ValueError, "residual='sign': the group has no projection"),
        (dict(projection="power"), ValueError, "either rank or density"),
        (dict(projection="columns", density=0.5, lazy=True), ValueError, "lazy=True asks whether"),
        (dict(projection="svd", rank=2, damping=0.1), ValueError, "damping=0.1: it belongs to history"),
        (dict(**GALORE, history=3, refresh="keep"), ValueError, "would mix gradients of different bases"),
        (dict(projection="gaussian", rank=2, residual="sign"), ValueError, "residual 'sign' needs an orth"),
        (dict(state_dtype="fp8"), ValueError, "fp8"),
        (dict(master="bf16"), ValueError, "bf16"),
        (dict(master="split24"), TypeError, "split24.*float32"),
        (dict(seed=-1), ValueError, "seed must be in"),
        (dict(seed=1.5), ValueError, "seed must be an int, got 1.5"),
        (dict(projection="power", rank=2.0), ValueError, "rank must be an int, got 2.0"),
        (dict(projection="power", rank=2, update_gap=2.5), ValueError, "update_gap must be an int, got 2.5"),
        (dict(betas=(0.9,)), ValueError, r"betas must be two numbers, got \(0.9,\)"),
        (dict(path="fast"), ValueError, "path must be auto or reference"),
        (dict(decay_order="during"), ValueError, "decay_order must be before or after"),
        (dict(**GALORE, split=0), ValueError, "split must be at least 1"),
        (dict(**GALORE, limiter=1.1), ValueError, "limiter=1.1: residual 'none' makes no use of it"),
        (dict(**GALORE, residual="sign", granularity="tensor"), ValueError, "granularity='tensor': residual"),
        (
            dict(**GALORE, residual="scale_only", residual_scale=2.0),
            ValueError,
            "residual_scale=2.0: residual",
        ),
    ],
)
def test_settings_that_cannot_be_honoured(settings, error, message):
    with pytest.raises(error, match=message):
        GridOptimizer([weight_of(6, 5)], **settings)


def test_misspelt_settings_of_groups_are_refused_and_foreign_keys_are_not():
    with pytest.raises(
        TypeError, match=r"unknown setting 'weight_decy' in a group: did you mean 'weight_decay'"
    ):
        GridOptimizer([{"params": [weight_of(6, 5)], "weight_decy": 0.1}])
    optimizer = GridOptimizer([{"params": [weight_of(6, 5)], "tag": "body", "initial_lr": 1.0}])
    assert optimizer.param_groups[0]["tag"] == "body"


def test_a_group_may_give_a_rank_where_the_others_have_a_density():
    optimizer = GridOptimizer(
        [{"params": [weight_of(6, 5)]}, {"params": [weight_of(6, 5)], "rank": 2}],
        projection="svd",
        density=0.5,
    )
    assert [(group["rank"], group["density"]) for group in optimizer.param_groups] == [(None, 0.5), (2, None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_dtypes_that_cannot_be_honoured(dtype):
    with pytest.raises(ValueError, match=rf"is {dtype}: states and arithmetic are fp32"):
        GridOptimizer([nn.Parameter(torch.zeros(3, dtype=dtype))])


def test_matrices_of_four_dimensions_are_refused_in_a_projected_group():
    with pytest.raises(ProjectionError, match=r"parameter 'conv.weight'.*matrices \[m, n\] or stacks"):
        GridOptimizer([("conv.weight", weight_of(2, 2, 3, 3))], **GALORE)


def test_importing_is_lean():
    import subprocess
    import sys

    code = (
        "import sys, memtrain.optim.named, memtrain.optim.roles, torch;"
        "assert not {'triton', 'bitsandbytes', 'transformers'} & set(sys.modules);"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rank=1), r"parameter 'w' \(6, 5\): state 'exp_avg.value' is \(6, 2\)"),
        (
            dict(projection=None, rank=None, update_gap=None),
            r"differ in \['projector.right', 'refresh.due'\]",
        ),
        (dict(state_dtype="bf16"), r"torch.bfloat16 is expected"),
        (dict(master="fp32"), r"differ in \['master.master'\]"),
        (dict(side="left"), r"differ in \['projector.left', 'projector.right'\]"),
        (dict(residual="scaled"), r"differ in \['residual.norm'\]"),
    ],
)
def test_settings_that_a_state_cannot_follow_are_refused_before_anything_is_updated(change, message):
    """Without the look, fused AdamW would write whole moments into those of the projection."""
    first, second = weight_of(6, 5), weight_of(6, 5)
    optimizer = GridOptimizer([{"params": [("v", first)]}, {"params": [("w", second)]}], **GALORE)
    run(optimizer, [first, second], 2)
    optimizer.param_groups[1].update(change)
    before = first.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert torch.equal(first, before)


def test_settings_that_a_state_can_follow_are_followed():
    weight = weight_of(6, 5)
    optimizer = GridOptimizer([weight], lr=0.0, **GALORE)
    run(optimizer, [weight], 1)
    optimizer.param_groups[0].update(projection="svd", update_gap=7, refresh="reset", scale=2.0)
    run(optimizer, [weight], 3, 1)
    assert int(optimizer.state[weight]["refresh.due"]) == 7


def test_parameters_of_a_group_may_be_replaced_and_cast():
    """As engines that shard parameters replace them, and model.to(bfloat16) casts them."""
    weights = [weight_of(6, 5), weight_of(4)]
    optimizer = GridOptimizer(weights, lr=0.1)
    run(optimizer, weights, 2)
    others = [weight_of(3, 7), weights[1], weight_of(2, dtype=torch.bfloat16)]
    optimizer.param_groups[0]["params"] = others
    run(optimizer, others, 1, 2)
    assert [float(optimizer.state[weight]["step"]) for weight in others] == [1, 3, 1]
    assert others[2].dtype == torch.bfloat16
    assert not torch.equal(others[2], weight_of(2, dtype=torch.bfloat16))
    others[0].grad, others[0].data = None, others[0].data.bfloat16()
    run(optimizer, others, 1, 3)
    assert others[0].dtype == torch.bfloat16
    for shape in ((9, 7), (7, 3)):
        others[0].grad, others[0].data = None, torch.zeros(shape)
        with pytest.raises(
            ValueError, match=rf"state 'exp_avg.value' is \(3, 7\).* and {re.escape(str(shape))}"
        ):
            run(optimizer, others, 1, 4)


def test_groups_may_be_taken_out():
    """Phases of a training do so: the other groups go on as if nothing had been."""
    (kept, twin), gone = [weight_of(6, 5), weight_of(6, 5)], weight_of(4)
    optimizer = GridOptimizer([{"params": [gone]}, {"params": [kept], **GALORE}], lr=0.1)
    alone = GridOptimizer([{"params": [weight_of(4)]}, {"params": [twin], **GALORE}], lr=0.1)
    run(optimizer, [gone, kept], 2)
    run(alone, [twin], 2)
    del optimizer.param_groups[0], optimizer.state[gone]
    assert optimizer.paths() == {"0: parameter 0 of its group, (6, 5)": "low-rank adam kernel"}
    assert optimizer.state_bytes()["projector"] == 5 * 2 * 4
    assert list(optimizer.state_dict()["state"]) == [0]
    run(optimizer, [kept], 3, 2)
    run(alone, [twin], 3, 2)
    torch.testing.assert_close(kept, twin)
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [gone]})
    assert optimizer.state_bytes()["moments"] == 2 * 4 * 4
    run(optimizer, [gone], 1)


@pytest.mark.parametrize("key", ["maximize", "amsgrad", "differentiable"])
def test_what_would_change_the_update_is_not_ignored(key):
    with pytest.raises(ValueError, match=f"{key}=True in a group: these optimizers have no {key}"):
        GridOptimizer([{"params": [weight_of(6, 5)], key: True}])
    GridOptimizer([{"params": [weight_of(6, 5)], key: False, "foreach": None}])


def test_settings_are_checked_whatever_was_checked_before():
    """1.0 equals 1 and True: what was found of one says nothing of the others."""
    group = dict(params=[], lr=0.1, projection="power", rank=1)
    assert Settings.of_group(group) is Settings.of_group(dict(group))
    with pytest.raises(ValueError, match=r"rank must be an int, got 1\.0"):
        Settings.of_group({**group, "rank": 1.0})
    with pytest.raises(ValueError, match=r"rank must be an int, got \[1\]"):
        Settings.of_group({**group, "rank": [1]})
