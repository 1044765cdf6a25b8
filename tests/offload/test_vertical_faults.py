"""What goes wrong in one of several micro-batches under way: one error, no thread, no hang, nothing held."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memtrain.offload.activations import ActivationExecutor
from memtrain.offload.engine import Engine
from memtrain.offload.errors import TierIOError
from memtrain.offload.io import Fault, FaultyBackend, ThreadPoolBackend
from memtrain.offload.turns import StoppedError, Turns
from memtrain.planner.actions import Tier
from tests.offload.late_device import LateDevice
from tests.offload.streamed import DEPTH, assert_same, blocks_of, llama, open_engine, stream
from tests.offload.test_vertical import vertical_plan
from tests.offload.vertical_runs import horizontal, micro_batches, no_thread_left, vertical

COUNT = 3
LIMIT_SECONDS = 120


class Mishap(Exception):
    """What a test has made go wrong."""


@contextmanager
def deadline() -> Iterator[None]:
    """A hang is a failure."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not over after {LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return horizontal(llama(tied=True), micro_batches(COUNT, same_length=True))


class Streaming:
    """A model whose weights are streamed and whose blocks do something else each."""

    def __init__(self, engine: Engine, slots: int = 2, tier: Tier = Tier.HOST) -> None:
        self.model = llama(tied=True)
        self.streamer = stream(self.model, engine, slots=slots, tier=tier)
        plan = vertical_plan("mixed", COUNT)
        self.executor = ActivationExecutor(self.model, blocks_of(self.model), plan, engine)
        self.executor.install()

    def run(self) -> list[Tensor]:
        self.model.zero_grad()
        with deadline(), no_thread_left():
            return vertical(self.model, micro_batches(COUNT, same_length=True))

    def check_released(self) -> None:
        """Any unit can have any window, and what was saved is given back."""
        assert not any(unit.users for unit in self.streamer._pool.units)
        for unit in self.streamer.streamed:
            with self.streamer.hold(unit):
                pass

    def close(self) -> None:
        self.executor.remove()
        self.streamer.remove()


@contextmanager
def failing(block: nn.Module, *, which: int, backward: bool, error: BaseException) -> Iterator[None]:
    """The micro-batch ``which`` fails in the block: as its forward begins, or its backward."""

    def raise_here() -> None:
        if threading.current_thread().name == f"micro-batch {which}":
            raise error

    def before(*_: Any) -> None:
        if not backward:
            raise_here()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if backward:
            hidden = output if isinstance(output, Tensor) else output[0]
            hidden.register_hook(lambda _: raise_here())

    handles = [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def running() -> Iterator[Streaming]:
    with open_engine() as engine:
        made = Streaming(engine)
        yield made
        made.close()


@settings(
    max_examples=16,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, COUNT - 1), st.integers(0, DEPTH - 1), st.booleans(), st.booleans())
def test_an_exception_anywhere(
    running: Streaming, expected: list[Tensor], which: int, block: int, backward: bool, interrupt: bool
) -> None:
    error: BaseException = KeyboardInterrupt() if interrupt else Mishap("here")
    module = blocks_of(running.model)[block][1]
    fails = failing(module, which=which, backward=backward, error=error)
    with fails, pytest.raises(type(error)) as caught:
        running.run()
    assert caught.value is error
    frames = [entry.name for entry in caught.traceback]
    assert frames.count("raise_here") == 1
    assert error.__context__ is None
    error.__traceback__ = None
    running.check_released()
    assert_same(expected, running.run())


@pytest.mark.parametrize("slots", [2, 3])
def test_a_tier_that_fails(slots: int, tmp_path: Path, expected: list[Tensor]) -> None:
    backend = FaultyBackend(ThreadPoolBackend(2))
    with open_engine(tmp_path, backend=backend) as engine:
        streaming = Streaming(engine, slots=slots, tier=Tier.NVME)
        streaming.run()
        for distance in (0, 9, 18):
            backend.plan.clear()
            fail_next_from(backend, distance)
            with pytest.raises(TierIOError):
                streaming.run()
            backend.plan.clear()
            for unit in streaming.streamer.streamed:  # what was being read ahead is refused where it is used
                with suppress(TierIOError), streaming.streamer.hold(unit):
                    pass
            streaming.check_released()
            assert_same(expected, streaming.run())
        streaming.close()


def fail_next_from(backend: FaultyBackend, distance: int) -> None:
    """Everything from there on goes wrong."""
    first = backend.submitted + distance
    for number in range(first, first + 200):
        backend.plan[number] = Fault(error=errno.EIO)


def names_of_main_thread() -> list[str]:
    """Of the functions that it is in."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return [entry.name for entry in traceback.extract_stack(frame)]


def test_ctrl_c_while_a_block_computes(running: Streaming, expected: list[Tensor]) -> None:
    """It reaches the main thread, which waits; who computes goes on to its next turn, and no further."""
    block = blocks_of(running.model)[2][1]
    passed: list[str] = []

    def interrupt(*_: Any) -> None:
        passed.append(threading.current_thread().name)
        if len(passed) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            while "_join" not in names_of_main_thread():
                time.sleep(0.01)

    handle = block.register_forward_pre_hook(interrupt)
    # A shell that starts the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            running.run()
    finally:
        signal.signal(signal.SIGINT, before)
        handle.remove()
    assert passed == ["micro-batch 2"]
    running.check_released()
    assert_same(expected, running.run())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["keep", "mixed", "attention swapped"])
def test_on_a_device_with_memory_of_its_own(name: str, seed: int, expected: list[Tensor]) -> None:
    model = llama(tied=True)
    device = LateDevice(seed=seed, eagerness=0.1 * seed)
    with open_engine(device=device) as engine:
        streamer = stream(model, engine, slots=2)
        executor = ActivationExecutor(model, blocks_of(model), vertical_plan(name, COUNT), engine)
        executor.install()
        data = micro_batches(COUNT, same_length=True)
        assert_same(expected, vertical(model, data))
        executor.remove()
        streamer.remove()
        assert device.faults == []
        assert not device.registered


# -- turns alone -------------------------------------------------------------------------------------


def test_turns_go_by_places_and_not_by_threads() -> None:
    log: list[tuple[int, int]] = []

    def work(number: int) -> Callable[[], int]:
        def run() -> int:
            for stage in range(4):
                turns.reach(number, (stage, -number if stage % 2 else number))
                log.append((stage, number))
                time.sleep(0.001 * (number == 0))
            return number

        return run

    turns = Turns([work(number) for number in range(3)], "turn")
    assert turns.run() == [0, 1, 2]
    assert log == [(s, n) for s in range(4) for n in (reversed(range(3)) if s % 2 else range(3))]


def test_the_others_give_back_what_they_hold_one_at_a_time() -> None:
    given_back: list[int] = []
    inside = 0

    def work(number: int) -> Callable[[], None]:
        def run() -> None:
            nonlocal inside
            try:
                turns.reach(number, (1, number))
                raise Mishap("first")
            finally:
                assert inside == 0
                inside += 1
                time.sleep(0.01)
                given_back.append(number)
                inside -= 1

        return run

    turns = Turns([work(number) for number in range(4)], "turn")
    with pytest.raises(Mishap, match="first"):
        turns.run()
    assert given_back == [0, 1, 2, 3]


def test_a_participant_that_will_not_stop_hears_of_it_again() -> None:
    def stubborn() -> None:
        for place in range(1, 4):
            with pytest.raises(StoppedError):
                turns.reach(1, (place, 1))

    def fails() -> None:
        turns.reach(0, (0, 5))
        raise Mishap("at once")

    turns = Turns([fails, stubborn], "turn")
    with deadline(), pytest.raises(Mishap):
        turns.run()
