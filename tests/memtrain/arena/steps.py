"""Steps that ask for blocks, and what can be seen of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memtrain.arena import PlannedAllocator

PAGE = 4096


def block(pages: int, value: int = 1) -> Tensor:
    """So many pages, each byte ``value``."""
    return torch.full((pages * PAGE,), value, dtype=torch.uint8)


def holds(tensor: Tensor, value: int) -> bool:
    """Whether all of it is ``value``; asked of numpy, which asks torch for nothing."""
    return bool((tensor.numpy() == value).all())


def three(sizes: tuple[int, int, int] = (8, 4, 6)) -> list[int]:
    """A step of three requests; the first dies before the third is made. Their addresses."""
    first = block(sizes[0], 1)
    second = block(sizes[1], 2)
    addresses = [first.data_ptr(), second.data_ptr()]
    assert holds(first, 1)
    del first
    third = block(sizes[2], 3)
    assert holds(second, 2)
    assert holds(third, 3)
    return [*addresses, third.data_ptr()]


def go(arena: PlannedAllocator, steps: Sequence[Callable[[], object]]) -> None:
    """One after the other."""
    for step in steps:
        with arena.step():
            step()


def go_under(arena: PlannedAllocator, key: str, steps: Sequence[Callable[[], object]]) -> None:
    """The same with a key."""
    for step in steps:
        with arena.step(key=key):
            step()


def learn(arena: PlannedAllocator, step: Callable[[], object] = three) -> None:
    """Two recordings."""
    go(arena, [step, step])


def resident_pages(address: int, pages: int) -> int:
    vector = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(pages * PAGE), vector) == 0
    return sum(page & 1 for page in vector)
