"""FRUGAL on single entries: reference against rows of one entry, every path against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memtrain.optim.kernels import adamw, randk, split_adamw
from memtrain.optim.kernels.pointwise import RANDOM_BF16, AdamStep
from memtrain.optim.kernels.sign import PlainStep, plain_
from memtrain.optim.projection.strata import shift, stratified_indices
from memtrain.optim.storage import RandomKey
from tests.optim.kernels.pointwise_cases import WEIGHTS, Case, assert_same
from tests.optim.kernels.traffic import count_traffic

STEP = AdamStep(lr=1e-2, step=5, weight_decay=0.1, eps=1e-7)
REST = PlainStep(lr=3e-3, weight_decay=0.2)
CHOICE = RandomKey(seed=9, parameter=4, step=2)
PATHS = [
    pytest.param("_cpu", id="native"),
    pytest.param("_triton", id="triton", marks=pytest.mark.venv_optim),
]


def make(
    count: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    master: str = "none",
    state: str = "fp32",
) -> Case:
    return Case(shape, dtype, master, dtype, state, moment_shape=(count,))


def moments(case: Case) -> tuple[Tensor, Tensor]:
    return case.first["value"], case.second["value"]


def both(case: Case, path: str, choice: RandomKey = CHOICE, rest: PlainStep = REST) -> tuple[Case, Case]:
    """The case after a step of ``path``, and after one of the reference."""
    expected = case.clone()
    randk.reference(expected.operands(), expected.first, expected.second, choice, STEP, rest)
    getattr(randk, path)(case.operands(), *moments(case), choice, STEP, rest)
    return case, expected


def test_it_is_adamw_on_the_chosen_and_the_rest_on_the_rest() -> None:
    case = make(300, (30, 40))
    index = stratified_indices(CHOICE, 300, 1200, torch.device("cpu"))
    active, gradient = case.weight.view(-1)[index], case.gradient.view(-1)[index]
    expected, low = case.weight.clone(), case.clone()
    plain_(expected, case.gradient, REST)
    adamw.adamw_(active, gradient, low.first, low.second, STEP)
    expected.view(-1)[index] = active
    randk.randk_adamw_(case.weight, case.gradient, case.first, case.second, CHOICE, STEP, REST)
    torch.testing.assert_close(case.weight, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments(case), moments(low), rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("rule", "state"), [("sign", "fp32"), ("sgd", "bf16")])
@pytest.mark.parametrize(("dtype", "master"), WEIGHTS)
@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (911, (9, 405)), (1030, (3, 5, 71))])
def test_paths_agree_with_the_reference(
    path: str, count: int, shape: tuple[int, ...], dtype: torch.dtype, master: str, state: str, rule: str
) -> None:
    """Three and a half chunks of the C++ pass with a quarter active; nearly all of one chunk and a bit."""
    rest = PlainStep(lr=3e-3 if rule == "sign" else 10.0, weight_decay=0.2, rule=rule)  # type: ignore[arg-type]
    assert_same(*both(make(count, shape, dtype, master, state), path, rest=rest))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 1024, 2048, 2049, 2999, 3000])
def test_strata_of_every_length_and_turn(path: str, count: int) -> None:
    """Strata longer than a chunk, of one entry, of one or two; and the last one cut by the end."""
    for step in range(6):
        choice = RandomKey(seed=1, parameter=0, step=step)
        assert_same(*both(make(count, (3000,)), path, choice))


@pytest.mark.parametrize("path", PATHS)
def test_the_last_entry_may_lie_at_the_beginning(path: str) -> None:
    for count in (1, 5, 700):
        turned = (RandomKey(seed=1, parameter=0, step=step) for step in range(10_000))
        choice = next(
            each for each in turned if int(stratified_indices(each, count, 2500, torch.device("cpu"))[-1]) < 2
        )
        assert shift(choice, 2500) > 0
        assert_same(*both(make(count, (2500,)), path, choice))


def test_operands_that_do_not_fit_are_refused() -> None:
    case = make(10, (6, 13))
    with pytest.raises(ValueError, match=r"1 to 78 entries of the weight may be active, got 0"):
        randk.randk_adamw_(
            case.weight, case.gradient, make(0, (6, 13)).first, make(0, (6, 13)).second, CHOICE, STEP, REST
        )
    with pytest.raises(ValueError, match=r"second must be \(10,\), got \(11,\)"):
        randk.randk_adamw_(
            case.weight, case.gradient, case.first, make(11, (6, 13)).second, CHOICE, STEP, REST
        )
    many, one = torch.zeros(1).expand(1 << 29), {"value": torch.zeros(1)}
    with pytest.raises(ValueError, match="1 of 536870912 places: at least one in 536870912 is to be chosen"):
        randk.randk_adamw_(many, many, one, one, CHOICE, STEP, REST)


@pytest.mark.venv_optim
def test_traffic_is_what_bytes_per_element_says() -> None:
    case = make(4000, (16, 1000), torch.bfloat16)
    with count_traffic(weight=case.weight) as traffic:
        randk._triton(case.operands(), *moments(case), CHOICE, STEP, REST)
    expected = split_adamw.bytes_per_element(RANDOM_BF16, torch.bfloat16, torch.float32, density=0.25)
    assert traffic.moved_bytes() == 16000 * expected
