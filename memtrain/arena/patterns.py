"""What is known of the steps of each key: recorded, planned, or left to the ordinary allocator."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from memtrain.arena import library
from memtrain.arena.library import Outcome, Request
from memtrain.arena.trace import StepPlan, Trace


@dataclass(slots=True)
class Pattern:
    """Of one key."""

    seen: int = 0
    """Steps so far."""
    previous: Trace | None = None
    """What was recorded last, and is not planned yet."""
    plan: StepPlan | None = None
    requests: ctypes.Array[Request] | None = None
    """The plan, as the library reads it."""
    marks: list[tuple[int, str]] = field(default_factory=list)
    """Which part of the step begins at which request of what was recorded last."""
    recordings: int = 0
    """Since the last plan, or the beginning."""
    plans: int = 0
    deviations: int = 0
    """In a row."""
    given_up: bool = False

    def follow(self, plan: StepPlan) -> None:
        """From now on."""
        self.previous, self.plan = None, plan
        self.plans += 1
        self.deviations = 0
        self.requests = (Request * len(plan.sizes))()
        for request, size, offset in zip(self.requests, plan.sizes, plan.offsets, strict=True):
            request.bytes, request.offset = size, offset

    def forget(self) -> None:
        """Record anew."""
        self.previous = self.plan = self.requests = None
        self.recordings = self.deviations = 0

    def give_up(self) -> None:
        """The ordinary allocator's, for good."""
        self.forget()
        self.given_up = True

    def deviation(self, outcome: Outcome) -> str:
        """What was not as planned; empty if nothing."""
        assert self.plan is not None
        sizes, index = self.plan.sizes, outcome.request
        where = self._where(index)
        said = {
            library.AS_PLANNED: [],
            library.SIZE: [
                f"request {index}{where} asked for {outcome.actual} bytes instead of {outcome.planned}"
            ],
            library.EXTRA: [f"after all {outcome.planned} requests came one for {outcome.actual} bytes"],
            library.MISSING: [f"{outcome.actual} requests came instead of {outcome.planned}"],
        }[outcome.kind]
        if said and outcome.kind != library.MISSING:
            said[0] += ", and the rest of the step was ordinary"
        if outcome.occupied:
            index = outcome.occupied_request
            said.append(
                f"{outcome.occupied} requests found their place taken by what lived longer than planned, the "
                f"first request {index}{self._where(index)} for {sizes[index]} bytes"
            )
        if outcome.outliving:
            index = outcome.outliving_request
            said.append(
                f"{outcome.outliving} blocks outlived the step, among them that of request "
                f"{index}{self._where(index)} for {sizes[index]} bytes"
            )
        return "; ".join(said)

    def _where(self, index: int) -> str:
        position = bisect.bisect_right(self.marks, index, key=lambda mark: mark[0])
        return f" ({self.marks[position - 1][1]})" if position else ""


class Patterns:
    """By key; of more than ``limit`` the one that was used longest ago is forgotten."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_key: dict[Hashable, Pattern] = {}

    def of(self, key: Hashable) -> Pattern:
        """Of ``key``, which is used now."""
        pattern = self._by_key.pop(key, None) or Pattern()
        self._by_key[key] = pattern
        if len(self._by_key) > self._limit:
            del self._by_key[next(iter(self._by_key))]
        return pattern

    def __iter__(self) -> Iterator[Pattern]:
        return iter(self._by_key.values())

    @property
    def plans(self) -> list[StepPlan]:
        """Of all keys that have one."""
        return [pattern.plan for pattern in self if pattern.plan is not None]
