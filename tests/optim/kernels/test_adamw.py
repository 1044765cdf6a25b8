"""AdamW with fp32, bf16 and 8-bit moments: the reference against torch, every path against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memtrain.optim.kernels import adamw, adamw8bit
from memtrain.optim.kernels.pointwise import FP32, RANDOM_BF16, SPLIT24, AdamStep, Operands
from memtrain.optim.storage import state_format
from tests.optim.kernels.pointwise_cases import OPERANDS, SHAPES, WEIGHTS, Case, assert_same, make_keys
from tests.optim.kernels.traffic import count_traffic

STEP = AdamStep(lr=1e-2, step=5, weight_decay=0.1, eps=1e-7)
PATHS = [
    pytest.param("_cpu", id="native"),
    pytest.param("_by_pieces", id="pieces"),
    pytest.param("_triton", id="triton", marks=pytest.mark.venv_optim),
]
FORMATS = ["fp32", "bf16", "int8"]


def run(path: str, case: Case, step: AdamStep = STEP) -> None:
    if case.state == "int8":
        getattr(adamw8bit, path)(case.operands(), case.first, case.second, step)
    else:
        getattr(adamw, path)(case.operands(), case.first["value"], case.second["value"], step)


def public(state: str) -> Callable[..., None]:
    return adamw8bit.adamw8bit_ if state == "int8" else adamw.adamw_


def call(case: Case, step: AdamStep = STEP, **changes: Any) -> None:
    arguments = {"master": case.master, "keys": case.keys, **changes}
    public(case.state)(case.weight, case.gradient, case.first, case.second, step, **arguments)


def test_reference_is_torchs_adamw() -> None:
    weight = torch.randn(40, 30)
    twin = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.AdamW([twin], lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    first, second = ({"value": torch.zeros(40, 30)} for _ in range(2))
    for step in range(1, 6):
        twin.grad = torch.randn(40, 30) * 10.0 ** -(step % 3)
        numbers = AdamStep(lr=1e-2, step=step, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
        adamw.reference(Operands(weight, twin.grad, {}, None), first, second, numbers, "fp32")
        theirs.step()
        torch.testing.assert_close(weight, twin.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize(("dtype", "master", "gradient_dtype"), OPERANDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_paths_agree_with_the_reference(
    path: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    master: str,
    gradient_dtype: torch.dtype,
    state: str,
) -> None:
    case = Case(shape, dtype, master, gradient_dtype, state)
    expected, before = case.clone(), case.clone()
    adamw.reference(expected.operands(), expected.first, expected.second, STEP, state)
    run(path, case)
    assert_same(case, expected)
    if case.weight.numel() > 1:
        assert not torch.equal(case.weight, before.weight)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("state", FORMATS)
def test_split24_without_keys_rounds_to_nearest(path: str, state: str) -> None:
    case = Case((5, 123), torch.bfloat16, "split24", torch.bfloat16, state)
    keyed = case.clone()
    case.keys = None if state != "bf16" else case.keys
    expected = case.clone()
    adamw.reference(expected.operands(), expected.first, expected.second, STEP, state)
    run(path, case)
    assert_same(case, expected)
    run(path, keyed)
    assert state == "bf16" or not torch.equal(case.master["correction"], keyed.master["correction"])


@pytest.mark.parametrize("state", FORMATS)
def test_many_steps_stay_with_torchs_adamw(state: str) -> None:
    """100 steps on a quadratic: 8-bit and bf16 states end where fp32 does."""
    target = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    case = Case((64, 32), torch.float32, "none", torch.float32, state)
    case.first, case.second = (
        state_format(state).empty(case.weight.shape, signed=signed, device="cpu") for signed in (True, False)
    )
    twin = torch.nn.Parameter(case.weight.clone())
    theirs = torch.optim.AdamW([twin], lr=3e-2, weight_decay=0.0)
    start = (case.weight - target).norm()
    for step in range(1, 101):
        case.gradient = case.weight - target
        case.keys = make_keys(step)
        call(case, AdamStep(lr=3e-2, step=step))
        twin.grad = twin.detach() - target
        theirs.step()
    assert (twin.detach() - target).norm() < 0.4 * start
    limit = {"fp32": 1e-5, "bf16": 1e-2, "int8": 3e-2}[state]
    assert (case.weight - twin.detach()).norm() <= limit * start


@pytest.mark.parametrize("state", FORMATS)
def test_a_parameter_with_any_strides_changes_in_place_and_autograd_knows(state: str) -> None:
    case = Case((40, 30), torch.bfloat16, "split24", torch.bfloat16, state)
    expected = case.clone()
    turned = torch.nn.Parameter(case.weight.t().contiguous().t())
    assert not turned.is_contiguous()
    version = turned._version
    public(state)(turned, case.gradient, case.first, case.second, STEP, master=case.master, keys=case.keys)
    call(expected)
    assert torch.equal(turned.detach(), expected.weight)
    assert turned._version > version
    version = expected.weight._version
    call(expected)
    assert expected.weight._version > version


@pytest.mark.parametrize("state", FORMATS)
def test_results_do_not_depend_on_threads_or_on_how_a_parameter_is_cut(state: str) -> None:
    case = Case((256, 160), torch.bfloat16, "none", torch.bfloat16, state)  # enough for more than one thread
    whole = case.clone()
    call(whole)
    one = case.clone()
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        call(one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.weight, whole.weight)
    assert case.keys is not None
    cut = 512
    for piece, keys in ((slice(0, cut), case.keys), (slice(cut, None), case.keys.skip(cut))):
        halves = []
        for stored in (case.first, case.second):
            scales = slice(*(b and b // 128 for b in (piece.start, piece.stop)))
            halves.append({n: t.view(-1)[scales if n == "scales" else piece] for n, t in stored.items()})
        public(state)(case.weight.view(-1)[piece], case.gradient.view(-1)[piece], *halves, STEP, keys=keys)
    assert torch.equal(case.weight, whole.weight)
    for mine, theirs in ((case.first, whole.first), (case.second, whole.second)):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("state", FORMATS)
def test_a_gradient_that_is_not_finite_stays_where_it_is(path: str, state: str, bad: float) -> None:
    case = Case((3, 128), torch.float32, "none", torch.float32, state)
    clean = case.clone()
    case.gradient[1, 7] = bad
    run(path, case)
    run(path, clean)
    hit = torch.zeros(3, 128, dtype=torch.bool)
    hit[1, 7] = True
    assert not torch.isfinite(case.value()[hit]).any()
    assert torch.equal(case.value()[~hit], clean.value()[~hit])
    form = state_format(state)
    for mine, theirs, signed in (
        (case.first, clean.first, True),
        (case.second, clean.second, False),
    ):
        loaded = form.load(mine, case.weight.shape, signed=signed)
        spoilt = hit if state != "int8" else torch.tensor([[False], [True], [False]]).expand(3, 128)
        assert not torch.isfinite(loaded[spoilt]).any()
        assert torch.equal(loaded[~spoilt], form.load(theirs, case.weight.shape, signed=signed)[~spoilt])


def test_bytes_an_element_worked_out_by_hand() -> None:
    """Weight, gradient, moments; read, and written but for the gradient."""
    f32, bf16 = torch.float32, torch.bfloat16
    assert adamw.bytes_per_element(FP32, f32, f32) == (4 + 4) + 4 + 2 * (4 + 4)
    assert adamw.bytes_per_element(RANDOM_BF16, bf16, f32) == 22  # the roofline of issue and paper tables
    assert adamw.bytes_per_element(SPLIT24, bf16, bf16) == (2 + 2) + (1 + 1) + 2 + 2 * (2 + 2)
    assert adamw8bit.bytes_per_element(RANDOM_BF16, bf16) == (2 + 2) + 2 + 2 * (1 + 1) + 2 * (4 + 4) / 128
    assert adamw8bit.bytes_per_element(SPLIT24, bf16) == 12.125


@pytest.mark.venv_optim
@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "master", "kind"),
    [(*weight, kind) for weight, kind in zip(WEIGHTS, (FP32, RANDOM_BF16, SPLIT24), strict=True)],
)
def test_traffic_is_what_bytes_per_element_says(
    state: str, dtype: torch.dtype, master: str, kind: int
) -> None:
    case = Case((16, 1000), dtype, master, dtype, state)  # 125 blocks of 128
    with count_traffic(weight=case.weight) as traffic:
        run("_triton", case)
    if state == "int8":
        expected = adamw8bit.bytes_per_element(kind, dtype)
    else:
        expected = adamw.bytes_per_element(kind, dtype, case.first["value"].dtype)
    assert traffic.moved_bytes() == expected * case.weight.numel()


def test_operands_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    case = Case((5, 123), torch.bfloat16, "none", torch.bfloat16, "int8")
    before = case.clone()
    with pytest.raises(ValueError, match="need keys"):
        call(case, keys=None)
    with pytest.raises(ValueError, match="run them on the fp32 master itself"):
        call(case, master={"master": case.weight.float()})
    turned = {"codes": case.first["codes"].t(), "scales": case.first["scales"]}
    with pytest.raises(ValueError, match=r"first codes must be \(5, 123\), got \(123, 5\)"):
        adamw8bit.adamw8bit_(case.weight, case.gradient, turned, case.second, STEP)
    with pytest.raises(TypeError, match=r"first codes must be torch\.int8, got torch\.uint8"):
        adamw8bit.adamw8bit_(case.weight, case.gradient, case.second, case.second, STEP)
    with pytest.raises(TypeError, match=r"gradient must be float32 or bfloat16, got torch\.float16"):
        adamw8bit.adamw8bit_(case.weight, case.gradient.half(), case.first, case.second, STEP)
    with pytest.raises(ValueError, match="must have the shape of weight"):
        adamw8bit.adamw8bit_(case.weight, case.gradient[:1], case.first, case.second, STEP)
    with pytest.raises(ValueError, match=r"master correction must be \(5, 123\), got \(1,\)"):
        call(case, master={"correction": torch.zeros(1, dtype=torch.int8)})
    with pytest.raises(TypeError, match=r"second must be torch\.float32, got torch\.bfloat16"):
        adamw.adamw_(
            case.weight,
            case.gradient,
            {"value": torch.zeros(5, 123)},
            {"value": torch.zeros(5, 123).bfloat16()},
            STEP,
            keys=case.keys,
        )
    assert_same(case, before)
    for numbers in ({"step": 0}, {"beta1": 1.0}, {"lr": -1.0}, {"lr": math.nan}):
        with pytest.raises(ValueError, match=next(iter(numbers))):
            AdamStep(**{"lr": 1e-3, "step": 1, **numbers})
