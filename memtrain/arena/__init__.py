"""Transients at planned addresses: a CPU allocator for loops whose steps ask for the same bytes in the same
order.

    from memtrain.arena import PlannedAllocator

    with PlannedAllocator() as arena:
        for batch in batches:
            with arena.step():
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

``allocator.py`` decides when a step is recorded, planned or followed; ``trace.py`` makes a plan of
recordings, with addresses from ``planner.addresses``; ``planned.cpp`` stands in the place of torch's own CPU
allocator. ``passes.py`` says where the steps of a session begin and end, for a loop that knows nothing of
them; ``device.py`` with ``device.cpp`` is the same for the memory of a GPU. What both sources share is
``plan_core.h``.
"""

from memtrain.arena.allocator import ArenaError as ArenaError
from memtrain.arena.allocator import ArenaReport as ArenaReport
from memtrain.arena.allocator import ArenaSettings as ArenaSettings
from memtrain.arena.allocator import ArenaWarning as ArenaWarning
from memtrain.arena.allocator import PlannedAllocator as PlannedAllocator

__all__ = ["ArenaError", "ArenaReport", "ArenaSettings", "ArenaWarning", "PlannedAllocator"]
