"""The planned allocator: records steps until two are alike, gives every request an address, and has them
followed.

A recorded step is served by the ordinary allocator, large requests by mappings of their own: what was
recorded then leaves nothing behind in the heap. A planned step finds all its memory in one mapping, resident
before the step begins, on huge pages where the kernel has them; it has no page fault and no fragments, and
takes what was packed.

Every request of a planned step is checked against the plan. Where size or order differ, or requests are
missing at the end, the rest of that step is ordinary, a warning says what differed, and after DEVIATIONS of
them in a row the step is recorded anew. A block that lives longer than planned keeps its place: whoever was
to have it next goes elsewhere. Steps that differ by design (another batch shape, accumulating or not) want a
``key`` each.

What outlives its step (a loss that is kept, gradients that are zeroed in the next step, states that an
optimizer makes) is not planned. Nor is what other threads ask for, or what is smaller than a page.

Source: MEMO (arXiv 2407.12117), section 4.3, plans addresses by two levels of integer programs and replays
them through PyTorch's allocator for GPUs; here one packing of the whole step, checked at run time, for CPUs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import warnings
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from memtrain.arena import library
from memtrain.arena.library import Outcome, Request
from memtrain.arena.trace import StepPlan, Trace, plan_step
from memtrain.optim.kernels import native
from memtrain.planner import resident

DEVIATIONS = 2
"""Steps in a row that leave their plan before the plan is given up and the step recorded anew."""
RECORDINGS = 8
"""Steps recorded without two neighbours alike before a key is left to the ordinary allocator."""
_MAPPED_SMALLEST_BYTES = 128 << 10
"""From here on a recorded request gets a mapping of its own; glibc's own threshold as a process starts."""


class ArenaError(RuntimeError):
    """A step cannot be opened or closed here: one is open already, or the arena is another process's."""


class ArenaWarning(RuntimeWarning):
    """A step left its plan, or cannot have one; it was served by the ordinary allocator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaSettings:
    """Of a PlannedAllocator.

    Raises:
        ValueError: a number out of range.
    """

    smallest_bytes: int = 4096
    """Requests below are left to the ordinary allocator and not looked at. Below a page a heap has no faults,
    and a logged scalar is no deviation."""
    packing_seconds: float = 10.0
    """Wall clock for a plan's addresses; taken only where the first passes do not reach the load."""
    poison: bool = False
    """Fill every block with NaN as it dies, to find who reads it afterwards. Slow."""

    def __post_init__(self) -> None:
        if self.smallest_bytes < 1:
            raise ValueError(
                f"smallest_bytes is {self.smallest_bytes}; it must be at least 1 (1: plan everything)"
            )
        if not self.packing_seconds >= 0:
            raise ValueError(f"packing_seconds is {self.packing_seconds}; it cannot be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaReport:
    """What the arena holds and how the steps went. Bytes."""

    arena_bytes: int
    """Resident while planned steps run: the packed height of the largest plan, in whole pages."""
    load_bytes: int
    """Of that plan, the most that is alive at once: no addresses need less."""
    outliving_bytes: int
    """Of that plan, requests of a step that outlive it and are not in the arena."""
    planned_requests: int
    """Of that plan, requests that have an address."""
    plans: int
    """Made so far, over all keys."""
    recorded_steps: int
    planned_steps: int
    """Steps that went as planned."""
    deviating_steps: int
    ordinary_steps: int
    """Steps without plan or recording: after an exception, without a compiler, or given up."""
    deviations: tuple[str, ...]
    """What was warned of."""


@dataclass(slots=True)
class _Sequence:
    """What is known of the steps of one key."""

    previous: Trace | None = None
    plan: StepPlan | None = None
    requests: ctypes.Array[Request] | None = None
    recordings: int = 0
    deviations: int = 0
    warned: bool = False
    given_up: bool = False

    def follow(self, plan: StepPlan) -> None:
        """From now on."""
        self.previous, self.plan = None, plan
        self.requests = (Request * len(plan.sizes))(
            *(Request(size, offset) for size, offset in zip(plan.sizes, plan.offsets, strict=True))
        )
        self.warned = False

    def forget(self) -> None:
        """Record anew."""
        self.previous = self.plan = self.requests = None
        self.recordings = self.deviations = 0


@dataclass(slots=True)
class _Counts:
    plans: int = 0
    recorded: int = 0
    planned: int = 0
    deviating: int = 0
    ordinary: int = 0
    deviations: list[str] = field(default_factory=list)


class PlannedAllocator:
    """An arena for the steps of one loop; see the module. ``close`` it, or use it as a context.

    Tensors made in a step may outlive the step and the arena: memory is given back when the last of them is
    gone. Without a C++ compiler it warns, and every step is an ordinary one.

    Args:
        settings: thresholds and limits.
    """

    def __init__(self, settings: ArenaSettings | None = None) -> None:
        self.settings = settings or ArenaSettings()
        self._process = os.getpid()
        self._sequences: dict[Hashable, _Sequence] = {}
        self._counts = _Counts()
        self._mapped_bytes = 0
        self._thread: int | None = None
        """Whose step is open."""
        self._closed = False
        self._library: ctypes.CDLL | None = None
        try:
            self._library = library.load()
        except native.FAILURES as error:
            warnings.warn(
                f"the planned allocator could not be set up, and torch's own is used; {native.remedy(error)}",
                ArenaWarning,
                stacklevel=2,
            )
            return
        self._arena = self._library.memtrain_arena_new(
            self.settings.smallest_bytes, _MAPPED_SMALLEST_BYTES, self.settings.poison
        )
        self._finalizer = weakref.finalize(self, _delete, self._library, self._arena, self._process)
        self._finalizer.atexit = False  # The process's end gives everything back, and tensors may still live.

    @contextmanager
    def step(self, key: Hashable = None) -> Iterator[None]:
        """Around everything that a step makes and lets go of, in one thread.

        Args:
            key: steps of one key ask for the same bytes in the same order.

        Raises:
            ArenaError: a step is open in this thread or of this arena, the arena is closed or another
            process's,
                or another allocator has taken torch's.
        """
        self._refuse()
        sequence = self._sequences.setdefault(key, _Sequence())
        if self._library is None or sequence.given_up:
            self._counts.ordinary += 1
            yield
            return
        self._open(self._library, sequence)
        try:
            yield
        except BaseException:
            self._end(self._library, sequence)  # It tells nothing of other steps.
            self._counts.ordinary += 1
            raise
        outcome = self._end(self._library, sequence)
        if isinstance(outcome, Trace):
            self._learn(self._library, sequence, key, outcome)
        elif outcome is not None:
            self._judge(sequence, key, outcome)

    def report(self) -> ArenaReport:
        """How it went so far."""
        plans = [s.plan for s in self._sequences.values() if s.plan is not None]
        largest = max(plans, key=lambda plan: plan.packing.height, default=None)
        return ArenaReport(
            arena_bytes=self._mapped_bytes,
            load_bytes=largest.load_bytes if largest else 0,
            outliving_bytes=largest.outliving_bytes if largest else 0,
            planned_requests=len(largest.packing.offsets) if largest else 0,
            plans=self._counts.plans,
            recorded_steps=self._counts.recorded,
            planned_steps=self._counts.planned,
            deviating_steps=self._counts.deviating,
            ordinary_steps=self._counts.ordinary,
            deviations=tuple(self._counts.deviations),
        )

    def close(self) -> None:
        """Give the memory back, of tensors that still live when they are gone. May be called twice.

        Raises:
            ArenaError: a step is open.
        """
        if self._thread is not None and os.getpid() == self._process:
            raise ArenaError("the arena has an open step: leave it before the arena is closed")
        self._closed = True
        if self._library is not None:
            self._finalizer()
            self._mapped_bytes = 0

    def __enter__(self) -> PlannedAllocator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse(self) -> None:
        if self._closed:
            raise ArenaError("the arena is closed: make a new PlannedAllocator")
        if os.getpid() != self._process:
            raise ArenaError(
                f"the arena is process {self._process}'s: make one in this process, {os.getpid()}"
            )
        if self._thread is not None:
            raise ArenaError("the arena has an open step: steps are neither nested nor shared by threads")

    def _open(self, lib: ctypes.CDLL, sequence: _Sequence) -> None:
        if sequence.requests is None:
            error = lib.memtrain_arena_record(self._arena)
        else:
            error = lib.memtrain_arena_replay(self._arena, sequence.requests, len(sequence.requests))
        if error == errno.EBUSY:
            raise ArenaError("another arena has an open step in this thread: steps are not nested")
        if error == errno.ENODEV:
            raise ArenaError("torch's CPU allocator was replaced by another one after this arena was made")
        if error:
            raise ArenaError(f"the arena's {self._mapped_bytes} bytes cannot be had: {os.strerror(error)}")
        self._thread = threading.get_ident()

    def _end(self, lib: ctypes.CDLL, sequence: _Sequence) -> Trace | Outcome | None:
        """What was recorded, or how the plan was followed; None in a child that was forked in the step."""
        if os.getpid() != self._process:
            return None
        if threading.get_ident() != self._thread:
            raise ArenaError("a step must be left by the thread that entered it")
        self._thread = None
        if sequence.requests is not None:
            outcome = Outcome()
            lib.memtrain_arena_end_replay(self._arena, outcome)
            return outcome
        count = lib.memtrain_arena_end_record(self._arena)
        sizes, deaths = (ctypes.c_uint64 * count)(), (ctypes.c_int64 * count)()
        lib.memtrain_arena_recorded(self._arena, sizes, deaths)
        return Trace(sizes=tuple(sizes), deaths=tuple(deaths))

    def _learn(self, lib: ctypes.CDLL, sequence: _Sequence, key: Hashable, trace: Trace) -> None:
        """A plan, when two neighbours are alike."""
        self._counts.recorded += 1
        sequence.recordings += 1
        previous, sequence.previous = sequence.previous, trace
        if previous is not None and previous.is_like(trace):
            sequence.follow(
                plan_step(previous.joined(trace), time_limit_seconds=self.settings.packing_seconds)
            )
            self._counts.plans += 1
            resident.trim()  # What the steps so far have left in the heap has its place in the arena now.
            self._fit(lib)
        elif sequence.recordings == RECORDINGS:
            sequence.given_up = True
            self._warn(
                f"no two neighbours of {RECORDINGS} recorded steps{_of(key)} ask for the same bytes in the "
                "same order: they stay with the ordinary allocator. Give steps that differ by design keys"
            )

    def _fit(self, lib: ctypes.CDLL) -> None:
        """As much memory as the largest plan needs."""
        need = max((s.plan.packing.height for s in self._sequences.values() if s.plan is not None), default=0)
        if need == self._mapped_bytes:
            return
        error = lib.memtrain_arena_map(self._arena, need)
        if error:
            for sequence in self._sequences.values():
                sequence.forget()
                sequence.given_up = True
            self._warn(
                f"an arena of {need} bytes cannot be had ({os.strerror(error)}): steps stay with the "
                "ordinary allocator"
            )
        self._mapped_bytes = 0 if error else need

    def _judge(self, sequence: _Sequence, key: Hashable, outcome: Outcome) -> None:
        """Give a plan up that steps in a row have left."""
        assert sequence.plan is not None
        deviation = _deviation(outcome, sequence.plan)
        if not deviation:
            self._counts.planned += 1
            sequence.deviations = 0
            return
        self._counts.deviating += 1
        sequence.deviations += 1
        if sequence.deviations == DEVIATIONS:
            sequence.forget()
        if not sequence.warned:
            sequence.warned = True
            self._warn(f"a step{_of(key)} left its plan: {deviation}")

    def _warn(self, message: str) -> None:
        self._counts.deviations.append(message)
        warnings.warn(message, ArenaWarning, stacklevel=5)  # the user's ``with``, below contextlib


def _deviation(outcome: Outcome, plan: StepPlan) -> str:
    """What was not as planned; empty if nothing."""
    index = outcome.request
    said = {
        library.AS_PLANNED: [],
        library.SIZE: [f"request {index} asked for {outcome.actual} bytes instead of {outcome.planned}"],
        library.EXTRA: [f"after all {outcome.planned} requests came one for {outcome.actual} bytes"],
        library.MISSING: [f"{outcome.actual} requests came instead of {outcome.planned}"],
    }[outcome.kind]
    if said and outcome.kind != library.MISSING:
        said[0] += ", and the rest of the step was ordinary"
    if outcome.occupied:
        index = outcome.occupied_request
        said.append(
            f"{outcome.occupied} requests found their place taken by what lived longer than planned, the "
            f"first request {index} for {plan.sizes[index]} bytes"
        )
    if outcome.outliving:
        index = outcome.outliving_request
        said.append(
            f"{outcome.outliving} blocks outlived the step, among them that of request {index} for "
            f"{plan.sizes[index]} bytes"
        )
    return "; ".join(said)


def _of(key: Hashable) -> str:
    return "" if key is None else f" of key {key!r}"


def _delete(lib: ctypes.CDLL, arena: int, process: int) -> None:
    if os.getpid() == process:
        lib.memtrain_arena_delete(arena)
