import os

import pytest
import torch

from memtrain.offload.errors import CorruptExtentError, OffloadError, SwapDirectoryError
from memtrain.offload.extents import FreeList
from memtrain.offload.manifest import MANIFEST
from memtrain.offload.slab import Slab
from memtrain.offload.tiers import NvmeStore

U = 4096


def filled(nbytes, value):
    return Slab(nbytes).buffer[:nbytes].fill_(value)


def opened(directory, capacity=16 * U):
    return NvmeStore(directory, capacity, run_id="mine", resumable=True, piece_bytes=U)


def test_a_later_store_finds_every_byte_again(tmp_path):
    with opened(tmp_path) as store:
        gap = store.allocate("gap", U)
        one = store.allocate("one", 3 * U + 5, dtype="bfloat16", shape=(3, 2))
        store.write(one, filled(3 * U + 5, 1)).wait()
        store.write(one, filled(3 * U + 5, 2)).wait()
        store.free(gap)
    (run,) = tmp_path.iterdir()
    assert sorted(os.listdir(run)) == ["arena", "lock", MANIFEST]
    with opened(tmp_path) as store:
        again = store.extents()["one"]
        assert (again.generation, again.dtype, again.shape) == (2, "bfloat16", (3, 2))
        assert store.used_bytes == 4 * U
        found = filled(3 * U + 5, 0)
        store.read(again, found).wait()
        assert torch.equal(found, filled(3 * U + 5, 2))
        assert store.allocate("two", U).arena_offset == 0
        store.write(again, filled(3 * U + 5, 3)).wait()
        assert again.generation == 3


def test_bytes_newer_than_the_table_are_found(tmp_path):
    store = opened(tmp_path)
    extent = store.allocate("w", U)
    store.write(extent, filled(U, 1)).wait()
    store.save()
    table = (store.run.path / MANIFEST).read_text()
    store.write(extent, filled(U, 2)).wait()
    store.close()
    (store.run.path / MANIFEST).write_text(table)  # as a process leaves it that is killed here
    with opened(tmp_path) as again, pytest.raises(CorruptExtentError, match="tensor w"):
        again.read(again.extents()["w"], filled(U, 0)).wait()


def test_a_damaged_missing_or_foreign_table_is_refused_and_left(tmp_path):
    opened(tmp_path).close()
    (run,) = tmp_path.iterdir()
    with pytest.raises(SwapDirectoryError, match="is not the arena that was left"):
        opened(tmp_path, 32 * U)
    text = (run / MANIFEST).read_text()
    (run / MANIFEST).write_text(text.replace("65536", "65537"))
    with pytest.raises(CorruptExtentError, match="is damaged"):
        opened(tmp_path)
    (run / MANIFEST).write_text("[]")
    with pytest.raises(CorruptExtentError, match="is damaged"):
        opened(tmp_path)
    (run / MANIFEST).unlink()
    with pytest.raises(SwapDirectoryError, match="never saved"):
        opened(tmp_path)
    (run / "arena").unlink()
    (run / "arena").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SwapDirectoryError, match="cannot open"):
        opened(tmp_path)
    assert run.exists()


def test_a_run_in_use_is_refused(tmp_path):
    with opened(tmp_path), pytest.raises(SwapDirectoryError, match="in use by another process"):
        opened(tmp_path)


def test_only_resumable_idle_stores_are_saved(tmp_path):
    with NvmeStore(tmp_path, U) as store, pytest.raises(OffloadError, match="made with resumable=True"):
        store.save()


def test_take_splits_a_run():
    space = FreeList(10)
    space.take(3, 4)
    assert (space.free_bytes, space.largest_bytes) == (6, 3)
    for run in ((2, 2), (6, 2), (8, 3), (3, 1)):
        with pytest.raises(ValueError, match="not free"):
            space.take(*run)
    space.take(0, 3)
    space.take(7, 3)
    assert space.allocate(1) is None
    space.free(3, 4)
    assert space.allocate(4) == 3
