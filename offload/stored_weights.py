"""A model's weights on their way to a tier, before there is a plan: an extent for each, filled in pieces.

Never more than two pieces are in memory here, however large the tensor; whoever makes the pieces (a file that
is read, a generator that draws) goes on while the one before is written. The extents are what weights are
streamed from: each one parameter, whole and contiguous, and coded where that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from memtrain.offload import codec as coding
from memtrain.offload.codec import Codec
from memtrain.offload.coded import CodedExtent, CodedStore, CodedTicket
from memtrain.offload.errors import OffloadError
from memtrain.offload.extents import Extent, reserved
from memtrain.offload.slab import PAGE_BYTES, Slab
from memtrain.offload.store import Store, Ticket, wait_all
from memtrain.offload.tensorfile import Entry

PIECE_BYTES = 8 << 20
"""One write: the size that saturates the disks measured for the tiers. Whole segments, where it is coded."""
assert PIECE_BYTES % coding.SEGMENT_BYTES == 0
_PIECES = 2  # one is filled, one is written


def room_bytes(entries: Iterable[Entry], codec: Codec | None = None) -> int:
    """What a store needs for all of ``entries``, in whole pages; coded, at most."""
    sizes = (entry.size_bytes for entry in entries)
    rooms = sizes if codec is None else (coding.room_bytes(codec, size) for size in sizes)
    return sum(reserved(room, PAGE_BYTES) for room in rooms)


class StoredWeights:
    """Weights on a tier, by the name that their model has for them. A context manager.

    Args:
        store: where they go. It is closed with this.
        codec: how they are coded on their way; None: they are not. Whoever streams them needs the same.
    """

    def __init__(self, store: Store, codec: Codec | None = None) -> None:
        self.store, self.codec = store, codec
        self._coded: CodedStore | None = None
        """From the first use to ``finish``: its memory is another one's while weights are streamed."""
        self._extents: dict[str, Extent | CodedExtent] = {}
        self._slab: Slab | None = None
        """Memory of the pieces, from the first write to ``finish``."""
        self._tickets: list[Ticket | CodedTicket | None] = [None] * _PIECES
        self._turn = 0

    @property
    def extents(self) -> Mapping[str, Extent | CodedExtent]:
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
        store: Any = self._open()
        extent = store.allocate(
            f"weight {entry.name}", entry.size_bytes, dtype=str(entry.dtype), shape=entry.shape
        )
        try:
            offset = 0
            for piece in self._filled(entry.dtype, parts):
                if offset + piece.numel() <= extent.nbytes:
                    self._tickets[self._turn] = store.write(extent, piece, offset)
                offset += piece.numel()
            if offset != extent.nbytes:
                raise OffloadError(f"{entry} has {extent.nbytes} bytes, {offset} were given for it")
        except BaseException:
            store.free(extent)
            raise
        self._extents[entry.name] = extent

    def read(self, name: str) -> Tensor:
        """A weight in memory of its own. Raises OffloadError as ``Ticket.wait`` does."""
        extent = self._extents[name]
        known = extent.inner if isinstance(extent, CodedExtent) else extent
        assert known.dtype is not None
        assert known.shape is not None
        buffer = Slab(max(1, extent.nbytes)).buffer[: extent.nbytes]
        if extent.nbytes:
            store: Any = self._open()
            store.read(extent, buffer).wait()
        return buffer.view(getattr(torch, known.dtype.removeprefix("torch."))).view(known.shape)

    def drop(self, name: str) -> None:
        """Give a weight's room back."""
        store: Any = self._open()
        store.free(self._extents.pop(name))

    def take_back(self, extents: Mapping[str, Extent | CodedExtent]) -> None:
        """Weights that have been lent, or that somebody else has written to the store."""
        self._extents.update(extents)

    def finish(self) -> None:
        """Wait until everything is on the tier, and give back the memory of pieces, and of coding. Raises
        TierIOError."""
        under_way = [ticket for ticket in self._tickets if ticket is not None]
        self._tickets = [None] * _PIECES
        try:
            wait_all(under_way)
        finally:
            if self._slab is not None:
                self._slab.close()
                self._slab = None
            self._close_coded()

    def close(self) -> None:
        """Close the store. May be called twice."""
        self._close_coded()
        self.store.close()

    def _open(self) -> Store | CodedStore:
        """Where weights go."""
        if self.codec is None:
            return self.store
        if self._coded is None:
            self._coded = CodedStore(self.store, self.codec)
        return self._coded

    def _close_coded(self) -> None:
        if self._coded is not None:
            self._coded.close()
            self._coded = None

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
