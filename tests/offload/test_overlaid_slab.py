"""One slab for what blocks keep and for gradients: nobody gets bytes that another one has."""

from __future__ import annotations

import threading

import torch

from memtrain.offload.device import CpuDevice
from memtrain.offload.gradient_slab import GradientSlab
from memtrain.offload.overlaid_slab import OverlaidSlab
from memtrain.offload.staging import SlotCache
from memtrain.planner.actions import Tier
from memtrain.planner.plan import Staging
from tests.offload.test_gradient_slab import address, make

PAGE = 4096
WEIGHT = 360448
"""300 x 300 fp32 in whole pages."""


class Group:
    """What lies in a place."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence

    def may_leave(self) -> bool:
        return False

    def leave(self) -> None:
        raise AssertionError("it has no tier")


def slab_of(kept_bytes: tuple[int, ...], gradient_bytes: int, overlaid_bytes: int) -> OverlaidSlab:
    return OverlaidSlab(
        Staging(kept_bytes=kept_bytes, gradient_slab_bytes=gradient_bytes, overlaid_bytes=overlaid_bytes)
    )


def cache_of(overlaid: OverlaidSlab, offsets: list[int], size: int) -> SlotCache:
    return SlotCache(
        len(offsets), size, "kept", threading.RLock(), CpuDevice(), shared=overlaid, offsets=offsets
    )


def test_places_lie_one_behind_the_other_and_the_slab_is_so_much_shorter() -> None:
    overlaid = slab_of((2 * PAGE, PAGE, 3 * PAGE), 4 * PAGE, 3 * PAGE)
    assert overlaid.kept_offsets == [[0], [2 * PAGE], [3 * PAGE]]
    assert overlaid.slab.nbytes == 7 * PAGE


def test_a_tenant_is_told_of_those_that_overlap_whoever_came_first() -> None:
    overlaid = slab_of((4 * PAGE,), 4 * PAGE, 2 * PAGE)
    there: set[str] = set()

    def let(name: str, begin: int, pages: int) -> object:
        return overlaid.let(begin * PAGE, pages * PAGE, lambda: name in there)

    low, high = let("low", 0, 3), let("high", 3, 3)
    middle = let("middle", 2, 2)
    assert not any(taken() for taken in (low, middle, high))  # type: ignore[operator]
    there.add("middle")
    assert (low(), middle(), high()) == (True, False, True)  # type: ignore[operator]
    there.clear()
    there.add("low")
    assert (low(), middle(), high()) == (False, True, False)  # type: ignore[operator]


def test_a_place_is_not_given_while_a_gradient_lies_there_and_the_other_way_round() -> None:
    model, index = make()
    # Two places of a page each; both gradients' 176 pages lie over the second one.
    overlaid = slab_of((PAGE, PAGE), 2 * WEIGHT, PAGE)
    cache = cache_of(overlaid, [0, PAGE], PAGE)
    slab = GradientSlab(
        index=index,
        tiers=dict.fromkeys(index.shards, Tier.DEVICE),
        slab_bytes=2 * WEIGHT,
        before_overwrite=lambda unit: None,
        overlaid=overlaid,
        latest_first=["2", "1", "0"],
    )
    one, two = Group(1), Group(2)
    first, second = cache.take(one), cache.take(two)
    assert not cache.has_room
    x = torch.randn(8, 300)
    model(x).square().sum().backward()
    inside = range(overlaid.slab.address, overlaid.slab.address + overlaid.slab.nbytes)
    # The last layer's gradient ends where the slab does; the first layer's place is the second group's.
    assert address(model[2].weight.grad) == inside.stop - WEIGHT
    assert address(model[0].weight.grad) not in inside
    expected = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    del two
    second.vacate()
    model(x).square().sum().backward()
    assert address(model[0].weight.grad) == inside.stop - 2 * WEIGHT == second.buffer.data_ptr()
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, model.parameters(), strict=True))
    assert (cache.has_room, cache.is_taken) == (False, True)
    late = Group(3)
    assert cache.try_take(late) is None
    model.zero_grad()
    assert (cache.has_room, cache.is_taken) == (True, False)
    assert cache.take(late) is second
    assert first.occupant is one
    slab.close()
    cache.close()


def test_a_slot_that_is_read_still_keeps_gradients_away() -> None:
    overlaid = slab_of((PAGE,), 2 * PAGE, PAGE)
    cache = cache_of(overlaid, [0], PAGE)
    taken = overlaid.let(0, PAGE, lambda: False)
    group = Group(1)
    slot = cache.take(group)
    view = slot.view(100)
    del group
    assert slot.occupant is None
    assert taken()
    del view
    assert not taken()
    cache.close()


def test_gradients_outlive_the_slab() -> None:
    model, index = make()
    overlaid = slab_of((PAGE,), 2 * WEIGHT, PAGE)
    slab = GradientSlab(
        index=index,
        tiers=dict.fromkeys(index.shards, Tier.DEVICE),
        slab_bytes=2 * WEIGHT,
        before_overwrite=lambda unit: None,
        overlaid=overlaid,
        latest_first=["2", "1", "0"],
    )
    model(torch.randn(8, 300)).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    slab.close()
    assert not overlaid.slab.closed  # it is the executor's
    overlaid.slab.close()
    del overlaid
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, model.parameters(), strict=True))
