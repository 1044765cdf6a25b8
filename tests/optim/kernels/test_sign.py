"""Sign, SGD and Lion: references against the formulas, every path against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from memtrain.optim.kernels import sign
from memtrain.optim.kernels.pointwise import FP32, RANDOM_BF16, SPLIT24, Operands
from memtrain.optim.kernels.sign import LionStep, PlainStep
from tests.optim.kernels.pointwise_cases import OPERANDS, SHAPES, WEIGHTS, Case, assert_same
from tests.optim.kernels.traffic import count_traffic

LION = LionStep(lr=1e-2, weight_decay=0.1)
PATHS = [
    pytest.param("_cpu", id="native"),
    pytest.param("_triton", id="triton", marks=pytest.mark.venv_optim),
]


def test_references_worked_out_by_hand() -> None:
    weight, gradient = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-3.0, 0.5, 0.0])
    o = Operands(weight, gradient, {}, None)
    sign.reference(o, gradient, PlainStep(lr=0.5, weight_decay=0.1))
    assert weight.tolist() == pytest.approx([0.95 + 0.5, 0.95 - 0.5, 0.95])
    sign.reference(o, gradient, PlainStep(lr=0.5, rule="sgd"))
    assert weight.tolist() == pytest.approx([1.45 + 1.5, 0.45 - 0.25, 0.95])
    weight.fill_(1)
    first = {"value": torch.tensor([1.0, -1.0, 0.0])}
    sign.reference_lion(o, first, LionStep(lr=0.5, beta1=0.5, beta2=0.75))
    assert weight.tolist() == [1.5, 1.5, 1.0]  # averages -1, -.25 and 0
    assert first["value"].tolist() == [0.0, -0.625, 0.0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rule", ["sign", "sgd"])
@pytest.mark.parametrize(("dtype", "master", "gradient_dtype"), OPERANDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_paths_agree_with_the_reference(
    path: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    master: str,
    gradient_dtype: torch.dtype,
    rule: sign.Rule,
) -> None:
    case = Case(shape, dtype, master, gradient_dtype, "fp32")
    expected = case.clone()
    step = PlainStep(lr=1e-2 if rule == "sign" else 100.0, weight_decay=1e-3, rule=rule)
    sign.reference(expected.operands(), expected.gradient.float(), step)
    getattr(sign, path)(case.operands(), step)
    assert_same(case, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize(("dtype", "master"), WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_lions_paths_agree_with_the_reference(
    path: str, shape: tuple[int, ...], dtype: torch.dtype, master: str, state: str
) -> None:
    case = Case(shape, dtype, master, dtype, state)
    expected = case.clone()
    sign.reference_lion(expected.operands(), expected.first, LION)
    getattr(sign, path + "_lion")(case.operands(), case.first["value"], LION)
    assert_same(case, expected)


@pytest.mark.parametrize("path", PATHS)
def test_the_sign_of_nan_is_zero_as_torch_has_it(path: str) -> None:
    case = Case((1, 300), torch.float32, "none", torch.float32, "fp32")
    case.gradient.fill_(math.nan)
    assert torch.sign(case.gradient).abs().max() == 0
    before = case.weight.clone()
    getattr(sign, path)(case.operands(), PlainStep(lr=0.1))
    assert torch.equal(case.weight, before)


def test_public_calls_change_the_parameter() -> None:
    case = Case((7, 5), torch.float32, "none", torch.float32, "fp32")
    twin = case.clone()
    parameter = torch.nn.Parameter(case.weight)
    sign.plain_(parameter, case.gradient, PlainStep(lr=0.5))
    assert torch.equal(parameter.detach(), twin.weight - 0.5 * case.gradient.sign())
    sign.lion_(parameter, case.gradient, case.first, LionStep(lr=0.5))
    assert parameter._version == 2
    with pytest.raises(ValueError, match=r"first must be \(7, 5\), got \(5, 7\)"):
        sign.lion_(parameter, case.gradient, {"value": case.first["value"].t()}, LION)
    with pytest.raises(ValueError, match=r"PlainStep\.rule must be 'sign' or 'sgd', got 'adam'"):
        PlainStep(lr=0.1, rule="adam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"LionStep\.beta2 must be in \[0, 1\), got 1\.0"):
        LionStep(lr=0.1, beta2=1.0)


def test_bytes_an_element_worked_out_by_hand() -> None:
    assert sign.bytes_per_element(RANDOM_BF16, torch.bfloat16) == 6
    assert sign.bytes_per_element(RANDOM_BF16, torch.bfloat16, torch.bfloat16) == 10
    assert sign.bytes_per_element(SPLIT24, torch.bfloat16) == 8
    assert sign.bytes_per_element(FP32, torch.float32, torch.float32) == 8 + 4 + 8


@pytest.mark.venv_optim
def test_traffic_is_what_bytes_per_element_says() -> None:
    case = Case((16, 1000), torch.bfloat16, "split24", torch.bfloat16, "bf16")
    with count_traffic(weight=case.weight) as traffic:
        sign._triton(case.operands(), PlainStep(lr=0.1))
    assert traffic.moved_bytes() == 16000 * sign.bytes_per_element(SPLIT24, torch.bfloat16)
    with count_traffic(weight=case.weight) as traffic:
        sign._triton_lion(case.operands(), case.first["value"], LION)
    assert traffic.moved_bytes() == 16000 * sign.bytes_per_element(SPLIT24, torch.bfloat16, torch.bfloat16)
