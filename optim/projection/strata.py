"""A choice of k out of N places that nobody stores: each place is computed from a key and its number.

The places 0..N-1 are cut into k strata of equal length, N/k rounded up or down, and one place is drawn from
each (stratified sampling with one unit a stratum; Cochran, Sampling Techniques, 1977, chapter 5):

    start(i) = floor((i N + shift) / k)
    place(i) = start(i) + floor(word(i) (start(i+1) - start(i)) / 2^32)

The shift, 0..N-1, is drawn as well and turns the strata round the circle of places, so that each place is
taken with probability k/N exactly, whether k divides N or not; of the last stratum, what lies beyond N-1
lies at the beginning. Unlike places drawn freely, two of one stratum are never taken together. What that
buys: chosen places are in order (but for the last), and whether a place is chosen, and as which, follows
from the place alone, so that one pass over memory in order finds both, and the moments in order, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtrain.optim.kernels import native
from memtrain.optim.storage import RandomKey, random_bits

_WORD = 0xFFFFFFFF
_SHIFT_STREAM = 1 << 32
"""Of the key, apart from the places' words: outside of the streams that anything else draws from."""
_MAX_STRATUM = 1 << 29
"""Places, so that in kernels a stratum, the one behind it and a chunk are less than int32's."""


def stratified_indices(key: RandomKey, count: int, size: int, device: torch.device) -> Tensor:
    """Of each of ``count`` strata of ``0..size-1`` one place, int64 ``[count]``, in order but for the last.

    Raises:
        ValueError: count is not in 0..size, or strata are too long.
    """
    if not 0 <= count <= size:
        raise ValueError(f"count must be in 0..{size}, got {count}")
    if not count:
        return torch.empty(0, dtype=torch.int64, device=device)
    check_strata(count, size)
    kernel = native.function("randk", "strata_places") if device.type == "cpu" else None
    if kernel is None:
        return reference(key, count, size, device)
    places = torch.empty(count, dtype=torch.int64, device="cpu")
    kernel(native_strata(key, count, size), native.pointer(places, torch.int64))
    return places


def check_strata(count: int, size: int) -> None:
    """Raises ValueError: strata are too long for kernels."""
    if size // count >= _MAX_STRATUM:
        raise ValueError(f"{count} of {size} places: at least one in {_MAX_STRATUM} is to be chosen")


def reference(key: RandomKey, count: int, size: int, device: torch.device) -> Tensor:
    """The same, plainly."""
    number = torch.arange(count + 1, device=device)
    # i N + shift could overflow.
    start = number * (size // count) + (number * (size % count) + shift(key, size)) // count
    words = random_bits(key, count, device).long() & _WORD
    place = start[:-1] + (words * start.diff() >> 32)
    return torch.where(place < size, place, place - size)


def native_strata(key: RandomKey, count: int, size: int) -> native.Strata:
    """For a C++ kernel."""
    return native.Strata(size, count, shift(key, size), *key.words())


def shift(key: RandomKey, size: int) -> int:
    """By how much the strata are turned, 0..size-1."""
    first, second = key.fold(key.stream + _SHIFT_STREAM).words()
    return (second << 32 | first) * size >> 64
