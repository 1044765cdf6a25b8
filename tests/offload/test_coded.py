"""A coded store: the same bytes back, in order, from any thread; faults named; room for the worst case."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from memtrain.offload import coded
from memtrain.offload.codec import SEGMENT_BYTES, WORKERS, segment_room, staging_bytes
from memtrain.offload.coded import CodedStore, CodedTicket
from memtrain.offload.errors import (
    CorruptExtentError,
    ExtentStateError,
    OffloadError,
    TierFullError,
    TierIOError,
)
from memtrain.offload.io import Fault, FaultyBackend, ThreadPoolBackend
from memtrain.offload.store import wait_all
from memtrain.offload.tiers import MemoryStore, NvmeStore
from memtrain.optim.storage.lossless import ExponentCodec
from memtrain.planner.actions import Tier

PAGE = 4096
CAPACITY = 16 * SEGMENT_BYTES


@pytest.fixture(autouse=True)
def _library() -> None:
    pytest.importorskip("zstandard")


def moments(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(-(-nbytes // 4), generator=generator).view(torch.uint8)[:nbytes]


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    inner = MemoryStore(Tier.HOST, CAPACITY) if request.param == "memory" else NvmeStore(tmp_path, CAPACITY)
    with inner:
        coded = CodedStore(inner, ExponentCodec())
        yield coded
        coded.close()


def there_and_back(store: CodedStore, extent: Any, plain: torch.Tensor) -> None:
    store.write(extent, plain).wait()
    found = torch.full_like(plain, 0x5A)
    store.read(extent, found).wait()
    assert torch.equal(found, plain)


SIZES = [0, 1, 4097, 100_003, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 2 * SEGMENT_BYTES + 12345]


@pytest.mark.parametrize("nbytes", SIZES)
def test_bytes_come_back_whatever_they_are_and_were(store: CodedStore, nbytes: int) -> None:
    """Longer and shorter than what was there, in the same room, which is reserved once."""
    extent = store.allocate("moments", nbytes)
    used = store._store.used_bytes
    whole, last = divmod(nbytes, SEGMENT_BYTES)
    rooms = [
        segment_room(store.codec, size) for size in [SEGMENT_BYTES] * whole + [last] * (last > 0 or not whole)
    ]
    assert used == sum(rooms)
    zeros = torch.zeros(nbytes, dtype=torch.uint8)
    for plain in (moments(nbytes), noise(nbytes), zeros, noise(nbytes, 1), moments(nbytes, 1)):
        there_and_back(store, extent, plain)
        assert store._store.used_bytes == used
    store.free(extent)
    assert store._store.used_bytes == 0


def test_statistics_say_what_coding_did(tmp_path: Path) -> None:
    with NvmeStore(tmp_path, CAPACITY) as inner:
        store = CodedStore(inner, ExponentCodec())
        assert store.statistics().ratio == 1.0
        first, second = store.allocate("moments", SEGMENT_BYTES), store.allocate("noise", SEGMENT_BYTES)
        there_and_back(store, first, moments(SEGMENT_BYTES))
        one = store.statistics()
        assert (one.plain_bytes_written, one.plain_bytes_read) == (SEGMENT_BYTES, SEGMENT_BYTES)
        assert one.coded_bytes_written == one.coded_bytes_read == inner.statistics().bytes_written
        assert 0.80 < one.ratio < 0.88
        assert min(one.encode_seconds, one.decode_seconds) > 0
        assert one.ways == {"plain": 0, "zeros": 0, "bf16": 0, "fp32": 8}
        there_and_back(store, second, noise(SEGMENT_BYTES))
        two = store.statistics()
        assert two.ways == {"plain": 8, "zeros": 0, "bf16": 0, "fp32": 8}  # told, not hidden
        assert two.coded_bytes_written - one.coded_bytes_written == SEGMENT_BYTES + 16 + 8 * 5
        store.close()


def test_room_for_the_worst_case_is_refused_at_allocation_and_never_later() -> None:
    codec = ExponentCodec()
    need = 2 * segment_room(codec, SEGMENT_BYTES)
    with MemoryStore(Tier.HOST, need - PAGE) as inner:
        store = CodedStore(inner, codec)
        with pytest.raises(TierFullError, match=f"tensor moments needs {need} bytes on host"):
            store.allocate("moments", 2 * SEGMENT_BYTES)
        store.close()
    with MemoryStore(Tier.HOST, need) as inner:
        store = CodedStore(inner, codec)
        there_and_back(store, store.allocate("moments", 2 * SEGMENT_BYTES), noise(2 * SEGMENT_BYTES))
        store.close()


def test_a_read_waits_for_the_write_before_it_and_a_write_for_the_read(tmp_path: Path) -> None:
    """Every write and the read behind it are given at once, and none is waited for in between."""
    with NvmeStore(tmp_path, CAPACITY) as inner:
        store = CodedStore(inner, ExponentCodec())
        nbytes = SEGMENT_BYTES + 5000
        extent = store.allocate("w", nbytes)
        written = [moments(nbytes, seed) if seed % 2 else noise(nbytes, seed) for seed in range(6)]
        found = [torch.empty(nbytes, dtype=torch.uint8) for _ in written]
        tickets: list[CodedTicket] = []
        for source, target in zip(written, found, strict=True):
            tickets += [store.write(extent, source), store.read(extent, target)]
        wait_all(tickets)  # type: ignore[arg-type]
        assert all(ticket.done() for ticket in tickets)
        assert all(torch.equal(a, b) for a, b in zip(written, found, strict=True))
        store.close()


def test_many_threads_at_once() -> None:
    with MemoryStore(Tier.HOST, CAPACITY) as inner:
        store = CodedStore(inner, ExponentCodec())

        def work(seed: int) -> None:
            nbytes = 50_000 + 777 * seed
            extent = store.allocate(f"w{seed}", nbytes)
            for turn in range(5):
                there_and_back(store, extent, (moments if turn % 2 else noise)(nbytes, seed + 100 * turn))
            store.free(extent)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert inner.used_bytes == 0
        store.close()


class Gate:
    """A codec whose coders wait for a permit before they decode: what is held up then can be looked at."""

    name = "gate"
    working_bytes = 0

    def __init__(self) -> None:
        self.open = threading.Event()
        self.held = threading.Semaphore(0)
        self.ways: dict[Any, int] = {}

    def bound_bytes(self, nbytes: int) -> int:
        return nbytes + 1

    def coder(self) -> Gate:
        return self

    def encode(self, plain: torch.Tensor, into: torch.Tensor) -> int:
        into[: plain.numel()] = plain
        return plain.numel() + 1

    def decode(self, coded: torch.Tensor, into: torch.Tensor) -> None:
        self.held.release()
        assert self.open.wait(20)
        into[:] = coded[:-1]


def test_decoding_holds_no_lock(tmp_path: Path) -> None:
    with NvmeStore(tmp_path, CAPACITY) as inner:
        gate = Gate()
        store = CodedStore(inner, gate)
        extents = [store.allocate(f"w{i}", 5000) for i in range(WORKERS + 1)]
        for extent in extents:
            store.write(extent, moments(5000)).wait()
        found = torch.empty(5000, dtype=torch.uint8)
        held = store.read(extents[0], found)
        assert gate.held.acquire(timeout=20)
        # Everything else goes on: statistics, allocation, writes, and reads of the store beneath.
        store.statistics()
        there = store.allocate("more", 5000)
        store.write(there, noise(5000)).wait(20)
        plain = inner.allocate("plain", PAGE)
        buffer = inner.allocate("other", PAGE)
        assert plain.arena_offset != buffer.arena_offset
        assert not held.done()
        with pytest.raises(TierIOError, match="read of tensor w0 on nvme is not finished"):
            held.wait(0.01)
        gate.open.set()
        held.wait(20)
        assert torch.equal(found, moments(5000))
        store.close()


def test_freeing_waits_for_what_is_under_way() -> None:
    with MemoryStore(Tier.HOST, CAPACITY) as inner:
        gate = Gate()
        store = CodedStore(inner, gate)
        extent = store.allocate("w", 5000)
        store.write(extent, moments(5000)).wait()
        found = torch.empty(5000, dtype=torch.uint8)
        ticket = store.read(extent, found)
        assert gate.held.acquire(timeout=20)
        store.free(extent)
        assert inner.used_bytes > 0
        gate.open.set()
        ticket.wait(20)
        assert torch.equal(found, moments(5000))
        assert inner.used_bytes == 0
        for use in (store.free, lambda e: store.read(e, found), lambda e: store.write(e, found)):
            with pytest.raises(ExtentStateError, match="tensor w on host: its extent was freed"):
                use(extent)
        store.close()


def faulty(tmp_path: Path, plan: dict[int, Fault]) -> tuple[NvmeStore, CodedStore]:
    backend = FaultyBackend(ThreadPoolBackend(2), plan)
    inner = NvmeStore(tmp_path, CAPACITY, backend=backend)
    return inner, CodedStore(inner, ExponentCodec())


def test_one_flipped_bit_on_the_disk_is_found_and_named(tmp_path: Path) -> None:
    with NvmeStore(tmp_path, CAPACITY) as inner:
        store = CodedStore(inner, ExponentCodec())
        store.allocate("before", 100)
        extent = store.allocate("layers.7.exp_avg", 300_000)
        store.write(extent, moments(300_000)).wait()
        arena = os.open(f"/proc/self/fd/{inner._target.descriptor}", os.O_RDWR)
        position = extent.inner.arena_offset + 100_000
        byte = os.pread(arena, 1, position)[0]
        os.pwrite(arena, bytes([byte ^ 0x10]), position)
        os.fsync(arena)
        os.close(arena)
        with pytest.raises(CorruptExtentError, match=r"tensor layers\.7\.exp_avg on nvme at offset \d+"):
            store.read(extent, torch.empty(300_000, dtype=torch.uint8)).wait()
        store.close()


def test_a_truncated_arena_is_found_and_named(tmp_path: Path) -> None:
    with NvmeStore(tmp_path, CAPACITY) as inner:
        store = CodedStore(inner, ExponentCodec())
        extent = store.allocate("exp_avg", 300_000)
        store.write(extent, moments(300_000)).wait()
        os.truncate(f"/proc/self/fd/{inner._target.descriptor}", 65536)
        with pytest.raises(TierIOError, match="tensor exp_avg on nvme at offset 0"):
            store.read(extent, torch.empty(300_000, dtype=torch.uint8)).wait()
        store.close()


def test_coded_bytes_that_are_none_are_found_behind_a_right_checksum(tmp_path: Path) -> None:
    """As when memory fails between coding and writing: the tier has what it was given."""
    with NvmeStore(tmp_path, CAPACITY) as inner:
        store = CodedStore(inner, ExponentCodec())
        store.allocate("before", 100)
        extent = store.allocate("exp_avg", 300_000)
        store.write(extent, moments(300_000)).wait()
        length = extent.lengths[0]
        assert length is not None
        bad = torch.empty(length + PAGE, dtype=torch.uint8)
        bad = bad[-bad.data_ptr() % PAGE :][:length].fill_(7)
        inner.write(extent.inner, bad).wait()
        where = extent.inner.arena_offset
        message = rf"read of tensor exp_avg on nvme at offset {where}: .*do not begin as coded ones do"
        with pytest.raises(CorruptExtentError, match=message):
            store.read(extent, torch.empty(300_000, dtype=torch.uint8)).wait()
        there_and_back(store, extent, moments(300_000, 1))
        store.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_is_named_and_what_it_replaced_is_not_read(tmp_path: Path, number: int) -> None:
    """Of two segments one fails: the other's new bytes must not come back beside old ones."""
    inner, store = faulty(tmp_path, {3: Fault(error=number)})
    with inner:
        nbytes = SEGMENT_BYTES + 9000
        extent, found = store.allocate("w", nbytes), torch.empty(nbytes, dtype=torch.uint8)
        store.write(extent, moments(nbytes)).wait()
        failing, following = store.write(extent, moments(nbytes, 1)), store.read(extent, found)
        with pytest.raises(TierIOError, match="tensor w on nvme at offset") as caught:
            failing.wait()
        assert caught.value.errno == number
        with pytest.raises(ExtentStateError, match="last write failed"):
            following.wait()
        there_and_back(store, extent, moments(nbytes, 2))  # and it goes on when the cause is gone
        store.close()


def test_a_write_that_never_begins_replaces_nothing_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transfer that stalls may keep a segment from being coded at all: the old one is not read then."""
    inner, store = faulty(tmp_path, {})
    with inner:
        nbytes = SEGMENT_BYTES + 9000
        extent, found = store.allocate("w", nbytes), torch.empty(nbytes, dtype=torch.uint8)
        store.write(extent, moments(nbytes)).wait()
        settle, turns = coded._Bench.settle, iter([True])

        def stalled(bench: Any) -> None:
            if next(turns, False):
                raise TierIOError("stalled", errno=errno.ETIMEDOUT)
            settle(bench)

        monkeypatch.setattr(coded._Bench, "settle", stalled)
        with pytest.raises(TierIOError, match="stalled"):
            store.write(extent, moments(nbytes, 1)).wait()
        with pytest.raises(ExtentStateError, match=r"never written|last write failed"):
            store.read(extent, found).wait()
        store.close()


def test_a_failed_read_leaves_the_extent_readable(tmp_path: Path) -> None:
    inner, store = faulty(tmp_path, {1: Fault(error=errno.EIO)})
    with inner:
        extent, found = store.allocate("w", 9000), torch.empty(9000, dtype=torch.uint8)
        store.write(extent, moments(9000)).wait()
        with pytest.raises(TierIOError, match="EIO"):
            store.read(extent, found).wait()
        store.read(extent, found).wait()
        assert torch.equal(found, moments(9000))
        store.close()


class Broken(Gate):
    name = "broken"

    def encode(self, plain: torch.Tensor, into: torch.Tensor) -> int:
        raise MemoryError("no room")


def test_a_codec_that_fails_leaves_no_waiter_and_no_old_bytes() -> None:
    with MemoryStore(Tier.HOST, CAPACITY) as inner:
        store = CodedStore(inner, Broken())
        extent = store.allocate("w", 100)
        with pytest.raises(
            OffloadError, match=r"write of tensor w on host: the codec broken failed: MemoryError"
        ):
            store.write(extent, moments(100)).wait(20)
        with pytest.raises(ExtentStateError, match="never written"):
            store.read(extent, moments(100))
        store.close()


def test_segments_are_written_one_after_the_other_and_read_by_another_store(store: CodedStore) -> None:
    plain = moments(2 * SEGMENT_BYTES + 12345)
    extent = store.allocate("w", plain.numel())
    for start in (SEGMENT_BYTES, 0, 2 * SEGMENT_BYTES):
        with pytest.raises(ExtentStateError, match="never written"):
            store.read(extent, torch.empty_like(plain))
        store.write(extent, plain[start : start + SEGMENT_BYTES].clone(), start).wait()
    with pytest.raises(ValueError, match="in segments of 4194304 bytes, got 4194304 at 100"):
        store.write(extent, plain[:SEGMENT_BYTES], 100)
    found, other = torch.empty_like(plain), CodedStore(store.beneath, ExponentCodec())
    other.read(extent, found).wait()
    assert torch.equal(found, plain)
    other.free(extent)
    other.close()
    assert store.beneath.used_bytes == 0


def test_what_is_refused(store: CodedStore) -> None:
    extent, buffer = store.allocate("w", 8192), torch.empty(8192, dtype=torch.uint8)
    with pytest.raises(ExtentStateError, match="cannot be read: the extent was never written"):
        store.read(extent, buffer)
    with pytest.raises(ValueError, match=r"written whole, all 8192 bytes from 0, .* got 4096 at 4096"):
        store.write(extent, buffer[4096:], 4096)
    with pytest.raises(ValueError, match=r"read whole, .* or in segments of 4194304 bytes, got 100 at 0"):
        store.read(extent, buffer[:100])
    for wrong in (buffer.view(torch.int8), buffer.view(2, -1), torch.empty(16384, dtype=torch.uint8)[::2]):
        with pytest.raises(ValueError, match="contiguous 1-D uint8 tensor in host memory"):
            store.write(extent, wrong)
    with pytest.raises(ValueError, match="nbytes must be >= 0, got -1"):
        store.allocate("w", -1)


def test_closing_gives_up_what_was_not_begun_and_refuses_more() -> None:
    with MemoryStore(Tier.HOST, CAPACITY) as inner:
        gate = Gate()
        store = CodedStore(inner, gate)
        extents = [store.allocate(f"w{i}", 5000) for i in range(WORKERS + 1)]
        wait_all([store.write(extent, moments(5000)) for extent in extents])  # type: ignore[misc]
        found = [torch.empty(5000, dtype=torch.uint8) for _ in extents]
        tickets = [store.read(extent, each) for extent, each in zip(extents, found, strict=True)]
        for _ in range(WORKERS):
            assert gate.held.acquire(timeout=20)
        closing = threading.Thread(target=store.close)
        closing.start()
        while not store._closed:
            pass
        gate.open.set()
        closing.join(20)
        for ticket, each in zip(tickets[:WORKERS], found, strict=False):
            ticket.wait(20)
            assert torch.equal(each, moments(5000))
        with pytest.raises(OffloadError, match="read of tensor w2 on host was given up: the store is closed"):
            tickets[WORKERS].wait(20)
        with pytest.raises(OffloadError, match="the coded host store is closed"):
            store.read(extents[0], found[0])
        store.close()


def test_its_memory_is_what_it_says() -> None:
    codec = ExponentCodec()
    with MemoryStore(Tier.HOST, CAPACITY) as inner:
        store = CodedStore(inner, codec)
        assert store.staging_bytes == staging_bytes(codec)
        assert store.staging_bytes == store._slab.nbytes + 2 * WORKERS * codec.working_bytes
        assert store._slab.nbytes == 2 * WORKERS * (SEGMENT_BYTES + PAGE)
        store.close()


def test_a_range_that_is_being_moved_is_not_discarded() -> None:
    with MemoryStore(Tier.HOST, CAPACITY) as inner:
        extent, buffer = inner.allocate("w", 2 * PAGE), torch.empty(3 * PAGE, dtype=torch.uint8)
        buffer = buffer[-buffer.data_ptr() % PAGE :][: 2 * PAGE].zero_()
        inner.write(extent, buffer[:PAGE]).wait()
        inner.write(extent, buffer[PAGE:], PAGE).wait()
        with pytest.raises(ExtentStateError, match="cuts the chunk"):
            inner.discard(extent, 0, PAGE - 1)
        inner.discard(extent, PAGE, PAGE)
        with pytest.raises(ExtentStateError, match="no chunk starts at 4096"):
            inner.read(extent, buffer)
        inner.read(extent, buffer[:PAGE]).wait()
