"""Steps under the planned allocator: followed where they are alike, right in every case."""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memtrain.arena import ArenaSettings, ArenaWarning, PlannedAllocator
from memtrain.arena.allocator import DEVIATIONS, PLANS, RECORDINGS
from tests.memtrain.arena.steps import PAGE, block, go, go_under, holds, learn, resident_pages, three


def test_two_steps_alike_are_recorded_and_the_next_ones_followed(arena: PlannedAllocator) -> None:
    learn(arena)
    found = []
    for _ in range(3):
        with arena.step():
            found.append(three())
    assert found[0] == found[1] == found[2]
    first, second, third = found[0]
    # 8 pages, of which the third takes 6 when they are free, and 4 pages: nothing packs it lower.
    assert {first, second, third} <= set(range(min(found[0]), min(found[0]) + 12 * PAGE))
    report = arena.report()
    assert (report.arena_bytes, report.load_bytes) == (12 * PAGE, 12 * PAGE)
    assert (report.recorded_steps, report.planned_steps, report.deviating_steps) == (2, 3, 0)
    assert (report.plans, report.planned_requests, report.outliving_bytes) == (1, 3, 0)


def test_a_first_step_that_differs_is_recorded_over(arena: PlannedAllocator) -> None:
    with arena.step():
        kept = block(20, 7)
    learn(arena)
    with arena.step():
        three()
    assert arena.report().recorded_steps == 3
    assert arena.report().planned_steps == 1
    assert holds(kept, 7)


def train(arena: PlannedAllocator | None, steps: int = 6) -> list[Tensor]:
    """Losses, then weights, of a small model with AdamW."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.LayerNorm(160), nn.Linear(160, 96))
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = torch.randn(64, 96, dtype=torch.bfloat16)
    losses = []

    def step() -> None:
        loss = (model(batch) - batch).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())

    for _ in range(steps):
        if arena is None:
            step()
        else:
            with arena.step():
                step()
    return [*losses, *(p.detach() for p in model.parameters())]


def test_training_is_bit_equal() -> None:
    plain = train(None)
    with PlannedAllocator() as arena:
        planned = train(arena)
    assert all(torch.equal(a, b) for a, b in zip(plain, planned, strict=True))
    report = arena.report()
    # The optimizer makes its states in the first step, so the second and third are the first two alike.
    assert (report.recorded_steps, report.planned_steps, report.deviating_steps) == (3, 3, 0)


Program = list[tuple[int, int, bool]]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A step: of each request the bytes, which of the living dies before it, counted from the youngest (0:
    none), and whether it outlives the step."""
    return draw(
        st.lists(st.tuples(st.integers(1, 9000), st.integers(0, 4), st.booleans()), min_size=1, max_size=25)
    )


def run(program: Program) -> list[tuple[Tensor, int]]:
    """Fill every block with a value of its own, and look at all of them at every turn."""
    living: list[tuple[Tensor, int]] = []
    for index, (size, dies, _) in enumerate(program):
        if 0 < dies <= len(living):
            del living[-dies]
        tensor = torch.empty(size, dtype=torch.uint8)
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(index % 251)
        living.append((tensor, index % 251))
        spans = sorted((t.data_ptr(), t.data_ptr() + t.numel()) for t, _ in living)
        assert all(low[1] <= high[0] for low, high in pairwise(spans))
        assert all(holds(t, value) for t, value in living)
    return living


@settings(max_examples=40, deadline=None)
@given(programs(), programs())
@pytest.mark.filterwarnings("ignore::memtrain.arena.ArenaWarning")
def test_random_steps_never_share_a_byte(program: Program, other: Program) -> None:
    """Also where another step comes in between, and where tensors outlive their steps."""
    settings = ArenaSettings(smallest_bytes=1, packing_seconds=0.05, poison=True)
    kept: list[tuple[Tensor, int]] = []
    with PlannedAllocator(settings) as arena:
        for step in (program, program, program, other, program, other, other, other, other, program):
            with arena.step():
                living = run(step)
                keep = [entry for entry, (_, _, stays) in zip(living, step, strict=False) if stays][:2]
                del living
            kept = [*kept[-4:], *keep] if step is other else kept
            del keep
            assert all(holds(t, value) for t, value in kept)
    assert all(holds(t, value) for t, value in kept)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: three((9, 4, 6)), r"request 0 asked for 36864 bytes instead of 32768, and the rest"),
        (lambda: three((4, 8, 6)), r"request 0 asked for 16384 bytes instead of 32768"),
        (lambda: three((8, 4, 5)), r"request 2 asked for 20480 bytes instead of 24576"),
        (lambda: (three(), block(2)), r"after all 3 requests came one for 8192 bytes"),
        (lambda: block(8), r"1 requests came instead of 3$"),
        (lambda: None, r"0 requests came instead of 3$"),
    ],
    ids=["size", "order", "last", "extra", "missing", "empty"],
)
def test_a_step_that_leaves_its_plan_says_where_and_the_next_follows_again(
    arena: PlannedAllocator, step: Callable[[], object], message: str
) -> None:
    learn(arena)
    with pytest.warns(ArenaWarning, match=message) as warned, arena.step():
        step()
    assert warned[0].filename == __file__
    with arena.step():
        three()
    report = arena.report()
    assert (report.planned_steps, report.deviating_steps, report.plans) == (1, 1, 1)
    assert len(report.deviations) == 1


def test_a_deviation_that_stays_is_recorded_and_planned(arena: PlannedAllocator) -> None:
    learn(arena)
    with pytest.warns(ArenaWarning, match="left its plan") as warned:
        go(arena, [lambda: three((9, 4, 6))] * DEVIATIONS)
    assert len(warned) == 1
    for _ in range(3):
        with arena.step():
            three((9, 4, 6))
    report = arena.report()
    assert (report.plans, report.recorded_steps, report.planned_steps) == (2, 4, 1)
    assert report.arena_bytes == 13 * PAGE


def test_steps_that_are_never_alike_are_left_alone(arena: PlannedAllocator) -> None:
    with pytest.warns(ArenaWarning, match=f"no two neighbours of {RECORDINGS} recorded steps") as warned:
        go(arena, [partial(block, pages) for pages in range(1, RECORDINGS + 3)])
    assert len(warned) == 1
    assert arena.report().ordinary_steps == 2


def test_steps_that_differ_by_design_have_keys(arena: PlannedAllocator) -> None:
    for _ in range(4):
        for pages in (3, 30):
            with arena.step(key=pages):
                block(pages)
    report = arena.report()
    assert (report.plans, report.planned_steps) == (2, 4)
    assert report.arena_bytes == 30 * PAGE


def test_empty_and_small_requests_are_nobody_s_business(arena: PlannedAllocator) -> None:
    learn(arena)
    with arena.step():
        assert torch.empty(0).data_ptr() == 0
        assert torch.zeros(1023).sum() == 0
        three()
    assert arena.report().planned_steps == 1


def test_with_a_smallest_of_one_they_are_planned() -> None:
    with PlannedAllocator(ArenaSettings(smallest_bytes=1)) as arena:
        learn(arena, lambda: torch.zeros(3))
        with arena.step():
            assert torch.empty(0).data_ptr() == 0
            torch.zeros(3)
        assert (arena.report().planned_steps, arena.report().load_bytes) == (1, 12)


@pytest.mark.parametrize("planned", [False, True])
def test_what_no_machine_has_is_refused_as_ever(arena: PlannedAllocator, planned: bool) -> None:
    if planned:
        learn(arena)
    with pytest.raises(RuntimeError, match="allocate"), arena.step():
        torch.empty(1 << 60, dtype=torch.uint8)
    with arena.step():
        three()
    assert arena.report().planned_steps == planned


def test_more_than_the_arena_holds_is_ordinary(arena: PlannedAllocator) -> None:
    learn(arena)
    with pytest.warns(ArenaWarning, match="request 0 asked for 67108864"), arena.step():
        assert holds(block(1 << 14, 3), 3)


def test_a_planned_step_has_no_page_faults(arena: PlannedAllocator) -> None:
    def step() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.zeros(8 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    learn(arena, step)
    counts = []
    for _ in range(4):
        with arena.step():
            counts.append(step())
    assert min(counts) <= 8  # of 32 MiB, four times: 32,768 with pages of 4 KiB
    assert arena.report().arena_bytes == 32 << 20


def test_while_a_step_is_recorded_anew_the_arena_gives_its_pages_back(arena: PlannedAllocator) -> None:
    learn(arena, lambda: block(1 << 14))
    with arena.step():
        address = block(1 << 14).data_ptr()
    with arena.step(key="other"):
        assert resident_pages(address, 1 << 14) == 0
    with arena.step():
        assert resident_pages(address, 1 << 14) == 1 << 14
        block(1 << 14)


def test_a_step_that_leaves_its_plan_gives_back_what_nothing_lives_in(arena: PlannedAllocator) -> None:
    pages = 1 << 12

    def step() -> list[int]:
        first, second = block(pages, 1), block(pages, 2)
        return [first.data_ptr(), second.data_ptr()]

    def leave() -> None:
        kept = block(pages, 1)
        block(3)
        assert kept.data_ptr() == first
        assert resident_pages(first, pages) == pages
        assert resident_pages(second, pages) == 0
        assert holds(kept, 1)
        del kept
        assert resident_pages(first, pages) == 0

    learn(arena, step)
    with arena.step():
        first, second = step()
        assert resident_pages(second, pages) == pages
    with pytest.warns(ArenaWarning, match="left its plan"), arena.step():
        leave()
    with arena.step():
        assert step() == [first, second]
        assert resident_pages(second, pages) == pages
    assert arena.report().planned_steps == 2
    arena.vacate()
    assert resident_pages(second, pages) == 0
    assert arena.vacant_bytes() == 0


def test_a_step_may_be_ended_by_another_thread(arena: PlannedAllocator) -> None:
    learn(arena)
    arena.begin()
    first = block(8, 1)
    thread = threading.Thread(target=lambda: arena.end(completed=False))
    thread.start()
    thread.join()
    second = block(4, 2)  # ordinary: the step is over
    assert holds(first, 1)
    assert holds(second, 2)
    del first, second
    with arena.step():
        three()
    assert (arena.report().planned_steps, arena.report().deviations) == (1, ())


def test_a_step_that_differs_is_said_to_by_part(arena: PlannedAllocator) -> None:
    def parts(sizes: tuple[int, int]) -> None:
        for name, pages in zip(("forward", "backward"), sizes, strict=True):
            arena.mark(name)
            block(pages)

    learn(arena, lambda: parts((2, 3)))
    with pytest.warns(ArenaWarning, match=r"request 1 \(backward\) asked for 16384 bytes"), arena.step():
        parts((2, 4))


def test_no_more_than_it_may_take() -> None:
    with PlannedAllocator(ArenaSettings(most_bytes=11 * PAGE)) as arena:
        learn(arena, lambda: block(11))
        with pytest.warns(ArenaWarning, match="need an arena of 49152 bytes, and it may take 45056"):
            go_under(arena, "large", [three] * 3)
        assert (arena.report().arena_bytes, arena.report().ordinary_steps) == (11 * PAGE, 1)


def test_keys_that_were_used_longest_ago_are_forgotten() -> None:
    with PlannedAllocator(ArenaSettings(patterns=2, unrecorded_steps=1)) as arena:
        for key in (1, 1, 1, 1, 2, 3, 1):
            with arena.step(key=key):
                block(2)
        report = arena.report()
        assert (report.recorded_steps, report.planned_steps, report.ordinary_steps) == (2, 1, 4)


def test_a_plan_that_is_left_again_and_again_is_given_up(arena: PlannedAllocator) -> None:
    with pytest.warns(ArenaWarning, match="left its plan"):
        go(arena, [partial(block, n + more) for n in range(2, 2 + PLANS) for more in (0, 0, 10, 10)])
    with arena.step():
        block(1)
    assert (arena.report().plans, arena.report().ordinary_steps) == (PLANS, 1)


def test_poison_is_what_a_dead_block_holds(arena: PlannedAllocator) -> None:
    learn(arena)
    with arena.step():
        tensor = block(8, 1)
        view = (ctypes.c_ubyte * 16).from_address(tensor.data_ptr())
        assert bytes(view) == b"\1" * 16
        del tensor
        assert bytes(view) == b"\xff" * 16
        second, third = block(4), block(6)
        del second, third


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"smallest_bytes": 0}, "smallest_bytes is 0"),
        ({"packing_seconds": -1.0}, "packing_seconds is -1.0"),
        ({"most_bytes": -1}, "most_bytes is -1"),
        ({"patterns": 0}, "patterns is 0"),
        ({"unrecorded_steps": -1}, "unrecorded_steps is -1"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArenaSettings(**arguments)  # type: ignore[arg-type]
