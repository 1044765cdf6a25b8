"""Closeness in roundings of the dtype."""

import torch
from torch import Tensor


def close(actual: Tensor, expected: Tensor, *, rounds: float) -> None:
    """Same shape and dtype, and within ``rounds`` roundings of the dtype, relative to the largest number."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.numel():
        limit = rounds * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=limit)
