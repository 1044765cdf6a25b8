"""What every tier does alike: round trips, order, refusals, statistics, no thread left."""

import contextlib
import os
import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.offload.errors import (
    ExtentStateError,
    OffloadError,
    PlacementError,
    TierFullError,
)
from memtrain.offload.io import Fault, FaultyBackend, Gate, ThreadPoolBackend
from memtrain.offload.slab import Ring
from memtrain.offload.tiers import MemoryStore, NvmeStore, wait_all
from memtrain.planner.actions import Tier
from memtrain.planner.memory_place import MemoryPlace
from tests.offload.tier_stores import CAPACITY, U, faulty_nvme, filled, refuse_direct


@pytest.fixture(params=["nvme", "nvme-buffered", "host", "cxl"])
def store(request, tmp_path, monkeypatch):
    if request.param == "nvme-buffered":
        monkeypatch.setattr("memtrain.offload.tiers.enable_direct", refuse_direct)
    fallback = pytest.warns(UserWarning, match="through the page cache")
    makers = {
        "nvme": lambda: NvmeStore(tmp_path, CAPACITY, piece_bytes=2 * U),
        "nvme-buffered": lambda: NvmeStore(tmp_path, CAPACITY, piece_bytes=2 * U, direct="allow_buffered"),
        "host": lambda: MemoryStore(Tier.HOST, CAPACITY, piece_bytes=2 * U),
        "cxl": lambda: MemoryStore(Tier.CXL, CAPACITY, MemoryPlace(nodes=(0,)), piece_bytes=2 * U),
    }
    with fallback if request.param == "nvme-buffered" else contextlib.nullcontext():
        made = makers[request.param]()
    yield made
    made.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("nbytes", [0, 1, U - 1, U, 2 * U + 5, 13 * U + 7])
def test_round_trip(store, nbytes):
    extent, source, found = store.allocate("w", nbytes), filled(nbytes), filled(nbytes, 1)
    assert extent.generation == 0
    for generation in (1, 2):
        store.write(extent, source).wait()
        assert extent.generation == generation
    ticket = store.read(extent, found)
    ticket.wait()
    ticket.wait()
    assert ticket.done()
    assert torch.equal(found, source)


def test_chunks_are_written_one_by_one_and_read_together_or_alone(store):
    extent, source, found = store.allocate("w", 5 * U + 9), filled(5 * U + 9), filled(5 * U + 9, 1)
    wait_all([store.write(extent, source[2 * U :], 2 * U), store.write(extent, source[: 2 * U])])
    store.read(extent, found).wait()
    assert torch.equal(found, source)
    found.zero_()
    store.read(extent, found[2 * U :], 2 * U).wait()
    assert torch.equal(found[2 * U :], source[2 * U :])
    with pytest.raises(ExtentStateError, match="read whole chunks"):
        store.read(extent, found[:U])
    with pytest.raises(ExtentStateError, match="cuts the chunk"):
        store.write(extent, found[:U])
    store.write(extent, filled(5 * U + 9, 4)).wait()
    store.read(extent, found).wait()
    assert torch.equal(found, filled(5 * U + 9, 4))


def test_a_read_waits_for_the_write_of_its_bytes_and_a_write_for_the_read(store):
    extent = store.allocate("w", 8 * U)
    sources, founds = [filled(8 * U, i) for i in range(10)], [filled(8 * U, 99) for _ in range(10)]
    tickets = []
    for source, found in zip(sources, founds, strict=True):
        tickets += [store.write(extent, source), store.read(extent, found)]
    wait_all(tickets)
    assert extent.generation == 10
    for source, found in zip(sources, founds, strict=True):
        assert torch.equal(source, found)


def test_never_written_freed_foreign_and_closed_are_refused_by_name(store):
    extent, buffer = store.allocate("layer.3.m", U), filled(U)
    with pytest.raises(ExtentStateError, match=r"tensor layer\.3\.m on .* never written"):
        store.read(extent, buffer)
    store.free(extent)
    for use in (store.read, store.write):
        with pytest.raises(ExtentStateError, match=r"layer\.3\.m.*was freed"):
            use(extent, buffer)
    with pytest.raises(ExtentStateError, match="was freed"):
        store.free(extent)
    with MemoryStore(Tier.HOST, U) as other, pytest.raises(ExtentStateError, match="another store"):
        store.write(other.allocate("x", U), buffer)
    mine = store.allocate("y", U)
    store.close()
    with pytest.raises(OffloadError, match="store is closed"):
        store.write(mine, buffer)
    with pytest.raises(OffloadError, match="store is closed"):
        store.allocate("z", U)


def test_bad_buffers_and_offsets(store):
    extent = store.allocate("w", 4 * U)
    buffer = filled(8 * U)
    for wrong, message in [
        (buffer.view(torch.int32), "1-D uint8"),
        (buffer.view(2, -1), "1-D uint8"),
        (buffer[::2], "contiguous"),
        (buffer[8 : U + 8], "multiple of 4096"),
        (buffer, "not within its 16384"),
        (buffer[:0], "not within"),
    ]:
        with pytest.raises(ValueError, match=message):
            store.write(extent, wrong)
    with pytest.raises(ValueError, match="multiple of 4096, got 100"):
        store.read(extent, buffer[:U], 100)
    with pytest.raises(ValueError, match="nbytes must be >= 0, got -1"):
        store.allocate("w", -1)


def test_a_full_tier_says_what_is_short(store):
    big = store.allocate("embed", 63 * U)
    assert (store.used_bytes, store.capacity_bytes, store.alignment) == (63 * U, 64 * U, U)
    message = (
        rf"head needs 8192 bytes on {store.tier.value}, 4096 of 262144 bytes are free: raise .* 4096 bytes"
    )
    with pytest.raises(TierFullError, match=message):
        store.allocate("head", U + 1)
    store.free(big)
    assert store.used_bytes == 0
    a, b, c = (store.allocate(n, 20 * U) for n in "abc")
    store.free(b)
    with pytest.raises(TierFullError, match=r"98304 of .* free \(the longest run is 81920 bytes\)"):
        store.allocate("d", 24 * U)
    assert {a.arena_offset, c.arena_offset} == {0, 40 * U}


def test_statistics_count_bytes_and_peak(store):
    extent, buffer = store.allocate("w", 3 * U + 1), filled(3 * U + 1)
    wait_all([store.write(extent, buffer), store.read(extent, buffer), store.read(extent, buffer)])
    store.free(extent)
    s = store.statistics()
    assert (s.bytes_written, s.bytes_read) == (3 * U + 1, 2 * (3 * U + 1))
    assert (s.used_bytes, s.peak_used_bytes) == (0, 4 * U)
    assert s.read_seconds > 0
    assert s.write_seconds > 0


def open_behind(gate, tickets):
    for ticket in tickets:
        with contextlib.suppress(OffloadError):
            ticket.wait()
    gate.open()


def test_close_fails_what_waits_and_hangs_nobody(tmp_path):
    gate = Gate()
    store, _ = faulty_nvme(tmp_path, {0: Fault(gate=gate)}, threads=1)
    extent, buffer, found = store.allocate("w", U), filled(U), filled(U, 1)
    tickets = [store.write(extent, buffer), store.read(extent, found), store.write(extent, buffer)]
    assert gate.reached.wait(20)  # the first one is in a worker now
    others = threading.Thread(target=open_behind, args=(gate, tickets[1:]))
    others.start()
    store.close()  # fails what waits, then waits for the worker
    others.join()
    tickets[0].wait()
    for ticket in tickets[1:]:
        with pytest.raises(OffloadError, match="given up: the store is closed"):
            ticket.wait()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_traffic_out_of_order_is_exact(tmp_path_factory, seed):
    rng = random.Random(seed)
    backend = FaultyBackend(
        ThreadPoolBackend(3), reorder=rng.choice([1, 2, 5]), seed=seed, hold_seconds=0.001
    )
    with MemoryStore(Tier.HOST, 16 * U, piece_bytes=U, backend=backend) as store:
        live, tickets, checks, serial = {}, [], [], 0
        for _ in range(40):
            action = rng.choice(["new", "write", "read", "read", "free"])
            if action == "new":
                nbytes = rng.randint(1, 4 * U)
                try:
                    live[store.allocate(f"t{len(live)}", nbytes)] = None
                except TierFullError:
                    assert store._space.largest_bytes < 4 * U
            elif live:
                extent = rng.choice(list(live))
                if action == "write":
                    serial += 1
                    live[extent] = filled(extent.nbytes, serial)
                    tickets.append(store.write(extent, live[extent]))
                elif action == "read" and live[extent] is not None:
                    found = filled(extent.nbytes, 10**6)
                    tickets.append(store.read(extent, found))
                    checks.append((found, live[extent]))
                elif action == "free":
                    store.free(extent)
                    del live[extent]
        wait_all(tickets)
        for found, expected in checks:
            assert torch.equal(found, expected)
        assert store.used_bytes == sum(extent.reserved_bytes for extent in live)


def test_progress_with_one_slot_and_many_tensors(tmp_path):
    ring = Ring(1, 3 * U)
    with NvmeStore(tmp_path, CAPACITY, piece_bytes=U, threads=1) as store:
        sizes = [1 + 997 * i % (3 * U) for i in range(20)]
        extents = [store.allocate(f"t{i}", n) for i, n in enumerate(sizes)]
        for step in (store.write, store.read):
            for i, extent in enumerate(extents):
                slot = ring.acquire(extent.nbytes)
                view = slot.buffer[: extent.nbytes]
                if step == store.write:
                    view.fill_(i)
                step(extent, view).wait()
                assert bool((view == i).all())
                slot.release()


def test_space_freed_under_a_transfer_is_waited_for(tmp_path):
    gate = Gate()
    store, _ = faulty_nvme(tmp_path, {0: Fault(gate=gate)})
    with store:
        extent, buffer = store.allocate("a", CAPACITY), filled(CAPACITY)
        ticket = store.write(extent, buffer)
        store.free(extent)
        assert not ticket.done()
        threading.Timer(0.1, gate.open).start()
        again = store.allocate("b", CAPACITY)
        assert ticket.done()
        assert again.arena_offset == 0
        with pytest.raises(ExtentStateError, match=r"tensor b .* never written"):
            store.read(again, buffer)


def test_memory_stores_say_what_they_need():
    with pytest.raises(ValueError, match="serves host or cxl, got nvme"):
        MemoryStore(Tier.NVME, U)
    with pytest.raises(ValueError, match="cxl tier needs a place"):
        MemoryStore(Tier.CXL, U)
    with pytest.raises(PlacementError, match="NUMA node 50 does not exist"):
        MemoryStore(Tier.CXL, U, MemoryPlace(nodes=(50,)))
    with pytest.raises(ValueError, match="piece_bytes must be a positive multiple of 4096, got 100"):
        MemoryStore(Tier.HOST, U, piece_bytes=100)


def test_no_threads_are_left(tmp_path):
    before = threading.active_count()
    for _ in range(3):
        with NvmeStore(tmp_path, CAPACITY), MemoryStore(Tier.HOST, CAPACITY):
            assert threading.active_count() == before + 4 + 2
    assert threading.active_count() == before
