"""The solver in this process: a child takes half a second, and is tested once for itself."""

from __future__ import annotations

import time
from typing import Any

import pytest

from memtrain.planner import bounding
from memtrain.planner.baselines import Search
from memtrain.planner.choices import Request


def _here(search: Search, deadline: float) -> Any:
    fields = {name: getattr(search, name) for name in ("profile", "machine", "budget", "options", "space")}
    return list(bounding.solve_all(Request(**fields), time.time() + 10.0))


@pytest.fixture
def solver_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS in this process."""
    monkeypatch.setattr(bounding, "_in_child", _here)
