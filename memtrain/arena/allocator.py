"""The planned allocator: records steps until two are alike, gives every request an address, and has them
followed.

A recorded step is served by the ordinary allocator, large requests by mappings of their own: what was
recorded then leaves nothing behind in the heap. A planned step finds all its memory in one mapping, resident
before the step begins, on huge pages where the kernel has them; it has no page fault and no fragments, and
takes what was packed.

Every request of a planned step is checked against the plan. Where size or order differ, or requests are
missing at the end, the rest of that step is served as a recorded one is, the arena gives back what nothing
lives in, a warning says what differed, and after DEVIATIONS of them in a row the step is recorded anew. A
block that lives longer than planned keeps its place: whoever was to have it next goes elsewhere. Steps that
differ by design (another batch shape, accumulating or not) want a ``key`` each.

What outlives its step (a loss that is kept, gradients that are zeroed in the next step, states that an
optimizer makes) is not planned. Nor is what other threads ask for, or what is smaller than a page.

Source: MEMO (arXiv 2407.12117), section 4.3, plans addresses by two levels of integer programs and replays
them through PyTorch's allocator for GPUs; here one packing of the whole step, checked at run time.
"""

from __future__ import annotations

import ctypes
import errno
import os
import warnings
import weakref
from array import array
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

from memtrain import malloc
from memtrain.arena import library
from memtrain.arena.library import Outcome
from memtrain.arena.patterns import Pattern, Patterns
from memtrain.arena.trace import ALIGNMENT_BYTES, Trace, plan_step
from memtrain.optim.kernels import native
from memtrain.planner import resident

DEVIATIONS = 2
"""Steps in a row that leave their plan before the plan is given up and the step recorded anew."""
RECORDINGS = 8
"""Steps recorded without two neighbours alike, completed or not, before a key is left to the ordinary
allocator."""
PLANS = 4
"""Of one key that were left, before it is given up in the same way."""
_TOLD = 32
"""What a report keeps of what was warned of."""
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
    most_bytes: int | None = None
    """The arena may take; steps that need more stay with the ordinary allocator. None: not limited."""
    patterns: int = 16
    """Keys that are remembered; a plan takes 32 bytes a request. The key that was used longest ago is
    forgotten."""
    unrecorded_steps: int = 0
    """Of each key that come before its first recording, which is slow."""
    poison: bool = False
    """Fill every block with NaN as it dies, to find who reads it afterwards. Slow."""

    def __post_init__(self) -> None:
        if self.smallest_bytes < 1:
            raise ValueError(
                f"smallest_bytes is {self.smallest_bytes}; it must be at least 1 (1: plan everything)"
            )
        if not self.packing_seconds >= 0:
            raise ValueError(f"packing_seconds is {self.packing_seconds}; it cannot be negative")
        if self.patterns < 1:
            raise ValueError(f"patterns is {self.patterns}; it must be at least 1 (1: of one key)")
        if self.unrecorded_steps < 0:
            raise ValueError(f"unrecorded_steps is {self.unrecorded_steps}; it cannot be negative")
        if self.most_bytes is not None and self.most_bytes < 0:
            raise ValueError(f"most_bytes is {self.most_bytes}; it cannot be negative (None: not limited)")


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
    """What was not as planned, the first of many; of each kind the first is a warning too."""


@dataclass(slots=True)
class _Counts:
    plans: int = 0
    recorded: int = 0
    planned: int = 0
    deviating: int = 0
    ordinary: int = 0
    deviations: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class _OpenStep:
    key: Hashable
    pattern: Pattern
    ordinary: bool
    marks: list[tuple[int, str]] = field(default_factory=list)


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
        self._patterns = Patterns(self.settings.patterns)
        self._counts = _Counts()
        self._warned: set[str] = set()
        self._mapped_bytes = 0
        self._step: _OpenStep | None = None
        self._closed = False
        self._library: ctypes.CDLL | None = None
        try:
            self._library = self._load()
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

    _ALIGNMENT_BYTES = ALIGNMENT_BYTES

    def _load(self) -> ctypes.CDLL:
        return library.load()

    @property
    def has_compiler(self) -> bool:
        """Whether steps are anything but ordinary."""
        return self._library is not None

    @contextmanager
    def step(self, key: Hashable = None) -> Iterator[None]:
        """Around everything that a step makes and lets go of, in one thread.

        Args:
            key: steps of one key ask for the same bytes in the same order.

        Raises:
            ArenaError: as ``begin``.
        """
        self.begin(key)
        try:
            yield
        except BaseException:
            self.end(completed=False)
            raise
        self.end()

    def begin(self, key: Hashable = None) -> None:
        """Open a step of this thread; ``step`` is made of this and ``end``.

        While steps follow plans, mimalloc keeps what it frees of all else (``malloc.keep_freed``), until an
        ordinary step, ``vacate`` or ``close``: what it gave back came again as page faults.

        Raises:
            ArenaError: a step is open in this thread or of this arena, the arena is closed or another
                process's, or another allocator has taken torch's.
        """
        self._refuse()
        pattern = self._patterns.of(key)
        pattern.seen += 1
        unrecorded = pattern.seen <= self.settings.unrecorded_steps
        ordinary = self._library is None or pattern.given_up or unrecorded
        if self._library is not None:
            if ordinary:
                self._library.memtrain_arena_vacate(self._arena)
            else:
                self._open(self._library, pattern)
        self._step = _OpenStep(key=key, pattern=pattern, ordinary=ordinary)
        malloc.keep_freed(malloc.Keep.ALL if self.follows else malloc.Keep.A_WHILE)

    def end(self, *, completed: bool = True) -> None:
        """End the open step, in any thread; in a child that was forked in it nothing happens.

        Args:
            completed: False after an exception: it tells nothing of other steps.
        """
        step, self._step = self._step, None
        if step is None or os.getpid() != self._process:
            return
        if self._library is None or step.ordinary:
            self._counts.ordinary += 1
            return
        outcome = self._end(self._library, step.pattern)
        if not completed:
            self._counts.ordinary += 1
            if isinstance(outcome, Trace):
                step.pattern.recordings += 1
                self._give_up_slow(step)
        elif isinstance(outcome, Trace):
            self._learn(self._library, step, outcome)
        else:
            self._judge(step, outcome)
        if step.pattern.given_up:
            self._fit(self._library)  # What its plan needed, if it was the largest, nobody needs now.

    def mark(self, part: str) -> None:
        """``part`` of the open step begins here; said of requests that are not as recorded."""
        step = self._step
        if step is None or step.ordinary or step.pattern.requests is not None or self._library is None:
            return
        if os.getpid() == self._process:
            step.marks.append((self._library.memtrain_arena_requests(self._arena), part))

    @property
    def follows(self) -> bool:
        """Whether a step is open that follows a plan, and has not left it."""
        if self._step is None or self._step.ordinary or self._library is None or not self._is_here:
            return False
        return bool(self._library.memtrain_arena_follows(self._arena))

    def vacate(self) -> None:
        """Give back what nothing lives in, until a step follows a plan again: for work between steps."""
        if self._step is None and self._library is not None and self._is_here:
            self._library.memtrain_arena_vacate(self._arena)
            malloc.keep_freed(malloc.Keep.A_WHILE)

    def vacant_bytes(self) -> int:
        """Resident, and free for what the plan foresees."""
        if self._library is None or not self._is_here:
            return 0
        return int(self._library.memtrain_arena_vacant(self._arena))

    def report(self) -> ArenaReport:
        """How it went so far."""
        largest = max(self._patterns.plans, key=lambda plan: plan.height_bytes, default=None)
        return ArenaReport(
            arena_bytes=self._mapped_bytes,
            load_bytes=largest.load_bytes if largest else 0,
            outliving_bytes=largest.outliving_bytes if largest else 0,
            planned_requests=largest.planned_requests if largest else 0,
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
        if self._step is not None and os.getpid() == self._process:
            raise ArenaError("the arena has an open step: leave it before the arena is closed")
        malloc.keep_freed(malloc.Keep.A_WHILE)
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

    @property
    def _is_here(self) -> bool:
        return not self._closed and os.getpid() == self._process

    def _refuse(self) -> None:
        if self._closed:
            raise ArenaError("the arena is closed: make a new PlannedAllocator")
        if os.getpid() != self._process:
            raise ArenaError(
                f"the arena is process {self._process}'s: make one in this process, {os.getpid()}"
            )
        if self._step is not None:
            raise ArenaError("the arena has an open step: steps are neither nested nor shared by threads")

    def _open(self, lib: ctypes.CDLL, pattern: Pattern) -> None:
        if pattern.requests is None:
            error = lib.memtrain_arena_record(self._arena)
        else:
            error = lib.memtrain_arena_replay(self._arena, pattern.requests, len(pattern.requests))
        if error == errno.EBUSY:
            raise ArenaError("another arena has an open step in this thread: steps are not nested")
        if error == errno.ENODEV:
            raise ArenaError("torch's CPU allocator was replaced by another one after this arena was made")
        if error:
            raise ArenaError(f"the arena's {self._mapped_bytes} bytes cannot be had: {os.strerror(error)}")

    def _end(self, lib: ctypes.CDLL, pattern: Pattern) -> Trace | Outcome:
        """What was recorded, or how the plan was followed."""
        if pattern.requests is not None:
            outcome = Outcome()
            lib.memtrain_arena_end_replay(self._arena, outcome)
            return outcome
        count = lib.memtrain_arena_end_record(self._arena)
        sizes, deaths = (ctypes.c_uint64 * count)(), (ctypes.c_int64 * count)()
        lib.memtrain_arena_recorded(self._arena, sizes, deaths)
        return Trace(sizes=array("q", bytes(sizes)), deaths=array("q", bytes(deaths)))

    def _learn(self, lib: ctypes.CDLL, step: _OpenStep, trace: Trace) -> None:
        """A plan, when two neighbours are alike."""
        pattern = step.pattern
        self._counts.recorded += 1
        pattern.recordings += 1
        previous, pattern.previous = pattern.previous, trace
        pattern.marks = step.marks
        if previous is not None and previous.is_like(trace):
            plan = plan_step(
                previous.joined(trace),
                time_limit_seconds=self.settings.packing_seconds,
                alignment_bytes=self._ALIGNMENT_BYTES,
            )
            most = self.settings.most_bytes
            if most is not None and plan.height_bytes > most:
                pattern.give_up()
                self._warn(
                    "large",
                    f"steps{_of(step.key)} need an arena of {plan.height_bytes} bytes, and it may take "
                    f"{most}: they stay with the ordinary allocator",
                )
                return
            pattern.follow(plan)
            self._counts.plans += 1
            resident.trim()  # What the steps so far have left in the heap has its place in the arena now.
            self._fit(lib)
        else:
            self._give_up_slow(step)

    def _give_up_slow(self, step: _OpenStep) -> None:
        """Recording is slow, and has led to nothing for long enough."""
        if step.pattern.recordings >= RECORDINGS:
            step.pattern.give_up()
            self._warn(
                "unlike",
                f"no two neighbours of {RECORDINGS} recorded steps{_of(step.key)} were completed and ask for "
                "the same bytes in the same order: they stay with the ordinary allocator. Give steps that "
                "differ by design keys",
            )

    def _fit(self, lib: ctypes.CDLL) -> None:
        """As much memory as the largest plan needs."""
        need = max((plan.height_bytes for plan in self._patterns.plans), default=0)
        if need == self._mapped_bytes:
            return
        error = lib.memtrain_arena_map(self._arena, need)
        if error:
            for pattern in self._patterns:
                pattern.give_up()
            self._warn(
                "memory",
                f"an arena of {need} bytes cannot be had ({os.strerror(error)}): steps stay with the "
                "ordinary allocator",
            )
        self._mapped_bytes = 0 if error else need

    def _judge(self, step: _OpenStep, outcome: Outcome) -> None:
        """Give a plan up that steps in a row have left."""
        pattern = step.pattern
        deviation = pattern.deviation(outcome)
        if not deviation:
            self._counts.planned += 1
            pattern.deviations = 0
            return
        self._counts.deviating += 1
        pattern.deviations += 1
        if pattern.deviations == DEVIATIONS:
            if pattern.plans == PLANS:
                pattern.give_up()
            else:
                pattern.forget()
        self._warn("deviation", f"a step{_of(step.key)} left its plan: {deviation}")

    def _warn(self, kind: str, message: str) -> None:
        if len(self._counts.deviations) < _TOLD:
            self._counts.deviations.append(message)
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, ArenaWarning, stacklevel=6)  # the user's ``with``, below contextlib


def _of(key: Hashable) -> str:
    return "" if key is None else f" of key {key!r}"


def _delete(lib: ctypes.CDLL, arena: int, process: int) -> None:
    if os.getpid() == process:
        lib.memtrain_arena_delete(arena)
