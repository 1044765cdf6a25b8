"""Room for generations that a snapshot still needs: cut to size, given back, left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from memtrain.offload.errors import ExtentStateError
from memtrain.offload.extents import Extent
from memtrain.offload.slab import Slab
from memtrain.offload.spares import SpareRoom
from memtrain.offload.tiers import MemoryStore
from memtrain.planner.actions import Tier

PAGE = 4096


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    with MemoryStore(Tier.HOST, 64 * PAGE) as made:
        yield made


def filled(store: MemoryStore, extent: Extent, value: int) -> None:
    with Slab(max(1, extent.nbytes)) as slab:
        slab.buffer.fill_(value)
        store.write(extent, slab.buffer[: extent.nbytes]).wait()


def value_of(store: MemoryStore, extent: Extent) -> int:
    with Slab(extent.nbytes) as slab:
        store.read(extent, slab.buffer[: extent.nbytes]).wait()
        (found,) = torch.unique(slab.buffer[: extent.nbytes]).tolist()
        return int(found)


def test_each_gets_what_it_has_at_home(store: MemoryStore) -> None:
    home = store.allocate("embedding", 3 * PAGE - 100, dtype="torch.uint8", shape=(3 * PAGE - 100,))
    small = store.allocate("projection", 10)
    room = SpareRoom(store, 5 * PAGE)
    first, second = room.take(home), room.take(small)
    assert (first.name, first.nbytes, first.dtype, first.shape) == (
        "embedding",
        3 * PAGE - 100,
        "torch.uint8",
        (3 * PAGE - 100,),
    )
    assert room.take(home) is None  # one page is left
    filled(store, home, 1)
    filled(store, first, 2)
    filled(store, second, 3)
    assert [value_of(store, one) for one in (home, first, second)] == [1, 2, 3]
    room.give_back(first)
    with pytest.raises(ExtentStateError, match="was freed"):
        value_of(store, first)
    assert room.take(home) is not None


def test_dissolving_leaves_what_is_taken(store: MemoryStore) -> None:
    home = store.allocate("w", PAGE)
    room = SpareRoom(store, 8 * PAGE)
    taken = [room.take(home) for _ in range(3)]
    room.give_back(taken[1])
    filled(store, taken[2], 7)
    assert store.used_bytes == 9 * PAGE
    room.dissolve()
    assert store.used_bytes == 3 * PAGE  # home and two spares
    assert value_of(store, taken[2]) == 7
    filler = store.allocate("all the rest, in two runs at least", 50 * PAGE)
    store.free(taken[0])
    store.free(taken[2])
    store.free(home)
    store.free(filler)
    assert store.used_bytes == 0
    assert store.allocate("everything", 64 * PAGE).arena_offset == 0  # no run was lost


def test_a_lost_write_does_not_pass_for_the_next_generation(store: MemoryStore) -> None:
    """The same tensor, in the same place, for the second time: its old bytes are another generation's."""
    home = store.allocate("w", PAGE)
    room = SpareRoom(store, PAGE)
    first = room.take(home)
    filled(store, first, 1)
    generation = first.generation
    room.give_back(first)
    second = room.take(home)
    assert second.identity == first.identity
    filled(store, second, 1)
    assert second.generation > generation
    (chunk,) = second.chunks.values()
    assert chunk.checksums != first.chunks[0].checksums  # of the same bytes
