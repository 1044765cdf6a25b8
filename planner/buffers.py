"""What is to be given an address: a name, a lifetime and a size; and the file form of MiniMalloc.

The form is comma-separated with the header ``id,lower,upper,size`` and, of a solution, ``offset``: lifetimes
are half-open, any order of columns. Google's minimalloc, idealloc and their benchmark instances use it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("id", "lower", "upper", "size")
OFFSET = "offset"


@dataclass(frozen=True, slots=True)
class Buffer:
    """Bytes that must stay at one address while they live.

    Raises:
        ValueError: it does not live at all, or has no bytes.
    """

    name: str
    start: int
    """First moment of its life: the operation that writes it."""
    end: int
    """First moment at which its bytes may be another's: one after the last operation that reads it."""
    size: int
    """Bytes."""

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ValueError(
                f"buffer {self.name!r} lives from {self.start} to {self.end}: end must be above start "
                "(it is the first moment after its life)"
            )
        if self.size <= 0:
            raise ValueError(
                f"buffer {self.name!r} has {self.size} bytes: leave out what is empty, a size is positive"
            )


class BufferFileError(ValueError):
    """A file of buffers cannot be read; says line, value and remedy."""


@dataclass(frozen=True, slots=True)
class BufferFile:
    """What a file holds."""

    buffers: tuple[Buffer, ...]
    offsets: Mapping[str, int]
    """By name, of the buffers that have one; empty without the column."""


def read_csv(path: str | Path) -> BufferFile:
    """Buffers, in the order of the lines, and the offsets if the file has them.

    Raises:
        BufferFileError: a column or a value is missing, no integer, or senseless; a name stands twice.
        OSError: the file cannot be opened.
    """
    buffers: dict[str, Buffer] = {}
    offsets: dict[str, int] = {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        header = [name.strip() for name in reader.fieldnames or ()]
        _check_header(path, header)
        reader.fieldnames = header
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise BufferFileError(
                    f"{where}: {_cells(row)} values under {len(header)} columns ({','.join(header)}); "
                    "give every column exactly one"
                )
            name = row["id"].strip()
            start, end, size = (_integer(where, row, column) for column in COLUMNS[1:])
            if name in buffers:
                raise BufferFileError(f"{where}: id {name!r} stands on an earlier line; give each its own")
            try:
                buffers[name] = Buffer(name, start, end, size)
            except ValueError as error:
                raise BufferFileError(f"{where}: {error}") from None
            if OFFSET in row:
                offsets[name] = _integer(where, row, OFFSET)
    return BufferFile(tuple(buffers.values()), offsets)


def write_csv(path: str | Path, buffers: Iterable[Buffer], offsets: Mapping[str, int] | None = None) -> None:
    """Write ``buffers``, with ``offsets`` as fifth column if given.

    Raises:
        ValueError: a buffer has no offset; nothing is written.
        OSError: the file cannot be written.
    """
    buffers = list(buffers)
    without = [b.name for b in buffers if offsets is not None and b.name not in offsets]
    if without:
        raise ValueError(f"no offset for buffer {without[0]!r} ({len(without)} in all): pass all or none")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS if offsets is None else (*COLUMNS, OFFSET))
        for b in buffers:
            row = (b.name, b.start, b.end, b.size)
            writer.writerow(row if offsets is None else (*row, offsets[b.name]))


def _check_header(path: str | Path, header: list[str]) -> None:
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise BufferFileError(
            f"{path}, line 1: no column {missing[0]!r} in {','.join(header)!r}; "
            f"the first line must name {','.join(COLUMNS)}, and may name {OFFSET}"
        )
    unknown = [column for column in header if column not in (*COLUMNS, OFFSET)]
    if unknown or len(set(header)) < len(header):
        # MiniMalloc's alignment, gaps and hints would change the answer: they are not silently dropped.
        raise BufferFileError(
            f"{path}, line 1: cannot honour the columns {','.join(header)!r}; "
            f"each of {','.join((*COLUMNS, OFFSET))} once and no others"
        )


def _cells(row: Mapping[str | None, object]) -> int:
    surplus = row.get(None)
    given = sum(1 for column, value in row.items() if column is not None and value is not None)
    return given + (len(surplus) if isinstance(surplus, list) else 0)


def _integer(where: str, row: Mapping[str, str], column: str) -> int:
    try:
        return int(row[column])
    except ValueError:
        raise BufferFileError(
            f"{where}: {column} is {row[column]!r}; write a whole number (of bytes, or a moment in time)"
        ) from None
