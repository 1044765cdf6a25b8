import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.offload import rundir
from memtrain.offload.errors import (
    CorruptExtentError,
    ExtentStateError,
    OffloadError,
    PlacementError,
    SwapDirectoryError,
    TierFullError,
    TierIOError,
)
from memtrain.offload.io import Fault, FaultyBackend, ThreadPoolBackend
from memtrain.offload.slab import Ring, Slab
from memtrain.offload.tiers import MemoryStore, NvmeStore, wait_all
from memtrain.planner.actions import Tier

U = 4096
CAPACITY = 64 * U


def filled(nbytes, seed=0):
    slab = Slab(max(nbytes, 1))
    generator = torch.Generator().manual_seed(seed)
    slab.buffer.copy_(torch.randint(0, 256, (slab.nbytes,), dtype=torch.uint8, generator=generator))
    return slab.buffer[:nbytes]


@pytest.fixture(params=["nvme", "nvme-buffered", "host", "cxl"])
def store(request, tmp_path, monkeypatch):
    if request.param == "nvme-buffered":
        monkeypatch.setattr("memtrain.offload.tiers.enable_direct", refuse_direct)
    made = {
        "nvme": lambda: NvmeStore(tmp_path, CAPACITY, piece_bytes=2 * U),
        "nvme-buffered": lambda: NvmeStore(tmp_path, CAPACITY, piece_bytes=2 * U, direct="allow_buffered"),
        "host": lambda: MemoryStore(Tier.HOST, CAPACITY, piece_bytes=2 * U),
        "cxl": lambda: MemoryStore(Tier.CXL, CAPACITY, 0, piece_bytes=2 * U),
    }[request.param]()
    yield made
    made.close()
    assert os.listdir(tmp_path) == []


def refuse_direct(descriptor, where, *, new):
    raise SwapDirectoryError("no direct I/O here")


def faulty_nvme(tmp_path, plan=None, *, threads=2, **options):
    backend = FaultyBackend(ThreadPoolBackend(threads), plan, **options)
    return NvmeStore(tmp_path, CAPACITY, piece_bytes=2 * U, backend=backend), backend


# What works, on every tier


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


def test_close_fails_what_waits_and_hangs_nobody(tmp_path):
    store, _ = faulty_nvme(tmp_path, {0: Fault(delay_seconds=0.2)}, threads=1)
    extent, buffer, found = store.allocate("w", U), filled(U), filled(U, 1)
    tickets = [store.write(extent, buffer), store.read(extent, found), store.write(extent, buffer)]
    time.sleep(0.05)  # the first one is in a worker now
    store.close()
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
    store, _ = faulty_nvme(tmp_path, {0: Fault(delay_seconds=0.1)})
    with store:
        extent, buffer = store.allocate("a", CAPACITY), filled(CAPACITY)
        ticket = store.write(extent, buffer)
        store.free(extent)
        again = store.allocate("b", CAPACITY)
        assert ticket.done()
        assert again.arena_offset == 0
        with pytest.raises(ExtentStateError, match=r"tensor b .* never written"):
            store.read(again, buffer)


# Faults


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
    store, _ = faulty_nvme(tmp_path, {0: Fault(delay_seconds=0.1)})
    with store:
        extent, buffer = store.allocate("w", U), filled(U)
        ticket = store.write(extent, buffer)
        time.sleep(0.05)
        buffer[5] ^= 1
        ticket.wait()
        with pytest.raises(CorruptExtentError):
            store.read(extent, filled(U, 1)).wait()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT])
def test_a_failed_write_is_never_published(tmp_path, number):
    store, _ = faulty_nvme(tmp_path, {3: Fault(error=number)})
    with store:
        extent, source, found = store.allocate("w", 4 * U), filled(4 * U, 1), filled(4 * U, 2)
        store.write(extent, source).wait()
        failing, following = store.write(extent, filled(4 * U, 3)), None
        following = store.read(extent, found)
        with pytest.raises(TierIOError, match=f"tensor w on nvme at offset {2 * U}") as caught:
            failing.wait()
        assert caught.value.errno == number
        with pytest.raises(ExtentStateError, match="last write failed"):
            following.wait()
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
    store, _ = faulty_nvme(tmp_path, {0: Fault(delay_seconds=0.3)})
    with store:
        ticket = store.write(store.allocate("w", U), filled(U))
        assert not ticket.done()
        with pytest.raises(TierIOError, match="write of tensor w on nvme is not finished"):
            ticket.wait(timeout_seconds=0.02)
        ticket.wait()


def test_a_stalled_disk_is_reported_and_a_moving_one_is_not(tmp_path):
    stuck = FaultyBackend(ThreadPoolBackend(1), {0: Fault(delay_seconds=0.4)})
    with (
        NvmeStore(tmp_path, CAPACITY, backend=stuck, stall_seconds=0.1) as store,
        pytest.raises(TierIOError, match="the tier has moved nothing for"),
    ):
        store.write(store.allocate("w", U), filled(U)).wait()
    slow = FaultyBackend(ThreadPoolBackend(1), dict.fromkeys(range(8), Fault(delay_seconds=0.05)))
    with NvmeStore(tmp_path, CAPACITY, piece_bytes=U, backend=slow, stall_seconds=0.3) as store:
        store.write(
            store.allocate("w", 8 * U), filled(8 * U)
        ).wait()  # 0.4 s in all, never 0.3 s without a piece


def test_wait_all_waits_for_every_ticket_before_it_raises(tmp_path):
    store, _ = faulty_nvme(tmp_path, {0: Fault(error=errno.EIO), 1: Fault(delay_seconds=0.1)})
    with store:
        tickets = [store.write(store.allocate(n, U), filled(U)) for n in "ab"]
        with pytest.raises(TierIOError, match="tensor a"):
            wait_all(tickets)
        assert tickets[1].done()


# The swap directory


def test_directories_that_cannot_serve_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SwapDirectoryError, match="does not exist: create it"):
        NvmeStore(tmp_path / "none", U)
    with pytest.raises(SwapDirectoryError, match="is not a directory"):
        NvmeStore(tmp_path / "file", U)
    with pytest.raises(ValueError, match="direct must be"):
        NvmeStore(tmp_path, U, direct="maybe")


@pytest.mark.skipif(rundir.filesystem_type("/dev/shm") != "tmpfs", reason="/dev/shm is not a tmpfs here")
def test_tmpfs_is_refused_by_name():
    with pytest.raises(SwapDirectoryError, match="is on tmpfs, which is memory"):
        NvmeStore("/dev/shm", U)


def test_a_directory_of_no_write_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(SwapDirectoryError, match="is not writable: change its owner"):
        NvmeStore(tmp_path, U)


def test_no_direct_io_is_refused_with_the_remedy_and_leaves_nothing(tmp_path, monkeypatch):
    def wrong_block(descriptor, buffers, offset):
        return real(descriptor, buffers, offset) - 512

    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", wrong_block)
    with pytest.raises(SwapDirectoryError, match=r"cannot do direct I/O.*direct='allow_buffered'"):
        NvmeStore(tmp_path, U)
    monkeypatch.setattr(
        os, "pwritev", lambda *a: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid argument"))
    )
    with pytest.raises(
        SwapDirectoryError, match=r"cannot do direct I/O in blocks of 4096 bytes \(Invalid argument\)"
    ):
        NvmeStore(tmp_path, U)
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_refuses_direct_writes_is_used_buffered_when_allowed(tmp_path, monkeypatch):
    """As some do: the flag is taken, the first direct write is not."""
    real = os.pwritev

    def refuse_if_direct(descriptor, buffers, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", refuse_if_direct)
    with pytest.raises(SwapDirectoryError, match="Invalid argument"):
        NvmeStore(tmp_path, CAPACITY)
    with NvmeStore(tmp_path, CAPACITY, direct="allow_buffered") as store:
        assert not store.direct
        extent, source, found = store.allocate("w", 3 * U + 1), filled(3 * U + 1), filled(3 * U + 1, 1)
        wait_all([store.write(extent, source), store.read(extent, found)])
        assert torch.equal(found, source)


def test_more_than_the_disk_has_is_refused_at_the_start(tmp_path):
    space = os.statvfs(tmp_path)
    need = (space.f_bavail * space.f_frsize + (1 << 30)) // U * U
    with pytest.raises(
        TierFullError,
        match=rf"free, the plan reserves .* \({need} bytes\): free \d+ bytes, lower budget.nvme",
    ):
        NvmeStore(tmp_path, need)
    assert os.listdir(tmp_path) == []


def test_the_run_directory_is_private_and_its_arena_has_no_name(tmp_path):
    old = os.umask(0)
    try:
        store = NvmeStore(tmp_path, CAPACITY)
    finally:
        os.umask(old)
    with store:
        (run,) = tmp_path.iterdir()
        assert run.stat().st_mode & 0o777 == 0o700
        assert os.listdir(run) == ["lock"]
        assert (run / "lock").stat().st_mode & 0o777 == 0o600
        status = os.fstat(store._target.descriptor)
        assert status.st_mode & 0o777 == 0o600
        assert (status.st_nlink, status.st_size) == (0, CAPACITY)
        assert status.st_blocks * 512 >= CAPACITY  # reserved, not sparse
    assert os.listdir(tmp_path) == []


def test_planted_links_and_foreign_directories_are_refused(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f"{rundir.PREFIX}mine").symlink_to(elsewhere)
    with pytest.raises(SwapDirectoryError):
        NvmeStore(tmp_path, U, run_id="mine", resumable=True)
    with pytest.raises(SwapDirectoryError, match="exists already"):
        NvmeStore(tmp_path, U, run_id="mine")
    assert os.listdir(elsewhere) == []
    open_to_all = tmp_path / f"{rundir.PREFIX}open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(SwapDirectoryError, match="open to others"):
        NvmeStore(tmp_path, U, run_id="open", resumable=True)
    with pytest.raises(SwapDirectoryError, match="1 to 64 letters"):
        NvmeStore(tmp_path, U, run_id="../up")


def test_two_stores_in_one_directory_do_not_see_each_other(tmp_path):
    with NvmeStore(tmp_path, CAPACITY) as one, NvmeStore(tmp_path, CAPACITY) as two:
        assert len(os.listdir(tmp_path)) == 2
        extents = [store.allocate("w", 9 * U) for store in (one, two)]
        sources = [filled(9 * U, seed) for seed in (1, 2)]
        wait_all(store.write(e, s) for store, e, s in zip((one, two), extents, sources, strict=True))
        one.close()
        assert len(os.listdir(tmp_path)) == 1
        found = filled(9 * U, 3)
        two.read(extents[1], found).wait()
        assert torch.equal(found, sources[1])
    assert os.listdir(tmp_path) == []


def run_python(program, *arguments, flags=(), **options):
    return subprocess.Popen(
        [sys.executable, *flags, "-W", "error", "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


HOLD = """
import sys, time
from memtrain.offload.tiers import NvmeStore
store = NvmeStore(sys.argv[1], 1 << 20)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_run_is_reaped_and_a_living_one_is_not(tmp_path):
    victim, living = run_python(HOLD, tmp_path), run_python(HOLD, tmp_path)
    try:
        assert victim.stdout.readline() + living.stdout.readline() == "ready\nready\n"
        assert rundir.reap_dead_runs(tmp_path) == []
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        assert len(os.listdir(tmp_path)) == 2
        with NvmeStore(tmp_path, U):
            left = os.listdir(tmp_path)
        assert sorted(int(name.removeprefix(rundir.PREFIX).split("-")[0]) for name in left) == sorted(
            [living.pid, os.getpid()]
        )
    finally:
        for process in (victim, living):
            process.kill()
            process.communicate()


def test_what_is_not_provably_dead_is_left(tmp_path):
    def run(name, text, **change):
        path = tmp_path / f"{rundir.PREFIX}{name}"
        path.mkdir(mode=0o700)
        here = {**rundir._this_process(), "resumable": False, **change}
        (path / "lock").write_text(text if text is not None else __import__("json").dumps(here))
        return path

    kept = [
        run("self", None),
        run("other-machine", None, machine="elsewhere", pid=2**22),
        run("resumable", None, pid=2**22 + 1, resumable=True),
        run("garbage", "{not json"),
        run("empty", ""),
    ]
    dead = [
        run("gone", None, pid=2**22 + 1),
        run("recycled", None, start=1),
        run("rebooted", None, boot="earlier"),
    ]
    # Killed between making the directory and filling the lock: the name tells.
    boot = rundir._this_process()["boot"][:8]
    me = rundir._start_time(os.getpid())
    dead.append(run(f"{2**22 + 1}-5-{boot}-00000000", ""))
    (dead[-1] / "lock").unlink()
    kept += [run(f"{os.getpid()}-{me}-{boot}-00000000", ""), run(f"{2**22 + 1}-5-deadbeef-00000000", "")]
    (tmp_path / f"{rundir.PREFIX}file").write_text("not a directory")
    (tmp_path / f"{rundir.PREFIX}link").symlink_to(kept[0])
    assert sorted(rundir.reap_dead_runs(tmp_path)) == sorted(dead)
    assert all(path.exists() for path in kept)


def test_a_forked_child_may_not_use_or_remove_anything(tmp_path):
    with NvmeStore(tmp_path, CAPACITY) as store:
        extent, source, found = store.allocate("w", U), filled(U), filled(U, 1)
        store.write(extent, source).wait()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                try:
                    store.write(extent, torch.zeros(0, dtype=torch.uint8).new_zeros(U))
                except (OffloadError, ValueError) as error:
                    code = 0 if "forked child" in str(error) or "multiple of" in str(error) else 2
                try:
                    store.allocate("x", U)
                    code = 3
                except OffloadError as error:
                    code = code if "forked child may not use it" in str(error) else 4
                store.close()
                store._remove_directory()
                store._close_file()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(os.listdir(tmp_path)) == 1
        store.read(extent, found).wait()
        assert torch.equal(found, source)


@pytest.mark.parametrize("flags", [(), ("-O",)])
def test_exit_without_close_leaves_nothing_and_optimized_python_moves_every_byte(tmp_path, flags):
    program = """
import sys, torch
from memtrain.offload.errors import CorruptExtentError
from memtrain.offload.slab import Slab
from memtrain.offload.tiers import NvmeStore
import os
store = NvmeStore(sys.argv[1], 1 << 20)
source, found = Slab(100000), Slab(100000)
source.buffer.fill_(77)
extent = store.allocate("w", 100000)
store.write(extent, source.buffer[:100000]).wait()
store.read(extent, found.buffer[:100000]).wait()
print(torch.equal(source.buffer[:100000], found.buffer[:100000]), store.statistics().bytes_written)
fd = os.open(f"/proc/self/fd/{store._target.descriptor}", os.O_WRONLY)
os.pwrite(fd, b"x", extent.arena_offset); os.fsync(fd)
try:
    store.read(extent, found.buffer[:100000]).wait()
except CorruptExtentError:
    print("found")
"""
    process = run_python(program, tmp_path, flags=flags)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "True 100000\nfound\n", "")
    assert os.listdir(tmp_path) == []


def test_a_file_size_limit_is_a_typed_error_at_the_start_and_in_mid_run(tmp_path):
    program = """
import resource, sys
from memtrain.offload.errors import SwapDirectoryError, TierIOError
from memtrain.offload.slab import Slab
from memtrain.offload.tiers import NvmeStore
buffer = Slab(1 << 20).buffer
store = NvmeStore(sys.argv[1], 1 << 20, piece_bytes=1 << 18)
resource.setrlimit(resource.RLIMIT_FSIZE, (300 * 1024, 300 * 1024))
extent = store.allocate("w", 1 << 20)
try:
    store.write(extent, buffer).wait()
except TierIOError as error:
    print(error.errno, "ulimit -f" in str(error), "tensor w" in str(error))
try:
    NvmeStore(sys.argv[1], 1 << 20)
except SwapDirectoryError as error:
    print("File too large" in str(error))
store.close()
"""
    process = run_python(program, tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, f"{errno.EFBIG} True True\nTrue\n", "")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of 64 MiB: what a full disk does is the kernel's, not a mock's."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control") or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root, loop devices and mkfs.ext4")
    image, mount = tmp_path / "image", tmp_path / "mount"
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(mount)], capture_output=True).returncode:
        pytest.skip("the kernel refuses to mount a loop device here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_refused_at_the_start_and_harmless_in_mid_run(small_disk):
    with pytest.raises(TierFullError, match=r"\(67108864 bytes\): free \d+ bytes"):
        NvmeStore(small_disk, 64 << 20)
    with NvmeStore(small_disk, 32 << 20) as store:
        extent, source, found = store.allocate("w", 30 << 20), filled(30 << 20), filled(30 << 20, 1)
        with open(small_disk / "other", "wb", buffering=0) as other, pytest.raises(OSError, match="No space"):
            deque(iter(lambda: other.write(bytes(1 << 20)), None))
        store.write(extent, source).wait()  # the arena's space was reserved before the disk filled up
        store.read(extent, found).wait()
        assert torch.equal(found, source)
        with pytest.raises(TierFullError):
            NvmeStore(small_disk, 8 << 20)
    assert sorted(os.listdir(small_disk)) == ["lost+found", "other"]


def test_a_device_that_loses_its_end_is_an_error_that_names_the_tensor(small_disk, tmp_path):
    with NvmeStore(small_disk, 32 << 20) as store:
        extent, buffer = store.allocate("layers.1.v", 30 << 20), filled(30 << 20)
        store.write(extent, buffer).wait()
        subprocess.run(["sync", "-f", str(small_disk)], check=True)
        os.truncate(tmp_path / "image", 12 << 20)
        with pytest.raises((TierIOError, CorruptExtentError), match=r"layers\.1\.v on nvme"):
            store.read(extent, buffer).wait()
        os.truncate(tmp_path / "image", 64 << 20)


# Memory tiers


def test_memory_stores_say_what_they_need():
    with pytest.raises(ValueError, match="serves host or cxl, got nvme"):
        MemoryStore(Tier.NVME, U)
    with pytest.raises(ValueError, match="cxl tier needs numa_node"):
        MemoryStore(Tier.CXL, U)
    with pytest.raises(PlacementError, match="NUMA node 50 does not exist"):
        MemoryStore(Tier.CXL, U, 50)
    with pytest.raises(ValueError, match="piece_bytes must be a positive multiple of 4096, got 100"):
        MemoryStore(Tier.HOST, U, piece_bytes=100)


def test_no_threads_are_left(tmp_path):
    before = threading.active_count()
    for _ in range(3):
        with NvmeStore(tmp_path, CAPACITY), MemoryStore(Tier.HOST, CAPACITY):
            assert threading.active_count() == before + 4 + 2
    assert threading.active_count() == before
