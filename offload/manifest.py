"""The table of a resumable arena on disk, so that a later process finds its extents again.

Only what was published is in the table. A process that dies after rewriting an extent leaves the table of
an earlier moment behind; the reader then finds another generation's bytes, and the checksum says so.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from typing import Any

import xxhash

from memtrain.offload.errors import CorruptExtentError, SwapDirectoryError
from memtrain.offload.extents import Chunk, Extent
from memtrain.offload.rundir import ARENA, RunDirectory
from memtrain.planner.actions import Tier

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_TEMPORARY = "manifest.new"


def save(
    run: RunDirectory, arena: int, store_id: str, capacity_bytes: int, extents: Iterable[Extent]
) -> None:
    """Make the arena durable, then the table, under a temporary name until it is whole."""
    table = {
        "version": MANIFEST_VERSION,
        "store_id": store_id,
        "capacity_bytes": capacity_bytes,
        "extents": [_describe(extent) for extent in extents],
    }
    body = json.dumps(table, sort_keys=True, separators=(",", ":"))
    text = json.dumps({"table": body, "checksum": xxhash.xxh3_64_hexdigest(body.encode())})
    os.fsync(arena)
    run.unlink(_TEMPORARY)
    descriptor = run.create(_TEMPORARY)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(_TEMPORARY, MANIFEST, src_dir_fd=run.descriptor, dst_dir_fd=run.descriptor)
    os.fsync(run.descriptor)


def load(run: RunDirectory, capacity_bytes: int) -> tuple[str, list[Extent]]:
    """The store's id and its extents.

    Raises:
        SwapDirectoryError: nothing was saved, or it was made with another capacity or by another version.
        CorruptExtentError: the table is damaged.
    """
    try:
        descriptor = os.open(MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=run.descriptor)
    except OSError as error:
        raise SwapDirectoryError(
            f"{run.path} holds no saved table ({error.strerror}): it was never saved; remove the directory"
        ) from error
    with os.fdopen(descriptor) as file:
        text = file.read()
    try:
        document = json.loads(text)
        intact = xxhash.xxh3_64_hexdigest(document["table"].encode()) == document["checksum"]
        table: dict[str, Any] = json.loads(document["table"])
    except (ValueError, KeyError, TypeError, AttributeError):
        intact, table = False, {}
    if not intact:
        raise CorruptExtentError(f"{run.path / MANIFEST} is damaged: resume from the last checkpoint")
    for name, expected in (("version", MANIFEST_VERSION), ("capacity_bytes", capacity_bytes)):
        if table[name] != expected:
            raise SwapDirectoryError(
                f"{run.path / MANIFEST} has {name} {table[name]}, asked for is {expected}"
            )
    return table["store_id"], [_restore(entry, table["store_id"]) for entry in table["extents"]]


def open_saved_arena(run: RunDirectory, capacity_bytes: int) -> int:
    """Open the arena file of a reopened run. Raises SwapDirectoryError where it is not the file that was
    left.
    """
    try:
        descriptor = os.open(ARENA, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=run.descriptor)
    except OSError as error:
        raise SwapDirectoryError(f"cannot open {run.path / ARENA}: {error.strerror}") from error
    status = os.fstat(descriptor)
    ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
    if not ours or status.st_size != max(capacity_bytes, 4096):
        os.close(descriptor)
        raise SwapDirectoryError(
            f"{run.path / ARENA} is not the arena that was left ({status.st_size} bytes)"
        )
    return descriptor


def _describe(extent: Extent) -> dict[str, Any]:
    return {
        "name": extent.name,
        "arena_offset": extent.arena_offset,
        "nbytes": extent.nbytes,
        "reserved_bytes": extent.reserved_bytes,
        "dtype": extent.dtype,
        "shape": extent.shape,
        "generation": extent.generation,
        "chunks": [
            [c.offset, c.nbytes, c.generation, c.piece_bytes, c.checksums] for c in extent.chunks.values()
        ],
    }


def _restore(entry: dict[str, Any], store_id: str) -> Extent:
    shape = entry["shape"]
    extent = Extent(
        name=entry["name"],
        tier=Tier.NVME,
        store_id=store_id,
        arena_offset=entry["arena_offset"],
        nbytes=entry["nbytes"],
        reserved_bytes=entry["reserved_bytes"],
        dtype=entry["dtype"],
        shape=None if shape is None else tuple(shape),
    )
    for offset, nbytes, generation, piece_bytes, checksums in entry["chunks"]:
        extent.publish(Chunk(offset, nbytes, generation, piece_bytes, tuple(checksums)))
    extent.generation = entry["generation"]
    extent.next_generation = extent.generation + 1
    return extent
