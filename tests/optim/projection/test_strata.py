"""The keyed choice behind columns, rows and randk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.optim.projection.strata import reference, shift, stratified_indices
from memtrain.optim.storage import RandomKey, random_bits

CPU = torch.device("cpu")


def key(step=0):
    return RandomKey(seed=3, parameter=1, step=step)


def by_hand(key, count, size):
    """The definition in Python's integers, which cannot overflow."""
    places, turn = [], shift(key, size)
    for i, word in enumerate(random_bits(key, count).tolist()):
        start, end = ((each * size + turn) // count for each in (i, i + 1))
        places.append((start + ((word % 2**32) * (end - start) >> 32)) % size)
    return places


@settings(derandomize=True, max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(1, 700), step=st.integers(0, 1000))
def test_one_place_of_each_stratum_and_none_twice(data, size, step):
    count = data.draw(st.integers(1, size))
    places = stratified_indices(key(step), count, size, CPU).tolist()
    assert places == by_hand(key(step), count, size)
    assert places == reference(key(step), count, size, CPU).tolist()
    assert len(set(places)) == count
    assert places[:-1] == sorted(places[:-1])


@pytest.mark.parametrize(("count", "size"), [(1000, 2**38 + 1), (2**20 - 1, 2**34)])
def test_large_sizes_do_not_overflow(count, size):
    """The products i N and word * length, which int64 does not always hold."""
    for choose in (stratified_indices, reference):
        assert choose(key(), count, size, CPU).tolist() == by_hand(key(), count, size)


def test_strata_beyond_the_kernels_are_refused():
    with pytest.raises(ValueError, match="3 of 1099511627776 places: at least one in 536870912"):
        stratified_indices(key(), 3, 2**40, CPU)


@pytest.mark.parametrize("count", [100, 300, 999])
def test_every_place_is_taken_as_often(count):
    """Under 400 keys a place is taken 400 count/1000 times on average, binomially."""
    taken = torch.zeros(1000)
    for step in range(400):
        taken[stratified_indices(key(step), count, 1000, CPU)] += 1
    share = count / 1000
    assert float(taken.mean()) == pytest.approx(400 * share)
    # The variance of 1,000 such counts is within a quarter of theory's; neighbours exclude one another.
    assert float(taken.var()) == pytest.approx(400 * share * (1 - share), rel=0.25)


def test_both_ends_have_the_probability_of_the_middle():
    """Strata that did not turn would take place 0 of 4 in 3 with 5/6 not 3/4: four standard errors."""
    hits = torch.zeros(4)
    for step in range(4000):
        hits[stratified_indices(key(step), 3, 4, CPU)] += 1
    assert float((hits / 4000 - 0.75).abs().max()) < 4 * (0.75 * 0.25 / 4000) ** 0.5


def test_neighbours_are_taken_together_less_often_than_by_chance():
    """Of a stratum of ten one is taken: a pair lies in two strata one time in ten, and is then taken with
    1/100. 999 pairs under 400 keys: 400 expected; five standard deviations are 100."""
    together = 0
    for step in range(400):
        chosen = torch.zeros(1000, dtype=torch.bool)
        chosen[stratified_indices(key(step), 100, 1000, CPU)] = True
        together += int((chosen[1:] & chosen[:-1]).sum())
    assert abs(together - 400) < 100


def test_places_are_these_for_ever():
    """Checkpoints rely on it: moments of a run that is resumed belong to these entries."""
    assert stratified_indices(key(), 5, 23, CPU).tolist() == [4, 10, 13, 17, 0]


@pytest.mark.parametrize("count", [-1, 11])
def test_counts_outside_are_refused(count):
    with pytest.raises(ValueError, match=r"count must be in 0..10"):
        stratified_indices(key(), count, 10, CPU)
    assert stratified_indices(key(), 0, 10, CPU).tolist() == []
