"""Windows: the memory in which streamed weights are while they are used, a bounded number of units at once.

A unit's weights lie in extents of a tier, one each. Brought into a window, they are read straight to where
the arithmetic uses them, and the parameters' data are views of the window; turned out, the parameters are
left without bytes and the window goes to another unit. Only what has changed is written back, by the
parameters' version counters: what is frozen is never written.

Windows are of one size, or of several (``window_classes.py``): a unit takes turns in the smallest that hold
it, with the other units of that class and with no others. So each class is a cache of its own, and one window
is enough for progress in it: what is larger never waits for what is smaller.

A window is handed on only when its write is on the tier and when nobody but the parameters refers to its
memory. So a view of a weight that somebody keeps costs a window, and never shows another unit's weights.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from memtrain.offload import away
from memtrain.offload.device import Device
from memtrain.offload.errors import OffloadError, WeightWindowError
from memtrain.offload.gradient_home import Ticket
from memtrain.offload.slab import PAGE_BYTES, HighWater, Slab
from memtrain.offload.store import wait_all
from memtrain.offload.weight_units import StreamedUnit, StreamedWeight, Window, references
from memtrain.offload.window_classes import class_of
from memtrain.offload.window_writes import WindowWrites
from memtrain.planner.plan import WindowClass
from memtrain.planner.units import round_up


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowStatistics:
    """What the windows have done so far."""

    windows: int
    """Of all sizes."""
    in_use: int
    peak_in_use: int
    reads: int
    """Units that were read from their tiers."""
    waits: int
    """Of those, units that were needed before they had been read."""
    bytes_read: int
    bytes_written: int


class WindowPool:
    """Windows, and which unit is in which. Thread-safe: CUDA runs backward in threads of its own.

    Args:
        units: in forward order.
        classes: of windows, the smallest first; each unit fits one of them.
        device: where the weights are used.

    Raises:
        OffloadError: the device refuses the memory.
    """

    def __init__(self, units: Sequence[StreamedUnit], classes: Sequence[WindowClass], device: Device) -> None:
        self.units = list(units)
        self.lock = threading.RLock()
        self.writes = WindowWrites(device)
        self.classes = tuple(classes)
        for unit in units:
            unit.window_bytes = classes[class_of(unit.nbytes, classes)].slot_bytes
        self._device = device
        self._closed = False
        self._pid = os.getpid()
        self._clock = 0
        self._reads = self._waits = self._peak = self._bytes_read = 0
        self._peaks = {each.slot_bytes: (0, 0) for each in classes}
        """By size of windows: most units there at once, most bytes of one."""
        with ExitStack() as made:
            sizes = [each.slot_bytes for each in classes for _ in range(each.slots)]
            self._slab = Slab(sum(sizes))
            made.callback(self._slab.close)
            self._slab.populate()
            device.register(self._slab)
            made.callback(device.unregister, self._slab)
            parts = torch.split(self._slab.buffer, sizes)
            self.windows = [
                Window(
                    number=number,
                    buffer=part if device.shares_memory else device.empty(part.numel()),
                    host=part,
                )
                for number, part in enumerate(parts)
            ]
            self._made = made.pop_all()

    # in ---------------------------------------------------------------------------------------

    def use(self, unit: StreamedUnit, *, read: bool = True) -> None:
        """Have the unit's weights in a window when this returns, and count it as the last one used.

        Args:
            read: False leaves anything in a window that is new: the caller overwrites all of it.

        Raises:
            WeightWindowError: every window is in use.
            OffloadError: the tier failed; the weights are still there, or in the window they were in. Or
                this is a forked child, which has no windows.
        """
        self._refuse_child()
        with self.lock:
            self._clock += 1
            unit.touched = self._clock
            if unit.ready:
                return
            try:
                known = read or unit.window is not None
                if unit.window is None:
                    self._occupy(unit, self._claim(unit))
                    if read:
                        self._read(unit)
                self._waits += any(not ticket.done() for ticket in unit.reads)
                self._arrive(unit)
                self._attach(unit, known=known)
            except BaseException:
                self.drop(unit)
                raise

    def _refuse_child(self) -> None:
        """Before any lock, and before anybody touches memory that a child does not inherit."""
        if os.getpid() != self._pid:
            raise OffloadError(
                f"the streamed weights belong to process {self._pid}; a forked child may not use them"
            )

    @contextmanager
    def using(self, units: Sequence[StreamedUnit], bring: Callable[[StreamedUnit], None]) -> Iterator[None]:
        """The units' weights may be used inside, by anybody, and stay.

        Args:
            bring: has one in its window, as ``use`` does.
        """
        held: list[StreamedUnit] = []
        self._refuse_child()
        try:
            for unit in units:
                with self.lock:
                    bring(unit)
                    held.append(unit)
                    unit.users += 1
                    if unit.users == 1:
                        for weight in unit.weights:
                            away.permit(weight.parameter)
            yield
        finally:
            with self.lock:
                for unit in held:
                    unit.users -= 1
                    if unit.users == 0 and not self._closed:
                        for weight in unit.weights:
                            away.forbid(weight.parameter, weight.where)

    def prefetch(self, units: Iterable[StreamedUnit], keep: Iterable[StreamedUnit]) -> bool:
        """Start reading units, in order, as far as there are windows: empty ones, or those of units that are
        neither among them nor in ``keep``. Never waits, never raises what a tier did: ``use`` will. Where one
        size has no window to give, units of others come all the same.

        Returns:
            Whether nothing is left to do for them.
        """
        wanted = list(units)
        staying = {id(unit) for unit in (*keep, *wanted)}
        full: set[int] = set()
        with self.lock:
            for unit in wanted:
                if unit.window is not None or unit.window_bytes in full:
                    continue
                window = self._spare(unit, staying)
                if window is None:
                    full.add(unit.window_bytes)
                    continue
                self._occupy(unit, window)
                try:
                    self._read(unit)
                except OffloadError:
                    self._withdraw(unit)
                    return False
            over = self._device.shares_memory or self._go_on()
            return over and not full

    def _read(self, unit: StreamedUnit) -> None:
        assert unit.window is not None
        self._reads += 1
        for weight in unit.weights:
            unit.reads.append(unit.store.read(weight.extent, unit.window.host[weight.span]))

    def _arrive(self, unit: StreamedUnit) -> None:
        """What the device is given from now on sees the unit's bytes."""
        assert unit.window is not None
        wait_all(unit.reads)
        self._copy_in(unit)
        unit.reads.clear()
        for copy in unit.window.arrivals or ():
            copy.wait()

    def _copy_in(self, unit: StreamedUnit) -> None:
        window = unit.window
        assert window is not None
        if window.arrivals is None and not self._device.shares_memory and unit.reads:
            window.arrivals = []
            for weight in unit.weights:
                part = weight.span
                if weight.extent.nbytes:
                    window.arrivals.append(self._device.copy_in(window.host[part], window.buffer[part]))

    def _go_on(self) -> bool:
        """What has been read starts for the device. Whether that is all there was."""
        reading = [unit for unit in self.units if unit.reads]
        for unit in reading:
            if all(ticket.done() for ticket in unit.reads):
                with suppress(OffloadError):  # it will be raised where the unit is used
                    wait_all(unit.reads)
                    self._copy_in(unit)
        return not reading

    def _occupy(self, unit: StreamedUnit, window: Window) -> None:
        window.unit, unit.window = unit, window
        window.arrivals = None
        unit.touched = self._clock
        self._peak = max(self._peak, sum(one.unit is not None for one in self.windows))
        held, used = self._peaks[unit.window_bytes]
        here = sum(one.unit is not None for one in self._windows_of(unit))
        self._peaks[unit.window_bytes] = max(held, here), max(used, unit.nbytes)

    def _attach(self, unit: StreamedUnit, *, known: bool) -> None:
        window = unit.window
        assert window is not None
        for weight in unit.weights:
            if known:
                self._bytes_read += weight.extent.nbytes
            weight.saved_version = weight.version if known else None
            weight.present = self._view(window, weight)
            away.put(weight.parameter, weight.present)
        unit.ready = True
        storages = {storage._cdata: storage for storage in map(_storage, unit.weights)}
        unit.references = [(storage, 0) for storage in storages.values()]
        unit.references = [(storage, references(storage)) for storage, _ in unit.references]

    def _view(self, window: Window, weight: StreamedWeight) -> Tensor:
        part, empty = window.buffer[weight.span], weight.empty
        if part.device.type == "cpu" and part.numel():
            # A storage of its own, of the parameter's own bytes: that is what torch.save and others look at.
            part = torch.frombuffer(part.numpy(), dtype=torch.uint8)
        return part.view(empty.dtype).as_strided(empty.shape, empty.stride())

    # out --------------------------------------------------------------------------------------

    def send_idle(self, current: StreamedUnit) -> None:
        """Start writing what has changed of units that nobody uses, but for ``current``."""
        with self.lock:
            for window in self.windows:
                other = window.unit
                if other is not None and other is not current and not other.users and not other.writes:
                    self.send(other)

    def send(self, unit: StreamedUnit) -> None:
        """Start writing what has changed of the unit, unless it is being written."""
        with self.lock:
            self.writes.send(unit)

    def settle(self, unit: StreamedUnit) -> None:
        """Wait for what is being written of the unit.

        Raises:
            OffloadError: a write failed; the weight is in the window still, and will be written again.
        """
        with self.lock:
            self.writes.settle(unit)

    def mark(self, unit: StreamedUnit) -> None:
        """All weights of the unit are to be written: what is under way may have been read before a change."""
        with self.lock:
            unit.writes = [(weight, None, ticket) for weight, _, ticket in unit.writes]
            for weight in unit.weights:
                weight.saved_version = None

    def flush(self) -> None:
        """Everything that has changed is on its tier when this returns. Raises the first error."""
        with self.lock:
            errors: list[OffloadError] = []
            for unit in self.units:
                self.send(unit)
            for unit in self.units:
                try:
                    self.writes.clean(unit)
                except OffloadError as error:
                    errors.append(error)
            if errors:
                raise errors[0]

    def turn_out(self, unit: StreamedUnit) -> None:
        """Take the unit's window away, having written what has changed. Raises OffloadError if that fails:
        the unit then stays."""
        with self.lock:
            if unit.window is None:
                return
            if unit.ready:
                self.writes.clean(unit)
            self._withdraw(unit)

    def drop(self, unit: StreamedUnit) -> None:
        """Take the unit's window away and forget what was written there: the tier has what it had."""
        with self.lock:
            if unit.window is not None:
                self._withdraw(unit)

    def _withdraw(self, unit: StreamedUnit) -> None:
        window = unit.window
        assert window is not None
        tickets = [*unit.reads, *(ticket for _, _, ticket in unit.writes)]
        for ticket in tickets:
            _settled(ticket)
        window.lingering += [ticket for ticket in tickets if not ticket.done()]
        window.finish_copies()
        unit.reads.clear()
        unit.writes.clear()
        if unit.ready:
            for weight in unit.weights:
                away.put(weight.parameter, weight.empty)
                weight.present = None
        unit.ready, unit.references = False, []
        unit.window = window.unit = window.arrivals = None

    # which ------------------------------------------------------------------------------------

    def _windows_of(self, unit: StreamedUnit) -> list[Window]:
        """Those that the unit takes turns in."""
        return [window for window in self.windows if window.buffer.numel() == unit.window_bytes]

    def _claim(self, unit: StreamedUnit) -> Window:
        """A window at any price but that of a unit in use: the one least recently used."""
        if (window := self._vacant(unit)) is not None:
            return window
        occupants = self._occupants(unit)
        for other in occupants:
            if other.users or other.viewed:
                continue
            freed = other.window
            assert freed is not None
            self.turn_out(other)
            if not freed.lingering:
                return freed
        for window in self._windows_of(unit):
            if window.unit is None:
                window.await_lingering()
                return window
        raise WeightWindowError(_all_in_use(unit, occupants))

    def _occupants(self, unit: StreamedUnit) -> list[StreamedUnit]:
        """Of the unit's windows, the one least recently used first."""
        found = [window.unit for window in self._windows_of(unit) if window.unit is not None]
        return sorted(found, key=lambda other: other.touched)

    def _vacant(self, unit: StreamedUnit) -> Window | None:
        """A window for the unit that no unit is in, and no transfer uses."""
        for window in self._windows_of(unit):
            window.lingering = [ticket for ticket in window.lingering if not ticket.done()]
            if window.unit is None and not window.lingering:
                return window
        return None

    def _spare(self, unit: StreamedUnit, staying: set[int]) -> Window | None:
        """A window for the unit that costs no waiting."""
        if (window := self._vacant(unit)) is not None:
            return window
        for other in self._occupants(unit):
            if other.users or id(other) in staying or other.reads or other.viewed:
                continue
            if other.dirty and not other.writes:
                try:
                    self.send(other)
                except OffloadError:
                    continue  # it will be raised where the window is needed
            if any(not ticket.done() for _, _, ticket in other.writes):
                continue
            window = other.window
            try:
                self.settle(other)
            except OffloadError:
                continue
            if not other.dirty:
                self._withdraw(other)
                return window
        return None

    def find(self, address: int) -> tuple[StreamedUnit, StreamedWeight] | None:
        """Whose bytes are at ``address`` of the device's memory; None where it is no window's."""
        for window in self.windows:
            offset = address - window.buffer.data_ptr()
            if 0 <= offset < window.buffer.numel():
                unit = window.unit
                if unit is None or not unit.ready:
                    return None
                for weight in unit.weights:
                    if weight.span.start <= offset < weight.span.stop:
                        return unit, weight
                return None
        return None

    def fill(self) -> int:
        """Touch every page of the windows that no unit has; bytes of all windows.

        Raises:
            OffloadError: a transfer that uses a window nobody has any more has stalled.
        """
        with self.lock:
            for window in self.windows:
                window.await_lingering()
                behind = 0 if window.unit is None else round_up(window.unit.nbytes, PAGE_BYTES)
                window.buffer[behind::PAGE_BYTES] = 0
            return self._slab.nbytes

    def statistics(self) -> WindowStatistics:
        """So far."""
        with self.lock:
            return WindowStatistics(
                windows=len(self.windows),
                in_use=sum(window.unit is not None for window in self.windows),
                peak_in_use=self._peak,
                reads=self._reads,
                waits=self._waits,
                bytes_read=self._bytes_read,
                bytes_written=self.writes.bytes_written,
            )

    def high_water(self) -> tuple[HighWater, ...]:
        """The most that was used of the windows of each size, the smallest first."""
        with self.lock:
            return tuple(
                HighWater(
                    name="weights" if number == 0 else "large weights",
                    slots=each.slots,
                    slot_bytes=each.slot_bytes,
                    slots_held=self._peaks[each.slot_bytes][0],
                    bytes_used=self._peaks[each.slot_bytes][1],
                )
                for number, each in enumerate(self.classes)
            )

    def close(self) -> None:
        """Forget what is in the windows, and give their memory back. May be called twice."""
        with self.lock:
            self._closed = True
            for unit in self.units:
                self.drop(unit)
            self.windows.clear()
        self._made.close()


def _storage(weight: StreamedWeight) -> torch.UntypedStorage:
    assert weight.present is not None
    return weight.present.untyped_storage()


def _settled(ticket: Ticket) -> None:
    with suppress(OffloadError):  # another error is on its way, or nobody wants these bytes any more
        ticket.wait()


def _all_in_use(unit: StreamedUnit, occupants: Sequence[StreamedUnit]) -> str:
    running = [other.name for other in occupants if other.users]
    viewed = [other.weights[0].name.rpartition(".")[0] or other.name for other in occupants if other.viewed]
    why = [f"weights of {', '.join(running)} are being used"] if running else []
    why += [f"views of weights of {', '.join(viewed)} are kept by somebody"] if viewed else []
    return (
        f"the weights of {unit.name} have no window of {unit.window_bytes} bytes: all {len(occupants)} are "
        f"taken, for {' and '.join(why)}. Drop such views (detach(), data, graphs made outside the model's "
        "forward), or plan with more weight windows"
    )
