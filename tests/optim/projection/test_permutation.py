"""The keyed permutation behind columns, rows and randk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.optim.projection.permutation import permuted_indices
from memtrain.optim.storage import RandomKey

CPU = torch.device("cpu")


def key(step=0):
    return RandomKey(seed=3, parameter=1, step=step)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(size=st.integers(1, 700), step=st.integers(0, 1000))
def test_it_is_a_permutation_of_any_size(size, step):
    images = permuted_indices(key(step), size, size, CPU)
    assert sorted(images.tolist()) == list(range(size))


def test_fewer_indices_are_a_prefix():
    every = permuted_indices(key(), 100, 100, CPU)
    assert torch.equal(permuted_indices(key(), 40, 100, CPU), every[:40])


def test_places_are_taken_evenly():
    """100 of 1,000 indices under 400 keys: each is taken 40 times on average, binomially."""
    taken = torch.zeros(1000)
    for step in range(400):
        taken[permuted_indices(key(step), 100, 1000, CPU)] += 1
    assert float(taken.mean()) == 40
    # Variance 400 * .1 * .9 = 36; the variance of 1,000 such counts is within 20% of it.
    assert 29 < float(taken.var()) < 43


def test_neighbours_are_not_taken_together():
    """A bad round function would move whole rows: neighbours (i, i+1) would be taken together too often."""
    together = 0
    for step in range(400):
        chosen = torch.zeros(1000, dtype=torch.bool)
        chosen[permuted_indices(key(step), 100, 1000, CPU)] = True
        together += int((chosen[1:] & chosen[:-1]).sum())
    # 999 pairs * .1 * .0991 * 400 = 3,960 expected; five standard deviations are about 320.
    assert abs(together - 3960) < 320


@pytest.mark.parametrize("count", [-1, 11])
def test_counts_outside_are_refused(count):
    with pytest.raises(ValueError, match=r"count must be in 0..10"):
        permuted_indices(key(), count, 10, CPU)
