"""Bytes that a disk loses, tears, flips or is late with are found and named."""

import errno
import os

import pytest
import torch

from memtrain.offload.errors import (
    CorruptExtentError,
    ExtentStateError,
    TierIOError,
)
from memtrain.offload.io import Fault, FaultyBackend, Gate, ThreadPoolBackend
from memtrain.offload.tiers import NvmeStore, wait_all
from tests.offload.tier_stores import CAPACITY, U, faulty_nvme, filled


def test_one_flipped_bit_in_the_arena_is_found_and_named(tmp_path):
    with NvmeStore(tmp_path, CAPACITY, piece_bytes=2 * U) as store:
        store.allocate("before", 3 * U)
        extent, source, found = store.allocate("layers.7.exp_avg", 5 * U), filled(5 * U), filled(5 * U, 1)
        store.write(extent, source).wait()
        arena = os.open(f"/proc/self/fd/{store._target.descriptor}", os.O_RDWR)
        position = extent.arena_offset + 3 * U + 17
        byte = os.pread(arena, 1, position)[0]
        os.pwrite(arena, bytes([byte ^ 0x10]), position)
        os.fsync(arena)
        os.close(arena)
        with pytest.raises(CorruptExtentError, match=rf"tensor layers\.7\.exp_avg on nvme at offset {5 * U}"):
            store.read(extent, found).wait()


def test_a_swapped_extent_table_is_found(tmp_path):
    with NvmeStore(tmp_path, CAPACITY) as store:
        a, b, buffer = store.allocate("a", U), store.allocate("b", U), filled(U)
        wait_all(
            [store.write(a, buffer), store.write(b, buffer)]
        )  # equal bytes: only identity tells them apart
        a.chunks, b.chunks = b.chunks, a.chunks
        with pytest.raises(CorruptExtentError, match="tensor a"):
            store.read(a, filled(U, 1)).wait()


@pytest.mark.parametrize(
    ("fault_of_write", "fault_of_read"),
    [
        (Fault(drop=True), None),  # lost write: the previous generation comes back
        (Fault(flip_bit=3), None),
        (None, Fault(flip_bit=3)),
        (None, Fault(stale={0: bytes(2 * U)})),
    ],
)
def test_lost_torn_flipped_and_stale_bytes_are_found(tmp_path, fault_of_write, fault_of_read):
    # Requests: 0, 1 first write; 2, 3 second write; 4, 5 read.
    plan = {n: fault for n, fault in ((2, fault_of_write), (4, fault_of_read)) if fault}
    store, _ = faulty_nvme(tmp_path, plan)
    with store:
        extent = store.allocate("w", 4 * U)
        store.write(extent, filled(4 * U, 1)).wait()
        store.write(extent, filled(4 * U, 2)).wait()
        with pytest.raises(CorruptExtentError, match="tensor w on nvme at offset 0"):
            store.read(extent, filled(4 * U, 3)).wait()


def test_a_buffer_changed_while_it_is_written_is_found(tmp_path):
    gate = Gate()
    store, _ = faulty_nvme(tmp_path, {0: Fault(gate=gate)})
    with store:
        extent, buffer = store.allocate("w", U), filled(U)
        ticket = store.write(extent, buffer)
        assert gate.reached.wait(20)
        buffer[5] ^= 1
        gate.open()
        ticket.wait()
        with pytest.raises(CorruptExtentError):
            store.read(extent, filled(U, 1)).wait()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT])
def test_a_failed_write_is_never_published(tmp_path, number):
    gate = Gate()
    store, _ = faulty_nvme(tmp_path, {3: Fault(error=number, gate=gate)})
    with store:
        extent, source, found = store.allocate("w", 4 * U), filled(4 * U, 1), filled(4 * U, 2)
        store.write(extent, source).wait()
        failing = store.write(extent, filled(4 * U, 3))
        following = store.read(extent, found)  # asked for before the write has failed
        gate.open()
        with pytest.raises(TierIOError, match=f"tensor w on nvme at offset {2 * U}") as caught:
            failing.wait()
        assert caught.value.errno == number
        with pytest.raises(ExtentStateError, match="last write failed"):
            following.wait()
        with pytest.raises(ExtentStateError, match="last write failed"):
            store.read(extent, found)
        assert extent.generation == 1
        assert bool((found == filled(4 * U, 2)).all())  # nothing was read into it
        store.write(extent, source).wait()  # and it goes on when the cause is gone
        store.read(extent, found).wait()
        assert torch.equal(found, source)


def test_a_failed_read_leaves_the_extent_readable(tmp_path):
    store, _ = faulty_nvme(tmp_path, {1: Fault(error=errno.EIO), 2: Fault(short_bytes=0)})
    with store:
        extent, source, found = store.allocate("w", U), filled(U), filled(U, 1)
        store.write(extent, source).wait()
        with pytest.raises(TierIOError, match="EIO"):
            store.read(extent, found).wait()
        with pytest.raises(TierIOError, match="ended after 0 of 4096"):
            store.read(extent, found).wait()
        store.read(extent, found).wait()
        assert torch.equal(found, source)


def test_a_slow_disk_hits_the_deadline_and_then_finishes(tmp_path):
    gate = Gate()
    store, _ = faulty_nvme(tmp_path, {0: Fault(gate=gate)})
    with store:
        ticket = store.write(store.allocate("w", U), filled(U))
        assert not ticket.done()
        with pytest.raises(TierIOError, match="write of tensor w on nvme is not finished"):
            ticket.wait(timeout_seconds=0.02)
        gate.open()
        ticket.wait()


def test_a_stalled_disk_is_reported_and_a_moving_one_is_not(tmp_path):
    gate = Gate()
    stuck = FaultyBackend(ThreadPoolBackend(1), {0: Fault(gate=gate)})
    with NvmeStore(tmp_path, CAPACITY, backend=stuck, stall_seconds=0.1) as store:
        with pytest.raises(TierIOError, match="the tier has moved nothing for"):
            store.write(store.allocate("w", U), filled(U)).wait()
        gate.open()
    slow = FaultyBackend(ThreadPoolBackend(1), dict.fromkeys(range(12), Fault(delay_seconds=0.1)))
    with NvmeStore(tmp_path, CAPACITY, piece_bytes=U, backend=slow, stall_seconds=1.0) as store:
        store.write(
            store.allocate("w", 12 * U), filled(12 * U)
        ).wait()  # 1.2 s in all, never 1 s without a piece


def test_wait_all_waits_for_every_ticket_before_it_raises(tmp_path):
    store, _ = faulty_nvme(tmp_path, {0: Fault(error=errno.EIO), 1: Fault(delay_seconds=0.1)})
    with store:
        tickets = [store.write(store.allocate(n, U), filled(U)) for n in "ab"]
        with pytest.raises(TierIOError, match="tensor a"):
            wait_all(tickets)
        assert tickets[1].done()
