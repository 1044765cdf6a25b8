"""What a snapshot still needs, kept from the updates that would overwrite it.

A snapshot is a list of *parts*: a weight, a record of state, each in memory or on a tier. Its thread copies
them one after the other while training goes on. An update asks before it overwrites:

- what is on a tier is written to a *spare* extent instead, and the old generation stays where it is until it
  has been copied; the next update brings it home. Without room for a spare the update waits, and the part it
  waits for is copied next. A weight that is streamed is updated in its window, which the snapshot never
  reads: only its way back to the tier asks;
- what is in memory has no second place, so the update waits for it. It hardly ever does: nothing in memory
  changes between two updates, and this is copied first.

So there is never a second copy of anything in memory, and on the tier none but the spares, for which room is
reserved beforehand.

The idea of copying while forward and backward leave weights alone is DataStates-LLM's (arXiv 2406.10707);
there everything goes to a second buffer in host memory first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from memtrain.offload.atomic import CheckpointError
from memtrain.offload.gradient_home import Store
from memtrain.offload.spares import SpareRoom, plain_store
from memtrain.offload.store import STALL_SECONDS


class Owner(Hashable, Protocol):
    """What an update overwrites as a whole: a ``Shard`` or a ``StreamedWeight``."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Something that a snapshot copies as a whole."""

    name: str
    owners: frozenset[Owner]
    """Whose updates overwrite it."""
    copy: Callable[[], None]
    extent: Any = None
    """Where it lies on a tier; None in memory."""


class CopyOnWrite:
    """Between the thread that trains and the one that copies. Thread-safe.

    Args:
        spares: room by store.
        stall_seconds: a snapshot that copies nothing for so long while an update waits is given up.
    """

    def __init__(self, spares: Mapping[Any, SpareRoom], *, stall_seconds: float = STALL_SECONDS) -> None:
        self._rooms = dict(spares)
        self._homes: dict[Owner, tuple[Store, Any]] = {}
        """The own extents of what is in a spare."""
        self._returning: dict[Owner, tuple[Store, Any]] = {}
        """Spares that something has left while the snapshot still needed them."""
        self._todo: list[Part] = []
        self._left: dict[Owner, set[Part]] = {}
        """Parts in memory that are not copied, by owner."""
        self._held: dict[Owner, Part] = {}
        """Parts on tiers that are not copied."""
        self._urgent: set[Owner] = set()
        self._stall_seconds = stall_seconds
        self._progress_at = time.monotonic()
        self._changed = threading.Condition()
        self.error: CheckpointError | None = None
        """Why the snapshot was given up from this side."""
        self.waited_seconds = 0.0
        """What updates have waited for snapshots."""
        self.most_spares = 0
        """In use at one time."""

    # the thread that trains -------------------------------------------------------------------

    def before_step(self, owner: Owner) -> None:
        """Return when what the owner has in memory may change: a shard's weights and its record."""
        with self._changed:
            if self._left.get(owner):
                self._wait(owner, lambda: not self._left.get(owner))

    def place(self, owner: Owner, store: Store, extent: Any) -> Any:
        """The extent that the next generation of what is in ``extent`` goes to."""
        with self._changed:
            held, away = self._held.get(owner), self._homes.get(owner)
            needed = held is not None and held.extent is extent
            if away is None and not needed:
                return extent
            if away is not None:
                _, home = away
                if held is not None and held.extent is home:
                    return extent  # the snapshot still needs what is at home
                del self._homes[owner]
                self._returning[owner] = store, extent
                if not needed:
                    self._give_back(owner)
                return home
            if (spare := self._take(store, extent)) is not None:
                self._homes[owner] = store, extent
                return spare
            self._wait(owner, lambda: owner not in self._held)
            return extent

    def settle(self) -> None:
        """Return when everything may be overwritten."""
        with self._changed:
            for owner in [*self._left, *self._held]:
                self._wait(owner, lambda: not self._held and not any(self._left.values()))

    # the thread that copies -------------------------------------------------------------------

    def begin(self, parts: Sequence[Part]) -> None:
        """Keep ``parts`` from now on. The order is that of copying."""
        with self._changed:
            assert not self._todo
            self._todo, self.error = list(parts), None
            self._progress_at = time.monotonic()
            for part in parts:
                for owner in part.owners:
                    if part.extent is None:
                        self._left.setdefault(owner, set()).add(part)
                    else:
                        self._held[owner] = part

    def take(self) -> Part | None:
        """The part to copy next: one that an update waits for, else the first; None at the end.

        Raises:
            CheckpointError: the snapshot was given up.
        """
        with self._changed:
            if self.error is not None:
                raise self.error
            waited_for = (part for part in self._todo if part.owners & self._urgent)
            part = next(waited_for, self._todo[0] if self._todo else None)
            if part is not None:
                self._todo.remove(part)
            return part

    def moved(self) -> None:
        """Note that bytes were copied."""
        self._progress_at = time.monotonic()

    def copied(self, part: Part) -> None:
        """Let go of ``part``."""
        with self._changed:
            self.moved()
            for owner in part.owners:
                if part.extent is None:
                    self._left.get(owner, set()).discard(part)
                elif self._held.pop(owner, None) is not None:
                    self._give_back(owner)
            self._changed.notify_all()

    def end(self) -> None:
        """Let go of everything, however it ended: nothing is read any more."""
        with self._changed:
            self._let_go()
            for owner in list(self._returning):
                self._give_back(owner)

    def close(self) -> list[tuple[Store, Any]]:
        """Give back what is left of the spares, and name the extents that nothing is in any more, which the
        caller frees. What is in a spare stays there."""
        self.end()
        with self._changed:
            for room in self._rooms.values():
                room.dissolve()
            unused = list(self._homes.values())
            self._rooms.clear()
            self._homes.clear()
            return unused

    # inside -----------------------------------------------------------------------------------

    def _take(self, store: Store, extent: Any) -> Any | None:
        room = self._rooms.get(plain_store(store))
        spare = None if room is None else room.take(extent)
        if spare is not None:
            self.most_spares = max(self.most_spares, len(self._homes) + len(self._returning) + 1)
        return spare

    def _give_back(self, owner: Owner) -> None:
        if owner in self._returning:
            store, spare = self._returning.pop(owner)
            self._rooms[plain_store(store)].give_back(spare)

    def _let_go(self) -> None:
        self._todo.clear()
        self._left.clear()
        self._held.clear()
        self._changed.notify_all()

    def _wait(self, owner: Owner, over: Callable[[], bool]) -> None:
        began = time.perf_counter()
        self._urgent.add(owner)
        try:
            while not over():
                patience = self._stall_seconds - (time.monotonic() - self._progress_at)
                if patience <= 0:
                    self.error = CheckpointError(
                        f"a snapshot was given up: it has copied nothing for {self._stall_seconds:.0f} s "
                        f"while the update of {owner.name} waited for it. Check the disk (dmesg)"
                    )
                    self._let_go()
                    return
                self._changed.wait(patience)
        finally:
            self._urgent.discard(owner)
            self.waited_seconds += time.perf_counter() - began
