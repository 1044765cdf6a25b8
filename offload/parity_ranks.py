"""Ranks that work on parity together: bytes between them, deadlines, and what becomes of all when one fails.

A rank whose own work fails (a full disk, a snapshot that cannot be read) goes on talking to the others, with
nothing to say, until the next ``agree``: there everybody raises, and names it. A rank that is gone or stands
still is found by a deadline; who is left then calls the roll in the group's store, so that the message names
whoever does not answer and not whoever waited for it.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from memtrain.offload.atomic import CheckpointError
from memtrain.offload.errors import OffloadError
from memtrain.offload.store import STALL_SECONDS

DEADLINE_SECONDS = STALL_SECONDS
"""For what a rank does between two messages: read or write a segment, and once per stripe sync and read back
a block. As long as a disk may pause anywhere else."""
ROLL_DEADLINES = 2
"""How long the others have to answer a roll call, in deadlines: who hears of a death at once calls it at
once, while another rank may still be at work for one deadline, and then wait in vain for a second."""
_LENGTH = struct.Struct("<q")
_calls = itertools.count()

T = TypeVar("T")


class PeerError(CheckpointError):
    """Another rank failed, is gone, or stands still.

    Attributes:
        ranks: which, as far as is known.
    """

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class Trial:
    """Work of this rank alone, of which the first failure is kept until ``Ranks.agree``."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def run(self, work: Callable[[], T], otherwise: Any = None) -> T:
        """The result of ``work``; ``otherwise`` where it, or something before it, failed."""
        if self.error is None:
            try:
                return work()
            except (OffloadError, OSError) as error:
                self.error = error
        result: T = otherwise
        return result


class Ranks:
    """The ranks of ``group``, all of which make one of these for the same work, in the same order.

    Args:
        group: None: all ranks.
        deadline_seconds: without a word for so long, a rank counts as lost.
    """

    def __init__(self, group: dist.ProcessGroup | None, deadline_seconds: float) -> None:
        if not deadline_seconds > 0:
            raise ValueError(f"deadline_seconds must be > 0, got {deadline_seconds}")
        self.count, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._group, self._deadline = group, timedelta(seconds=deadline_seconds)
        self._number = next(_calls)

    def send(self, data: bytes, ranks: Sequence[int]) -> None:
        """``data`` to each of ``ranks``. Raises PeerError."""
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._wait([(rank, dist.isend(tensor, group=self._group, group_dst=rank)) for rank in ranks])

    def receive(self, length: int, ranks: Sequence[int]) -> list[bytes]:
        """As many bytes from each of ``ranks``. Raises PeerError."""
        tensors = [torch.empty(length, dtype=torch.uint8) for _ in ranks]
        self._wait(list(zip(ranks, map(self._receive_into, tensors, ranks), strict=True)))
        return [tensor.numpy().tobytes() for tensor in tensors]

    def gather(self, text: str) -> list[str]:
        """What every rank says, by rank. Raises PeerError."""
        others = [rank for rank in range(self.count) if rank != self.rank]
        data = text.encode()
        lengths = self._swap(_LENGTH.pack(len(data)), dict.fromkeys(others, _LENGTH.size))
        sizes = {rank: _LENGTH.unpack(length)[0] for rank, length in lengths.items()}
        found = self._swap(data, sizes)
        return [text if rank == self.rank else found[rank].decode() for rank in range(self.count)]

    def agree(self, trial: Trial) -> None:
        """Return where no rank's trial has failed; else every rank raises: its own error, or a PeerError that
        names the rank that failed."""
        error = trial.error
        texts = self.gather("" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [rank for rank, text in enumerate(texts) if text]
        if failed:
            told = "; ".join(f"rank {rank}: {texts[rank]}" for rank in failed)
            raise PeerError(f"{told}. Nothing of this is kept here either", failed)

    def _swap(self, data: bytes, sizes: dict[int, int]) -> dict[int, bytes]:
        """``data`` to every other rank, and what they send, of known sizes."""
        tensors = {rank: torch.empty(size, dtype=torch.uint8) for rank, size in sizes.items()}
        own = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
        works = [(rank, self._receive_into(t, rank)) for rank, t in tensors.items() if t.numel()]
        if data:
            works += [(rank, dist.isend(own, group=self._group, group_dst=rank)) for rank in sizes]
        self._wait(works)
        return {rank: tensor.numpy().tobytes() for rank, tensor in tensors.items()}

    def _receive_into(self, tensor: Tensor, rank: int) -> Any:
        return dist.irecv(tensor, group=self._group, group_src=rank)

    def _wait(self, works: Sequence[tuple[int, Any]]) -> None:
        for rank, work in works:
            try:
                work.wait(self._deadline)
            except RuntimeError as error:
                raise self._lost(rank, error) from error

    # -- who is to blame -----------------------------------------------------------------------

    def _lost(self, rank: int, error: RuntimeError) -> PeerError:
        silent = self._call_the_roll()
        if silent:
            who = ", ".join(map(str, silent))
            what = f"rank {who} does not answer" if len(silent) == 1 else f"ranks {who} do not answer"
        else:
            silent = [rank]
            what = f"rank {rank} has broken off, or waits itself for one that has"
        seconds = self._deadline.total_seconds()
        return PeerError(
            f"{what} (deadline {seconds:g} s; gloo: {str(error).splitlines()[0]}). Nothing of this is kept "
            f"here: start the ranks again, and take snapshots up with restore()",
            silent,
        )

    def _call_the_roll(self) -> list[int]:
        """Ranks that do not say that they are alive; none where the store itself, which is rank 0's, is out
        of reach. In a thread: no call of a store keeps its deadline when the other side stands still."""
        present: list[int] = []
        everybody = threading.Event()
        patience = self._deadline * ROLL_DEADLINES
        until = time.monotonic() + patience.total_seconds()

        def call() -> None:
            group = self._group or dist.group.WORLD
            assert group is not None
            store = group.get_group_store()
            with contextlib.suppress(RuntimeError):  # rank 0 has gone, and the store with it
                store.set(self._key(self.rank), "here")
            for rank in range(self.count):
                left = max(until - time.monotonic(), 0.1)  # 0.1 s: to fetch what was answered long ago
                with contextlib.suppress(RuntimeError):
                    store.wait([self._key(rank)], timedelta(seconds=left))
                    present.append(rank)
            everybody.set()

        thread = threading.Thread(target=call, name="memtrain roll call", daemon=True)
        thread.start()
        if not everybody.wait(patience.total_seconds() + self.count):
            return []
        return [rank for rank in range(self.count) if rank not in present] if self.rank in present else []

    def _key(self, rank: int) -> str:
        return f"memtrain/parity/{self._number}/{rank}"
