"""A rank that fails while parity is made or used: all ranks raise, soon, and name it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from memtrain.offload import parity as parity_module
from memtrain.offload.atomic import CheckpointError, publish
from memtrain.offload.parity import protect, restore
from memtrain.offload.parity_ranks import PeerError, Ranks
from memtrain.offload.placed import PlacedFile
from tests.offload.test_parity import make_folder, on_ranks

pytest.importorskip("zfec")

FAILING = 1
SOON_SECONDS = 20.0
"""Gloo's own patience in these tests is 60 s, and 30 minutes by default."""


def failing_write(after: int) -> Callable[..., None]:
    """``PlacedFile.write`` on a disk that is full from its nth write on."""
    real, writes = PlacedFile.write, 0

    def write(file: PlacedFile, data: Any, offset: int) -> None:
        nonlocal writes
        writes += 1
        if writes > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data, offset)

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in folder.iterdir()}


@pytest.mark.parametrize("after", [0, 2])
def test_a_full_disk_under_one_share(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_module, "SEGMENT_BYTES", 8192)

    def work(rank: int) -> None:
        folder, share = tmp_path / f"{rank}" / "at", tmp_path / f"{rank}" / "parity"
        before = make_folder(folder, rank)
        protect(folder, lambda: publish(share))
        old, began = contents(share), time.monotonic()
        with pytest.MonkeyPatch.context() as patched:
            if rank == FAILING:
                patched.setattr(PlacedFile, "write", failing_write(after))
                with pytest.raises(CheckpointError, match=r"parity: No space left") as own:
                    protect(folder, lambda: publish(share))
                assert own.value.errno == errno.ENOSPC
            else:
                with pytest.raises(PeerError, match=r"rank 1: OSError.*No space left") as caught:
                    protect(folder, lambda: publish(share))
                assert caught.value.ranks == (FAILING,)
        assert time.monotonic() - began < SOON_SECONDS
        assert contents(share) == old
        protect(folder, lambda: publish(share))  # the ranks can still talk
        if rank == 2:
            shutil.rmtree(folder)
        assert restore(folder, share) == [2]
        assert contents(folder) == before

    on_ranks(3, work)


def test_a_snapshot_that_cannot_be_read_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_module, "SEGMENT_BYTES", 8192)

    def work(rank: int) -> None:
        folder, share = tmp_path / f"{rank}" / "at", tmp_path / f"{rank}" / "parity"
        make_folder(folder, rank)
        real, reads = parity_module._Stream.read, 0

        def read(stream: Any, start: int, length: int) -> bytes:
            nonlocal reads
            reads += 1
            if rank == FAILING and reads == 2:
                raise CheckpointError("3.bin cannot be read: Input/output error", errno.EIO)
            return real(stream, start, length)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(parity_module._Stream, "read", read)
            with pytest.raises(CheckpointError, match=r"cannot be read: Input/output error") as caught:
                protect(folder, lambda: publish(share))
        assert isinstance(caught.value, PeerError) == (rank != FAILING)
        assert not share.exists()

    on_ranks(3, work)


def test_a_full_disk_under_what_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity_module, "SEGMENT_BYTES", 8192)

    def work(rank: int) -> None:
        folder, share = tmp_path / f"{rank}" / "at", tmp_path / f"{rank}" / "parity"
        before = make_folder(folder, rank)
        protect(folder, lambda: publish(share))
        if rank == FAILING:
            shutil.rmtree(folder)
            shutil.rmtree(share)
        dist.barrier()
        with pytest.MonkeyPatch.context() as patched:
            if rank == FAILING:
                patched.setattr(PlacedFile, "write", failing_write(3))
            with pytest.raises(CheckpointError, match="No space left") as caught:
                restore(folder, share)
        assert isinstance(caught.value, PeerError) == (rank != FAILING)
        assert folder.exists() == (rank != FAILING)
        assert restore(folder, share) == [FAILING]
        assert contents(folder) == before

    on_ranks(3, work)


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize(("ranks", "losses"), [(3, 1), (4, 2)])
def test_a_rank_that_stands_still_or_dies(
    blow: signal.Signals, ranks: int, losses: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle, without a word. The others do not wait for gloo, and name it."""
    monkeypatch.setattr(parity_module, "SEGMENT_BYTES", 8192)
    done = tmp_path / "done"
    done.mkdir()

    def work(rank: int) -> None:
        folder, share = tmp_path / f"{rank}" / "at", tmp_path / f"{rank}" / "parity"
        make_folder(folder, rank)
        protect(folder, lambda: publish(share), losses=losses)
        old = contents(share)
        if rank == FAILING:
            real, reads = parity_module._Stream.read, 0

            def read(stream: Any, start: int, length: int) -> bytes:
                nonlocal reads
                reads += 1
                if reads == 2:
                    os.kill(os.getpid(), blow)
                return real(stream, start, length)

            parity_module._Stream.read = read  # type: ignore[method-assign]
        began = time.monotonic()
        with pytest.raises(PeerError, match=r"rank 1 does not answer \(deadline 2 s") as caught:
            protect(folder, lambda: publish(share), losses=losses, deadline_seconds=2.0)
        assert caught.value.ranks == (FAILING,)
        assert time.monotonic() - began < SOON_SECONDS
        assert contents(share) == old
        (done / str(rank)).touch()
        patience = time.monotonic() + SOON_SECONDS  # rank 0 has the store: nobody leaves before the others
        while len(list(done.iterdir())) < ranks - 1 and time.monotonic() < patience:
            time.sleep(0.02)
        os._exit(0)  # the group is broken, and so would be leaving it

    on_ranks(ranks, work, tearing=FAILING)
    assert sorted(path.name for path in done.iterdir()) == [str(r) for r in range(ranks) if r != FAILING]


def test_a_deadline_is_a_time() -> None:
    with pytest.raises(ValueError, match="deadline_seconds must be > 0, got 0"):
        Ranks(None, 0)
