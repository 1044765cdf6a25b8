"""The ring of chunks through which gradients leave for a tier and come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from torch import Tensor
from torch import dtype as Dtype

from memtrain.offload.gradient_home import Chunk, OffloadedGradient, Ticket
from memtrain.offload.slab import Ring, Slot


class GradientRing:
    """``slots`` chunks of ``slot_bytes`` under way at once."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self._ring = Ring(slots, slot_bytes)
        self._in_flight: deque[tuple[Slot, Ticket]] = deque()

    @property
    def size_bytes(self) -> int:
        """What the ring occupies."""
        return self._ring.slab.nbytes

    def send(self, home: OffloadedGradient, flat: Tensor) -> None:
        """Start writing a gradient (1-D, contiguous): its memory is free when this returns."""
        for chunk in home.chunks:
            slot = self._slot()
            try:
                _typed(slot, chunk, flat.dtype).copy_(flat[chunk.start : chunk.stop])
                ticket = home.store.write(home.extent, slot.buffer[: chunk.nbytes], chunk.offset)
            except BaseException:
                slot.release()
                raise
            self._in_flight.append((slot, ticket))

    def stream(self, home: OffloadedGradient) -> Iterator[tuple[Chunk, Tensor]]:
        """The gradient's chunks in order, scaled; each is valid until the next is asked for. Reads run ahead
        by as many slots as the ring has."""
        self.drain()  # every slot is free from here on
        value, dtype = home.value, home.parameter.dtype
        waiting = deque(home.chunks)
        reading: deque[tuple[Chunk, Slot, Ticket | None]] = deque()
        try:
            while waiting or reading:
                while waiting and (slot := self._ring.try_acquire()) is not None:
                    chunk = waiting.popleft()
                    reading.append((chunk, slot, None))
                    if not value.zero:
                        ticket = home.store.read(home.extent, slot.buffer[: chunk.nbytes], chunk.offset)
                        reading[-1] = (chunk, slot, ticket)
                chunk, slot, ticket = reading[0]
                typed = _typed(slot, chunk, dtype)
                if ticket is None:
                    typed.zero_()
                else:
                    ticket.wait()
                value.apply(typed)
                yield chunk, typed
                reading.popleft()
                slot.release()
        finally:
            for _, slot, ticket in reading:
                settle(ticket)
                slot.release()

    def _slot(self) -> Slot:
        slot = self._ring.try_acquire()
        while slot is None:
            self._retire()
            slot = self._ring.try_acquire()
        return slot

    def _retire(self) -> None:
        slot, ticket = self._in_flight.popleft()
        try:
            ticket.wait()
        finally:
            slot.release()

    def drain(self) -> None:
        """Wait until every chunk is on its tier. Raises what went wrong."""
        while self._in_flight:
            self._retire()

    def close(self) -> None:
        """Give the memory back. Nothing may be under way."""
        self._ring.close()


def _typed(slot: Slot, chunk: Chunk, dtype: Dtype) -> Tensor:
    return slot.buffer[: (chunk.stop - chunk.start) * dtype.itemsize].view(dtype)


def settle(ticket: Ticket | None) -> None:
    """Wait for a transfer whose outcome no longer matters: another error is on its way already."""
    if ticket is not None:
        try:
            ticket.wait()
        except Exception:
            return
