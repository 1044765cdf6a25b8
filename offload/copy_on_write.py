"""What a snapshot still needs, kept from the updates that would overwrite it.

A snapshot is a list of *parts*: a weight, a record in memory, a record on a tier. Its thread copies them one
after the other while training goes on. An update asks before it overwrites:

- a record on a tier is written to a *spare* extent instead, and the old generation stays where it is until it
  has been copied; the next update brings the record home. Without a spare the update waits, and the part it
  waits for is copied next;
- what is in memory has no second place, so the update waits for it. It hardly ever does: nothing in memory
  changes between two updates, and this is copied first.

So there is never a second copy of anything in memory, and on the tier none but the spares, whose number is
given beforehand.

The idea of copying while forward and backward leave weights alone is DataStates-LLM's (arXiv 2406.10707);
there everything goes to a second buffer in host memory first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from memtrain.offload.atomic import CheckpointError
from memtrain.offload.gradient_home import Store
from memtrain.offload.shards import Shard
from memtrain.offload.store import STALL_SECONDS


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Something that a snapshot copies as a whole."""

    name: str
    shards: frozenset[Shard]
    """Whose updates overwrite it."""
    copy: Callable[[], None]
    extent: Any = None
    """Where it lies on a tier; None in memory."""


class Records(Protocol):
    """``optimizer_state.RecordStore``."""

    def home(self, shard: Shard) -> tuple[Store, Any] | None: ...


class CopyOnWrite:
    """Between the thread that trains and the one that copies. Thread-safe.

    Args:
        spares: extents by store, each as large as any record there.
        stall_seconds: a snapshot that copies nothing for so long while an update waits is given up.
    """

    def __init__(
        self, records: Records, spares: Mapping[Store, Sequence[Any]], *, stall_seconds: float = STALL_SECONDS
    ) -> None:
        self._records = records
        self._idle = {store: list(extents) for store, extents in spares.items()}
        self._homes: dict[Shard, tuple[Store, Any]] = {}
        """The own extents of records that are in a spare."""
        self._returning: dict[Shard, tuple[Store, Any]] = {}
        """Spares that a record has left while the snapshot still needed them."""
        self._todo: list[Part] = []
        self._left: dict[Shard, set[Part]] = {}
        """Parts in memory that are not copied, by shard."""
        self._held: dict[Shard, Part] = {}
        """Parts on tiers that are not copied."""
        self._urgent: set[Shard] = set()
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

    def before_step(self, shard: Shard) -> None:
        """Return when weights of the shard and its record in memory may change."""
        with self._changed:
            if self._left.get(shard):
                self._wait(shard, lambda: not self._left.get(shard))

    def place(self, shard: Shard, extent: Any) -> Any:
        """The extent that the record's next generation goes to."""
        with self._changed:
            held, away = self._held.get(shard), self._homes.get(shard)
            needed = held is not None and held.extent is extent
            if away is None and not needed:
                return extent
            if away is not None:
                store, home = away
                if held is not None and held.extent is home:
                    return extent  # the snapshot still needs what is at home
                del self._homes[shard]
                if needed:
                    self._returning[shard] = store, extent
                else:
                    self._idle[store].append(extent)
                return home
            if (taken := self._take(shard)) is not None:
                self._homes[shard] = taken[0], extent
                return taken[1]
            self._wait(shard, lambda: shard not in self._held)
            return extent

    def settle(self) -> None:
        """Return when everything may be overwritten."""
        with self._changed:
            for shard in [*self._left, *self._held]:
                self._wait(shard, lambda: not self._held and not any(self._left.values()))

    # the thread that copies -------------------------------------------------------------------

    def begin(self, parts: Sequence[Part]) -> None:
        """Keep ``parts`` from now on. The order is that of copying."""
        with self._changed:
            assert not self._todo
            self._todo, self.error = list(parts), None
            self._progress_at = time.monotonic()
            for part in parts:
                for shard in part.shards:
                    if part.extent is None:
                        self._left.setdefault(shard, set()).add(part)
                    else:
                        self._held[shard] = part

    def take(self) -> Part | None:
        """The part to copy next: one that an update waits for, else the first; None at the end.

        Raises:
            CheckpointError: the snapshot was given up.
        """
        with self._changed:
            if self.error is not None:
                raise self.error
            waited_for = (part for part in self._todo if part.shards & self._urgent)
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
            for shard in part.shards:
                if part.extent is None:
                    self._left.get(shard, set()).discard(part)
                elif self._held.pop(shard, None) is not None:
                    self._give_back(shard)
            self._changed.notify_all()

    def end(self) -> None:
        """Let go of everything, however it ended: nothing is read any more."""
        with self._changed:
            self._let_go()
            for shard in list(self._returning):
                self._give_back(shard)

    def close(self) -> list[tuple[Store, Any]]:
        """Extents that no record is in any more; the caller frees them."""
        self.end()
        with self._changed:
            unused = [(store, spare) for store, spares in self._idle.items() for spare in spares]
            unused += self._homes.values()
            self._idle.clear()
            self._homes.clear()
            return unused

    # inside -----------------------------------------------------------------------------------

    def _take(self, shard: Shard) -> tuple[Store, Any] | None:
        place = self._records.home(shard)
        if place is None or not self._idle.get(place[0]):
            return None
        store, spare = place[0], self._idle[place[0]].pop()
        store.discard(spare, 0, spare.nbytes)  # another record's bytes, of another length
        spare.name = f"optimizer state of {shard.name}, in a spare extent"
        used = len(self._homes) + len(self._returning) + 1
        self.most_spares = max(self.most_spares, used)
        return store, spare

    def _give_back(self, shard: Shard) -> None:
        if shard in self._returning:
            store, spare = self._returning.pop(shard)
            self._idle[store].append(spare)

    def _let_go(self) -> None:
        self._todo.clear()
        self._left.clear()
        self._held.clear()
        self._changed.notify_all()

    def _wait(self, shard: Shard, over: Callable[[], bool]) -> None:
        began = time.perf_counter()
        self._urgent.add(shard)
        try:
            while not over():
                patience = self._stall_seconds - (time.monotonic() - self._progress_at)
                if patience <= 0:
                    self.error = CheckpointError(
                        f"a snapshot was given up: it has copied nothing for {self._stall_seconds:.0f} s "
                        f"while the update of {shard.name} waited for it. Check the disk (dmesg)"
                    )
                    self._let_go()
                    return
                self._changed.wait(patience)
        finally:
            self._urgent.discard(shard)
            self.waited_seconds += time.perf_counter() - began
