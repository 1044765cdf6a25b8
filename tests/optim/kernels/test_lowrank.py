"""Down, Adam and up of GaLore and FRUGAL: both paths against the references, and against plain code."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from memtrain.optim.kernels import lowrank_adam, lowrank_down, lowrank_products, lowrank_up, lowrank_up_cpu
from memtrain.optim.projection import Projection
from memtrain.optim.residual import Residual
from memtrain.optim.rules import Adam
from memtrain.optim.storage.masters import Split24Master
from memtrain.optim.storage.random import RandomKey, random_bits, stochastic_round
from tests.optim.kernels.compare import close
from tests.optim.kernels.traffic import count_traffic

SIZES = [(123, 37, 5), (70, 300, 17), (1, 3, 1), (257, 129, 64)]
KEY = RandomKey(seed=3, parameter=1, step=5)
PATHS = ["public", "torch product", pytest.param("triton", marks=pytest.mark.venv_optim)]
UP_PATHS = ["plain", *PATHS]


@pytest.fixture(autouse=True)
def _products(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("venv_optim"):
        request.getfixturevalue("bf16_products")


def operands(m: int, n: int, rank: int, *, right: bool, basis_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """weight, gradient, basis, direction; fp32 but for the basis."""
    generator = torch.Generator().manual_seed(m + n)
    weight, gradient = (torch.randn(m, n, generator=generator) for _ in range(2))
    length = n if right else m
    basis = torch.randn(length, rank, generator=generator) / length**0.5
    direction = torch.randn((m, rank) if right else (rank, n), generator=generator)
    return weight, gradient, basis.to(basis_dtype), direction


def run_down(
    path: str, low: Tensor, gradient: Tensor, basis: Tensor, *, right: bool, accumulate: bool
) -> None:
    if path == "triton":
        lowrank_down._triton_down(low, gradient, basis, right, accumulate)
        return
    with pytest.MonkeyPatch.context() as patch:
        if path != "public":  # no AMX
            patch.setattr(lowrank_products, "serves", lambda *_: False)
        lowrank_down.project_down_(low, gradient, basis, right=right, accumulate=accumulate)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("gradient_dtype", "basis_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_down(
    path: str,
    right: bool,
    size: tuple[int, int, int],
    gradient_dtype: torch.dtype,
    basis_dtype: torch.dtype,
) -> None:
    _, gradient, basis, start = operands(*size, right=right, basis_dtype=basis_dtype)
    gradient = gradient.to(gradient_dtype)
    if path == "triton":  # whose interpreter cuts fp32 to bf16 where a GPU rounds
        gradient = gradient.to(basis_dtype).to(gradient_dtype)
    expected = lowrank_down.reference(gradient, basis, right=right)
    # The kernel keeps its fp32 sums, a CPU's product is rounded to the dtype of the basis.
    eps = torch.finfo(torch.float32 if path == "triton" else basis_dtype).eps
    limit = 16 * eps * max(1.0, expected.abs().max().item())
    for accumulate in (False, True):
        low = start.clone()
        run_down(path, low, gradient, basis, right=right, accumulate=accumulate)
        wanted = expected + start if accumulate else expected
        torch.testing.assert_close(low, wanted, rtol=0, atol=limit)


def run_up(path: str, weight: Tensor, basis: Tensor, direction: Tensor, **options: Any) -> None:
    if path != "triton":
        with pytest.MonkeyPatch.context() as patch:
            if path != "public":  # no AMX
                patch.setattr(lowrank_products, "serves", lambda *_: False)
            if path == "plain":  # where nothing can be compiled
                patch.setattr(lowrank_up_cpu.native, "function", lambda *_: None)
            lowrank_up.project_up_(weight, basis, direction, **options)
    else:
        options = {"decay": 1.0, "residual": None, "key": None, "correction": None, **options}
        names = ("right", "factor", "decay", "residual", "key", "correction")
        lowrank_up._triton_up(weight, basis, direction, *(options[name] for name in names))


@pytest.mark.parametrize("path", UP_PATHS)
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("weight_dtype", "basis_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_up(
    path: str, right: bool, size: tuple[int, int, int], weight_dtype: torch.dtype, basis_dtype: torch.dtype
) -> None:
    weight, _, basis, direction = operands(*size, right=right, basis_dtype=basis_dtype)
    weight = weight.to(weight_dtype)
    expected = lowrank_up.reference(weight, basis, direction, right=right, factor=0.1, decay=0.75)
    run_up(path, weight, basis, direction, right=right, factor=0.1, decay=0.75)
    # One rounding of the product to the dtype of the basis on a CPU, one of the weight.
    product = torch.finfo(basis_dtype).eps * 0.1 * 4
    limit = max(product, torch.finfo(weight_dtype).eps * expected.abs().max().item())
    torch.testing.assert_close(weight.float(), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (600, 1300, 90), (1100, 700, 300)])
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_tiles_keep_fp32_sums(right: bool, size: tuple[int, int, int], gradient_dtype: torch.dtype) -> None:
    """Several parts of the summed axis, strips and threads; bit for bit the same with one thread."""
    weight, gradient, basis, direction = operands(*size, right=right, basis_dtype=torch.bfloat16)
    gradient = gradient.to(gradient_dtype)
    if not lowrank_products.serves(basis, gradient):
        pytest.skip("this machine has no AMX")
    expected = lowrank_down.reference(gradient, basis, right=right)
    residual = (gradient, expected, 0.25)
    moved = lowrank_up.reference(
        weight, basis, direction, right=right, factor=0.1, decay=0.75, residual=residual
    )
    found, threads = [], torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            low, after = torch.empty_like(expected), weight.clone()
            lowrank_down.project_down_(low, gradient, basis, right=right)
            lowrank_up.project_up_(
                after, basis, direction, right=right, factor=0.1, decay=0.75, residual=residual
            )
        finally:
            torch.set_num_threads(threads)
        torch.testing.assert_close(low, expected, rtol=0, atol=4e-6)
        # But where the residual is rounding, and its sign with it.
        apart = (after - moved).abs() > 1e-6
        assert float(apart.float().mean()) < 1e-4
        found.append((low, after))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("path", UP_PATHS)
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_up_with_the_sign_of_the_residual(path: str, right: bool, weight_dtype: torch.dtype) -> None:
    weight, gradient, basis, direction = operands(70, 130, 9, right=right, basis_dtype=torch.bfloat16)
    weight, gradient = weight.to(weight_dtype), gradient.to(weight_dtype)
    low = lowrank_down.reference(gradient, basis, right=right)
    residual = (gradient, low, 0.5)
    expected = lowrank_up.reference(weight, basis, direction, right=right, factor=0.1, residual=residual)
    run_up(path, weight, basis, direction, right=right, factor=0.1, residual=residual)
    # A residual that a rounding of P R takes to the other side of zero moves by the whole sign.
    rest = gradient.float() - (
        low.bfloat16().float() @ basis.float().mT if right else basis.float() @ low.bfloat16().float()
    )
    clear = rest.abs() > 2**-6
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(weight.float()[clear], expected[clear], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("path", UP_PATHS)
@pytest.mark.parametrize("right", [False, True])
def test_a_key_rounds_at_random_as_the_storage_does(path: str, right: bool) -> None:
    weight, _, _, _ = operands(300, 70, 8, right=right, basis_dtype=torch.bfloat16)
    weight = weight.bfloat16()
    # A basis and a direction of powers of two: every path has the same product, 2^-9 everywhere.
    basis = torch.full((70 if right else 300, 1), 0.5, dtype=torch.bfloat16)
    direction = torch.full((300, 1) if right else (1, 70), 2.0**-8)
    value = weight.float() - 2.0**-9
    expected = stochastic_round(value, random_bits(KEY, value.numel()))
    run_up(path, weight, basis, direction, right=right, factor=1.0, key=KEY)
    assert torch.equal(weight, expected)
    assert (weight.float() != value.bfloat16().float()).any()


@pytest.mark.parametrize("path", UP_PATHS)
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("key", [None, KEY])
def test_a_split_master_keeps_24_bits(path: str, right: bool, key: RandomKey | None) -> None:
    weight, _, basis, direction = operands(70, 33, 5, right=right, basis_dtype=torch.bfloat16)
    master = Split24Master()
    half = weight.bfloat16()
    stored = master.empty(half)
    master.store_(half, stored, weight, key=KEY)
    start = master.load(half, stored).clone()
    expected = lowrank_up.reference(start, basis, direction, right=right, factor=2.0**-12)
    run_up(
        path, half, basis, direction, right=right, factor=2.0**-12, correction=stored["correction"], key=key
    )
    # 15 bits of mantissa: a unit is at most 2^-15; the product on a CPU is rounded to bf16.
    rtol = 2**-16 if key is None else 2**-15
    torch.testing.assert_close(master.load(half, stored), expected, rtol=rtol, atol=2**-19)


def test_a_step_is_seen_by_autograd() -> None:
    weight, _, basis, direction = operands(6, 4, 2, right=False, basis_dtype=torch.float32)
    parameter = torch.nn.Parameter(weight.bfloat16())
    version = parameter._version
    lowrank_up.project_up_(parameter, basis, direction, right=False, factor=0.1, key=KEY)
    assert parameter._version > version


@pytest.mark.venv_optim
def test_a_kernel_rounds_what_is_not_finite_as_the_storage_does() -> None:
    value = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e38]])
    weight = value.bfloat16()
    lowrank_up._triton_up(
        weight, torch.zeros(1, 1).bfloat16(), torch.zeros(1, 6), False, 0.0, 1.0, None, KEY, None
    )
    expected = stochastic_round(value.bfloat16().float(), random_bits(KEY, 6))
    torch.testing.assert_close(weight.float(), expected.view(1, 6).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", ["plain", *PATHS[::2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adam_is_torchs(path: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(7, 1000))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0, betas=(0.8, 0.99), eps=1e-3)
    mean, square = torch.zeros(7, 1000), torch.zeros(7, 1000)
    for step in (1, 2, 3):
        low = torch.randn(7, 1000, generator=generator)
        before = parameter.detach().clone()
        parameter.grad = low.clone()
        optimizer.step()
        direction = torch.empty(7, 1000, dtype=dtype)
        run = lowrank_adam._triton_direction if path == "triton" else lowrank_adam._cpu_direction
        with pytest.MonkeyPatch.context() as patch:
            if path == "plain":
                patch.setattr(lowrank_adam.native, "function", lambda *_: None)
            run(low, mean, square, direction, step, (0.8, 0.99), 1e-3)
        close(direction, (before - parameter.detach()).to(dtype), rounds=8)
    state = optimizer.state[parameter]
    close(mean, state["exp_avg"], rounds=4)
    close(square, state["exp_avg_sq"], rounds=4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["none", "sign"])
def test_whole_steps_are_the_grids(side: Literal["left", "right"], kind: Literal["none", "sign"]) -> None:
    weight, gradient, _, _ = operands(60, 40, 6, right=False, basis_dtype=torch.float32)
    projector = Projection(kind="semi_orthogonal", rank=6, side=side).bind(weight.shape)
    stored = projector.empty("cpu")
    projector.refresh_(stored, None, key=KEY)
    rule, residual = Adam(), Residual(kind=kind, scale=0.25, residual_scale=0.5)
    plain, fused = (
        {name: torch.zeros(projector.low_shape) for name in ("exp_avg", "exp_avg_sq")} for _ in range(2)
    )
    expected = weight.clone()
    for step in (1, 2, 3):
        lowrank_adam.lowrank_adam_step_(
            weight,
            gradient,
            stored[side],
            fused["exp_avg"],
            fused["exp_avg_sq"],
            right=side == "right",
            step=step,
            lr=0.1,
            weight_decay=0.5,
            scale=0.25,
            residual_scale=0.5 if kind == "sign" else 0.0,
        )
        low = projector.down(stored, gradient)
        direction = rule.direction(plain, low, step)
        update = residual.combine(gradient, low, direction, projector, stored, {})
        expected.mul_(1 - 0.1 * 0.5).sub_(update, alpha=0.1)
        gradient = gradient.roll(1, 0)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)
    for name in plain:
        close(fused[name], plain[name], rounds=4)


@pytest.mark.venv_optim
@pytest.mark.parametrize("right", [False, True])
def test_traffic_is_what_the_specs_say(right: bool) -> None:
    m, n, rank = 64, 192, 32  # whole tiles are not needed: masked lanes move nothing
    weight, gradient, basis, direction = operands(m, n, rank, right=right, basis_dtype=torch.bfloat16)
    weight, gradient, direction = weight.bfloat16(), gradient.bfloat16(), direction.bfloat16()
    short, other = (n, m) if right else (m, n)
    low = torch.empty((m, rank) if right else (rank, n))
    for accumulate in (False, True):
        with count_traffic(gradient=gradient, basis=basis, low=low) as traffic:
            lowrank_down._triton_down(low, gradient, basis, right, accumulate)
        expected = lowrank_down._moved_bytes(
            short, other, rank, gradient_size=2, basis_size=2, accumulate=accumulate
        )
        assert traffic.moved_bytes(cached=["basis"]) == pytest.approx(expected * m * n)
    for residual in (None, (gradient, low, 0.1)):
        with count_traffic(w=weight, g=gradient, basis=basis, direction=direction, low=low) as traffic:
            lowrank_up._triton_up(weight, basis, direction, right, 0.1, 1.0, residual, KEY, None)
        expected = lowrank_up._moved_bytes(
            short, other, rank, weight_size=2, basis_size=2, residual=residual is not None, kind=1
        )
        assert traffic.moved_bytes(cached=["basis", "direction", "low"]) == pytest.approx(expected * m * n)
    with count_traffic(low=low) as traffic:
        mean, square = torch.zeros_like(low), torch.zeros_like(low)
        lowrank_adam._triton_direction(low, mean, square, direction, 1, (0.9, 0.999), 1e-8)
    assert traffic.moved_bytes() == lowrank_adam.SPECS[0].variants[0].moved_bytes * low.numel()


def test_what_does_not_fit_is_refused() -> None:
    weight, gradient, basis, direction = operands(6, 4, 2, right=False, basis_dtype=torch.float32)
    low = torch.empty_like(direction)
    with pytest.raises(ValueError, match=r"has a low part \(2, 4\), got \(4, 2\)"):
        lowrank_down.project_down_(low.mT.contiguous(), gradient, basis, right=False)
    with pytest.raises(ValueError, match="low must be fp32"):
        lowrank_down.project_down_(low.bfloat16(), gradient, basis, right=False)
    with pytest.raises(ValueError, match="must be contiguous"):
        lowrank_down.project_down_(low, gradient.mT.contiguous().mT, basis, right=False)
    with pytest.raises(ValueError, match="only bf16 weights are rounded at random"):
        lowrank_up.project_up_(weight, basis, direction, right=False, factor=0.1, key=KEY)
    with pytest.raises(ValueError, match="a correction is int8"):
        lowrank_up.project_up_(
            weight, basis, direction, right=False, factor=0.1, correction=weight.to(torch.int8)
        )
    with pytest.raises(ValueError, match="step counts from 1, got 0"):
        lowrank_adam.adam_direction(low, low.clone(), low.clone(), step=0)
    with pytest.raises(ValueError, match="exp_avg_sq must be fp32"):
        lowrank_adam.adam_direction(low, low.clone(), low.bfloat16(), step=1)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projection_of_nothing_is_zero(right, dtype):
    """Not what lay in memory."""
    shape, low = ((5, 0), (5, 3)) if right else ((0, 5), (3, 5))
    found = torch.full(low, 7.0)
    lowrank_down.project_down_(
        found, torch.zeros(shape), torch.zeros(0, 3, dtype=dtype), right=right, accumulate=True
    )
    assert (found == 7).all()
    lowrank_down.project_down_(found, torch.zeros(shape), torch.zeros(0, 3, dtype=dtype), right=right)
    assert not found.any()
