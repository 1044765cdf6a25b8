"""Blocks that outlive their step, die in other threads or see an exception: kept whole, given back."""

from __future__ import annotations

import ctypes
import gc
import threading

import pytest
from torch import Tensor

from memtrain.arena import ArenaError, ArenaWarning, PlannedAllocator
from memtrain.arena.allocator import DEVIATIONS, RECORDINGS
from tests.memtrain.arena.steps import PAGE, block, holds, learn, resident_pages, three


def fail(pages: int) -> None:
    """Make a tensor of fives, and raise an error that holds it."""
    raise KeeperError(block(pages, 5))


class KeeperError(Exception):
    """``args[0]`` is a tensor."""


def test_an_exception_ends_the_step_and_its_tensors_survive(arena: PlannedAllocator) -> None:
    learn(arena)
    with pytest.raises(KeeperError) as raised, arena.step():
        fail(8)
    kept = raised.value.args[0]
    assert holds(kept, 5)
    # It keeps its place, so the first of the next step goes elsewhere, and the third that was to follow it.
    with (
        pytest.warns(ArenaWarning, match="2 requests found their place taken.*first request 0"),
        arena.step(),
    ):
        three()
    assert holds(kept, 5)
    del kept, raised
    gc.collect()
    with arena.step():
        three()
    assert arena.report().planned_steps == 1


def test_an_exception_while_recording(arena: PlannedAllocator) -> None:
    with pytest.raises(KeeperError) as raised, arena.step():
        fail(64)
    kept = raised.value.args[0]
    learn(arena)
    with arena.step():
        three()
    assert holds(kept, 5)
    assert arena.report().planned_steps == 1


def test_steps_are_not_nested(arena: PlannedAllocator) -> None:
    with arena.step(), pytest.raises(ArenaError, match="neither nested"), arena.step():
        pass
    with (
        arena.step(),
        PlannedAllocator() as other,
        pytest.raises(ArenaError, match="another arena has an open step in this thread"),
        other.step(),
    ):
        pass
    with arena.step():
        pass


def test_what_other_threads_ask_for_is_theirs(arena: PlannedAllocator) -> None:
    learn(arena)
    stop, errors = threading.Event(), list[Exception]()

    def work() -> None:
        try:
            while not stop.is_set():
                assert holds(block(5, 9), 9)
            with pytest.raises(ArenaError, match="shared by threads"), arena.step():
                pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    with arena.step():
        for thread in threads:
            thread.start()
        assert holds(block(8, 1), 1)
        second = block(4, 2)
        third = block(6, 3)
        stop.set()
        for thread in threads:
            thread.join()
        assert holds(second, 2)
        assert holds(third, 3)
        del second, third
    assert not errors
    assert arena.report().planned_steps == 1


def test_blocks_die_in_other_threads(arena: PlannedAllocator) -> None:
    def step() -> None:
        box = [block(40, 1)]
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
        assert holds(block(40, 2), 2)

    learn(arena, step)
    with arena.step():
        step()
    assert arena.report().planned_steps == 1
    assert arena.report().arena_bytes == 40 * PAGE


def test_what_outlives_every_step_is_kept_out(arena: PlannedAllocator) -> None:
    kept = []
    for value in range(5):
        with arena.step():
            kept.append(block(10, value))
            three()
    assert [int(t[0]) for t in kept] == list(range(5))
    assert all(holds(t, value) for value, t in enumerate(kept))
    report = arena.report()
    assert (report.planned_steps, report.planned_requests) == (3, 3)
    assert (report.outliving_bytes, report.arena_bytes) == (10 * PAGE, 12 * PAGE)


def test_what_outlives_one_step_is_not_overwritten(arena: PlannedAllocator) -> None:
    learn(arena)
    with (
        pytest.warns(ArenaWarning, match="1 blocks outlived the step, among them that of request 0"),
        arena.step(),
    ):
        kept = [block(8, 5), block(4)][0]
    for _ in range(2):  # One more deviation and the plan is given up; it is recorded.
        with arena.step():
            three()
    assert holds(kept, 5)
    assert arena.report().deviating_steps == DEVIATIONS


def test_tensors_outlive_the_arena_and_their_memory_is_given_back() -> None:
    with PlannedAllocator() as arena:
        learn(arena, lambda: block(300))
        with pytest.warns(ArenaWarning, match="outlived"), arena.step():
            kept = block(300, 5)
        address = kept.data_ptr()
    assert holds(kept, 5)
    assert is_mapped(address)
    del kept
    assert not is_mapped(address)
    with pytest.raises(ArenaError, match="closed"), arena.step():
        pass
    arena.close()


def test_steps_that_are_never_completed_are_not_recorded_for_ever(arena: PlannedAllocator) -> None:
    """As those of a model whose output hides its tensors: the next pass ends the one before."""
    for _ in range(RECORDINGS - 1):
        arena.begin("hidden")
        arena.end(completed=False)
    arena.begin("hidden")
    with pytest.warns(ArenaWarning, match=rf"no two neighbours of {RECORDINGS} .* were completed"):
        arena.end(completed=False)
    arena.begin("hidden")
    assert holds(block(8, 3), 3)
    arena.end()
    report = arena.report()
    assert (report.recorded_steps, report.ordinary_steps) == (0, RECORDINGS + 1)


def test_what_outlives_the_arena_keeps_its_own_pages_only() -> None:
    """Both blocks live at once, so they lie in the arena one behind the other."""
    found: dict[str, int] = {}

    def step(kept: list[Tensor]) -> None:
        large, small = block(300), block(2, 5)
        found["large"], found["small"] = large.data_ptr(), small.data_ptr()
        kept.append(small)

    kept: list[Tensor] = []
    with PlannedAllocator() as arena:
        learn(arena, lambda: step([]))
        with pytest.warns(ArenaWarning, match="outlived"), arena.step():
            step(kept)
        assert abs(found["large"] - found["small"]) <= 300 * PAGE
        assert resident_pages(found["large"], 300) == 300
    assert resident_pages(found["large"], 300) == 0
    assert resident_pages(found["small"], 2) == 2
    assert holds(kept[0], 5)


def is_mapped(address: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    vector = ctypes.create_string_buffer(1)
    return libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), vector) == 0


def test_an_arena_that_nobody_closes_is_given_back() -> None:
    arena = PlannedAllocator()
    learn(arena, lambda: block(300))
    with arena.step():
        address = block(300).data_ptr()
    del arena
    gc.collect()
    assert not is_mapped(address)


def test_an_open_arena_is_not_closed(arena: PlannedAllocator) -> None:
    with arena.step(), pytest.raises(ArenaError, match="leave it before"):
        arena.close()


def test_storages_grow_and_shrink(arena: PlannedAllocator) -> None:
    def step() -> None:
        tensor = block(8, 3)
        tensor.resize_(20 * PAGE)
        assert tensor[: 8 * PAGE].tolist() == [3] * (8 * PAGE)
        tensor.untyped_storage().resize_(PAGE)
        assert tensor.resize_(PAGE).tolist() == [3] * PAGE

    learn(arena, step)
    with arena.step():
        step()
    assert arena.report().planned_steps == 1
    assert arena.report().planned_requests == 3
