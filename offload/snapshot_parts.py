"""What a snapshot consists of: which bytes go to which place of which file, and how each part is copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from memtrain.offload.atomic import CheckpointError
from memtrain.offload.copy_on_write import CopyOnWrite, Part
from memtrain.offload.gradient_home import Store
from memtrain.offload.gradient_ring import settle
from memtrain.offload.placed import PlacedFile, SnapshotWriter, byte_views, settle_window
from memtrain.offload.shards import Shard
from memtrain.offload.snapshot import Session, state_files, weights_of, write_small_files
from memtrain.offload.snapshot_weights import WEIGHT_INDEX, weight_files
from memtrain.offload.store import PIECE_BYTES
from memtrain.offload.tensorfile import Entry, header

_COPY_BYTES = 8 << 20  # between two looks at the window, and of a tensor that is on another device


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a tensor's bytes go."""

    file: str
    offset: int


class _SmallFiles:
    """Notes small files down, as ``write_small_files`` gives them, for a writer that comes later."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.copies: list[Path] = []

    def write_text(self, name: str, text: str) -> None:
        self.texts[name] = text

    def copy(self, source: Path) -> None:
        self.copies.append(source)


@dataclass(kw_only=True)
class SnapshotContents:
    """A session as it was when ``gather`` looked: what is small by value, the rest as parts to copy."""

    small: _SmallFiles
    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    """Of the files that parts are copied to."""
    staging: Tensor
    parts: list[Part] = field(default_factory=list)
    files: dict[str, PlacedFile] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of all files together, without those that are copied from the model's folder."""
        texts = sum(len(text.encode()) for text in self.small.texts.values())
        return sum(self.sizes.values()) + texts

    def write(self, writer: SnapshotWriter, keeper: CopyOnWrite) -> None:
        """Copy every part to its file."""
        for name, size_bytes in self.sizes.items():
            self.files[name] = PlacedFile(name, writer.open(name), size_bytes)
        for name, text in self.headers.items():
            self.files[name].write(text, 0)
        while (part := keeper.take()) is not None:
            part.copy()
            settle_window(self.files.values())
            keeper.copied(part)

    def finish(self, writer: SnapshotWriter) -> None:
        """Make the files durable, verify them, and add the small ones."""
        buffer = memoryview(self.staging.numpy().data)
        for name, file in self.files.items():
            writer.note(name, file.close(buffer))
        for name, text in self.small.texts.items():
            writer.write_text(name, text)
        for source in self.small.copies:
            writer.copy(source)

    def abandon(self) -> None:
        """Close the files. May be called twice."""
        for file in self.files.values():
            file.abandon()

    def put(self, place: _Place, start_bytes: int, data: Any) -> None:
        """Bytes of a tensor, from ``start_bytes`` of it on, to their place."""
        self.files[place.file].write(data, place.offset + start_bytes)


def gather(
    session: Session,
    progress: dict[str, Any],
    source_folder: Path | None,
    staging: Tensor,
    moved: Callable[[], None],
) -> SnapshotContents:
    """Note what a checkpoint of ``session`` consists of. No update may be pending, and every change of a
    streamed weight is on its tier.

    Args:
        staging: memory for records on their way.
        moved: called whenever bytes have moved.

    Raises:
        CheckpointError: something cannot be stored.
        WeightsWrittenError: a weight was written since the update that left half of its master in a record.
    """
    session.optimizer.check_masters()  # weights and records are of one step, or nothing is noted
    small = _SmallFiles()
    weights = weight_files(session.model, weights_of(session))
    write_small_files(small, session, progress, source_folder)
    if weights.index is not None:
        small.texts[WEIGHT_INDEX] = weights.index
    state = state_files(session)
    headers = {name: header(entries, weights.metadata[name]) for name, entries in weights.files.items()}
    headers |= {name: header(entries) for name, entries in state.items()}
    entries = {**weights.files, **state}
    places = dict(_places(entries, headers))
    contents = SnapshotContents(
        small=small,
        headers=headers,
        sizes={name: len(headers[name]) + sum(e.size_bytes for e in entries[name]) for name in entries},
        staging=staging,
    )
    parts = [
        *_weight_parts(contents, session, weights.tensors, places, moved),
        *_record_parts(contents, session, places, moved),
    ]
    # What is in memory first: for that an update would have to wait.
    contents.parts += [part for part in parts if part.extent is None]
    contents.parts += [part for part in parts if part.extent is not None]
    return contents


def _places(
    files: Mapping[str, Sequence[Entry]], headers: Mapping[str, bytes]
) -> Iterator[tuple[tuple[str, str], _Place]]:
    """By kind of file (weights or state) and entry."""
    for name, entries in files.items():
        kind, offset = name.partition("-")[0].partition(".")[0], len(headers[name])
        for entry in entries:
            yield (kind, entry.name), _Place(file=name, offset=offset)
            offset += entry.size_bytes


# -- weights -----------------------------------------------------------------------------------------------


def _weight_parts(
    contents: SnapshotContents,
    session: Session,
    tensors: Mapping[str, Tensor],
    places: Mapping[tuple[str, str], _Place],
    moved: Callable[[], None],
) -> Iterator[Part]:
    """Parameters as they lie in memory, or on the tier from which they are streamed. Buffers, which a forward
    pass may change, are copied now."""
    index, streamer = session.optimizer.index, weights_of(session)
    streamed = {} if streamer is None else {id(w.parameter): w for w in streamer.extents()}
    homes = {} if streamer is None else streamer.extents()
    shards_of = {
        id(parameter): frozenset(shard for shard, _ in index.pieces.get(name, ()))
        for name, parameter in index.parameters.items()
    }
    parameters = dict(session.model.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        parameter, place = parameters.get(name), places["model", name]
        if (weight := streamed.get(id(tensor))) is not None:
            store, extent = homes[weight]
            whole = [_Range(start=0, stop=extent.nbytes, place=place)]
            copy = _copy_tier(contents, store, extent, extent.nbytes, whole, moved)
            yield Part(name=name, owners=frozenset([weight]), copy=copy, extent=extent)
            continue
        kept = parameter is tensor or (
            parameter is not None and streamer is None and parameter.data_ptr() == tensor.data_ptr()
        )
        yield Part(
            name=name,
            owners=shards_of.get(id(parameter), frozenset()) if kept else frozenset(),
            copy=_copy_weight(contents, name, tensor if kept else tensor.detach().clone(), place, moved),
        )


def _copy_weight(
    contents: SnapshotContents, name: str, tensor: Tensor, place: _Place, moved: Callable[[], None]
) -> Callable[[], None]:
    version = tensor._version

    def copy() -> None:
        for start, data in byte_views(tensor, _COPY_BYTES):
            contents.put(place, start, data)
            settle_window(contents.files.values())
            moved()
        if tensor._version != version:
            raise CheckpointError(
                f"{name} was changed in place while a snapshot of it was being written: call wait() on the "
                f"checkpointer before changing weights; what was complete before is untouched"
            )

    return copy


# -- state -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Range:
    """Bytes of a record that go to a file."""

    start: int
    stop: int
    place: _Place


def _record_parts(
    contents: SnapshotContents,
    session: Session,
    places: Mapping[tuple[str, str], _Place],
    moved: Callable[[], None],
) -> Iterator[Part]:
    """A part for each shard that has state, in the order of updates."""
    optimizer = session.optimizer
    records = optimizer.records
    for shard in optimizer.index.all_shards():
        ranges = _ranges(session, shard, places)
        if not ranges:
            continue
        home = records.home(shard)
        if home is None:
            record = records.memory(shard, None)
            yield Part(
                name=shard.name, owners=frozenset([shard]), copy=_copy_memory(contents, record, ranges, moved)
            )
        else:
            yield Part(
                name=shard.name,
                owners=frozenset([shard]),
                copy=_copy_tier(contents, *home, optimizer.layout.shards[shard].record_bytes, ranges, moved),
                extent=home[1],
            )


def _ranges(session: Session, shard: Shard, places: Mapping[tuple[str, str], _Place]) -> list[_Range]:
    """Of a shard's record, what belongs to a checkpoint: not padding, nor parameters without state yet."""
    optimizer, found = session.optimizer, []
    layout, records = optimizer.layout.shards[shard], optimizer.records
    for piece in shard.pieces:
        for tensor in records.stored(piece.name):
            nbytes = tensor.bytes_for(piece.shape)
            before = tensor.start_of(piece) * tensor.dtype.itemsize
            start = layout.state_offset(piece, tensor.key)
            place = places["optimizer", f"{piece.name}/{tensor.key}"]
            place = _Place(file=place.file, offset=place.offset + before)
            if nbytes:
                found.append(_Range(start=start, stop=start + nbytes, place=place))
    return found


def _copy_memory(
    contents: SnapshotContents, record: Tensor, ranges: Sequence[_Range], moved: Callable[[], None]
) -> Callable[[], None]:
    def copy() -> None:
        for one in ranges:
            for start, data in byte_views(record[one.start : one.stop], _COPY_BYTES):
                contents.put(one.place, start, data)
                settle_window(contents.files.values())
                moved()

    return copy


def read_bytes(store: Store) -> int:
    """How much of an extent is read at once: whole pieces, about ``PIECE_BYTES``."""
    return max(1, PIECE_BYTES // store.piece_bytes) * store.piece_bytes


def _copy_tier(
    contents: SnapshotContents,
    store: Store,
    extent: Any,
    record_bytes: int,
    ranges: Sequence[_Range],
    moved: Callable[[], None],
) -> Callable[[], None]:
    """Read an extent piece by piece, one ahead, and write what of each piece belongs to a file. Bytes of a
    piece are verified by the store before they are handed on."""
    piece = read_bytes(store)

    def copy() -> None:
        starts = range(0, record_bytes, piece)
        slots = [contents.staging[:piece], contents.staging[piece : 2 * piece]]
        tickets: list[Any] = []

        def read(number: int) -> None:
            if number < len(starts):
                buffer = slots[number % 2][: min(piece, record_bytes - starts[number])]
                tickets.append(store.read(extent, buffer, starts[number]))

        try:
            read(0)
            for number, start in enumerate(starts):
                read(number + 1)
                tickets.pop(0).wait()
                moved()
                data = slots[number % 2]
                for one in ranges:
                    low, high = max(one.start, start), min(one.stop, start + piece, record_bytes)
                    if low < high:
                        part = data[low - start : high - start].numpy()
                        contents.put(one.place, low - one.start, part)
                settle_window(contents.files.values())
        finally:
            for ticket in tickets:
                settle(ticket)

    return copy
