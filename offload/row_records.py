"""A table on a tier, or its state, by groups of rows: only groups that are used are read and written.

A *group* is as many rows as fit ``GROUP_BYTES``, one at least: their state tensors one behind the other,
together a whole number of pages, and one chunk of the table's extent with a generation and a checksum of its
own. A group that was never written holds what a new optimizer has, and takes no transfer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.gradient_ring import settle
from memtrain.offload.shards import PAGE_BYTES
from memtrain.offload.store import Store, Ticket, wait_all
from memtrain.planner.units import round_up

GROUP_BYTES = PAGE_BYTES
"""Rows that are used lie apart, so what a group has beside them is written for nothing: in groups of 16 KiB
2.9 times the least, of SmolLM2's table under Zipf's tokens. A page is the least that direct I/O moves."""
_ALIGNMENT = 64  # of each tensor in a group: a cache line, and a multiple of every dtype
NOTES_BYTES = 448
"""What a store and this note of a group that was written, in Python's heap: a chunk with its numbers and
checksum, its places in the extent's dictionary and list, a byte here. Python 3.11 takes up to 330 (8,192
groups, each written twice); the rest is for other versions and dictionaries that have just grown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowState:
    """One state tensor of a table, or its weight: of the table's shape."""

    key: str
    dtype: torch.dtype
    initial: float
    """What every element is before a row's first step."""


class RowRecords:
    """Groups of rows of one table.

    Args:
        store: holds them. Coded stores move whole tensors only, and are none.
        name: of the extent, which says what it is of (``contents.py``).
        shape: of the parameter: rows, and what a row is.
        states: its state tensors, one at least.

    Raises:
        TierFullError: no room.
    """

    def __init__(self, store: Store, name: str, shape: Sequence[int], states: Sequence[RowState]) -> None:
        self.name, self.rows, self.row_shape = name, shape[0], tuple(shape[1:])
        self.states = tuple(states)
        self._store = store
        self.group_rows, self.group_bytes, self._spans = _cut(shape, states)
        self.groups = -(-self.rows // self.group_rows)
        self._extent = store.allocate(name, self.groups * self.group_bytes)
        self._written = bytearray(self.groups)
        """1 for each group that was."""

    @property
    def row_bytes(self) -> int:
        """State of one row."""
        elements = torch.Size(self.row_shape).numel()
        return elements * sum(state.dtype.itemsize for state in self.states)

    def read(self, groups: Sequence[int], slot: Tensor) -> list[Ticket]:
        """Start reading groups to their places in the slot, one behind the other."""
        tickets = []
        for place, group in enumerate(groups):
            part = self._part(place, slot)
            if self._written[group]:
                tickets.append(self._store.read(self._extent, part, group * self.group_bytes))
            else:
                part.zero_()  # padding, too, is written
                for state in self.states:
                    part[self._spans[state.key]].view(state.dtype).fill_(state.initial)
        return tickets

    def write(self, groups: Sequence[int], slot: Tensor) -> list[Ticket]:
        """Start writing groups from their places in the slot."""
        tickets = []
        for place, group in enumerate(groups):
            self._written[group] = 1  # also if this fails: a read then says that it was
            tickets.append(self._store.write(self._extent, self._part(place, slot), group * self.group_bytes))
        return tickets

    def views(self, count: int, slot: Tensor) -> dict[str, Tensor]:
        """State tensors of the first ``count`` groups in the slot: ``[count, group_rows, *row_shape]``."""
        grid = slot[: count * self.group_bytes].view(count, self.group_bytes)
        return {
            state.key: grid[:, self._spans[state.key]]
            .view(state.dtype)
            .unflatten(1, (self.group_rows, *self.row_shape))
            for state in self.states
        }

    def forget(self) -> None:
        """All rows are what a new optimizer has."""
        self._written = bytearray(self.groups)

    def in_runs(self, count: int, *, written: bool) -> Iterator[list[int]]:
        """Groups in order, ``count`` at most at a time: all, or those that were written."""
        groups = [group for group in range(self.groups) if self._written[group] or not written]
        for start in range(0, len(groups), count):
            yield groups[start : start + count]

    def rows_of(self, group: int) -> slice:
        """The rows of a group; of the last one perhaps fewer."""
        return slice(group * self.group_rows, min(self.rows, (group + 1) * self.group_rows))

    def fresh(self, device: torch.device | str = "cpu") -> Mapping[str, Tensor]:
        """Whole state tensors as a new optimizer has them."""
        shape = (self.rows, *self.row_shape)
        return {s.key: torch.full(shape, s.initial, dtype=s.dtype, device=device) for s in self.states}

    def close(self) -> None:
        """Give the room back."""
        self._store.free(self._extent)

    def _part(self, place: int, slot: Tensor) -> Tensor:
        return slot[place * self.group_bytes : (place + 1) * self.group_bytes]


def extent_bytes(shape: Sequence[int], states: Sequence[RowState]) -> int:
    """What ``RowRecords`` takes of its store."""
    group_rows, group_bytes, _ = _cut(shape, states)
    return -(-shape[0] // group_rows) * group_bytes


def _cut(shape: Sequence[int], states: Sequence[RowState]) -> tuple[int, int, dict[str, slice]]:
    """Rows and bytes of a group, and where each state is in it."""
    row_elements = torch.Size(shape[1:]).numel()
    row_bytes = row_elements * sum(state.dtype.itemsize for state in states)
    group_rows = max(1, min(shape[0], GROUP_BYTES // row_bytes))
    spans: dict[str, slice] = {}
    start = 0
    for state in states:
        stop = start + group_rows * row_elements * state.dtype.itemsize
        spans[state.key] = slice(start, stop)
        start = round_up(stop, _ALIGNMENT)
    return group_rows, round_up(start, PAGE_BYTES), spans


def finish(tickets: Sequence[Ticket]) -> None:
    """``wait_all``; where that is interrupted, too, nothing uses the slot any more when this raises."""
    try:
        wait_all(tickets)
    except BaseException:
        for ticket in tickets:
            settle(ticket)
        raise


def scalar_copy(value: Any) -> Any:
    """A scalar of the state, which a step may change in place."""
    return value.clone() if isinstance(value, Tensor) else value
