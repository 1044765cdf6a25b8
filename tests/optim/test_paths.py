"""Fast paths beside the reference path, and that they are taken."""

import pytest
import torch
from torch import nn

from memtrain.optim.grid import GridOptimizer
from memtrain.optim.lowrank_path import KernelLowRank
from memtrain.optim.paths import KernelAdamW, KernelCoordinates, KernelLion, WholeAdamW
from memtrain.optim.scaled_path import KernelScaled

STEPS = 8
BLOCK = dict(projection="block", density=0.3, refresh="rotate")
LOW_RANK = dict(projection="power", rank=8, update_gap=3, scale=0.5, weight_decay=0.1)
COORDINATES = dict(update_gap=3, residual="sign", scale=0.5, residual_scale=0.2, weight_decay=0.1)
CASES = [
    (WholeAdamW, dict(weight_decay=0.1), torch.float32),
    (KernelAdamW, dict(weight_decay=0.1), torch.bfloat16),
    (KernelAdamW, dict(master="split24", state_dtype="bf16"), torch.bfloat16),
    (KernelAdamW, dict(state_dtype="int8", weight_decay=0.1), torch.float32),
    (KernelAdamW, dict(state_dtype="int8", master="split24"), torch.bfloat16),
    (KernelLion, dict(rule="lion", weight_decay=0.1), torch.float32),
    (KernelLion, dict(rule="lion", state_dtype="bf16", master="split24"), torch.bfloat16),
    (KernelCoordinates, dict(projection="columns", density=0.25, **COORDINATES), torch.float32),
    (KernelCoordinates, dict(projection="rows", density=0.5, **COORDINATES), torch.float32),
    (
        KernelCoordinates,
        dict(**BLOCK, **COORDINATES),
        torch.float32,
    ),
    (
        KernelCoordinates,
        dict(projection="columns", density=0.25, master="split24", **{**COORDINATES, "residual": "sgd"}),
        torch.bfloat16,
    ),
    (KernelCoordinates, dict(projection="randk", density=0.3, **COORDINATES), torch.float32),
    (
        KernelCoordinates,
        dict(projection="randk", density=0.25, state_dtype="bf16", master="split24", **COORDINATES),
        torch.bfloat16,
    ),
    (KernelLowRank, LOW_RANK, torch.float32),
    (KernelLowRank, dict(**LOW_RANK, residual="sign", residual_scale=0.2), torch.float32),
    (KernelLowRank, dict(**LOW_RANK, side="left", refresh="reset"), torch.bfloat16),
    (KernelLowRank, {**LOW_RANK, "projection": "semi_orthogonal", "refresh": "keep"}, torch.float32),
    (KernelLowRank, dict(**LOW_RANK, split=2, state_dtype="bf16"), torch.float32),
    (KernelLowRank, {**LOW_RANK, "master": "split24", "projection": "svd"}, torch.bfloat16),
    (KernelScaled, dict(**LOW_RANK, residual="scaled", residual_scale=0.3), torch.float32),
    (KernelScaled, dict(**LOW_RANK, residual="scaled", side="left", limiter=0.0), torch.float32),
    (KernelScaled, dict(**LOW_RANK, residual="scaled", granularity="tensor"), torch.float32),
    (KernelScaled, {**LOW_RANK, "projection": "gaussian", "residual": "scale_only"}, torch.float32),
    (KernelScaled, {**LOW_RANK, "residual": "scale_only", "granularity": "tensor"}, torch.float32),
    (KernelScaled, {**LOW_RANK, "residual": "scale_only", "state_dtype": "bf16"}, torch.float32),
    (KernelLowRank, {**LOW_RANK, "rank": 64, "state_dtype": "int8", "split": 1}, torch.float32),
]


def run(settings, dtype, *, transposed=False, path="auto"):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(80, 64, generator=generator).to(dtype)
    weight = nn.Parameter(start.T.contiguous().T if transposed else start)
    optimizer = GridOptimizer([weight], lr=0.01, path=path, **settings)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(1 + step)
        weight.grad = torch.randn(80, 64, generator=generator).to(dtype)
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize(("path", "settings", "dtype"), CASES)
def test_a_fast_path_is_the_reference_up_to_rounding(path, settings, dtype):
    fast, optimizer = run(settings, dtype)
    assert type(optimizer._plans[0].paths[0]) is path
    slow, reference = run(settings, dtype, path="reference")
    assert reference._plans[0].paths == [None]
    # A weight that falls between two bf16 numbers may be rounded to the other one: half a percent.
    atol = 1e-6 if dtype == torch.float32 else 2**-7
    if settings.get("state_dtype") == "int8":
        atol = 2e-3  # a code more or less, of 8 steps of .01
    difference = (fast.float() - slow.float()).abs()
    assert float(difference.max()) <= atol * max(1.0, float(slow.float().abs().max()))
    assert float(difference.mean()) < 1e-4
    (ours,), (theirs,) = optimizer.state.values(), reference.state.values()
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["step"], theirs["step"])


@pytest.mark.parametrize(("path", "settings", "dtype"), CASES)
def test_weights_that_are_not_contiguous(path, settings, dtype):
    """Kernels bring them into order, torch's AdamW leaves them to the reference."""
    straight, _ = run(settings, dtype)
    turned, _ = run(settings, dtype, transposed=True)
    difference = (straight.float() - turned.float()).abs()
    assert float(difference.mean()) < 1e-4


BF16_BASIS = dict(**LOW_RANK, basis_dtype="bf16")


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        (BF16_BASIS, torch.float32),
        (dict(**BF16_BASIS, side="left"), torch.float32),
        (BF16_BASIS, torch.bfloat16),
        (dict(**BF16_BASIS, master="split24", split=2), torch.bfloat16),
    ],
)
def test_products_in_bf16_differ_by_their_rounding(settings, dtype):
    """G and N are rounded to bf16 by either path, R and P N by the reference, and where there is no AMX."""
    fast, optimizer = run(settings, dtype)
    assert type(optimizer._plans[0].paths[0]) is KernelLowRank
    slow, _ = run(settings, dtype, path="reference")
    start, _ = run({**settings, "scale": 0.0, "weight_decay": 0.0}, dtype)
    difference, moved = (fast.float() - slow.float()).norm(), (slow.float() - start.float()).norm()
    assert moved > 0.1
    # A bf16 weight that falls to the other side of a threshold moves by 2^-8; many do without a master.
    limit = 0.002 if dtype == torch.float32 else 0.03 if "master" in settings else 0.05
    assert difference < limit * moved


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_norm_of_a_residual_behind_a_bf16_basis(side, granularity):
    """The limiter would see another growth, were the basis taken for orthonormal."""
    settings = dict(**BF16_BASIS, residual="scaled", side=side, granularity=granularity)
    fast, optimizer = run(settings, torch.float32)
    slow, reference = run(settings, torch.float32, path="reference")
    start, _ = run({**settings, "scale": 0.0, "weight_decay": 0.0, "residual_scale": 0.0}, torch.float32)
    assert float((fast - slow).norm()) < 0.01 * float((slow - start).norm())
    norms = [next(iter(each.state.values()))["residual.norm"] for each in (optimizer, reference)]
    torch.testing.assert_close(*norms, rtol=2e-3, atol=0)


def test_signs_of_a_residual_in_bf16_agree_but_where_it_vanishes():
    settings = dict(**BF16_BASIS, residual="sign", residual_scale=0.2)
    fast, _ = run(settings, torch.float32)
    slow, _ = run(settings, torch.float32, path="reference")
    # A sign that falls the other way moves a weight by 2 * .01 * .2.
    apart = (fast - slow).abs() > 2e-3
    assert float(apart.float().mean()) < 0.01


def test_stacks_go_matrix_by_matrix():
    def stack(path):
        weight = nn.Parameter(torch.zeros(3, 20, 12))
        optimizer = GridOptimizer([weight], lr=0.01, path=path, **LOW_RANK)
        for step in range(STEPS):
            weight.grad = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return weight.detach()

    torch.testing.assert_close(stack("auto"), stack("reference"), rtol=0, atol=1e-6)


def test_a_gradient_out_of_order_gives_the_same():
    def of(turn):
        weight = nn.Parameter(torch.zeros(20, 12))
        optimizer = GridOptimizer([weight], lr=0.01, **LOW_RANK)
        for step in range(STEPS):
            weight.grad = turn(torch.randn(20, 12, generator=torch.Generator().manual_seed(step)))
            optimizer.step()
        return weight.detach()

    assert torch.equal(of(lambda gradient: gradient), of(lambda gradient: gradient.T.contiguous().T))


def test_the_choice_is_printable():
    matrix, vector = nn.Parameter(torch.zeros(20, 12)), nn.Parameter(torch.zeros(20))
    turned = nn.Parameter(torch.zeros(12, 20).T)
    named = [("up.weight", matrix), ("up.bias", vector), ("turned", turned)]
    optimizer = GridOptimizer(named, lr=0.01, **LOW_RANK)
    assert optimizer.paths() == {
        "0: parameter 'up.weight' (20, 12)": "low-rank adam kernel",
        "1: parameter 'up.bias' (20,)": "torch AdamW",
        "2: parameter 'turned' (20, 12)": "reference",
    }


@pytest.mark.parametrize(
    "settings",
    [
        dict(eps_on="uncorrected"),
        dict(decay_order="after"),
        dict(master="fp32"),
        dict(rule="adafactor"),
        dict(projection="power", rank=4, side="full"),
        dict(projection="power", rank=4, residual="sgd"),
        dict(projection="power", rank=4, residual="scaled", split=2),
        dict(projection="power", rank=4, history=2),
        dict(projection="power", rank=4, master="fp32"),
        dict(projection="gaussian", rank=4),
        dict(projection="columns", density=0.25, residual="none"),
        dict(projection="columns", density=0.25, residual="sign", residual_scale=0.0),
        dict(projection="columns", density=1.0, residual="sign", state_dtype="int8"),
        dict(projection="columns", density=0.25, residual="sign", split=2),
        dict(projection="columns", density=0.25, residual="sign", rule="lion"),
        dict(state_dtype="int4"),
    ],
    ids=str,
)
def test_what_no_path_serves(settings):
    _, optimizer = run(settings, torch.float32)
    assert optimizer._plans[0].paths == [None]
