"""Snapshots of several ranks that survive the loss of some: parity over their bytes, spread over the ranks.

Of ``n`` ranks any ``m`` may lose all they have, their snapshot and their share of the parity, and are rebuilt
bit for bit from the others. Each rank keeps beside its own snapshot of ``S`` bytes parity of ``m / (n - m)``
times the largest, where a copy on another rank would be ``m`` times.

There are ``n`` stripes, each a codeword of ``n`` blocks: stripe ``s`` has its ``m`` parity blocks on ranks
``s .. s + m - 1`` (modulo ``n``) and one block of data of each other rank. So a rank's snapshot, its files in
order of names, is cut into ``n - m`` blocks, one for each stripe in which it holds no parity, and no rank
holds two blocks of one codeword. The code is zfec's Reed-Solomon code (``k = n - m`` of ``n``).

After REFT (arXiv 2310.12670), with parity of any strength instead of one exclusive-or.

Index letters: n ranks, m losses survived, k = n - m, s stripe, r rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from memtrain.offload.atomic import (
    MANIFEST,
    CheckpointError,
    CorruptCheckpointError,
    manifest_text,
    publish,
    verify,
)
from memtrain.offload.errors import OffloadError
from memtrain.offload.parity_ranks import DEADLINE_SECONDS, Ranks, Trial
from memtrain.offload.placed import PlacedFile, SnapshotWriter, settle_window
from memtrain.planner.units import round_up

SEGMENT_BYTES = 1 << 20
"""Moved and coded at once: each rank holds up to n of them."""
_META = "parity.json"
_BLOCK = "parity-{:05d}"
_VERSION = 1


class SnapshotLostError(CheckpointError):
    """More ranks have lost their snapshot than the parity can make up for."""


class MissingZfecError(OffloadError):
    """The erasure code's library is not installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stripes:
    """Which rank has what."""

    ranks: int
    losses: int

    def __post_init__(self) -> None:
        if not 1 <= self.losses < self.ranks <= 256:
            raise ValueError(
                f"losses must be at least 1 and less than the number of ranks, which is at most 256: got "
                f"{self.losses} of {self.ranks}"
            )

    @property
    def data_blocks(self) -> int:
        """Of a codeword, and of a rank's snapshot."""
        return self.ranks - self.losses

    def block_bytes(self, largest_bytes: int) -> int:
        """Of each block, where the largest snapshot has so many bytes; the others are filled up."""
        return round_up(-(-largest_bytes // self.data_blocks), 4096)

    def holders(self, stripe: int) -> list[int]:
        """Ranks with the stripe's parity, in order of its blocks."""
        return [(stripe + number) % self.ranks for number in range(self.losses)]

    def members(self, stripe: int) -> list[int]:
        """Ranks with the stripe's data, in order of its blocks."""
        holders = self.holders(stripe)
        return [rank for rank in range(self.ranks) if rank not in holders]

    def place(self, stripe: int, rank: int) -> int:
        """Number of the block that ``rank`` has in the codeword."""
        members = self.members(stripe)
        return members.index(rank) if rank in members else len(members) + self.holders(stripe).index(rank)

    def own_block(self, stripe: int, rank: int) -> int:
        """Which block of its snapshot a member has in the stripe."""
        return sum(rank in self.members(earlier) for earlier in range(stripe))


def protect(
    folder: Path | str,
    open_writer: Callable[[], AbstractContextManager[SnapshotWriter]],
    *,
    losses: int = 1,
    group: dist.ProcessGroup | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> int:
    """Write this rank's share of the parity over the snapshots of all ranks. Every rank calls it.

    Args:
        folder: this rank's snapshot, complete.
        open_writer: opens the folder that the share goes to: ``lambda: publish(path)``, or
            ``lambda: held.publish(name, retire=False)``.
        losses: how many ranks may be lost.
        deadline_seconds: how long another rank may be silent.

    Returns:
        Bytes of the share.

    Raises:
        CorruptCheckpointError: the snapshot is damaged.
        CheckpointError: the share cannot be written.
        MissingZfecError: the extra ``parity`` is not installed.
        PeerError: any of this happened to another rank, which is named; or one is gone.

        Where one rank raises, all do, and shares of earlier snapshots are what they were; unless publishing,
        the last act of all, failed: then other ranks have the new ones, and this is to be called again.
    """
    ranks, trial = Ranks(group, deadline_seconds), Trial()
    stripes = Stripes(ranks=ranks.count, losses=losses)
    code = trial.run(lambda: _Code(stripes))
    files = trial.run(lambda: verify(Path(folder)), {})
    ranks.agree(trial)
    stream = _Stream(Path(folder), files)
    manifests = ranks.gather(stream.manifest)
    block_bytes = stripes.block_bytes(max(_total(text) for text in manifests))
    meta = {
        "version": _VERSION,
        "losses": losses,
        "block_bytes": block_bytes,
        "manifests": manifests,
    }
    written = 0
    with ExitStack() as opened:
        writer = trial.run(lambda: opened.enter_context(open_writer()))
        for stripe in range(stripes.ranks):
            if ranks.rank in stripes.members(stripe):
                start = stripes.own_block(stripe, ranks.rank) * block_bytes
                _send_block(ranks, trial, stream, start, block_bytes, stripes.holders(stripe))
            else:
                _write_parity(ranks, trial, code, stripe, block_bytes, writer)
                written += block_bytes
            ranks.agree(trial)
        trial.run(lambda: writer.write_text(_META, json.dumps(meta)))
        ranks.agree(trial)
        trial.run(opened.pop_all().close)
    ranks.agree(trial)
    return written


def _write_parity(
    ranks: Ranks, trial: Trial, code: _Code, stripe: int, block_bytes: int, writer: SnapshotWriter
) -> None:
    """This rank's block of the stripe's parity, out of what the members send."""
    stripes, name = code.stripes, _BLOCK.format(stripe)
    number, members = stripes.place(stripe, ranks.rank), stripes.members(stripe)
    with ExitStack() as closing:
        file = trial.run(lambda: PlacedFile(name, writer.open(name), block_bytes))
        if file is not None:
            closing.callback(file.abandon)
        for offset, length in _segments(block_bytes):
            blocks = ranks.receive(length, members)
            trial.run(partial(_encode, code, blocks, number, file, offset))
        trial.run(lambda: writer.note(name, file.close(_buffer())))


def _encode(code: _Code, blocks: list[bytes], number: int, file: PlacedFile, offset: int) -> None:
    file.write(code.encode(blocks, number), offset)
    settle_window([file])


def _send_block(
    ranks: Ranks, trial: Trial, source: _Stream, start: int, block_bytes: int, to: Sequence[int]
) -> None:
    """A block of ``source``; zeros where it cannot be read, which ``agree`` will tell."""
    for offset, length in _segments(block_bytes):
        ranks.send(trial.run(partial(source.read, start + offset, length), bytes(length)), to)


def restore(
    folder: Path | str,
    parity: Path | str | None,
    *,
    group: dist.ProcessGroup | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> list[int]:
    """Rebuild the snapshots that ranks have lost. Every rank calls it, also those that lost nothing.

    Args:
        folder: where this rank's snapshot is, or is to be; one that is damaged, or is not the one that the
            parity was made of, counts as lost and is replaced.
        parity: this rank's share of the parity; None or a damaged one counts as lost too. Call ``protect``
            afterwards to have it again.
        deadline_seconds: how long another rank may be silent.

    Returns:
        The ranks whose snapshots were rebuilt.

    Raises:
        SnapshotLostError: on every rank, naming those that are lost: too many. Nothing is changed.
        CorruptCheckpointError: what was rebuilt is not what was lost; nothing is published.
        CheckpointError: what was rebuilt cannot be written.
        PeerError: any of this happened to another rank, which is named; or one is gone.
    """
    ranks, trial, folder = Ranks(group, deadline_seconds), Trial(), Path(folder)
    meta = _read_meta(Path(parity)) if parity is not None else None
    manifest = _read_whole(folder)
    found = [json.loads(text) for text in ranks.gather(json.dumps([manifest, meta]))]
    known = _most_usable(found)
    if known is None:
        raise SnapshotLostError("no rank has its share of the parity: nothing can be rebuilt")
    if len(known["manifests"]) != len(found):
        raise SnapshotLostError(
            f"the parity is of {len(known['manifests'])} ranks, there are {len(found)}: restart with as many"
        )
    stripes = Stripes(ranks=len(found), losses=known["losses"])
    whole = {r for r, (text, _) in enumerate(found) if text == known["manifests"][r]}
    sharing = {r for r, (_, one) in enumerate(found) if one == known}
    lost = [r for r in range(len(found)) if r not in whole]
    _refuse_too_many(stripes, whole, sharing, lost)
    code = trial.run(lambda: _Code(stripes))
    ranks.agree(trial)
    stream = _Stream(folder, json.loads(manifest)["files"]) if ranks.rank in whole and manifest else None
    for one in lost:
        if one == ranks.rank:
            _rebuild(ranks, folder, code, known, whole, sharing)
        else:
            share = Path(parity) if parity is not None else None
            _help(ranks, one, stripes, known, whole, sharing, stream, share)
    return lost


# -- rebuilding --------------------------------------------------------------------------------------------


def _most_usable(found: list[tuple[str | None, dict[str, Any] | None]]) -> dict[str, Any] | None:
    """The parity that most ranks have a share or the snapshot of: ranks that were killed one after the other
    may have shares of two. The same on every rank."""

    def use(meta: dict[str, Any]) -> int:
        texts = meta["manifests"]
        whole = sum(bool(text == expected) for (text, _), expected in zip(found, texts, strict=False))
        return whole + sum(one == meta for _, one in found)

    return max((one for _, one in found if one is not None), key=use, default=None)


def _refuse_too_many(stripes: Stripes, whole: set[int], sharing: set[int], lost: list[int]) -> None:
    for one in lost:
        for stripe in range(stripes.ranks):
            if one in stripes.members(stripe):
                left = _sources(stripes, stripe, whole, sharing)
                if len(left) < stripes.data_blocks:
                    raise SnapshotLostError(
                        f"the snapshots of ranks {lost} are lost, and {sorted(sharing)} of {stripes.ranks} "
                        f"ranks have their share of the parity, which makes up for {stripes.losses}: take a "
                        f"checkpoint on disk"
                    )


def _sources(stripes: Stripes, stripe: int, whole: set[int], sharing: set[int]) -> list[int]:
    """Ranks that still have their block of the stripe, data first; as many as are needed."""
    members = [rank for rank in stripes.members(stripe) if rank in whole]
    holders = [rank for rank in stripes.holders(stripe) if rank in sharing]
    return (members + holders)[: stripes.data_blocks]


def _rebuild(
    ranks: Ranks, folder: Path, code: _Code, meta: dict[str, Any], whole: set[int], sharing: set[int]
) -> None:
    """This rank's snapshot, out of what ``_help`` of the others sends."""
    stripes, rank, block_bytes, trial = code.stripes, ranks.rank, meta["block_bytes"], Trial()
    expected = json.loads(meta["manifests"][rank])["files"]
    with ExitStack() as opened:
        writer = trial.run(lambda: opened.enter_context(publish(folder)))
        files: dict[str, PlacedFile] = {}
        closing = opened.enter_context(ExitStack())
        for name in sorted(expected):
            trial.run(partial(_open, files, closing, writer, name, expected[name]["size_bytes"]))
        for stripe in (s for s in range(stripes.ranks) if rank in stripes.members(s)):
            sources = _sources(stripes, stripe, whole, sharing)
            numbers = [stripes.place(stripe, source) for source in sources]
            start = stripes.own_block(stripe, rank) * block_bytes
            for offset, length in _segments(block_bytes):
                blocks = ranks.receive(length, sources)
                decode = partial(code.decode, blocks, numbers, stripes.place(stripe, rank))
                trial.run(partial(_put_range, files, expected, start + offset, length, decode))
            ranks.agree(trial)
        trial.run(lambda: _seal(folder, files, expected, writer))
        if trial.error is None:
            trial.run(opened.pop_all().close)
        ranks.agree(trial)


def _open(
    files: dict[str, PlacedFile], closing: ExitStack, writer: SnapshotWriter, name: str, size_bytes: int
) -> None:
    files[name] = PlacedFile(name, writer.open(name), size_bytes)
    closing.callback(files[name].abandon)


def _put_range(
    files: dict[str, PlacedFile],
    expected: dict[str, Any],
    start: int,
    length: int,
    make: Callable[[], bytes],
) -> None:
    data = memoryview(make())
    for name, place, low, high in _cut(expected, start, length):
        files[name].write(data[low:high], place)
    settle_window(files.values())


def _seal(
    folder: Path, files: dict[str, PlacedFile], expected: dict[str, Any], writer: SnapshotWriter
) -> None:
    for name, file in files.items():
        entry = file.close(_buffer())
        if entry != expected[name]:
            raise CorruptCheckpointError(
                f"{name} of {folder} cannot be rebuilt: its checksum is not that of what was lost. Take "
                f"a checkpoint on disk"
            )
        writer.note(name, entry)


def _help(
    ranks: Ranks,
    lost: int,
    stripes: Stripes,
    meta: dict[str, Any],
    whole: set[int],
    sharing: set[int],
    stream: _Stream | None,
    parity: Path | None,
) -> None:
    """Send what ``lost`` needs of this rank."""
    rank, block_bytes, trial = ranks.rank, meta["block_bytes"], Trial()
    for stripe in (s for s in range(stripes.ranks) if lost in stripes.members(s)):
        if rank in _sources(stripes, stripe, whole, sharing):
            if rank in stripes.members(stripe):
                assert stream is not None
                source, start = stream, stripes.own_block(stripe, rank) * block_bytes
            else:
                assert parity is not None
                name = _BLOCK.format(stripe)
                source, start = _Stream(parity, {name: {"size_bytes": block_bytes}}), 0
            _send_block(ranks, trial, source, start, block_bytes, [lost])
        ranks.agree(trial)
    ranks.agree(trial)


# -- bytes -------------------------------------------------------------------------------------------------


class _Code:
    """zfec's, for one layout."""

    def __init__(self, stripes: Stripes) -> None:
        try:
            import zfec
        except ImportError as error:
            raise MissingZfecError("parity over ranks needs zfec: pip install 'memtrain[parity]'") from error
        self.stripes = stripes
        self._encoder = zfec.Encoder(stripes.data_blocks, stripes.ranks)
        self._decoder = zfec.Decoder(stripes.data_blocks, stripes.ranks)

    def encode(self, blocks: list[bytes], number: int) -> bytes:
        """Block ``number`` of the codeword whose data are ``blocks``."""
        (found,) = self._encoder.encode(blocks, (number,))
        return bytes(found)

    def decode(self, blocks: list[bytes], numbers: list[int], wanted: int) -> bytes:
        """Data block ``wanted``, from any ``data_blocks`` of the codeword's blocks."""
        return bytes(self._decoder.decode(blocks, numbers)[wanted])


class _Stream:
    """The files of a folder, one after another in order of names, and zeros behind them."""

    def __init__(self, folder: Path, files: dict[str, dict[str, Any]]) -> None:
        self._folder, self._files = folder, files
        self.manifest = manifest_text(files)

    def read(self, start: int, length: int) -> bytes:
        """``length`` bytes from ``start``. Raises CheckpointError."""
        found = bytearray(length)
        for name, place, low, high in _cut(self._files, start, length):
            try:
                with (self._folder / name).open("rb", buffering=0) as file:
                    view = memoryview(found)[low:high]
                    while len(view):
                        count = os.preadv(file.fileno(), [view], place)
                        if not count:
                            raise CorruptCheckpointError(f"{self._folder / name} ends at byte {place}")
                        view, place = view[count:], place + count
            except OSError as error:
                raise CheckpointError(
                    f"{self._folder / name} cannot be read: {error.strerror}", error.errno
                ) from error
        return bytes(found)


def _cut(files: dict[str, dict[str, Any]], start: int, length: int) -> Iterator[tuple[str, int, int, int]]:
    """``(name, offset in the file, low, high)``: which part of the range each file has."""
    begins = 0
    for name in sorted(files):
        ends = begins + files[name]["size_bytes"]
        low, high = max(begins, start), min(ends, start + length)
        if low < high:
            yield name, low - begins, low - start, high - start
        begins = ends


def _total(manifest: str) -> int:
    return sum(entry["size_bytes"] for entry in json.loads(manifest)["files"].values())


def _segments(block_bytes: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, block_bytes, SEGMENT_BYTES):
        yield offset, min(SEGMENT_BYTES, block_bytes - offset)


def _buffer() -> memoryview:
    return memoryview(bytearray(SEGMENT_BYTES))


def _read_whole(folder: Path) -> str | None:
    """The manifest of a snapshot that is whole."""
    try:
        verify(folder)
        return (folder / MANIFEST).read_text()
    except (CheckpointError, OSError):
        return None


def _read_meta(parity: Path) -> dict[str, Any] | None:
    """What is to be known of the parity, where this rank's share of it is whole."""
    try:
        verify(parity)
        meta: dict[str, Any] = json.loads((parity / _META).read_text())
    except (CheckpointError, OSError):
        return None
    return meta if meta.get("version") == _VERSION else None
