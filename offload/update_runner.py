"""Updates that have been asked for: begun, finished unit by unit, and what a failure leaves."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from memtrain.offload.device import Device
from memtrain.offload.errors import OffloadError
from memtrain.offload.gradients import GradientStore
from memtrain.offload.optimizer_layout import OptimizerLayout
from memtrain.offload.optimizer_state import RecordStore
from memtrain.offload.overlaid_slab import OverlaidSlab
from memtrain.offload.pipeline import ShardPipeline, Stages
from memtrain.offload.shards import Shard
from memtrain.offload.slab import HighWater, Slot
from memtrain.offload.update import Update
from memtrain.offload.update_slots import UpdateSlots


class WeightHome(Protocol):
    """Where weights are that an update changes."""

    def updating(self, unit: str, replaced: Collection[str]) -> AbstractContextManager[None]:
        """The unit's weights may be changed inside; those of ``replaced`` are overwritten, and not read."""

    def await_updating(self, units: Collection[str], replaced: Collection[str]) -> None:
        """``updating`` will be called of each of ``units`` before its weights are used again."""


class InMemory:
    """Weights that are always there."""

    def await_updating(self, units: Collection[str], replaced: Collection[str]) -> None:
        """Nothing to do."""

    def updating(self, unit: str, replaced: Collection[str]) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()


class UpdateRunner:
    """Owns the ring of update slots and the update that waits.

    Args:
        device: where it is stepped.
        layout, records, gradients: what is stepped.
        weights: has those of a unit there while it is stepped.
        slots, slot_bytes: the ring; 0 slots where no shard moves.
        overlaid: where the ring lies, if the plan has it share memory with the passes.
    """

    def __init__(
        self,
        device: Device,
        layout: OptimizerLayout,
        records: RecordStore,
        gradients: GradientStore,
        weights: WeightHome,
        *,
        slots: int,
        slot_bytes: int,
        overlaid: OverlaidSlab | None = None,
    ) -> None:
        self._index = layout.index
        self._weights = weights
        self._pid = os.getpid()
        self._records = records
        self._update: Update | None = None
        self._streamed: dict[str, list[Shard]] = {}
        """Of the shards that wait, those that need a slot, by unit: ``ensure`` is called before every module
        of a forward pass, and must not walk past the others each time."""
        self._failure: BaseException | None = None
        stages = Stages(
            read=lambda shard, slot: self._pending.read(shard, slot),
            step=self._step,
            write=records.write,
            needs_slot=lambda shard: self._pending.needs_slot(shard),
            incoming=lambda shard: self._pending.incoming(shard),
            outgoing=records.span,
        )
        with ExitStack() as undo:
            self._slots = UpdateSlots(slots, slot_bytes, device, overlaid) if slots else None
            if self._slots is not None:
                undo.callback(self._slots.ring.close)
            self._pipeline = ShardPipeline(self._slots and self._slots.ring, stages, device)
            undo.pop_all()

    @property
    def ring_bytes(self) -> int:
        """What the slots occupy."""
        return 0 if self._slots is None else self._slots.ring.size_bytes

    def high_water(self) -> tuple[HighWater, ...]:
        """What was used of the slots so far; empty where there are none."""
        return () if self._slots is None else (self._slots.ring.high_water("update"),)

    @property
    def holds_tensors(self) -> bool:
        """Whether an update waits that uses gradients which somebody could still overwrite."""
        return self._update is not None and self._update.holds_tensors

    @property
    def waits(self) -> bool:
        """Whether an update was begun that is not done yet."""
        return self._update is not None

    def make_room(self) -> None:
        """Before an update is taken up: whoever shares its slots' memory leaves.

        Raises:
            OffloadError: a transfer failed that was under way there; nothing of the update is done.
        """
        if self._slots is not None:
            self._pipeline.use(self._slots.arrive())

    def begin(self, update: Update, *, ahead: bool) -> None:
        """Take up an update: done when this returns, or, ``ahead``, by ``ensure`` and ``flush``."""
        now: list[Shard] = []
        for unit, shards in self._index.shards.items():
            work = [
                shard for shard in shards if any(piece.name in update.gradients for piece in shard.pieces)
            ]
            # Small gradients stay in memory, where the next zero_grad may overwrite them: use them now.
            now += [shard for shard in work if shard.small]
            if later := [shard for shard in work if not shard.small]:
                update.waiting[unit] = later
        self._streamed = {
            unit: streamed
            for unit, shards in update.waiting.items()
            if (streamed := [shard for shard in shards if update.needs_slot(shard)])
        }

        def start() -> None:
            self._update = update
            self._pipeline.run(now, [])

        self._guarded(start)
        if not update.waiting:
            self._update = None
        elif not ahead:
            self.flush()
        else:
            self._weights.await_updating(update.waiting, update.replaced)
            self._read_ahead()

    def advance(self, update: Update, unit: str, following: list[Shard]) -> None:
        """Do what ``update`` has of ``unit``: of one that grows, and of which nothing waits. Records of
        ``following`` are read ahead. Raises as ``ensure``."""
        self.check_alive()
        shards = [
            shard
            for shard in self._index.shards[unit]
            if any(piece.name in update.gradients for piece in shard.pieces)
        ]

        def work() -> None:
            with self._at_work(update), self._weights.updating(unit, update.replaced):
                self._pipeline.run(shards, following)

        self._guarded(work)

    def read_ahead(self, update: Update, shards: list[Shard]) -> None:
        """Start reading records of ``shards``, which ``advance`` will ask for, as far as slots are free."""

        def work() -> None:
            with self._at_work(update):
                self._pipeline.prefetch(shards)

        self._guarded(work)

    def end(self) -> None:
        """Nothing more comes of an update that grew: give up what was read ahead for it."""
        self._guarded(self._pipeline.forget_ahead)

    def fail(self, error: BaseException) -> None:
        """Weights and state do not belong together any more: all use of them raises from now on."""
        if self._failure is None:
            self._failure = error
            self._pipeline.abandon()

    @contextmanager
    def _at_work(self, update: Update) -> Iterator[None]:
        self._update = update
        try:
            yield
        finally:
            self._update = None

    def ensure(self, unit: str) -> None:
        """Finish the pending update of ``unit``, if there is one, on the calling thread; if not, let the next
        ones be read into slots whose writes have ended meanwhile.

        Raises:
            OffloadError: in a forked child; or an update has failed, now or earlier. The weights of any unit
                may then be those of either step: so every forward pass from then on raises, whatever unit it
                begins with.
        """
        self.check_alive()
        update = self._update
        if update is None:
            return
        if unit not in update.waiting:
            self._read_ahead()
            return

        def finish() -> None:
            shards = update.waiting.pop(unit)
            self._streamed.pop(unit, None)
            with self._weights.updating(unit, update.replaced):
                self._pipeline.run(shards, list(_in_order(update.waiting)))
            update.forget({piece.name for shard in shards for piece in shard.pieces})

        self._guarded(finish)
        if not update.waiting:
            self._update = None

    @torch.no_grad()
    def flush(self) -> None:
        """Finish the pending update, and wait until all state is on its tier."""
        self.check_alive()
        while self._update is not None:
            self.ensure(next(iter(self._update.waiting)))
        self._guarded(self._pipeline.drain)
        if self._slots is not None:
            self._pipeline.use(self._slots.ring)

    def settle(self) -> None:
        """Nothing pending; after a failure, what is on the tiers may still be looked at."""
        if self._failure is None:
            self.flush()

    def borrow(self) -> Slot | None:
        """A slot for other use, which the caller releases; None where no record is on a tier."""
        return None if self._slots is None else self._slots.borrow() or self._pipeline.borrow()

    def close(self) -> None:
        """Finish what is pending, and give the memory back."""
        try:
            self.settle()
        finally:
            if self._slots is not None:
                self._slots.ring.close()
                self._slots = None

    def _step(self, shard: Shard, slot: Tensor | None) -> None:
        self._records.before_step(shard)
        self._pending.step(shard, slot)

    @property
    def _pending(self) -> Update:
        assert self._update is not None
        return self._update

    def _read_ahead(self) -> None:
        """Looks at no more shards than there are slots, and one."""
        if self._streamed:
            self._guarded(lambda: self._pipeline.prefetch(_in_order(self._streamed)))

    def _guarded(self, work: Callable[[], None]) -> None:
        """All that an update changes happens in here: Ctrl-C may come between any two lines."""
        try:
            work()
        except BaseException as error:
            self._failure = error
            self._pipeline.abandon()
            raise

    def check_alive(self) -> None:
        """Raises OffloadError in a forked child, and once an update has failed."""
        if os.getpid() != self._pid:
            raise OffloadError(
                f"the streamed optimizer belongs to process {self._pid}; a forked child may not use it"
            )
        if self._failure is not None:
            raise OffloadError(
                f"an earlier update failed half-way ({self._failure}): weights and state no longer belong "
                f"together. "
                f"Restore the last checkpoint"
            ) from self._failure


def _in_order(shards_of: Mapping[str, list[Shard]]) -> Iterator[Shard]:
    """All units' shards, in forward order."""
    return (shard for shards in shards_of.values() for shard in shards)
