"""Bytes of state, worked out by hand, and against the optimizers themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.planner.optimizer_bytes import OptimizerRule, ParameterSpec, StateBytes, state_bytes


def spec(shape: tuple[int, ...], element_bytes: int = 2, trainable: bool = True) -> ParameterSpec:
    dtype = {2: "bfloat16", 4: "float32"}[element_bytes]
    return ParameterSpec(name="p", shape=shape, dtype=dtype, element_bytes=element_bytes, trainable=trainable)


def test_adamw_by_hand() -> None:
    found = state_bytes([spec((10, 30))], OptimizerRule.ADAMW)
    assert found == StateBytes(weights=600, gradients=600, moments=2 * 600 + 4, masters=0)
    assert found.total == 2404
    with_masters = state_bytes([spec((10, 30))], OptimizerRule.ADAMW, master_weights=True)
    assert with_masters == StateBytes(weights=600, gradients=600, moments=2 * 1200 + 4, masters=1200)
    # A weight in fp32 is its own master.
    full = state_bytes([spec((10, 30), 4)], OptimizerRule.ADAMW, master_weights=True)
    assert full == StateBytes(weights=1200, gradients=1200, moments=2404, masters=0)


def test_the_others_by_hand() -> None:
    assert state_bytes([spec((10, 30))], OptimizerRule.SGD_MOMENTUM).moments == 600
    # A row of 10 and a column of 30 moments, twice over for the two matrices of a 3-D weight.
    assert state_bytes([spec((2, 10, 30))], OptimizerRule.ADAFACTOR).moments == 2 * (10 + 30) * 2 + 4
    assert state_bytes([spec((30,))], OptimizerRule.ADAFACTOR).moments == 60 + 4
    # 5000 elements: two bytes each, and 20 blocks of 256 with two scales of 4 bytes.
    assert state_bytes([spec((50, 100))], OptimizerRule.ADAM_8BIT).moments == 2 * 5000 + 2 * 20 * 4
    assert state_bytes([spec((4095,))], OptimizerRule.ADAM_8BIT).moments == 2 * 4 * 4095


def test_frozen_parameters_have_weights_alone() -> None:
    for rule in OptimizerRule:
        found = state_bytes([spec((64, 128), trainable=False)], rule, master_weights=True)
        assert found == StateBytes(weights=2 * 64 * 128, gradients=0, moments=0, masters=0)


def test_a_shape_must_make_sense() -> None:
    with pytest.raises(ValueError, match="shape"):
        spec((3, -1))


OPTIMIZERS = {
    OptimizerRule.ADAMW: lambda p: torch.optim.AdamW(p, lr=1e-3),
    OptimizerRule.SGD_MOMENTUM: lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    OptimizerRule.ADAFACTOR: lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(list(OPTIMIZERS)),
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rules_are_what_torch_allocates(
    rule: OptimizerRule, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = OPTIMIZERS[rule](parameters)
    optimizer.step()
    state = (value for values in optimizer.state.values() for value in values.values())
    allocated = sum(value.nbytes for value in state if isinstance(value, torch.Tensor))
    specs = [spec(shape, dtype.itemsize) for shape in shapes]
    assert state_bytes(specs, rule).moments == allocated
