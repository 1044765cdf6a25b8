"""FRUGAL on rows and columns: reference against AdamW and sign apart, every path against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memtrain.optim.kernels import adamw, split_adamw
from memtrain.optim.kernels.pointwise import RANDOM_BF16, AdamStep
from memtrain.optim.kernels.sign import PlainStep, plain_
from tests.optim.kernels.pointwise_cases import WEIGHTS, Case, assert_same
from tests.optim.kernels.traffic import count_traffic

STEP = AdamStep(lr=1e-2, step=5, weight_decay=0.1, eps=1e-7)
REST = PlainStep(lr=3e-3, weight_decay=0.2)
PATHS = [
    pytest.param("_cpu", id="native"),
    pytest.param("_triton", id="triton", marks=pytest.mark.venv_optim),
]
AXES = pytest.mark.parametrize("axis", ["rows", "columns"])


def make(
    axis: split_adamw.Axis,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    master: str = "none",
    state: str = "fp32",
    share: float = 0.3,
) -> tuple[Case, Tensor]:
    """The active indices are in no order."""
    rows, columns = shape
    size = rows if axis == "rows" else columns
    index = torch.randperm(size, generator=torch.Generator().manual_seed(2))[: round(share * size)]
    low = (len(index), columns) if axis == "rows" else (rows, len(index))
    return Case(shape, dtype, master, dtype, state, moment_shape=low), index


def moments(case: Case) -> tuple[Tensor, Tensor]:
    return case.first["value"], case.second["value"]


@AXES
def test_it_is_adamw_on_the_active_part_and_the_rest_on_the_rest(axis: split_adamw.Axis) -> None:
    case, index = make(axis, (30, 40))
    dim = 0 if axis == "rows" else 1
    active = case.weight.index_select(dim, index)
    expected = case.weight.clone()
    plain_(expected, case.gradient, REST)
    low = case.clone()
    adamw.adamw_(active, case.gradient.index_select(dim, index), low.first, low.second, STEP)
    expected.index_copy_(dim, index, active)
    split_adamw.split_adamw_(case.weight, case.gradient, case.first, case.second, index, axis, STEP, REST)
    torch.testing.assert_close(case.weight, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments(case), moments(low), rtol=1e-6, atol=0)


@AXES
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("rule", "state"), [("sign", "fp32"), ("sgd", "bf16")])
@pytest.mark.parametrize(("dtype", "master"), WEIGHTS)
@pytest.mark.parametrize("shape", [(1, 1), (0, 8), (9, 700)])
def test_paths_agree_with_the_reference(
    path: str,
    axis: split_adamw.Axis,
    shape: tuple[int, int],
    dtype: torch.dtype,
    master: str,
    state: str,
    rule: str,
) -> None:
    case, index = make(axis, shape, dtype, master, state)
    rest = PlainStep(lr=3e-3 if rule == "sign" else 10.0, weight_decay=0.2, rule=rule)  # type: ignore[arg-type]
    expected = case.clone()
    split_adamw.reference(expected.operands(), expected.first, expected.second, index, axis, STEP, rest)
    getattr(split_adamw, path)(case.operands(), *moments(case), index, axis, STEP, rest)
    assert_same(case, expected)


@AXES
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_or_everything_may_be_active(path: str, axis: split_adamw.Axis, share: float) -> None:
    case, index = make(axis, (6, 130), share=share)
    expected = case.clone()
    split_adamw.reference(expected.operands(), expected.first, expected.second, index, axis, STEP, REST)
    getattr(split_adamw, path)(case.operands(), *moments(case), index, axis, STEP, REST)
    assert_same(case, expected)


def test_operands_that_do_not_fit_are_refused() -> None:
    case, index = make("columns", (6, 130))

    def call(weight: Tensor = case.weight, index: Tensor = index, axis: str = "columns") -> None:
        split_adamw.split_adamw_(
            weight,
            case.gradient,
            case.first,
            case.second,
            index,
            axis,
            STEP,
            REST,  # type: ignore[arg-type]
        )

    with pytest.raises(ValueError, match=r"first must be \(39, 130\), got \(6, 39\)"):
        call(axis="rows", index=torch.arange(39) % 6)
    with pytest.raises(ValueError, match=r"indices of columns must be in 0\.\.129, got -1\.\.129"):
        call(index=torch.tensor([129, -1]))
    with pytest.raises(ValueError, match="need a matrix"):
        call(weight=case.weight.view(-1))
    with pytest.raises(ValueError, match="need a matrix"):
        call(axis="block")


def test_bytes_an_element_worked_out_by_hand() -> None:
    """6 + 16 density for bf16 weights and fp32 moments."""
    bf16 = torch.bfloat16
    assert split_adamw.bytes_per_element(RANDOM_BF16, bf16, torch.float32, density=0.25) == 10
    assert split_adamw.bytes_per_element(RANDOM_BF16, bf16, bf16, density=0.5) == 10


@pytest.mark.venv_optim
@AXES
def test_traffic_is_what_bytes_per_element_says(axis: split_adamw.Axis) -> None:
    case, index = make(axis, (16, 1000), torch.bfloat16, "none", "fp32", share=0.25)
    with count_traffic(weight=case.weight) as traffic:
        split_adamw._triton(case.operands(), *moments(case), index, axis, STEP, REST)
    expected = split_adamw.bytes_per_element(RANDOM_BF16, torch.bfloat16, torch.float32, density=0.25)
    # Beside it each stretch of a row reads its slots, 4 bytes each, which stay in the cache: for rows one in
    # each of two stretches of 512, for columns all.
    slots = 16 * (2 if axis == "rows" else 1000)
    assert traffic.moved_bytes() - 4 * slots == 16000 * expected
