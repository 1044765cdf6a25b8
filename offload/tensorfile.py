"""Safetensors files, written and read tensor by tensor.

The format is eight bytes of header length, a JSON header, and the tensors' bytes one after another. A writer
that holds the tensors, as the library's does, would need all of them in memory; here each is asked for when
its turn comes. Reading does not map the file either: pages of a mapping count as resident for as long as it
lasts.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from memtrain.offload.atomic import CHUNK_BYTES, CheckpointError, CorruptCheckpointError, FileWriter

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def split(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Runs of entries of at most ``shard_bytes``; a larger tensor is a run of its own."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.size_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.size_bytes
    return shards


def write_tensors(
    file: FileWriter,
    entries: Sequence[Entry],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file.

    Args:
        tensors: of ``entries``, in their order; taken one by one, and let go of before the next. A tensor may
            come in contiguous parts, in the order of its elements.
        metadata: text for the header.

    Raises:
        CheckpointError: a dtype that the format does not have.
    """
    file.write(header(entries, metadata))
    source = iter(tensors)
    for entry in entries:
        left_bytes = entry.size_bytes
        while True:
            part = next(source).detach()
            assert (part.dtype, part.nbytes <= left_bytes) == (entry.dtype, True), entry
            if part.nbytes:
                file.write(part.cpu().contiguous().view(-1).view(torch.uint8).numpy())
            left_bytes -= part.nbytes
            del part  # or it would be in memory beside the next one
            if not left_bytes:
                break


def header(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """What a file of ``entries`` begins with; their bytes follow one after another.

    Raises:
        CheckpointError: a dtype that the format does not have.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        if entry.dtype not in _CODES:
            raise CheckpointError(f"{entry}: safetensors files cannot hold this dtype; convert the tensor")
        stop = offset + entry.size_bytes
        table[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors' bytes start aligned, as the format recommends
    return struct.pack("<Q", len(text)) + text


class TensorFile:
    """A safetensors file, open for reading. A context manager.

    Attributes:
        entries: by name.
        metadata: the header's text.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            (length,) = struct.unpack("<Q", self._bytes(8, 0))
            if length > os.fstat(self._descriptor).st_size:
                raise CorruptCheckpointError(
                    f"{path} is no safetensors file: its header is {length} bytes long"
                )
            header = json.loads(self._bytes(length, 8))
        except BaseException:
            self.close()
            raise
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.entries = {
            name: Entry(name=name, dtype=_DTYPES[one["dtype"]], shape=tuple(one["shape"]))
            for name, one in header.items()
        }
        self._offsets = {name: 8 + length + one["data_offsets"][0] for name, one in header.items()}
        self._chunk: Tensor | None = None

    @torch.no_grad()
    def read_into(self, name: str, target: Tensor) -> None:
        """Copy a tensor into one of its dtype and shape, on any device, through a chunk of memory."""
        entry = self.entries[name]
        assert (target.dtype, tuple(target.shape)) == (entry.dtype, entry.shape), entry
        if not target.is_contiguous():
            target.copy_(self.read(name))
            return
        flat, start = target.detach().view(-1), 0
        for part in self.parts(name):
            flat[start : start + part.numel()].copy_(part)
            start += part.numel()

    def parts(self, name: str) -> Iterator[Tensor]:
        """A tensor's elements, flat, a chunk at a time; each is in the memory of the one before.

        Raises:
            CorruptCheckpointError: the file ends before the tensor does.
        """
        entry, offset = self.entries[name], self._offsets[name]
        if self._chunk is None:
            self._chunk = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        step = CHUNK_BYTES // entry.dtype.itemsize * entry.dtype.itemsize
        for start in range(0, entry.size_bytes, step):
            chunk = self._chunk[: min(step, entry.size_bytes - start)]
            self._fill(chunk, offset + start)
            os.posix_fadvise(self._descriptor, offset + start, chunk.numel(), os.POSIX_FADV_DONTNEED)
            yield chunk.view(entry.dtype)

    def read(self, name: str) -> Tensor:
        """A tensor, in memory."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(name, tensor)
        return tensor

    def close(self) -> None:
        """May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _bytes(self, size_bytes: int, offset: int) -> bytes:
        buffer = torch.empty(size_bytes, dtype=torch.uint8)
        self._fill(buffer, offset)
        return buffer.numpy().tobytes()

    def _fill(self, buffer: Tensor, offset: int) -> None:
        view = memoryview(buffer.numpy().data)
        while len(view):
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise CorruptCheckpointError(f"{self.path} ends at byte {offset}: take another checkpoint")
            view, offset = view[count:], offset + count
