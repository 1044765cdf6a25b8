"""Ranks that lose their snapshots get them back bit for bit from the others."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from memtrain.offload import parity as parity_module
from memtrain.offload.atomic import publish, verify
from memtrain.offload.held import HeldSnapshots
from memtrain.offload.parity import MissingZfecError, SnapshotLostError, Stripes, protect, restore
from memtrain.offload.snapshot import load_checkpoint
from tests.offload.async_runs import AsyncCheckpointer, nvme_run
from tests.offload.snapshot_runs import SEQUENTIAL, assert_same
from tests.offload.training import batches

pytest.importorskip("zfec")


def on_ranks(count: int, work: Callable[[int], Any], *, tearing: int | None = None) -> None:
    """``work(rank)`` in ``count`` processes that are joined by gloo.

    Args:
        tearing: a rank that will stop or die: it is killed when the others have ended.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                dist.init_process_group(
                    "gloo",
                    init_method=f"tcp://127.0.0.1:{port}",
                    rank=rank,
                    world_size=count,
                    timeout=timedelta(seconds=60),
                )
                work(rank)
                dist.barrier()
                dist.destroy_process_group()
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    codes = [os.waitpid(pid, 0)[1] for rank, pid in enumerate(pids) if rank != tearing]
    if tearing is not None:
        os.kill(pids[tearing], signal.SIGKILL)
        os.waitpid(pids[tearing], 0)
    assert codes == [0] * len(codes)


def make_folder(path: Path, rank: int) -> dict[str, bytes]:
    """A snapshot whose size differs from rank to rank, with an empty file."""
    generator = random.Random(rank)
    files = {f"{n}.bin": generator.randbytes(5000 * (rank + 1) * n + n) for n in range(4)}
    with publish(path) as writer:
        for name, data in files.items():
            with writer.create(name) as file:
                file.write(data)
    return {item.name: item.read_bytes() for item in path.iterdir()}


@pytest.mark.parametrize(("ranks", "losses"), [(2, 1), (3, 1), (4, 1), (3, 2), (5, 2)])
def test_no_rank_has_two_blocks_of_a_codeword(ranks: int, losses: int) -> None:
    stripes = Stripes(ranks=ranks, losses=losses)
    for stripe in range(ranks):
        places = [stripes.place(stripe, rank) for rank in range(ranks)]
        assert sorted(places) == list(range(ranks))
        assert all((places[r] >= ranks - losses) == (r in stripes.holders(stripe)) for r in range(ranks))
    for rank in range(ranks):
        blocks = [stripes.own_block(s, rank) for s in range(ranks) if rank in stripes.members(s)]
        assert blocks == list(range(ranks - losses))  # each block of its snapshot once


def test_how_much_is_kept() -> None:
    stripes = Stripes(ranks=5, losses=2)
    assert stripes.block_bytes(3 * 4096) == 4096
    assert stripes.block_bytes(3 * 4096 + 1) == 8192
    for ranks, losses in ((1, 1), (3, 0), (3, 3), (257, 1)):
        with pytest.raises(ValueError, match="losses must be at least 1 and less than the number of ranks"):
            Stripes(ranks=ranks, losses=losses)


@pytest.mark.parametrize(("ranks", "losses"), [(2, 1), (3, 1), (4, 2), (5, 3)])
def test_whoever_is_lost_comes_back(
    ranks: int, losses: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every set of ranks that may be lost, and one more."""
    monkeypatch.setattr(parity_module, "SEGMENT_BYTES", 8192)

    def work(rank: int) -> None:
        folder, share = tmp_path / f"{rank}" / "at", tmp_path / f"{rank}" / "parity"
        before = make_folder(folder, rank)
        written = protect(folder, lambda: publish(share), losses=losses)
        largest = 5000 * ranks * 6 + 6
        pages = -(-largest // (ranks - losses) // 4096)
        assert written == losses * pages * 4096
        for count in range(1, losses + 1):
            for lost in itertools.combinations(range(ranks), count):
                if rank in lost:
                    shutil.rmtree(folder)
                    shutil.rmtree(share)
                assert restore(folder, share) == list(lost)
                assert {item.name: item.read_bytes() for item in folder.iterdir()} == before
                verify(folder)
                protect(folder, lambda: publish(share), losses=losses)
        lost = range(losses + 1)
        if rank in lost:
            shutil.rmtree(folder)
            shutil.rmtree(share)
        with pytest.raises(SnapshotLostError, match=r"the snapshots of ranks \[0, 1|no rank has its share"):
            restore(folder, share)
        assert folder.exists() == (rank not in lost)

    on_ranks(ranks, work)


def test_a_damaged_snapshot_or_share_counts_as_lost(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        folder, share = tmp_path / f"{rank}" / "at", tmp_path / f"{rank}" / "parity"
        before = make_folder(folder, rank)
        protect(folder, lambda: publish(share))
        if rank == 1:
            (folder / "3.bin").write_bytes(b"x" + before["3.bin"][1:])
        assert restore(folder, share) == [1]
        assert {item.name: item.read_bytes() for item in folder.iterdir()} == before
        if rank == 2:  # a share alone costs nobody's snapshot
            shutil.rmtree(share)
        assert restore(folder, share) == []
        if rank == 1:
            shutil.rmtree(folder)
        with pytest.raises(SnapshotLostError, match=r"ranks \[1\] are lost, and \[0, 1\] of 3 ranks have"):
            restore(folder, share)
        shutil.rmtree(share, ignore_errors=True)
        with pytest.raises(SnapshotLostError, match="no rank has its share"):
            restore(folder, None)

    on_ranks(3, work)


def test_shares_of_two_snapshots_beside_whole_ones(tmp_path: Path) -> None:
    """Rank 0 was killed before it published its new share: the old one is lost, and no snapshot with it."""

    def work(rank: int) -> None:
        folder, share = tmp_path / f"{rank}" / "at", tmp_path / f"{rank}" / "parity"
        make_folder(folder, rank)
        protect(folder, lambda: publish(share))
        before = make_folder(folder, rank + 3)
        protect(folder, lambda: publish(share if rank else tmp_path / "never"))
        assert restore(folder, share) == []
        if rank == 0:
            shutil.rmtree(folder)
        assert restore(folder, share) == [0]
        assert {item.name: item.read_bytes() for item in folder.iterdir()} == before

    on_ranks(3, work)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_three_ranks_that_train_and_hold_their_snapshots(lost: int, tmp_path: Path) -> None:
    """One rank's machine is gone, and with it what it held: it goes on from what the others know."""

    def work(rank: int) -> None:
        data = batches(4 + rank)[rank:]
        place = tmp_path / f"{rank}"
        place.mkdir()
        held = HeldSnapshots(place / "holder")
        with nvme_run(place / "swap", SEQUENTIAL) as run:
            with AsyncCheckpointer(run) as snapshots:
                run.train(data[:2])
                snapshots.begin(lambda: held.publish("step-2"), "step-2", progress={"rank": rank})
            with held.folder("step-2") as folder:
                assert folder is not None
                protect(folder, lambda: held.publish("parity-2", retire=False))
            if rank == lost:
                held.close()
                held = HeldSnapshots(place / "holder")
            with held.folder("step-2") as folder, held.folder("parity-2") as share:
                found = folder or place / "rebuilt"
                assert restore(found, share) == [lost]
                with nvme_run(place / "again", SEQUENTIAL) as resumed:
                    assert load_checkpoint(found, resumed) == {"rank": rank}
                    resumed.train(data[2:])
                    run.train(data[2:])
                    assert_same(run, resumed)
        held.close()

    on_ranks(3, work)


def test_zfec_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "zfec", None)
    with pytest.raises(MissingZfecError, match=r"memtrain\[parity\]"):
        parity_module._Code(Stripes(ranks=3, losses=1))
