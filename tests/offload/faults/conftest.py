"""What these tests share: a deadline."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

DEADLINE_SECONDS = 120
"""Of one test, on a busy machine: a hang is a failure here, not a silence."""


@pytest.fixture(autouse=True)
def deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    def hung(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {DEADLINE_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hung)
    whole_suite = request.node.name == "test_all_of_them_under_python_o"
    signal.alarm(8 * DEADLINE_SECONDS if whole_suite else DEADLINE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
