"""Room on a tier for generations that a snapshot still needs, reserved beforehand and cut as they come.

Records and weights differ in size by orders of magnitude (an embedding beside a projection), so the room is
one run of pages out of which each gets what it has at home. Where nothing is left for one, its update waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from memtrain.offload.coded import CodedExtent, CodedStore, elsewhere
from memtrain.offload.errors import OffloadError
from memtrain.offload.extents import Extent, FreeList
from memtrain.offload.store import Store
from memtrain.planner.actions import Tier

Place = tuple[Any, Any]
"""A store, coded or not, and an extent of it."""


class SpareRoom:
    """Of one store. For one thread at a time.

    Args:
        store: not a coded one: that is a way to write to the one beneath it.
        nbytes: reserved now, a multiple of a page.

    Raises:
        TierFullError: no room.
    """

    def __init__(self, store: Store, nbytes: int) -> None:
        self._store = store
        self._room = store.allocate("spare extents for snapshots", nbytes)
        self._free = FreeList(nbytes)
        self._leaving: list[Any] = []
        """Given back while the tier, which had stalled, was still moving their bytes."""

    def take(self, like: Any) -> Any | None:
        """A place for the next generation of what is in ``like``, or None where none is free."""
        self._collect()
        home: Extent = _plain(like)
        offset = self._free.allocate(home.reserved_bytes)
        if offset is None:
            return None
        extent = self._store.carve(self._room, offset, home)
        return extent if like is home else elsewhere(like, extent)

    def give_back(self, spare: Any) -> None:
        """What ``take`` gave is not needed any more."""
        self._leaving.append(spare)
        self._collect()

    def dissolve(self) -> None:
        """Give the tier back what is not taken. What is taken is an extent like any other from now on."""
        self._collect()
        self._store.dissolve(self._room, self._free.runs)
        for spare in self._leaving:
            self._store.free(_plain(spare))  # when its transfer ends
        self._leaving.clear()

    def _collect(self) -> None:
        waiting, self._leaving = self._leaving, []
        for spare in waiting:
            extent = _plain(spare)
            coding = isinstance(spare, CodedExtent) and spare.pending
            if coding or not self._store.retire(self._room, extent):
                self._leaving.append(spare)
            else:
                self._free.free(extent.arena_offset - self._room.arena_offset, extent.reserved_bytes)


def plain_store(store: Any) -> Store:
    """The store that has the room: the one beneath, where ``store`` codes."""
    found: Store = store.beneath if isinstance(store, CodedStore) else store
    return found


def reserve_spares(
    records: Iterable[Place], weights: Iterable[Place], spare_bytes: Mapping[Tier, int]
) -> dict[Store, SpareRoom]:
    """Rooms by store, of at most ``spare_bytes`` in each tier, and of no more than all of it could use.

    Args:
        records, weights: what is on tiers, and would be overwritten.

    Raises:
        TierFullError: no room; nothing stays allocated.
        OffloadError: the tier has neither state nor weights, or the bytes are less than its largest record.
    """
    rooms: dict[Store, SpareRoom] = {}
    state, streamed = list(records), list(weights)
    try:
        for tier, limit_bytes in spare_bytes.items():
            here = [place for place in (*state, *streamed) if place[0].tier is tier]
            if not here:
                raise OffloadError(
                    f"spares on {tier.value} were asked for, but no state is kept there, and no weights"
                )
            sizes = [_plain(extent).reserved_bytes for _, extent in here]
            largest = max(sizes[: sum(place[0].tier is tier for place in state)] or sizes)
            if limit_bytes < largest:
                raise OffloadError(
                    f"{limit_bytes} bytes of spares on {tier.value} do not hold a record of {largest} bytes: "
                    f"give at least that, or none"
                )
            store = plain_store(here[0][0])
            rooms[store] = SpareRoom(store, min(limit_bytes // store.alignment * store.alignment, sum(sizes)))
    except BaseException:
        for room in rooms.values():
            room.dissolve()
        raise
    return rooms


def _plain(extent: Any) -> Extent:
    found: Extent = getattr(extent, "inner", extent)
    return found
