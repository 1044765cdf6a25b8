import errno
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
import xxhash

from memtrain.offload.errors import CorruptExtentError, OffloadError, TierIOError
from memtrain.offload.io import Direction, Fault, FaultyBackend, IORequest, ThreadPoolBackend, transfer
from memtrain.offload.slab import Slab
from memtrain.offload.targets import FileTarget, MemoryTarget
from memtrain.planner.actions import Tier

N = 3 * 4096 + 100


@pytest.fixture
def backend():
    pool = ThreadPoolBackend(2)
    yield pool
    pool.close()


def filled(nbytes, seed=0):
    slab = Slab(nbytes)
    slab.buffer.copy_(
        torch.randint(
            0, 256, (slab.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
    )
    return slab


def request(direction, target, buffer, offset=0, expected=None, done=lambda r: None, seed=5):
    return IORequest(
        direction=direction,
        target=target,
        offset=offset,
        buffer=buffer,
        tensor_name="layer.w",
        tier=Tier.NVME,
        seed=seed,
        expected=expected,
        done=done,
    )


@pytest.fixture
def target(tmp_path):
    descriptor = os.open(tmp_path / "arena", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    os.posix_fallocate(descriptor, 0, 1 << 20)
    yield FileTarget(descriptor, direct=True)
    os.close(descriptor)


class Scripted:
    """A target that answers from a list: a count, an exception, or None for "all of it"."""

    def __init__(self, inner, *answers, alignment=4096):
        self.inner, self.answers, self.alignment, self.calls = inner, list(answers), alignment, []

    def _step(self, move, address, nbytes, offset):
        answer = self.answers.pop(0) if self.answers else None
        self.calls.append((offset, nbytes))
        if isinstance(answer, BaseException):
            raise answer
        count = nbytes if answer is None else answer
        if count:
            move(address, count, offset)
        return count

    def read(self, *a):
        return self._step(self.inner.read, *a)

    def write(self, *a):
        return self._step(self.inner.write, *a)


@pytest.mark.parametrize("nbytes", [1, 511, 4096, 4097, N, 1 << 18])
def test_file_round_trip_touches_nothing_else(target, nbytes):
    source, found = filled(nbytes), Slab(nbytes + 4096)
    found.buffer.fill_(0xAB)
    write = request(Direction.WRITE, target, source.buffer[:nbytes], 8192)
    transfer(write)
    assert write.checksum == xxhash.xxh3_64_intdigest(bytes(source.buffer[:nbytes].tolist()), 5)
    transfer(request(Direction.READ, target, found.buffer[:nbytes], 8192, write.checksum))
    assert torch.equal(found.buffer[:nbytes], source.buffer[:nbytes])
    assert bool((found.buffer[nbytes:] == 0xAB).all())


def test_buffered_target_writes_the_same_bytes(target):
    buffered_fd = os.open(f"/proc/self/fd/{target.descriptor}", os.O_RDWR)
    buffered, source, found = FileTarget(buffered_fd, direct=False), filled(N), Slab(N)
    assert buffered.write(source.address, N, 4096) == N
    assert target.read(found.address, N, 4096) == N
    assert torch.equal(found.buffer[:N], source.buffer[:N])
    found.buffer.zero_()
    assert buffered.read(found.address, N, 4096) == N
    assert torch.equal(found.buffer[:N], source.buffer[:N])
    os.close(buffered_fd)


def test_short_transfers_resume_at_a_block():
    memory, source, found = Slab(N), filled(N), Slab(N)
    out = Scripted(MemoryTarget(memory.address), 4096 + 17, 1)
    write = request(Direction.WRITE, out, source.buffer[:N])
    transfer(write)
    assert out.calls == [(0, N), (4096, N - 4096), (4096, N - 4096)]
    back = Scripted(MemoryTarget(memory.address), 5000, alignment=1)
    transfer(request(Direction.READ, back, found.buffer[:N], expected=write.checksum))
    assert back.calls == [(0, N), (5000, N - 5000)]
    assert torch.equal(found.buffer[:N], source.buffer[:N])


def test_interruptions_are_retried():
    memory, source = Slab(N), filled(N)
    target = Scripted(
        MemoryTarget(memory.address), InterruptedError(errno.EINTR, "x"), BlockingIOError(errno.EAGAIN, "x")
    )
    transfer(request(Direction.WRITE, target, source.buffer[:N]))
    assert torch.equal(memory.buffer[:N], source.buffer[:N])


def test_endless_refusal_ends(monkeypatch):
    monkeypatch.setattr("memtrain.offload.io._RETRIES", 3)
    monkeypatch.setattr("memtrain.offload.io._RETRY_SECONDS", 0)
    memory = Slab(N)
    refusing = Scripted(MemoryTarget(memory.address), *[BlockingIOError(errno.EAGAIN, "x")] * 9)
    with pytest.raises(TierIOError, match=r"EAGAIN.*still refused after 3 attempts") as caught:
        transfer(request(Direction.WRITE, refusing, memory.buffer[:N]))
    assert caught.value.errno == errno.EAGAIN
    assert len(refusing.calls) == 4
    crawling = Scripted(MemoryTarget(memory.address), *[1] * 9)
    with pytest.raises(TierIOError, match=f"ended again and again after 0 of {N} bytes"):
        transfer(request(Direction.WRITE, crawling, memory.buffer[:N]))


def test_nothing_moved_is_an_error():
    memory = Slab(N)
    with pytest.raises(
        TierIOError, match=f"read of tensor layer.w on nvme at offset 0 failed: ended after 4096 of {N}"
    ) as c:
        transfer(
            request(
                Direction.READ,
                Scripted(MemoryTarget(memory.address), 4096, 0, 4096, 0),
                memory.buffer[:N],
                expected=0,
            )
        )
    assert c.value.errno is None


def test_reading_past_the_end_of_the_file_is_an_error(target):
    slab = Slab(8192)
    with pytest.raises(TierIOError, match="ended after 4096 of 8192 bytes"):
        transfer(request(Direction.READ, target, slab.buffer, (1 << 20) - 4096, 0))


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "ENOSPC.*the disk is full: free space"),
        (errno.EDQUOT, "EDQUOT.*quota"),
        (errno.EFBIG, "EFBIG.*ulimit -f"),
        (errno.EIO, "EIO.*resume from the last checkpoint"),
        (errno.EINVAL, "EINVAL.*check the device"),
    ],
)
def test_errors_name_tensor_tier_offset_and_remedy(number, remedy):
    memory = Slab(N)
    target = Scripted(MemoryTarget(memory.address), OSError(number, "x"))
    with pytest.raises(
        TierIOError, match=rf"write of tensor layer\.w on nvme at offset 4096 failed \[{remedy}"
    ) as caught:
        transfer(request(Direction.WRITE, target, memory.buffer[:N], 4096))
    assert caught.value.errno == number


def test_a_wrong_bit_or_seed_is_corruption():
    memory, found = filled(N), Slab(N)
    good = xxhash.xxh3_64_intdigest(bytes(memory.buffer[:N].tolist()), 5)
    target = MemoryTarget(memory.address)
    transfer(request(Direction.READ, target, found.buffer[:N], expected=good))
    with pytest.raises(CorruptExtentError, match=r"tensor layer.w on nvme at offset 0"):
        transfer(request(Direction.READ, target, found.buffer[:N], expected=good, seed=6))
    memory.buffer[N - 1] ^= 1
    with pytest.raises(CorruptExtentError):
        transfer(request(Direction.READ, target, found.buffer[:N], expected=good))


class Held:
    """A target whose calls wait for a gate; notes the order of their starts."""

    alignment = 1

    def __init__(self):
        self.gate, self.started = threading.Event(), []

    def read(self, address, nbytes, offset):
        return self.write(address, nbytes, offset)

    def write(self, address, nbytes, offset):
        self.started.append(offset)
        self.gate.wait(10)
        return nbytes


def test_each_direction_starts_in_order_and_none_starves(backend):
    held, slab, finished = Held(), Slab(4096), threading.Semaphore(0)
    for offset in (0, 1, 2, 3):
        backend.submit(request(Direction.WRITE, held, slab.buffer, offset, done=lambda r: finished.release()))
    backend.submit(
        request(Direction.READ, held, slab.buffer, 100, expected=0, done=lambda r: finished.release())
    )
    held.gate.set()
    for _ in range(5):
        assert finished.acquire(timeout=10)
    assert sorted(o for o in held.started if o < 100) == [0, 1, 2, 3]
    # Two threads, both with writes when the read came: it goes next, before the writes that waited longer.
    assert held.started.index(100) <= 3


def test_one_thread_is_strictly_first_in_first_out():
    pool, held, slab, finished = ThreadPoolBackend(1), Held(), Slab(4096), threading.Semaphore(0)
    held.gate.set()
    for offset in range(20):
        pool.submit(request(Direction.WRITE, held, slab.buffer, offset, done=lambda r: finished.release()))
    for _ in range(20):
        assert finished.acquire(timeout=10)
    assert held.started == list(range(20))
    pool.close()


def test_whatever_a_target_raises_reaches_the_waiter(backend):
    class Broken:
        alignment = 1

        def write(self, *a):
            raise ZeroDivisionError("inside")

    finished, slab = threading.Event(), Slab(4096)
    bad = request(Direction.WRITE, Broken(), slab.buffer, done=lambda r: finished.set())
    backend.submit(bad)
    assert finished.wait(10)
    assert isinstance(bad.error, OffloadError)
    assert isinstance(bad.error.__cause__, ZeroDivisionError)
    memory, again = Slab(4096), threading.Event()
    backend.submit(
        request(Direction.WRITE, MemoryTarget(memory.address), slab.buffer, done=lambda r: again.set())
    )
    assert again.wait(10)


@pytest.mark.parametrize("closed", [False, True], ids=["moved", "given up"])
def test_whoever_hears_of_the_end_finds_the_buffer_let_go(closed):
    """Or the memory that it gives back then would be there until the worker is scheduled again."""
    memory, pool, finished, kept = filled(N), ThreadPoolBackend(1), threading.Event(), []
    buffer = torch.zeros(N, dtype=torch.uint8)
    known = weakref.ref(buffer)
    write = request(Direction.WRITE, MemoryTarget(memory.address), buffer)
    write.done = lambda r: (kept.append(known()), finished.set())
    del buffer
    if closed:
        pool.close()
    pool.submit(write)
    assert finished.wait(60)
    assert kept == [None]
    pool.close()


def test_close_fails_what_has_not_begun_and_ends_the_threads():
    pool, held, slab, outcomes = ThreadPoolBackend(1, "pool-under-test"), Held(), Slab(4096), []
    requests = [
        request(Direction.WRITE, held, slab.buffer, i, done=lambda r: outcomes.append(r.error))
        for i in range(3)
    ]
    for r in requests:
        pool.submit(r)
    while not held.started:
        time.sleep(0.001)
    closer = threading.Thread(target=pool.close)
    closer.start()
    while len(outcomes) < 2:
        time.sleep(0.001)
    held.gate.set()
    closer.join(10)
    assert [type(e) for e in outcomes] == [OffloadError, OffloadError, type(None)]
    assert not [t for t in threading.enumerate() if t.name.startswith("pool-under-test")]
    pool.close()
    pool.submit(requests[0])
    assert "closed" in str(outcomes[-1])


def test_close_does_not_wait_for_ever_on_a_stalled_device():
    pool, held, slab = ThreadPoolBackend(1, "stuck", join_seconds=0.05), Held(), Slab(4096)
    pool.submit(request(Direction.WRITE, held, slab.buffer))
    while not held.started:
        time.sleep(0.001)
    with pytest.raises(TierIOError, match="stuck-0 did not end"):
        pool.close()
    held.gate.set()


def run_one(backend, direction, target, buffer, offset=0, expected=None):
    finished = threading.Event()
    r = request(direction, target, buffer, offset, expected, lambda r: finished.set())
    backend.submit(r)
    assert finished.wait(10)
    return r


def test_faults_do_what_they_say(backend):
    memory, source, found = Slab(8192), filled(8192, 1), Slab(8192)
    target = MemoryTarget(memory.address)
    faulty = FaultyBackend(
        backend,
        {
            1: Fault(flip_bit=9),
            2: Fault(drop=True),
            3: Fault(error=errno.EIO),
            4: Fault(error=errno.EAGAIN, times=2),
            5: Fault(short_bytes=100),
            6: Fault(short_bytes=0),
            7: Fault(flip_bit=0),
            8: Fault(stale={0: b"\0" * 8192}),
            9: Fault(delay_seconds=0.05),
        },
    )
    write = run_one(faulty, Direction.WRITE, target, source.buffer)
    assert torch.equal(memory.buffer, source.buffer)
    before = source.buffer.clone()
    run_one(faulty, Direction.WRITE, target, source.buffer)
    assert int(memory.buffer[1] ^ source.buffer[1]) == 2
    assert torch.equal(source.buffer, before)
    memory.buffer.zero_()
    assert run_one(faulty, Direction.WRITE, target, source.buffer).error is None
    assert int(memory.buffer.sum()) == 0
    assert run_one(faulty, Direction.WRITE, target, source.buffer).error.errno == errno.EIO
    assert run_one(faulty, Direction.WRITE, target, source.buffer).error is None
    assert torch.equal(memory.buffer, source.buffer)
    for fault, error in (
        ("short", None),
        ("end", TierIOError),
        ("flip", CorruptExtentError),
        ("stale", CorruptExtentError),
    ):
        result = run_one(faulty, Direction.READ, target, found.buffer, expected=write.checksum)
        assert isinstance(result.error, error) if error else result.error is None, fault
    start = time.monotonic()
    assert run_one(faulty, Direction.READ, target, found.buffer, expected=write.checksum).error is None
    assert time.monotonic() - start >= 0.05


def test_reordering_passes_everything_on_in_another_order():
    pool, held, slab, finished = ThreadPoolBackend(1), Held(), Slab(4096), threading.Semaphore(0)
    faulty = FaultyBackend(pool, reorder=8, seed=3)
    held.gate.set()
    for offset in range(11):
        faulty.submit(request(Direction.WRITE, held, slab.buffer, offset, done=lambda r: finished.release()))
    for _ in range(11):
        assert finished.acquire(timeout=10)
    assert sorted(held.started) == list(range(11))
    assert held.started[:8] != list(range(8))
    faulty.close()


def test_interpreter_exits_with_a_transfer_stuck():
    program = """
import time, torch
from memtrain.offload.io import *
from memtrain.planner.actions import Tier
class Stuck:
    alignment = 1
    def write(self, *a): time.sleep(60)
pool = ThreadPoolBackend(2)
pool.submit(IORequest(direction=Direction.WRITE, target=Stuck(), offset=0,
                      buffer=torch.zeros(9, dtype=torch.uint8), tensor_name='x',
                      tier=Tier.NVME, seed=0, done=print))
time.sleep(0.1)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")
