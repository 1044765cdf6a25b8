"""Slots of the streamed update: in memory of their own, or where passes have theirs.

In the second case everybody else leaves before an update begins, which waits for what is under way there. A
graph that is held beyond its backward cannot leave: the update then has memory of its own for once, and says
so.
"""

from __future__ import annotations

import warnings

from memtrain.offload.device import Device
from memtrain.offload.overlaid_slab import OverlaidSlab, OverlayWarning
from memtrain.offload.slab import Ring, Slot


class UpdateSlots:
    """The ring, and whether it may be used now.

    Args:
        slots, slot_bytes: of the ring.
        device: where shards are stepped.
        overlaid: where the slots lie, if the plan has them share its memory.

    Raises:
        OffloadError: the device refuses the memory.
    """

    def __init__(self, slots: int, slot_bytes: int, device: Device, overlaid: OverlaidSlab | None) -> None:
        self._overlaid = overlaid if overlaid is not None and overlaid.update_offsets else None
        self._has_told = False
        if self._overlaid is None:
            self.ring = Ring(slots, slot_bytes, device=device)
            return
        self._in_use = self._holds
        is_taken = self._overlaid.let(0, slots * slot_bytes, self._in_use)
        self.ring = Ring(
            slots,
            slot_bytes,
            slab=self._overlaid.slab,
            offsets=self._overlaid.update_offsets,
            is_taken=is_taken,
        )

    def _holds(self) -> bool:
        return self.ring.in_use()

    def arrive(self) -> Ring:
        """The ring that an update which begins now may use.

        Raises:
            OffloadError: a transfer failed that somebody had under way in the memory.
        """
        return self.ring if self._clear() else self._apart(self.ring.count)

    def borrow(self) -> Slot | None:
        """A slot elsewhere, while the ring's memory cannot be had; None where it can."""
        return None if self._clear() else self._apart(1).acquire()

    def _clear(self) -> bool:
        if self._overlaid is None:
            return True
        return self._overlaid.clear(0, self.ring.size_bytes, self._in_use)

    def _apart(self, count: int) -> Ring:
        if not self._has_told:
            warnings.warn(
                "a graph is still held when the optimizer needs the memory that the plan gives it after the "
                "last backward; its slots are now elsewhere, which takes more than was planned. Let go of "
                "losses whose backward is not to come (and of retain_graph) before step(), or plan with "
                "options.overlay off",
                OverlayWarning,
                stacklevel=2,
            )
        self._has_told = True
        return Ring(count, self.ring.slot_bytes)
