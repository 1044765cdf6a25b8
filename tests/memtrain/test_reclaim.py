"""When freed memory is asked back: where the plan's peak is near, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from memtrain.malloc import Keep
from memtrain.reclaim import Reclaimer


class Heap:
    """Resident memory that a test sets."""

    def __init__(self) -> None:
        self.rss_bytes = 0
        self.left_bytes = 0
        self.code_bytes = 0
        self.trimmed: list[int] = []
        self.buffer_bytes = 0
        self.kept: list[Keep] = []
        self.can_be_told = True

    def keep_freed(self, keep: Keep) -> bool:
        if self.can_be_told:
            self.kept.append(keep)
        return self.can_be_told

    def give_back_buffers(self) -> None:
        self.rss_bytes -= self.buffer_bytes
        self.buffer_bytes = 0

    def trim(self) -> bool:
        self.trimmed.append(self.rss_bytes)
        self.rss_bytes = self.left_bytes
        return True

    def drop(self) -> int:
        """Unmap the code."""
        self.rss_bytes -= self.code_bytes
        code_bytes, self.code_bytes = self.code_bytes, 0
        return code_bytes


def make(
    limit_bytes: int = 6400, *, is_served: Callable[[], bool] = lambda: False, **transients: int
) -> tuple[Reclaimer, Heap, nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    heap = Heap()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reclaimer = Reclaimer(
        model,
        [("0", model[0]), ("1", model[1])],
        optimizer,
        limit_bytes=limit_bytes,
        transients={name.replace("_", " "): size for name, size in transients.items()},
        is_served=is_served,
        rss_bytes=lambda: heap.rss_bytes,
        trim=heap.trim,
        drop_library_pages=heap.drop,
        keep_freed=heap.keep_freed,
        give_back_buffers=heap.give_back_buffers,
    )
    return reclaimer, heap, model, optimizer


def test_one_block_after_another_may_come_within_a_64th() -> None:
    reclaimer, heap, _, _ = make(6400, forward_0=1000, forward_1=1000)
    reclaimer.enter("forward 0")
    heap.rss_bytes = 6300
    reclaimer.enter("forward 1")  # what it needs for a moment has been served to the block before
    assert heap.trimmed == []
    heap.rss_bytes = 6301
    reclaimer.enter("forward 1")
    assert heap.trimmed == [6301]
    assert reclaimer.times == 1


def test_where_all_that_is_needed_is_resident_only_the_limit_counts() -> None:
    served = [True]
    reclaimer, heap, _, _ = make(6400, is_served=lambda: served[0], forward_0=3000, forward_1=3000)
    heap.rss_bytes = 6400
    reclaimer.enter("forward 0")
    reclaimer.enter("forward 1")
    assert heap.trimmed == []
    heap.rss_bytes = 6401
    reclaimer.enter("forward 1")
    assert heap.trimmed == [6401]
    served[0] = False
    heap.rss_bytes = 6350
    reclaimer.enter("backward 1")
    assert heap.trimmed == [6401, 6350]


def test_what_is_freed_is_kept_where_asking_back_leaves_half_as_much_again() -> None:
    reclaimer, heap, _, _ = make(6400, forward_0=900, epilogue=900)
    heap.rss_bytes, heap.left_bytes = 6390, 6400 - 1450
    reclaimer.enter("forward 0")  # needs 900, half of it again, and a 64th
    assert (len(heap.trimmed), heap.kept, reclaimer.short_times) == (1, [], 0)
    assert reclaimer.line() == "freed memory asked back 1 times"
    heap.rss_bytes, heap.left_bytes = 6390, 6400 - 1449
    reclaimer.enter("epilogue")
    assert (len(heap.trimmed), heap.kept, reclaimer.short_times) == (2, [Keep.NOTHING], 1)
    assert reclaimer.line() == "freed memory asked back 2 times, and not kept behind 1 of them"


def test_what_is_freed_is_kept_again_from_where_there_is_room_without_asking() -> None:
    reclaimer, heap, _, _ = make(6400)
    heap.rss_bytes, heap.left_bytes = 6390, 6350
    reclaimer.enter("forward 0")
    reclaimer.enter("forward 1")  # a trim has just been of no use
    assert heap.kept == [Keep.NOTHING]
    heap.rss_bytes = 6300
    reclaimer.enter("epilogue")
    reclaimer.enter("backward 1")
    assert heap.kept == [Keep.NOTHING, Keep.A_WHILE]


def test_what_was_not_kept_serves_no_other_block() -> None:
    """Blocks of the same kind need what the first one needed, anew."""
    reclaimer, heap, _, _ = make(6400, forward_0=1000, forward_1=1000)
    heap.rss_bytes, heap.left_bytes = 6390, 6400 - 1599
    reclaimer.enter("forward 0")
    reclaimer.enter("forward 1")
    assert (heap.kept, len(heap.trimmed)) == ([Keep.NOTHING], 1)
    heap.rss_bytes = 6400 - 1600
    reclaimer.enter("forward 1")
    assert heap.kept == [Keep.NOTHING, Keep.A_WHILE]


def test_what_is_freed_is_kept_again_between_steps() -> None:
    _, heap, model, optimizer = make(6400)
    heap.rss_bytes = heap.left_bytes = 6390
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert heap.kept[0] is Keep.NOTHING
    assert heap.kept[-1] is Keep.A_WHILE


def test_what_is_freed_is_kept_again_behind_the_session() -> None:
    reclaimer, heap, _, _ = make(6400)
    heap.rss_bytes = heap.left_bytes = 6390
    reclaimer.enter("forward 0")
    reclaimer.remove()
    reclaimer.remove()
    assert heap.kept == [Keep.NOTHING, Keep.A_WHILE]


def test_an_allocator_that_cannot_be_told_is_not_said_to_have_kept_nothing() -> None:
    reclaimer, heap, _, _ = make(6400)
    heap.rss_bytes = heap.left_bytes = 6390
    heap.can_be_told = False
    reclaimer.enter("forward 0")
    assert (reclaimer.times, reclaimer.short_times) == (1, 0)


def test_a_block_that_needs_more_than_those_before_it_gets_room_for_the_rest() -> None:
    reclaimer, heap, _, _ = make(6400, backward_1=100, backward_0=3000)
    reclaimer.enter("epilogue")
    heap.rss_bytes = 3400
    reclaimer.enter("backward 1")
    reclaimer.enter("backward 0")  # 3400 + 100 + (3000 - 100) is the limit
    assert heap.trimmed == []
    reclaimer.enter("epilogue")
    reclaimer.enter("backward 1")
    heap.rss_bytes = 3401
    reclaimer.enter("backward 0")
    assert heap.trimmed == [3401]


def test_a_trim_that_was_not_enough_is_not_repeated_until_more_is_resident() -> None:
    reclaimer, heap, _, _ = make(6400)
    heap.left_bytes = 6350
    heap.rss_bytes = 6390
    reclaimer.enter("forward 0")
    for rss_bytes in (6350, 6449):
        heap.rss_bytes = rss_bytes
        reclaimer.enter("forward 1")
    assert heap.trimmed == [6390]
    heap.rss_bytes = 6450
    reclaimer.enter("forward 1")
    assert heap.trimmed == [6390, 6450]
    reclaimer.enter("epilogue")  # another kind of work begins anew
    assert reclaimer.times == 3


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("forward 1", "epilogue"),
        ("epilogue", "backward 1"),
        ("backward 0", "backward prologue"),
        ("backward prologue", "update"),
        ("update", "forward prologue"),
        ("forward prologue", "forward 0"),
    ],
)
def test_another_kind_of_work_needs_room_for_its_transients(before: str, after: str) -> None:
    reclaimer, heap, _, _ = make(6400, **{after.replace(" ", "_"): 1000})
    reclaimer.enter(before)
    heap.rss_bytes = 5300
    reclaimer.enter(after)
    assert heap.trimmed == []
    reclaimer.enter(before)
    heap.rss_bytes = 5301
    reclaimer.enter(after)
    assert heap.trimmed == [5301]


def test_whoever_waits_keeps_nothing_that_is_free_where_the_next_one_needs_room() -> None:
    reclaimer, heap, _, _ = make(6400, forward_0=1000, forward_1=1000)
    heap.rss_bytes, heap.left_bytes = 5200, 4000
    reclaimer.enter("forward 0")
    reclaimer.leave()
    assert heap.trimmed == []
    heap.rss_bytes, heap.buffer_bytes = 5301, 50  # less than 1000 and a 64th are left
    reclaimer.leave()
    assert heap.trimmed == [5251]  # what the buffers have given the heap goes back with it
    heap.rss_bytes = 5350
    reclaimer.enter("forward 1")  # of another thread, which has been served nothing
    assert heap.trimmed == [5251, 5350]
    reclaimer.remove()
    heap.rss_bytes = 6400
    reclaimer.leave()
    assert len(heap.trimmed) == 2


def test_what_those_who_wait_leave_is_not_kept_either_where_it_is_short() -> None:
    reclaimer, heap, _, _ = make(6400, forward_0=1000)
    heap.rss_bytes, heap.left_bytes = 5301, 6400 - 1600  # 1000, half of it again, and a 64th
    reclaimer.leave()
    assert (len(heap.trimmed), heap.kept) == (1, [])
    heap.rss_bytes, heap.left_bytes = 5301, 6400 - 1599
    reclaimer.leave()
    reclaimer.enter("forward 0")  # of another thread: there is room, but not ample room
    assert (len(heap.trimmed), heap.kept) == (2, [Keep.NOTHING])


def test_code_is_unmapped_where_a_trim_is_not_enough() -> None:
    reclaimer, heap, _, _ = make(6400)
    heap.left_bytes, heap.code_bytes, heap.rss_bytes = 6250, 60, 6390
    reclaimer.enter("forward 0")
    assert heap.rss_bytes == 6250  # 150 are free, 100 are needed
    heap.left_bytes, heap.rss_bytes = 6350, 6390
    reclaimer.enter("forward 1")
    assert heap.rss_bytes == 6290
    assert reclaimer.times == 2


def test_a_step_enters_every_part_in_order() -> None:
    reclaimer, _, model, optimizer = make()
    parts: list[str] = []
    reclaimer.enter = parts.append  # type: ignore[method-assign]
    model(torch.ones(2, 4, requires_grad=True) * 1).sum().backward()
    optimizer.step()
    expected = ["forward prologue", "forward 0", "forward 1", "epilogue", "backward 1", "backward 0"]
    assert parts == [*expected, "backward prologue", "update"]


class Keyword(nn.Module):
    """A block that is given its hidden state by name and returns it in a dict, after a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, mask: torch.Tensor, *, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mask": mask, "hidden": self.linear(hidden)}


def test_keyword_arguments_and_dicts_are_looked_into() -> None:
    root, block, heap = nn.Module(), Keyword(), Heap()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    reclaimer = Reclaimer(
        root, [("b", block)], optimizer, limit_bytes=1, transients={}, rss_bytes=lambda: 0, trim=heap.trim
    )
    parts: list[str] = []
    reclaimer.enter = parts.append  # type: ignore[method-assign]
    hidden = torch.ones(2, 4, requires_grad=True) * 1
    block(torch.ones(2), hidden=hidden)["hidden"].sum().backward()
    assert parts == ["forward b", "epilogue", "backward b", "backward prologue"]


def test_no_hooks_pile_up_on_a_leaf_and_a_living_graph_is_silent_after_remove() -> None:
    reclaimer, heap, model, _ = make(limit_bytes=1)
    leaf = torch.ones(2, 4, requires_grad=True)
    model(leaf).sum().backward()
    assert not leaf._backward_hooks
    loss = model(leaf).sum()
    reclaimer.remove()
    heap.rss_bytes = 100
    before = reclaimer.times
    loss.backward()
    assert reclaimer.times == before


def test_nothing_is_left_after_remove() -> None:
    reclaimer, heap, model, optimizer = make(limit_bytes=1)
    reclaimer.remove()
    heap.rss_bytes = 100
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert heap.trimmed == []
    assert not model._forward_pre_hooks
    assert not model[0]._forward_pre_hooks
    assert not model[1]._forward_hooks


def test_a_forward_without_gradients_leaves_no_hook_on_tensors() -> None:
    reclaimer, _, model, _ = make()
    parts: list[str] = []
    reclaimer.enter = parts.append  # type: ignore[method-assign]
    with torch.no_grad():
        model(torch.ones(2, 4))
    assert parts == ["forward prologue", "forward 0", "forward 1", "epilogue"]
