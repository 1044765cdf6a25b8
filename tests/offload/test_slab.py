import ctypes
import errno
import faulthandler
import os
import random
import re
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch

from memtrain.offload import numa
from memtrain.offload import slab as slab_module
from memtrain.offload.device import CpuDevice
from memtrain.offload.errors import PlacementError, StagingError, TierIOError
from memtrain.offload.slab import HUGE_PAGE_BYTES, Ring, Slab
from memtrain.planner.memory_place import MemoryPlace


@pytest.mark.parametrize(("asked", "got"), [(1, 4096), (4096, 4096), (4097, 8192), (3 << 20, 3 << 20)])
def test_slab_is_exact_and_page_aligned(asked, got):
    with Slab(asked) as slab:
        assert slab.nbytes == got
        assert slab.buffer.shape == (got,)
        assert slab.buffer.dtype == torch.uint8
        assert slab.address % 4096 == 0
        assert int(slab.buffer.sum()) == 0


def test_a_view_outlives_the_closed_slab():
    slab = Slab(8192)
    view = slab.buffer[4096:]
    view.fill_(7)
    slab.close()
    slab.close()
    assert slab.closed
    assert int(view.sum()) == 7 * 4096
    with pytest.raises(StagingError, match="closed"):
        _ = slab.buffer


def test_huge_pages_are_asked_for_from_their_size_on():
    def advised(slab):
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(mapping[1], 16) <= slab.address < int(mapping[2], 16)
            elif inside and line.startswith("VmFlags:"):
                return "hg" in line.split()
        raise AssertionError("the slab is not mapped")

    with (
        Slab(HUGE_PAGE_BYTES) as large,
        Slab(HUGE_PAGE_BYTES, huge_pages=False) as refused,
        Slab(4096) as small,
    ):
        assert advised(large)
        assert not advised(refused)
        assert not advised(small)


@pytest.mark.parametrize(("inherited", "outcome"), [(True, ("exit", 7)), (False, ("signal", signal.SIGSEGV))])
def test_a_forked_child_reads_what_it_inherits(inherited, outcome):
    with Slab(4096, inherited=inherited) as slab:
        slab.buffer[100] = 7
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()
            os._exit(int(slab.buffer[100]))
        _, status = os.waitpid(child, 0)
    found = ("signal", os.WTERMSIG(status)) if os.WIFSIGNALED(status) else ("exit", os.WEXITSTATUS(status))
    assert found == outcome


def test_memory_is_forgotten_before_its_address_can_be_anothers(monkeypatch):
    mapped = []

    class Watched(dict):
        def pop(self, address, *default):
            with open("/proc/self/maps") as maps:
                areas = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
            mapped.append(any(low <= address < high for low, high in areas))
            return super().pop(address, *default)

    known = Watched()
    monkeypatch.setattr(slab_module, "_not_inherited", known)
    monkeypatch.setattr(slab_module._Mapping.__del__, "__defaults__", (known,))
    slab = Slab(64 << 20)
    address = slab.address
    assert known == {address: 64 << 20}
    slab.close()
    assert known == {}
    assert mapped == [True]


LIBC = ctypes.CDLL(None, use_errno=True)


def resident(address, nbytes):
    """Pages that are there, by the kernel."""
    vector = (ctypes.c_ubyte * (nbytes // 4096))()
    assert LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), vector) == 0
    return sum(page & 1 for page in vector)


class Kernel:
    """libc, but for an ``madvise`` that takes the pages and says that it could not."""

    def __init__(self, reason):
        self._reason = reason

    def madvise(self, address, nbytes, advice):
        done = LIBC.madvise(address, nbytes, advice)
        if advice != slab_module._POPULATE_WRITE:
            return done
        ctypes.set_errno(self._reason)
        return -1


def test_a_populated_slab_is_there_before_anything_is_written():
    with Slab(64 * 4096, huge_pages=False) as slab:
        assert resident(slab.address, slab.nbytes) == 0
        slab.populate()
        assert resident(slab.address, slab.nbytes) == 64
        assert not slab.buffer.any()
    ring = Ring(3, 4096)
    assert resident(ring.slab.address, ring.slab.nbytes) == 3


def test_an_older_kernel_is_helped(monkeypatch):
    monkeypatch.setattr(slab_module.ctypes, "CDLL", lambda *_, **__: Kernel(errno.EINVAL))
    with Slab(64 * 4096, huge_pages=False) as slab:
        slab.populate()
        monkeypatch.undo()
        assert resident(slab.address, slab.nbytes) == 64


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (errno.ENOMEM, r"\(Cannot allocate memory\): lower the budget"),
        (errno.EPERM, r"\(Operation not permitted\)$"),
    ],
)
def test_pages_that_cannot_be_had_are_an_error_that_holds_none(monkeypatch, reason, told):
    slab = Slab(64 * 4096, huge_pages=False)
    address, held = slab.address, slab.buffer
    monkeypatch.setattr(slab_module.ctypes, "CDLL", lambda *_, **__: Kernel(reason))
    with pytest.raises(StagingError, match=f"does not give 262144 bytes {told}"):
        slab.populate()
    monkeypatch.undo()
    assert slab.closed
    assert resident(address, held.nbytes) == 0


def test_slab_on_a_node_lies_there():
    with Slab(1 << 20, MemoryPlace(nodes=(0,))) as slab:
        assert set(numa.nodes_of_pages(slab.address, slab.nbytes)) == {0}


def test_slab_on_an_absent_node_is_refused_by_name():
    with pytest.raises(PlacementError, match="NUMA node 77 does not exist"):
        Slab(4096, MemoryPlace(nodes=(77,)))


def test_bad_sizes():
    with pytest.raises(ValueError, match="nbytes >= 1, got 0"):
        Slab(0)
    with pytest.raises(ValueError, match="count >= 1, got 0"):
        Ring(0, 4096)


def test_ring_gives_each_slot_once_and_takes_it_back():
    ring = Ring(2, 5000)
    assert ring.slot_bytes == 8192
    first, second = ring.acquire(), ring.acquire()
    assert {first.buffer.data_ptr(), second.buffer.data_ptr()} == {
        ring.slab.address,
        ring.slab.address + 8192,
    }
    assert ring.try_acquire() is None
    assert ring.free_count == 0
    first.release()
    assert ring.try_acquire() is first
    first.release()
    with pytest.raises(StagingError, match="released twice"):
        first.release()


def test_acquire_raises_where_the_caller_holds_every_slot():
    ring = Ring(2, 4096)
    held = [ring.acquire(), ring.acquire()]
    with pytest.raises(StagingError, match="none can become free"):
        ring.acquire()
    held[0].release()
    assert ring.acquire() is held[0]


def test_acquire_raises_where_a_dead_thread_holds_the_slot():
    ring = Ring(1, 4096)
    thread = threading.Thread(target=ring.acquire)
    thread.start()
    thread.join()
    with pytest.raises(StagingError, match="none can become free"):
        ring.acquire()


def test_two_threads_that_wait_for_each_other_do_not_hang():
    ring = Ring(2, 4096)
    ready = threading.Barrier(2)
    outcomes = []

    def work():
        slot = ring.acquire()
        ready.wait()
        try:
            ring.acquire().release()
            outcomes.append("slot")
        except StagingError:
            outcomes.append("refused")
        slot.release()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(outcomes) == ["refused", "slot"]


def test_acquire_waits_for_a_release_by_another_thread():
    ring = Ring(1, 4096)
    slot = ring.acquire()
    got = []
    thread = threading.Thread(target=lambda: got.append(ring.acquire(timeout_seconds=10)))
    thread.start()
    slot.release()
    thread.join(10)
    assert got == [slot]


def test_acquire_gives_up_in_time_and_refuses_what_does_not_fit():
    ring = Ring(1, 4096)
    stop = threading.Event()

    def hold():
        slot = ring.acquire()
        stop.wait(10)
        slot.release()

    thread = threading.Thread(target=hold)
    thread.start()
    while ring.free_count:
        pass
    with pytest.raises(StagingError, match=r"within 0\.05 s"):
        ring.acquire(timeout_seconds=0.05)
    with pytest.raises(StagingError, match="4097 bytes do not fit a staging slot of 4096"):
        ring.acquire(4097)
    stop.set()
    thread.join()


def test_a_closed_ring_refuses_and_takes_back_what_is_out():
    ring = Ring(1, 4096)
    slot = ring.acquire()
    ring.close()
    slot.release()
    with pytest.raises(StagingError, match="closed"):
        ring.acquire()
    with pytest.raises(StagingError, match="closed"):
        ring.try_acquire()


def test_a_ring_whose_device_fails_is_closed_all_the_same():
    class Broken(CpuDevice):
        def unregister(self, slab):
            raise RuntimeError("an illegal memory access was encountered")

    ring = Ring(1, 4096, device=Broken())
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ring.close()
    assert ring.slab.closed
    ring.close()
    with pytest.raises(StagingError, match="closed"):
        ring.acquire()


def test_the_high_water_of_a_ring_is_what_was_held_and_used_at_most():
    ring = Ring(3, 5000)
    first, second = ring.acquire(), ring.acquire()
    first.note_used(4097)
    first.release()
    second.release()
    third = ring.acquire()
    third.note_used(100)
    mark = ring.high_water("update")
    assert (mark.name, mark.slots, mark.slot_bytes) == ("update", 3, 8192)
    assert (mark.slots_held, mark.bytes_used, mark.size_bytes) == (2, 4097, 24576)


@pytest.mark.parametrize("seed", range(5))
def test_one_slot_of_the_largest_size_serves_any_sizes_in_any_number(seed):
    sizes = random.Random(seed).choices(range(1, 50_000), k=200)
    ring = Ring(1, max(sizes))
    done = []

    def work(mine):
        for size in mine:
            slot = ring.acquire(size, timeout_seconds=30)
            slot.note_used(size)
            slot.buffer[:size] = size % 251
            assert bool((slot.buffer[:size] == size % 251).all())
            slot.release()
            done.append(size)

    threads = [threading.Thread(target=work, args=(sizes[start::8],)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == sorted(sizes)
    assert ring.free_count == 1
    assert ring.high_water("any").bytes_used == max(sizes)


class Lingering:
    """A transfer that uses a slot after its release, until the test ends it."""

    def __init__(self, *, stalls=False):
        self.over, self.stalls = threading.Event(), stalls

    def done(self):
        return self.over.is_set()

    def wait(self):
        if self.stalls:
            raise TierIOError("write of tensor w on nvme: the tier has moved nothing for 300 s")
        assert self.over.wait(10)


def hold_and_die(ring):
    holder = threading.Thread(target=ring.acquire, name="worker-7")
    holder.start()
    holder.join()


def test_a_transfer_that_lingers_is_waited_for_where_the_other_slots_are_lost():
    ring, transfer = Ring(2, 4096), Lingering()
    slot = ring.acquire()
    hold_and_die(ring)
    slot.release(after=[transfer])
    threading.Timer(0.05, transfer.over.set).start()
    assert ring.acquire() is slot


def test_a_transfer_that_stalls_beside_dead_holders_is_an_error_that_names_both():
    ring, transfer = Ring(3, 4096), Lingering(stalls=True)
    slot, _mine = ring.acquire(), ring.acquire()
    hold_and_die(ring)
    slot.release(after=[transfer])
    with pytest.raises(TierIOError, match="tensor w on nvme") as caught:
        ring.acquire()
    assert caught.value.__notes__ == [
        "No other staging slot can become free: of 3 are held 1 by MainThread, which waits for one more, "
        "1 by worker-7, which is dead"
    ]
    transfer.over.set()
    assert ring.acquire() is slot


def test_a_thread_that_never_gives_its_slot_back_is_named_in_time(monkeypatch):
    """It waits for something else, so that it is neither dead nor a part of a deadlock."""
    monkeypatch.setattr(slab_module, "HOLDER_SECONDS", 0.2)
    monkeypatch.setattr(slab_module, "_RECHECK_SECONDS", 0.02)
    ring, stop, held = Ring(1, 4096), threading.Event(), threading.Event()

    def hold():
        slot = ring.acquire()
        held.set()
        stop.wait(10)
        slot.release()

    holder = threading.Thread(target=hold, name="autograd")
    holder.start()
    held.wait(10)
    with pytest.raises(
        StagingError, match=r"for 0 s: of 1 are held 1 by autograd, which is alive\. See where those"
    ):
        ring.acquire()
    stop.set()
    holder.join()
    ring.acquire().release()
