"""By how much tensors differ, and where their tokens lie."""

from __future__ import annotations

import math

import pytest
import torch

from memtrain.offload.compare import Mismatch, TwoTokenAxes, difference, fingerprint, token_axis
from memtrain.offload.token_rows import RowAxis


def test_difference_in_parts_of_the_largest_entry() -> None:
    one = torch.tensor([1.0, -4.0, 0.0])
    assert difference(one, one.clone()) == 0.0
    assert difference(one, torch.tensor([1.0, -4.0, 0.5])) == 0.125
    assert 0.0 < difference(one, torch.tensor([1.0, -4.0, -0.0])) < 1e-300  # another bit
    infinite = torch.tensor([-math.inf, 2.0])
    assert difference(infinite, torch.tensor([-math.inf, 1.0])) == 0.5
    assert difference(infinite, torch.tensor([1.0, 2.0])) == math.inf
    assert difference(torch.tensor([math.nan]), torch.tensor([math.nan])) == 0.0
    assert difference(torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0])) == math.inf
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    assert difference(torch.tensor([True]), torch.tensor([True])) == 0.0


def test_what_is_compared_in_pieces_is_compared_to_the_end() -> None:
    """Three pieces and a bit, of a tensor and of rows that do not lie together."""
    one = torch.zeros(2, 30, 4000)
    one[1, 29, 3999] = 2.0
    other = one.clone()
    other[1, 29, 3998] = 0.5
    assert difference(one, one.clone()) == 0.0
    assert difference(one, other) == 0.25
    assert difference(one[:, :29], other[:, :29]) == 0.0
    assert difference(one[:, 1:], other[:, 1:]) == 0.25
    assert fingerprint(one) == fingerprint(one.transpose(1, 2).contiguous().transpose(1, 2))
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one[:, :29]) == fingerprint(other[:, :29])


def test_a_fingerprint_is_of_every_bit_in_its_place() -> None:
    one = torch.tensor([0.0, 1.0, 2.0, math.nan], dtype=torch.bfloat16)
    assert fingerprint(one) == fingerprint(one.clone())
    assert fingerprint(one) != fingerprint(one.flip(0))
    assert fingerprint(one[:1]) != fingerprint(-one[:1])
    assert fingerprint(torch.tensor([True])) != fingerprint(torch.tensor([False]))
    assert fingerprint(torch.ones(2, 3)[:, :1].expand(2, 3)) == fingerprint(torch.ones(2, 3))


def test_axis_of_the_tokens() -> None:
    whole = torch.randn(3, 8, 4)
    assert token_axis(whole, whole[:, :5], 8, 5) == (RowAxis(dim=1), 0.0)
    assert token_axis(whole, whole.clone(), 8, 5) == (None, 0.0)
    rows_first, tokens_first = whole.flatten(0, 1), whole.transpose(0, 1).flatten(0, 1)
    assert token_axis(rows_first, whole[:, :5].flatten(0, 1), 8, 5) == (RowAxis(dim=0), 0.0)
    found = token_axis(tokens_first, tokens_first[: 5 * 3], 8, 5)
    assert found == (RowAxis(dim=0, leading=True), 0.0)


def test_what_is_not_the_same_tensor() -> None:
    whole = torch.randn(3, 8, 8)
    with pytest.raises(TwoTokenAxes, match="2 dimensions"):
        token_axis(whole, whole[:, :5, :5], 8, 5)
    for part in (whole[:, :4], whole[:2], whole[0], whole[:, :5].half()):
        with pytest.raises(Mismatch):
            token_axis(whole, part, 8, 5)
