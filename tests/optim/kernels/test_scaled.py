"""Squares of rows and columns, and the scaled step: compiled beside plain."""

import pytest
import torch

from memtrain.optim.kernels.scaled import add_scaled_, reference_squares, reference_step_, squares_of

SHAPES = [(1, 1), (0, 5), (3, 401), (200, 7), (131, 1030), (33, 33)]  # the last: rows or columns?


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squares_are_those_of_fp64(shape, by_rows, dtype):
    gradient = (1e-8 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = gradient.double().square().sum(-1 if by_rows else -2, keepdim=True).float()
    torch.testing.assert_close(squares_of(gradient, by_rows=by_rows), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(reference_squares(gradient, by_rows=by_rows), expected, rtol=1e-5, atol=0)


def test_squares_do_not_depend_on_the_number_of_threads():
    gradient = torch.randn(301, 500, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(squares_of(gradient, by_rows=False))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by", ["rows", "columns", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_step_is_the_plain_one(shape, by, dtype):
    generator = torch.Generator().manual_seed(1)
    weight, gradient = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    sizes = {"rows": (shape[0], 1), "columns": (1, shape[1]), "one": (1, 1)}
    scaling = torch.rand(sizes[by], generator=generator)
    expected = weight.double() * 0.9 - scaling.double() * gradient.to(dtype).double()
    for step in (add_scaled_, reference_step_):
        found = weight.clone()
        version = found._version
        step(found, gradient.to(dtype), scaling, keep=0.9)
        assert found._version > version or not found.numel()
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
