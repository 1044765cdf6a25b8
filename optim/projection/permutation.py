"""A random permutation of 0..N-1 that nobody stores: the image of an index is computed from a key.

A generalised Feistel network on pairs (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): an
index is written as ``a_count * b + a`` and the two digits take turns in being shifted by a hash of the other.
The pairs cover slightly more than N indices; those that land beyond are sent through again until they do
not. Bijective whatever the hash is, so k different inputs give k different indices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memtrain.optim.storage import RandomKey, random_bits

_ROUNDS = 4
"""Luby and Rackoff: four rounds of a random function cannot be told from a random permutation."""
_WORD = 0xFFFFFFFF
_CHUNK = 1 << 16
"""Indices at a time, so that int64 temporaries stay in the cache."""


def permuted_indices(key: RandomKey, count: int, size: int, device: torch.device) -> Tensor:
    """The images of ``0..count-1`` under the key's permutation of ``0..size-1``, int64 ``[count]``.

    Raises:
        ValueError: count is not in 0..size.
    """
    if not 0 <= count <= size:
        raise ValueError(f"count must be in 0..{size}, got {count}")
    a_count = max(1, math.isqrt(size))
    b_count = -(-size // a_count)
    round_keys = (random_bits(key, _ROUNDS, torch.device("cpu")).long() & _WORD).tolist()
    images = torch.empty(count, dtype=torch.int64, device=device)
    for start in range(0, count, _CHUNK):
        part = images[start : start + _CHUNK]
        index = torch.arange(start, start + len(part), device=device)
        part.copy_(_rounds(index, a_count, b_count, round_keys))
    outside = (images >= size).nonzero().squeeze(1)
    while outside.numel():
        images[outside] = _rounds(images[outside], a_count, b_count, round_keys)
        outside = outside[images[outside] >= size]
    return images


def _rounds(index: Tensor, a_count: int, b_count: int, keys: list[int]) -> Tensor:
    a, b = index % a_count, index // a_count
    for number, key in enumerate(keys):
        if number % 2:
            b = _hash(a, key).add_(b).remainder_(b_count)
        else:
            a = _hash(b, key).add_(a).remainder_(a_count)
    return b * a_count + a


def _hash(value: Tensor, key: int) -> Tensor:
    """Murmur3's finaliser on 32 bits, in int64, whose products wrap around."""
    h = (value ^ key).bitwise_and_(_WORD)
    h.bitwise_xor_(h >> 16).mul_(0x85EBCA6B).bitwise_and_(_WORD)
    h.bitwise_xor_(h >> 13).mul_(0xC2B2AE35).bitwise_and_(_WORD)
    return h.bitwise_xor_(h >> 16)
