"""An arena without plans holds no memory and says so."""

from __future__ import annotations

import contextlib

import pytest

from memtrain.arena import ArenaSettings, ArenaWarning, PlannedAllocator
from memtrain.arena.allocator import DEVIATIONS, PLANS, RECORDINGS
from tests.memtrain.arena.steps import block, go, go_under, learn, three


def leave_again_and_again(arena: PlannedAllocator, key: str, first: int) -> None:
    """Plans are made, and left, until the key is given up."""
    for plan in range(PLANS):
        pages = first + 4 * plan
        go_under(arena, key, [lambda p=pages: three((p, 4, 6))] * 2)
        go_under(arena, key, [lambda p=pages: three((p + 1, 4, 6))] * DEVIATIONS)


@pytest.mark.filterwarnings("ignore::memtrain.arena.ArenaWarning")
def test_when_the_last_plan_is_given_up_the_arena_goes() -> None:
    with PlannedAllocator() as arena:
        leave_again_and_again(arena, "a", 40)
        report = arena.report()
        assert report.plans == PLANS
        assert (report.arena_bytes, report.load_bytes, report.planned_requests) == (0, 0, 0)
        assert arena.vacant_bytes() == 0
        learn(arena)
        assert arena.report().arena_bytes == arena.report().load_bytes > 0


@pytest.mark.filterwarnings("ignore::memtrain.arena.ArenaWarning")
def test_what_another_plan_needs_stays() -> None:
    with PlannedAllocator() as arena:
        go_under(arena, "small", [three] * 2)
        small = arena.report().arena_bytes
        assert small
        leave_again_and_again(arena, "large", 400)
        assert arena.report().arena_bytes == small
        go_under(arena, "small", [three])
        assert arena.report().planned_steps == 1


def test_so_it_does_when_a_plan_was_too_large_the_second_time() -> None:
    with PlannedAllocator(ArenaSettings(most_bytes=20 * 4096)) as arena:
        learn(arena)
        assert arena.report().arena_bytes
        with pytest.warns(ArenaWarning, match="left its plan"):
            go(arena, [lambda: three((30, 4, 6))] * DEVIATIONS)
        with pytest.warns(ArenaWarning, match="ordinary allocator"):
            go(arena, [lambda: three((30, 4, 6))] * 2)
        assert arena.report().arena_bytes == 0


def test_so_it_does_when_nothing_is_alike_after_a_plan() -> None:
    with PlannedAllocator() as arena:
        learn(arena)
        sizes = iter(range(100, 100 + DEVIATIONS + RECORDINGS))
        with pytest.warns(ArenaWarning):
            go(arena, [lambda: three((next(sizes), 4, 6))] * (DEVIATIONS + RECORDINGS))
        assert arena.report().arena_bytes == 0


def test_a_tensor_in_an_arena_that_goes_keeps_its_bytes() -> None:
    with PlannedAllocator() as arena:
        learn(arena)
        held = []
        sizes = iter(range(100, 140))
        steps = [lambda: held.append(block(8, 7))]
        steps += [lambda: three((next(sizes), 4, 6))] * (RECORDINGS + 1)
        with pytest.warns(ArenaWarning):
            go(arena, steps)
        assert arena.report().arena_bytes == 0
        assert bool((held[0] == 7).all())


def test_a_step_follows_its_plan_until_it_leaves_it() -> None:
    with PlannedAllocator() as arena:
        found = []
        for last in (6, 6, 6, 7):
            with contextlib.nullcontext() if last == 6 else pytest.warns(ArenaWarning), arena.step():
                first = block(8)
                found.append(arena.follows)
                del first
                block(last)
                found.append(arena.follows)
        assert found == [False] * 4 + [True] * 3 + [False]
        assert not arena.follows
