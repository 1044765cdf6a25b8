"""No room: at the start, in mid run, by quota, by limit, in every tier."""

from __future__ import annotations

import errno
import os
import random
import resource
from pathlib import Path

import pytest
import torch

from memtrain.offload.atomic import CheckpointError
from memtrain.offload.errors import ExtentStateError, SwapDirectoryError, TierFullError, TierIOError
from memtrain.offload.snapshot import latest_checkpoint, load_checkpoint, save_checkpoint
from memtrain.offload.tiers import MemoryStore, NvmeStore
from memtrain.planner.actions import Tier
from tests.offload.faults.disks import MiB, fill, in_child, loop_disk, needs_mounts, punch_holes
from tests.offload.faults.runs_on_disk import CAPACITY, assert_trained, disk_of, open_run_in, open_run_on
from tests.offload.tier_stores import U, filled
from tests.offload.training import batches


@needs_mounts
def test_a_disk_that_fills_up_costs_nothing_but_the_write(tmp_path: Path) -> None:
    """The arena's room is reserved, so it is given back first: as on a file system that copies on write."""
    with loop_disk(tmp_path, "disk", 48 * MiB) as disk:
        with NvmeStore(disk, 16 * MiB, piece_bytes=MiB) as store:
            old, new = store.allocate("old", 4 * MiB), store.allocate("new", 4 * MiB + 5)
            before, after, found = filled(4 * MiB, 1), filled(4 * MiB + 5, 2), filled(4 * MiB + 5, 3)
            store.write(old, before).wait()
            punch_holes(store._target.descriptor, new.arena_offset, new.reserved_bytes)
            filler = fill(disk)
            with pytest.raises(
                TierIOError, match=r"tensor new on nvme at offset \d+ failed \[ENOSPC\].*free space"
            ):
                store.write(new, after).wait()
            assert torch.equal(after, filled(4 * MiB + 5, 2))  # the only copy
            with pytest.raises(ExtentStateError, match="last write failed"):
                store.read(new, found).wait()
            store.read(old, found[: 4 * MiB]).wait()
            assert torch.equal(found[: 4 * MiB], before)
            filler.unlink()
            store.write(new, after).wait()
            store.read(new, found).wait()
            assert torch.equal(found, after)
        assert os.listdir(disk) == ["lost+found"]


@needs_mounts
def test_a_run_on_a_full_disk_goes_on_from_its_checkpoint_when_there_is_room(tmp_path: Path) -> None:
    with loop_disk(tmp_path, "disk", 40 * MiB) as disk:
        with open_run_in(disk) as run:
            run.train(batches(5)[:2])
            saved = save_checkpoint(disk / "checkpoints" / "step-2", run, progress={"steps_done": 2})
            filler = fill(disk)
            with pytest.raises(CheckpointError, match=r"No space left.*\d+ bytes are free there") as caught:
                save_checkpoint(disk / "checkpoints" / "step-2b", run, progress={})
            assert caught.value.errno == errno.ENOSPC
            assert os.listdir(disk / "checkpoints") == ["step-2"]
        filler.unlink()
        with open_run_in(disk) as run:
            punch_holes(disk_of(run)._target.descriptor, 0, CAPACITY)
            filler = fill(disk)
            with pytest.raises(TierIOError, match=r"tensor optimizer state of .*ENOSPC"):
                load_checkpoint(saved, run)
            filler.unlink()
            assert latest_checkpoint(disk / "checkpoints") == saved
            assert load_checkpoint(saved, run) == {"steps_done": 2}
            run.train(batches(5)[2:])
            assert_trained(run, 5)


def test_a_file_size_limit_in_mid_run_is_an_error_and_lifting_it_is_enough(tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limit(size_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))

    def until_the_limit() -> None:
        with open_run_in(tmp_path) as run:
            run.train(batches(5)[:3])
            run.flush()
            limit(300_000)
            with pytest.raises(CheckpointError, match=r"ulimit -f"):
                save_checkpoint(tmp_path / "at", run, progress={})
            assert not (tmp_path / "at").exists()
            with pytest.raises(SwapDirectoryError, match="File too large"), open_run_in(tmp_path):
                pass
            limit(hard)
            save_checkpoint(tmp_path / "at", run, progress={})
            limit(300_000)
            run.train(batches(5)[3:])

    def work() -> None:
        with pytest.raises(TierIOError, match=r"EFBIG.*ulimit -f"):
            until_the_limit()
        limit(hard)
        with open_run_in(tmp_path) as run:
            load_checkpoint(tmp_path / "at", run)
            run.train(batches(5)[3:])
            assert_trained(run, 5)

    in_child(work)


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC])
def test_a_quota_is_met_at_the_start_with_a_typed_error_and_leaves_nothing(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another's writes may come between looking at the free room and reserving it."""

    def refuse(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SwapDirectoryError, match=rf"reserves .*{os.strerror(number)}"):
        NvmeStore(tmp_path, CAPACITY)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("seed", range(8))
def test_what_fits_fits_in_any_order_and_never_more(seed: int) -> None:
    rng = random.Random(seed)
    capacity = 64 * U
    sizes: list[int] = []
    while sum(-(-size // U) for size in sizes) < 60:
        sizes.append(rng.randint(1, 9 * U))
    for _ in range(4):
        rng.shuffle(sizes)
        with MemoryStore(Tier.HOST, capacity) as store:
            fitting, refused = [], 0
            for number, size in enumerate(sizes):
                room = capacity - store.used_bytes
                if -(-size // U) * U <= room:
                    fitting.append(store.allocate(f"t{number}", size))
                else:
                    with pytest.raises(TierFullError, match=rf"t{number} needs \d+ bytes on host, {room} of"):
                        store.allocate(f"t{number}", size)
                    refused += 1
                assert store.used_bytes <= capacity
            assert len(fitting) + refused == len(sizes)
            assert store.statistics().peak_used_bytes == sum(-(-e.nbytes // U) * U for e in fitting)
            for extent in fitting:
                store.free(extent)
            store.allocate("all of it", capacity)


def test_a_budget_without_room_for_the_state_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with NvmeStore(tmp_path, 2 * MiB) as store:
        with (
            pytest.raises(TierFullError, match=r"needs \d+ bytes on nvme, \d+ of 2097152 bytes are free"),
            open_run_on(store),
        ):
            pass
        assert store.used_bytes == 0
    assert os.listdir(tmp_path) == []
