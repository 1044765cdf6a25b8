"""An arena in which what is dead does not keep its bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memtrain.arena import ArenaSettings, PlannedAllocator


@pytest.fixture
def arena() -> Iterator[PlannedAllocator]:
    with PlannedAllocator(ArenaSettings(poison=True)) as arena:
        yield arena
