"""What codes bytes on their way to a tier, as the coded store sees it: memory, bounds, and how it is cut.

The arithmetic is the caller's (``memtrain.optim.storage.lossless``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from memtrain.offload.targets import BLOCK_BYTES
from memtrain.planner.units import MiB, round_up

SEGMENT_BYTES = 4 * MiB  # coded, it is still a transfer that the disks measured move at their full rate
WORKERS = 2  # a direction: one codes while the other's bytes move


class Coder(Protocol):
    """Codes and decodes in memory of its own; for one thread at a time."""

    @property
    def ways(self) -> Mapping[Any, int]:
        """Parts coded so far by the way they were stored in, as they are being one of them."""
        ...

    def encode(self, plain: torch.Tensor, into: torch.Tensor) -> int:
        """Code ``plain`` to the beginning of ``into``; how many bytes it became."""
        ...

    def decode(self, coded: torch.Tensor, into: torch.Tensor) -> None:
        """Fill ``into``. Raises ValueError where ``coded`` is not what ``encode`` made of as many bytes."""
        ...


class Codec(Protocol):
    """What makes coders, and what they need."""

    @property
    def name(self) -> str: ...
    @property
    def working_bytes(self) -> int:
        """Memory of one coder at most."""
        ...

    def bound_bytes(self, nbytes: int) -> int:
        """The most that ``nbytes`` can become."""
        ...

    def coder(self) -> Coder: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CodingStatistics:
    """What a coded store has moved so far."""

    plain_bytes_read: int
    coded_bytes_read: int
    plain_bytes_written: int
    coded_bytes_written: int
    encode_seconds: float
    """Processor time; of the next one too."""
    decode_seconds: float
    ways: Mapping[str, int]
    """Parts written by the way they were coded in, ``plain`` being what did not shrink."""

    @property
    def ratio(self) -> float:
        """Coded bytes by plain ones of what was written; 1 before anything was."""
        return self.coded_bytes_written / self.plain_bytes_written if self.plain_bytes_written else 1.0


def segment_room(codec: Codec, nbytes: int) -> int:
    """What a segment of ``nbytes`` takes on a tier at most, in whole blocks."""
    return round_up(codec.bound_bytes(nbytes), BLOCK_BYTES)


def room_bytes(codec: Codec, nbytes: int) -> int:
    """What a tensor takes on a tier at most: all its segments."""
    segments = segments_of(nbytes)
    whole = (len(segments) - 1) * segment_room(codec, SEGMENT_BYTES)
    return whole + segment_room(codec, segments[-1][1])


def staging_bytes(codec: Codec) -> int:
    """Memory of a coded store: segments on their way, and the coders' own."""
    return 2 * WORKERS * (segment_room(codec, SEGMENT_BYTES) + codec.working_bytes)


def segments_of(nbytes: int) -> list[tuple[int, int]]:
    """``(offset, length)`` of each; an empty tensor is one that is empty."""
    starts = range(0, max(nbytes, 1), SEGMENT_BYTES)
    return [(start, min(SEGMENT_BYTES, nbytes - start)) for start in starts]
