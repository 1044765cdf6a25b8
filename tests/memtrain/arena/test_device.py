"""The planned allocator for GPUs: its C++, called with torch's signatures, over a stand-in for cudaMalloc."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator

import pytest

from memtrain.arena import ArenaError, ArenaWarning
from memtrain.arena.device import ALIGNMENT_BYTES, DeviceAllocator

LIBC = ctypes.CDLL(None)
LIBC.aligned_alloc.restype = ctypes.c_void_p
LIBC.aligned_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
LIBC.free.argtypes = [ctypes.c_void_p]
MALLOC = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t)
FREE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
STREAM, OTHER = 7, 8


class Gpu:
    """Memory that is given and taken, and how often it was waited for."""

    def __init__(self) -> None:
        self.alive: dict[int, int] = {}
        self.limit = 1 << 30
        self.waits = 0
        self.pause = lambda what: None
        self.malloc, self.free = MALLOC(self._malloc), FREE(self._free)

    def _malloc(self, out, size):
        self.pause("malloc")
        if sum(self.alive.values()) + size > self.limit:
            return OUT_OF_MEMORY
        out[0] = LIBC.aligned_alloc(ALIGNMENT_BYTES, -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
        self.alive[out[0]] = size
        return 0

    def _free(self, address):
        self.pause("free")
        del self.alive[address]
        LIBC.free(address)
        return 0

    def wait(self) -> None:
        self.waits += 1


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def arena(gpu: Gpu) -> Iterator[DeviceAllocator]:
    take = ctypes.cast(gpu.malloc, ctypes.c_void_p).value
    give = ctypes.cast(gpu.free, ctypes.c_void_p).value
    with DeviceAllocator(take=take, give=give, synchronise=gpu.wait) as arena:
        yield arena


class Tensor:
    """What torch would ask for and let go of."""

    def __init__(self, arena: DeviceAllocator, size: int, value: int, stream: int = STREAM) -> None:
        self.library, self.size, self.stream = arena._library, size, stream
        self.address = self.library.memtrain_device_alloc(size, 0, stream)
        assert self.address
        assert self.address % ALIGNMENT_BYTES == 0
        self.value = value
        ctypes.memset(self.address, value, size)

    def use_in(self, stream: int) -> None:
        self.library.memtrain_device_record_stream(self.address, stream)

    def drop(self) -> None:
        assert ctypes.string_at(self.address, self.size) == bytes([self.value]) * self.size
        self.library.memtrain_device_free(self.address, self.size, 0, self.stream)


def step(arena: DeviceAllocator, sizes: tuple[int, int, int] = (4096, 1000, 3000)) -> list[int]:
    """The first dies before the third is made."""
    first, second = Tensor(arena, sizes[0], 1), Tensor(arena, sizes[1], 2)
    first.drop()
    third = Tensor(arena, sizes[2], 3)
    second.drop()
    third.drop()
    return [first.address, second.address, third.address]


def outlive(arena: DeviceAllocator) -> Tensor:
    """A step whose first tensor lives on."""
    kept = Tensor(arena, 4096, 5)
    Tensor(arena, 1000, 2).drop()
    Tensor(arena, 3000, 3).drop()
    return kept


def read_elsewhere(arena: DeviceAllocator) -> None:
    """A step whose first tensor another stream reads when it is let go of."""
    first, second = Tensor(arena, 4096, 1), Tensor(arena, 1000, 2)
    first.use_in(OTHER)
    first.drop()
    third = Tensor(arena, 3000, 3)
    assert not first.address <= third.address < first.address + 4096
    second.drop()
    third.drop()


def learn(arena: DeviceAllocator) -> None:
    for _ in range(2):
        with arena.step():
            step(arena)


def test_steps_follow_their_plan_in_one_piece_of_memory(arena: DeviceAllocator, gpu: Gpu) -> None:
    learn(arena)
    assert list(gpu.alive.values()) == [4096 + 1024]
    found = []
    for _ in range(3):
        with arena.step():
            found.append(step(arena))
    assert found[0] == found[1] == found[2]
    assert arena.report().planned_steps == 3
    assert list(gpu.alive.values()) == [4096 + 1024]
    arena.close()
    assert not gpu.alive


def test_weights_made_outside_have_memory_of_their_own(arena: DeviceAllocator, gpu: Gpu) -> None:
    weight = Tensor(arena, 5000, 9)
    learn(arena)
    with arena.step():
        step(arena)
    weight.drop()
    assert list(gpu.alive.values()) == [4096 + 1024]


def test_a_step_that_differs_is_right_and_told(arena: DeviceAllocator, gpu: Gpu) -> None:
    learn(arena)
    with pytest.warns(ArenaWarning, match="request 0 asked for 8192 bytes instead of 4096"), arena.step():
        step(arena, (8192, 1000, 3000))
    with arena.step():
        step(arena)
    assert arena.report().planned_steps == 1
    assert list(gpu.alive.values()) == [4096 + 1024]


def test_what_outlives_its_step_keeps_its_place(arena: DeviceAllocator, gpu: Gpu) -> None:
    learn(arena)
    with pytest.warns(ArenaWarning, match="1 blocks outlived the step"), arena.step():
        kept = outlive(arena)
    with arena.step():
        step(arena)
    kept.drop()
    arena.close()
    assert not gpu.alive


def test_other_streams_are_not_planned(arena: DeviceAllocator, gpu: Gpu) -> None:
    def mixed() -> None:
        first = Tensor(arena, 4096, 1)
        beside = Tensor(arena, 2048, 4, stream=OTHER)
        first.drop()
        second = Tensor(arena, 4096, 2)
        beside.drop()
        second.drop()

    for _ in range(4):
        with arena.step():
            mixed()
    report = arena.report()
    assert (report.planned_steps, report.planned_requests, report.arena_bytes) == (2, 2, 4096)


def test_a_place_that_another_stream_reads_is_not_handed_on_before_it_was_waited_for(
    arena: DeviceAllocator, gpu: Gpu
) -> None:
    learn(arena)
    with (
        pytest.warns(ArenaWarning, match="1 requests found their place taken.*first request 2"),
        arena.step(),
    ):
        read_elsewhere(arena)
    assert gpu.waits == 0
    with arena.step():
        step(arena)
    assert gpu.waits == 1
    assert arena.report().planned_steps == 1


def test_while_a_step_is_recorded_the_arena_is_given_back(arena: DeviceAllocator, gpu: Gpu) -> None:
    learn(arena)
    with arena.step(key="other"):
        assert not gpu.alive
    with arena.step():
        step(arena)
    assert arena.report().planned_steps == 1


def test_memory_that_there_is_not(arena: DeviceAllocator, gpu: Gpu) -> None:
    library = arena._library
    assert library is not None
    gpu.limit = 100
    assert library.memtrain_device_alloc(4096, 0, STREAM) is None  # torch raises its own error
    gpu.limit = 1 << 20

    def starved() -> None:
        step(arena)
        gpu.limit = 4096 + 1024 - 1

    with arena.step():
        step(arena)
    with pytest.warns(ArenaWarning, match="an arena of 5120 bytes cannot be had"), arena.step():
        starved()
    gpu.limit = 1 << 20
    with arena.step():
        step(arena)
    assert arena.report().ordinary_steps == 1


def test_tensors_outlive_the_arena(arena: DeviceAllocator, gpu: Gpu) -> None:
    learn(arena)
    with pytest.warns(ArenaWarning, match="outlived"), arena.step():
        kept = outlive(arena)
    arena.close()
    assert len(gpu.alive) == 1
    kept.drop()
    assert not gpu.alive


class Held:
    """One call of a stand-in that does not return before it is let go."""

    def __init__(self, gpu: Gpu, what: str) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.was_let_go: list[bool] = []
        self._what, self._gpu = what, gpu
        gpu.pause = self._pause

    def _pause(self, what: str) -> None:
        if what == self._what and not self.begun.is_set():
            self._gpu.pause = lambda what: None
            self.begun.set()
            self.was_let_go.append(self.go.wait(20))

    def during(self, work: Callable[[], object], then: Callable[[], object]) -> None:
        """``then`` while ``work`` is held."""
        thread = threading.Thread(target=work)
        thread.start()
        assert self.begun.wait(20)
        then()
        self.go.set()
        thread.join()
        assert self.was_let_go == [True]


def test_while_memory_is_asked_for_others_get_their_places(arena: DeviceAllocator, gpu: Gpu) -> None:
    learn(arena)
    made: list[Tensor] = []

    def ask() -> None:
        made.append(Tensor(arena, 5000, 9, stream=OTHER))

    with arena.step():
        first, second = Tensor(arena, 4096, 1), Tensor(arena, 1000, 2)
        first.drop()
        Held(gpu, "malloc").during(ask, lambda: Tensor(arena, 3000, 3).drop())
        second.drop()
    assert arena.report().planned_steps == 1
    made[0].drop()


def test_while_memory_is_given_back_others_get_their_places(arena: DeviceAllocator, gpu: Gpu) -> None:
    learn(arena)
    weight = Tensor(arena, 5000, 9)
    with arena.step():
        Held(gpu, "free").during(weight.drop, lambda: step(arena))
    assert arena.report().planned_steps == 1


def test_what_was_asked_for_in_a_recorded_step_that_is_over_is_not_the_next_one_s(
    arena: DeviceAllocator, gpu: Gpu
) -> None:
    made: list[Tensor] = []
    arena.begin()
    held = Held(gpu, "malloc")

    def end_and_learn() -> None:
        arena.end()
        learn(arena)

    held.during(lambda: made.append(Tensor(arena, 7000, 9)), end_and_learn)
    with arena.step():
        step(arena)
    assert arena.report().planned_steps == 1
    made[0].drop()


def test_two_steps_at_once_get_one_arena(arena: DeviceAllocator, gpu: Gpu) -> None:
    learn(arena)
    arena.vacate()
    assert not gpu.alive
    errors: list[BaseException] = []

    def begin() -> None:
        try:
            arena.begin()
        except ArenaError as error:
            errors.append(error)

    take, give = (ctypes.cast(f, ctypes.c_void_p).value for f in (gpu.malloc, gpu.free))
    with DeviceAllocator(take=take, give=give, synchronise=gpu.wait) as other:
        Held(gpu, "malloc").during(begin, other.begin)
        other.end()
    assert len(errors) == 1
    assert not gpu.alive
    with arena.step():
        step(arena)
    assert arena.report().planned_steps == 1


def test_without_a_cuda_runtime_it_is_refused() -> None:
    with pytest.raises(ArenaError, match="no CUDA runtime"):
        DeviceAllocator()
