"""Fast paths beside the reference path, and that they are taken."""

import pytest
import torch
from torch import nn

from memtrain.optim.grid import GridOptimizer
from memtrain.optim.paths import KernelAdamW, KernelCoordinates, KernelLion, WholeAdamW

STEPS = 8
BLOCK = dict(projection="block", density=0.3, refresh="rotate")
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


@pytest.mark.parametrize(
    "settings",
    [
        dict(eps_on="uncorrected"),
        dict(decay_order="after"),
        dict(master="fp32"),
        dict(rule="adafactor"),
        dict(projection="power", rank=4),
        dict(projection="columns", density=0.25, residual="none"),
        dict(projection="columns", density=0.25, residual="sign", residual_scale=0.0),
        dict(projection="columns", density=1.0, residual="sign", state_dtype="int8"),
        dict(projection="columns", density=0.25, residual="sign", split=2),
        dict(projection="randk", density=0.25, residual="sign"),
        dict(projection="columns", density=0.25, residual="sign", rule="lion"),
        dict(state_dtype="int4"),
    ],
    ids=str,
)
def test_what_no_path_serves(settings):
    _, optimizer = run(settings, torch.float32)
    assert optimizer._plans[0].paths == [None]
