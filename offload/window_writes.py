"""What has changed in a window goes back to its tier: only that, once, and where nobody needs what is there.

Who calls has the lock of the windows (``weight_windows.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from memtrain.offload.device import Device
from memtrain.offload.errors import OffloadError
from memtrain.offload.optimizer_state import Keeper
from memtrain.offload.weight_units import StreamedUnit, StreamedWeight, Window


class WindowWrites:
    """Writes of units that are in windows, and how many bytes that has been.

    Args:
        device: where the windows are.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.keeper: Keeper | None = None
        """Who still needs what is about to be overwritten on the tiers."""
        self.bytes_written = 0

    def send(self, unit: StreamedUnit) -> None:
        """Start writing what has changed of the unit, unless it is being written."""
        window = unit.window
        if window is None or not unit.ready or unit.writes:
            return
        changed = [weight for weight in unit.weights if weight.dirty]
        if not changed:
            return
        self._copy_out(window, changed)
        for weight in changed:
            version = weight.version
            weight.saved_version = None  # until it is there
            if self.keeper is not None:
                weight.extent = self.keeper.place(weight, unit.store, weight.extent)
            ticket = unit.store.write(weight.extent, window.host[weight.span])
            unit.writes.append((weight, version, ticket))

    def _copy_out(self, window: Window, changed: Sequence[StreamedWeight]) -> None:
        if self._device.shares_memory:
            return
        window.finish_copies()
        copies = [
            self._device.copy_out(window.buffer[weight.span], window.host[weight.span])
            for weight in changed
            if weight.extent.nbytes
        ]
        for copy in copies:
            copy.synchronize()

    def settle(self, unit: StreamedUnit) -> None:
        """Wait for what is being written of the unit. Raises the first error; what failed is still dirty."""
        errors: list[OffloadError] = []
        for weight, version, ticket in unit.writes:
            try:
                ticket.wait()
            except OffloadError as error:
                errors.append(error)
                continue
            weight.saved_version = version
            self.bytes_written += weight.extent.nbytes
        # Where the tier has stalled, a write may end later: it uses the window until then.
        unit.writes = [write for write in unit.writes if not write[2].done()]
        if errors:
            raise errors[0]

    def clean(self, unit: StreamedUnit) -> None:
        """Everything of the unit is on its tier when this returns. Raises as ``settle``."""
        self.settle(unit)  # may have begun before the last change
        self.send(unit)
        self.settle(unit)
