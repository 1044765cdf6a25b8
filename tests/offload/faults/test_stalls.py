"""Disks that are late or hang, rings with one slot: bounded, told of, ended by a deadline, never a hang."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from memtrain.offload import store as store_module
from memtrain.offload.coded import CodedStore
from memtrain.offload.device import CpuDevice
from memtrain.offload.errors import TierIOError
from memtrain.offload.io import Fault, FaultyBackend, Gate, IORequest, ThreadPoolBackend
from memtrain.offload.slab import Ring
from memtrain.offload.staging import SlotCache
from memtrain.offload.tiers import MemoryStore, NvmeStore
from memtrain.optim.storage.lossless import ExponentCodec
from memtrain.planner.actions import Tier
from tests.offload.faults.disks import MiB, frozen, loop_disk, needs_mounts
from tests.offload.faults.runs_on_disk import assert_trained, open_run_on
from tests.offload.snapshot_runs import AHEAD, SEQUENTIAL
from tests.offload.tier_stores import U, filled
from tests.offload.training import STAGING, batches


@needs_mounts
def test_a_disk_that_hangs_is_told_of_ends_in_an_error_and_serves_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "REPORT_SECONDS", 0.1)
    caplog.set_level(logging.WARNING)
    with ExitStack() as stack:
        disk = stack.enter_context(loop_disk(tmp_path, "disk", 32 * MiB))
        with NvmeStore(disk, 16 * MiB, piece_bytes=MiB, stall_seconds=0.5) as store:
            extent, source, found = store.allocate("w", 4 * MiB), filled(4 * MiB), filled(4 * MiB, 1)
            with frozen(disk):
                ticket = store.write(extent, source)
                with pytest.raises(
                    TierIOError, match=r"write of tensor w on nvme: the tier has moved nothing"
                ):
                    ticket.wait()
                store.free(extent)
                began = time.monotonic()
                with pytest.raises(TierIOError, match=r"room for tensor again on nvme: the tier has moved"):
                    store.allocate("again", 16 * MiB)  # must wait for what is freed but still being written
                assert time.monotonic() - began < 5
            assert "write of tensor w on nvme has been waited for" in caplog.text
            assert "1 transfers under way" in caplog.text
            while not ticket.done():
                time.sleep(0.01)
            ticket.wait()
            extent = store.allocate("again", 4 * MiB)
            store.write(extent, source).wait()
            store.read(extent, found).wait()
            assert torch.equal(found, source)


@needs_mounts
def test_a_run_whose_disk_hangs_ends_with_an_error_in_time(tmp_path: Path) -> None:
    def work(disk: Path) -> None:
        store = NvmeStore(disk, 8 * MiB, stall_seconds=0.5)
        with open_run_on(store) as run:
            run.train(batches(1))
            with frozen(disk):
                run.train(batches(1))
                run.flush()

    before = set(threading.enumerate())
    hangs = pytest.raises(TierIOError, match="the tier has moved nothing")
    with loop_disk(tmp_path, "disk", 32 * MiB) as disk, hangs:
        work(disk)
    assert set(threading.enumerate()) <= before


class Slow(FaultyBackend):
    """A millisecond a piece; notes how many bytes of buffers are given to it at once."""

    def __init__(self) -> None:
        super().__init__(ThreadPoolBackend(1))
        self.held = self.most = 0
        self._count = threading.Lock()

    def submit(self, request: IORequest) -> None:
        self.plan[self.submitted] = Fault(delay_seconds=0.001)
        done, nbytes = request.done, request.buffer.numel()
        with self._count:
            self.held += nbytes
            self.most = max(self.most, self.held)

        def over(finished: IORequest) -> None:
            with self._count:
                self.held -= nbytes
            done(finished)

        request.done = over
        super().submit(request)


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_a_slow_tier_never_holds_more_than_the_rings(schedule: Any) -> None:
    backend = Slow()
    gradients = STAGING.gradient_slots * STAGING.gradient_slot_bytes
    rings = gradients + STAGING.update_slots * STAGING.update_slot_bytes
    with open_run_on(MemoryStore(Tier.HOST, 8 * MiB, backend=backend), schedule=schedule) as run:
        run.train(batches(3))
        assert_trained(run, 3)
    assert 0 < backend.most <= rings


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("seed", range(3))
def test_one_slot_in_each_direction_is_enough(schedule: Any, seed: int) -> None:
    rng = random.Random(seed)
    staging = dataclasses.replace(
        STAGING,
        gradient_slots=1,
        gradient_slot_bytes=4096 * rng.randint(2, 40),
        update_slots=1,
        update_shard_elements=rng.randint(10_000, 80_000),
    )
    backend = FaultyBackend(ThreadPoolBackend(3), reorder=rng.randint(1, 4), seed=seed, hold_seconds=0.001)
    store = MemoryStore(Tier.HOST, 16 * MiB, backend=backend, piece_bytes=4096 * rng.randint(1, 64))
    with open_run_on(store, schedule=schedule, staging=staging) as run:
        run.train(batches(3))
        assert_trained(run, 3)


class Stuck:
    """A transfer that does not end before it is let go."""

    def __init__(self) -> None:
        self.over = False

    def done(self) -> bool:
        return self.over

    def wait(self) -> None:
        if not self.over:
            raise TierIOError("the tier has moved nothing for 0 s")


def test_a_slot_with_a_transfer_that_hangs_is_nobodys() -> None:
    ring, stuck = Ring(2, U), Stuck()
    one, other = ring.acquire(), ring.acquire()
    one.release(after=[stuck])
    assert ring.try_acquire() is None
    other.release()
    again = ring.acquire()
    assert again is other
    again.release(after=[stuck])
    with pytest.raises(TierIOError, match="moved nothing"):
        ring.acquire()
    stuck.over = True
    assert {ring.acquire(), ring.acquire()} == {one, other}
    ring.close()


class Passing:
    """Something in a slot that may leave at once."""

    sequence = 0

    def may_leave(self) -> bool:
        return True

    def leave(self) -> None:
        return


def test_a_staging_slot_with_a_transfer_that_hangs_is_kept_for_it() -> None:
    cache, stuck = SlotCache(1, U, "saved", threading.RLock(), CpuDevice()), Stuck()
    first, second = Passing(), Passing()
    slot = cache.take(first)
    slot.ticket = stuck
    for _ in range(2):  # also when the error was told before
        with pytest.raises(TierIOError, match="moved nothing"):
            cache.take(second)
    stuck.over = True
    assert cache.take(second) is slot
    cache.close()


def test_a_coded_tier_that_hangs_for_a_while_loses_nothing_later() -> None:
    pytest.importorskip("zstandard")
    gate = Gate()
    slow = FaultyBackend(ThreadPoolBackend(2), {2: Fault(gate=gate)})
    plain = torch.randn(200_000).view(torch.uint8)
    with MemoryStore(Tier.HOST, 64 * MiB, backend=slow) as store:
        coded = CodedStore(store, ExponentCodec())
        extents = [coded.allocate(name, plain.numel()) for name in "ab"]
        for extent in extents:
            coded.write(extent, plain).wait()
        patient, store.stall_seconds = store.stall_seconds, 0.1
        late, found = coded.read(extents[0], torch.empty_like(plain)), torch.empty_like(plain)
        with pytest.raises(TierIOError, match="the tier has moved nothing"):
            late.wait()
        for _ in range(4):  # both workers' memory is used again, one's only when the late read is over
            with contextlib.suppress(TierIOError):
                coded.read(extents[1], found.zero_()).wait()
                assert torch.equal(found, plain)
        store.stall_seconds = patient
        gate.open()
        for extent in extents:
            coded.read(extent, found.zero_()).wait()
            assert torch.equal(found, plain)
        coded.close()
