"""A transfer between a buffer and a tier: what it may move, and how one waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch

from memtrain.offload.errors import OffloadError
from memtrain.offload.extents import Extent
from memtrain.offload.io import Direction
from memtrain.offload.targets import BLOCK_BYTES
from memtrain.planner.actions import Tier

if TYPE_CHECKING:
    from memtrain.offload.store import Store


class Ticket:
    """One read or write under way. ``wait`` returns when it is done, or raises what went wrong, each time
    anew.
    """

    __slots__ = (
        "_checksums",
        "_error",
        "_event",
        "_left",
        "_store",
        "_waits_for",
        "buffer",
        "direction",
        "extent",
        "generation",
        "nbytes",
        "offset",
    )

    def __init__(
        self, store: Store, direction: Direction, extent: Extent, buffer: torch.Tensor, offset: int
    ) -> None:
        self._store = store
        self._event = threading.Event()
        self._error: OffloadError | None = None
        self._waits_for: set[Ticket] = set()
        self._left = 0
        self._checksums: list[int] = []
        self.direction = direction
        self.extent = extent
        self.buffer: torch.Tensor | None = buffer
        self.offset = offset
        self.nbytes = buffer.numel()
        self.generation = 0

    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._event.is_set()

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Return when the bytes are where they should be.

        Raises:
            TierIOError: the tier failed, stalled, or ``timeout_seconds`` passed.
            CorruptExtentError: what was read is not what was written.
            ExtentStateError: what was to be read was never written.
        """
        began = time.monotonic()
        deadline = None if timeout_seconds is None else began + timeout_seconds
        while not self._event.wait(self._store._patience(self, began, deadline)):
            pass
        if self._error is not None:
            raise self._error

    def _describe(self) -> str:
        return f"{self.direction.value} of tensor {self.extent.name} on {self.extent.tier.value}"

    def _conflicts(self, other: Ticket) -> bool:
        both_read = self.direction is Direction.READ and other.direction is Direction.READ
        apart = self.offset >= other.offset + other.nbytes or other.offset >= self.offset + self.nbytes
        return not both_read and not apart


def check_buffer(tier: Tier, extent: Extent, buffer: torch.Tensor, offset: int) -> None:
    """Raises ValueError where ``buffer`` cannot be moved to or from byte ``offset`` of ``extent``."""
    what = f"tensor {extent.name} on {tier.value}"
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous() or buffer.is_cuda:
        raise ValueError(
            f"{what}: a buffer is a contiguous 1-D uint8 tensor in host memory, got {buffer.dtype} of "
            f"shape {tuple(buffer.shape)} on {buffer.device}; take a view of a slab"
        )
    if buffer.numel() and buffer.data_ptr() % BLOCK_BYTES:
        raise ValueError(f"{what}: a buffer starts at a multiple of {BLOCK_BYTES}; take a view of a slab")
    if offset % BLOCK_BYTES or offset < 0:
        raise ValueError(f"{what}: offset must be a multiple of {BLOCK_BYTES}, got {offset}")
    if offset + buffer.numel() > extent.nbytes or (buffer.numel() == 0) != (extent.nbytes == 0):
        raise ValueError(
            f"{what}: {buffer.numel()} bytes at {offset} are not within its {extent.nbytes} bytes"
        )


class Waitable(Protocol):
    """A transfer under way, of this store or of one that codes for it."""

    def wait(self) -> None: ...


def wait_all(tickets: Iterable[Waitable]) -> None:
    """Wait for every ticket, then raise the first error, so that no buffer is still in use when this
    raises.
    """
    errors = []
    for ticket in tickets:
        try:
            ticket.wait()
        except OffloadError as error:
            errors.append(error)
    if errors:
        raise errors[0]
