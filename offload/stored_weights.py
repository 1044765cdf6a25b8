"""A model's weights on their way to a tier, before there is a plan: an extent for each, filled in pieces.

Never more than two pieces are in memory here, however large the tensor; whoever makes the pieces (a file that
is read, a generator that draws) goes on while the one before is written. The extents are what weights are
streamed from: each one parameter, whole and contiguous.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType, TracebackType

import torch
from torch import Tensor

from memtrain.offload.errors import OffloadError
from memtrain.offload.extents import Extent, reserved
from memtrain.offload.slab import PAGE_BYTES, Slab
from memtrain.offload.store import Store, Ticket, wait_all
from memtrain.offload.tensorfile import Entry

PIECE_BYTES = 8 << 20
"""One write: the size that saturates the disks measured for the tiers."""
_PIECES = 2  # one is filled, one is written


def room_bytes(entries: Iterable[Entry]) -> int:
    """What a store needs for all of ``entries``, in whole pages."""
    return sum(reserved(entry.size_bytes, PAGE_BYTES) for entry in entries)


class StoredWeights:
    """Weights on a tier, by the name that their model has for them. A context manager.

    Args:
        store: where they go. It is closed with this.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._extents: dict[str, Extent] = {}
        self._slab: Slab | None = None
        """Memory of the pieces, from the first write to ``finish``."""
        self._tickets: list[Ticket | None] = [None] * _PIECES
        self._turn = 0

    @property
    def extents(self) -> Mapping[str, Extent]:
        """Of every weight that was put here."""
        return MappingProxyType(self._extents)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a weight that is in memory; it may change when this has returned. Raises as ``put_parts``."""
        self.put_parts(Entry(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape)), [tensor])

    @torch.no_grad()
    def put_parts(self, entry: Entry, parts: Iterable[Tensor]) -> None:
        """Write a weight whose elements come in ``parts``, one after another, and are converted to its dtype.

        Raises:
            TierFullError: the store has no room.
            TierIOError: a write failed, of this weight or an earlier one.
            OffloadError: the weight was written before, or has another number of elements than the parts.
        """
        if entry.name in self._extents:
            raise OffloadError(f"{entry.name} was written before: write each weight once")
        extent = self.store.allocate(
            f"weight {entry.name}", entry.size_bytes, dtype=str(entry.dtype), shape=entry.shape
        )
        try:
            offset = 0
            for piece in self._filled(entry.dtype, parts):
                if offset + piece.numel() <= extent.nbytes:
                    self._tickets[self._turn] = self.store.write(extent, piece, offset)
                offset += piece.numel()
            if offset != extent.nbytes:
                raise OffloadError(f"{entry} has {extent.nbytes} bytes, {offset} were given for it")
        except BaseException:
            self.store.free(extent)
            raise
        self._extents[entry.name] = extent

    def read(self, name: str) -> Tensor:
        """A weight in memory of its own. Raises OffloadError as ``Ticket.wait`` does."""
        extent = self._extents[name]
        assert extent.dtype is not None
        assert extent.shape is not None
        buffer = Slab(max(1, extent.nbytes)).buffer[: extent.nbytes]
        if extent.nbytes:
            self.store.read(extent, buffer).wait()
        return buffer.view(getattr(torch, extent.dtype.removeprefix("torch."))).view(extent.shape)

    def drop(self, name: str) -> None:
        """Give a weight's room back."""
        self.store.free(self._extents.pop(name))

    def take_back(self, extents: Mapping[str, Extent]) -> None:
        """Weights that have been lent, or that somebody else has written to the store."""
        self._extents.update(extents)

    def finish(self) -> None:
        """Wait until everything is on the tier, and give the pieces' memory back. Raises TierIOError."""
        under_way = [ticket for ticket in self._tickets if ticket is not None]
        self._tickets = [None] * _PIECES
        try:
            wait_all(under_way)
        finally:
            if self._slab is not None:
                self._slab.close()
                self._slab = None

    def close(self) -> None:
        """Close the store. May be called twice."""
        self.store.close()

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _filled(self, dtype: torch.dtype, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pieces that are full of the parts' elements, the last one perhaps less."""
        piece, filled = self._piece(), 0
        room = PIECE_BYTES // dtype.itemsize
        for part in parts:
            rest = part.detach().reshape(-1)
            while rest.numel():
                if filled == room:
                    yield piece
                    piece, filled = self._piece(), 0
                count = min(room - filled, rest.numel())
                piece.view(dtype)[filled : filled + count].copy_(rest[:count])
                filled, rest = filled + count, rest[count:]
        if filled:
            yield piece[: filled * dtype.itemsize]

    def _piece(self) -> Tensor:
        """Memory of the piece whose turn it is, when its write is over."""
        if self._slab is None:
            self._slab = Slab(_PIECES * PIECE_BYTES)
        self._turn = (self._turn + 1) % _PIECES
        ticket, self._tickets[self._turn] = self._tickets[self._turn], None
        if ticket is not None:
            ticket.wait()
        return self._slab.buffer[self._turn * PIECE_BYTES : (self._turn + 1) * PIECE_BYTES]
