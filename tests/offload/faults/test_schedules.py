"""Random schedules of operations, delays, reorderings and failures: the right bytes or a typed error, never a
hang, and nothing left behind.

``StoreMachine`` has a backend without threads, which carries out requests one by one, in any order that the
store allows, and fails any of them: it knows of each read what it must find. ``OptimizerMachine`` trains
beside plain PyTorch over a backend with threads that delays, reorders and fails.
``MEMTRAIN_SCHEDULES`` is their number, by default 500.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.errors import (
    CorruptExtentError,
    ExtentStateError,
    OffloadError,
    TierFullError,
    TierIOError,
)
from memtrain.offload.extents import Extent
from memtrain.offload.io import (
    Direction,
    Fault,
    FaultyBackend,
    FaultyTarget,
    IORequest,
    ThreadPoolBackend,
    perform,
)
from memtrain.offload.store import Ticket
from memtrain.offload.tiers import MemoryStore
from memtrain.planner.actions import Tier
from tests.offload.faults.disks import open_descriptors
from tests.offload.snapshot_runs import AHEAD, SEQUENTIAL, UNITS, adamw
from tests.offload.tier_stores import U, filled
from tests.offload.training import STAGING, make_model, make_plan, trainable, wrap

SCHEDULES = int(os.environ.get("MEMTRAIN_SCHEDULES", "500"))
STORE_SCHEDULES = SCHEDULES * 4 // 5
OPTIMIZER_SCHEDULES = SCHEDULES - STORE_SCHEDULES
DEADLINE_SECONDS = 60
"""Of one schedule."""
HEALTH = [HealthCheck.too_slow, HealthCheck.filter_too_much]


class HandBackend:
    """Requests wait until somebody carries them out."""

    def __init__(self) -> None:
        self.held: list[IORequest] = []

    def submit(self, request: IORequest) -> None:
        self.held.append(request)

    def close(self) -> None:
        while self.held:
            perform(self.held.pop())


LASTING = {
    "error": Fault(error=errno.EIO),
    "end": Fault(short_bytes=0),
    "flip": Fault(flip_bit=3),
    "drop": Fault(drop=True),
}
PASSING = {
    "again": Fault(error=errno.EAGAIN, times=1),
    "short": Fault(short_bytes=U, times=1),
    "once": Fault(error=errno.EIO, times=1),
}


@dataclass(eq=False)
class Operation:
    """One write or read, and what became of its pieces."""

    direction: Direction
    buffer: Tensor
    sources: list[Operation | None] = field(default_factory=list)
    """Of a read: the writes whose bytes it must find."""
    ticket: Ticket | None = None
    failed: bool = False
    damaged: bool = False
    """It succeeds, or would, with wrong bytes."""

    def suffers(self, name: str) -> None:
        write = self.direction is Direction.WRITE
        self.failed |= name in ("error", "end") or (name == "once" and write)
        self.damaged |= name == "flip" or (name == "drop" and write)


@dataclass(eq=False)
class Place:
    """An extent of one, two or three chunks, and the last write of each."""

    extent: Extent
    cuts: list[int]
    writes: list[Operation | None]


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        signal.alarm(DEADLINE_SECONDS)
        self.backend = HandBackend()
        self.store = MemoryStore(Tier.HOST, 24 * U, backend=self.backend, piece_bytes=2 * U)
        self.places: list[Place] = []
        self.operations: list[Operation] = []
        self.serial = 0

    @rule(pages=st.lists(st.integers(1, 5), min_size=1, max_size=3), odd=st.integers(0, U - 1))
    def allocate(self, pages: list[int], odd: int) -> None:
        while any(extent.freed for extent in self.store._pending):
            self.carry_out(0, "")  # or it would wait for room that is being given back
        cuts = [U * sum(pages[:number]) for number in range(len(pages))]
        nbytes = U * sum(pages) - odd
        room = self.store._space.largest_bytes
        try:
            extent = self.store.allocate(f"t{self.serial}", nbytes)
        except TierFullError:
            assert U * sum(pages) > room
            return
        assert U * sum(pages) <= room
        self.places.append(Place(extent, [*cuts, nbytes], [None] * len(pages)))
        self.serial += 1

    @precondition(lambda self: self.places)
    @rule(which=st.integers(0, 99), chunk=st.integers(0, 2))
    def write(self, which: int, chunk: int) -> None:
        place = self.places[which % len(self.places)]
        chunk %= len(place.writes)
        start, stop = place.cuts[chunk : chunk + 2]
        self.serial += 1
        operation = Operation(Direction.WRITE, filled(stop - start, self.serial))
        self.operations.append(operation)
        operation.ticket = self.store.write(place.extent, operation.buffer, start)
        place.writes[chunk] = operation

    @precondition(lambda self: self.places)
    @rule(which=st.integers(0, 99), first=st.integers(0, 2), count=st.integers(1, 3))
    def read(self, which: int, first: int, count: int) -> None:
        place = self.places[which % len(self.places)]
        first %= len(place.writes)
        last = min(first + count, len(place.writes))
        start, stop = place.cuts[first], place.cuts[last]
        operation = Operation(Direction.READ, filled(stop - start, 0), place.writes[first:last])
        self.operations.append(operation)
        try:
            operation.ticket = self.store.read(place.extent, operation.buffer, start)
        except ExtentStateError:
            self.operations.remove(operation)
            assert any(source is None or source.failed for source in operation.sources)

    @precondition(lambda self: self.backend.held)
    @rule(number=st.integers(0, 99), name=st.sampled_from(["", "", "", *LASTING, *PASSING]))
    def carry_out(self, number: int, name: str) -> None:
        request = self.backend.held.pop(number % len(self.backend.held))
        owner = next(o for o in self.operations if _within(request.buffer, o.buffer))
        if name:
            owner.suffers(name)
            request.target = FaultyTarget(request.target, {**LASTING, **PASSING}[name])
        perform(request)

    @precondition(lambda self: self.operations)
    @rule(which=st.integers(0, 99))
    def wait(self, which: int) -> None:
        operation = self.operations[which % len(self.operations)]
        ticket = operation.ticket
        assert ticket is not None
        while not ticket.done():
            assert self.backend.held, "a hang: nobody moves anything"
            self.carry_out(which, "")
        self.operations.remove(operation)
        if operation.direction is Direction.WRITE:
            _outcome(ticket, TierIOError if operation.failed else None)
        elif any(source is None or source.failed for source in operation.sources):
            _outcome(ticket, ExtentStateError)
        elif operation.failed:
            _outcome(ticket, (TierIOError, CorruptExtentError))
        elif operation.damaged or any(source is not None and source.damaged for source in operation.sources):
            _outcome(ticket, CorruptExtentError)
        else:
            _outcome(ticket, None)
            assert torch.equal(operation.buffer, torch.cat([o.buffer for o in operation.sources if o]))

    @precondition(lambda self: self.places)
    @rule(which=st.integers(0, 99))
    def free(self, which: int) -> None:
        self.store.free(self.places.pop(which % len(self.places)).extent)

    @invariant()
    def nothing_is_lost_or_taken_twice(self) -> None:
        held = {place.extent for place in self.places} | set(self.store._pending)
        assert self.store.used_bytes == sum(extent.reserved_bytes for extent in held)

    def teardown(self) -> None:
        while self.operations:
            self.wait(len(self.operations) - 1)
        assert not self.backend.held
        for place in self.places:
            self.store.free(place.extent)
        assert self.store._space.largest_bytes == self.store.capacity_bytes
        self.store.close()


def _within(part: Tensor, whole: Tensor) -> bool:
    return 0 <= part.data_ptr() - whole.data_ptr() < max(whole.numel(), 1)


def _outcome(ticket: Ticket, expected: Any) -> None:
    try:
        ticket.wait()
    except OffloadError as error:
        found = error
    else:
        assert expected is None, f"silent: {expected} was due"
        return
    assert expected is not None
    assert isinstance(found, expected), found


FAULTS = st.one_of(
    st.builds(Fault, delay_seconds=st.sampled_from([0.001, 0.004])),
    st.builds(Fault, error=st.sampled_from([errno.EIO, errno.ENOSPC]), times=st.sampled_from([1, 9])),
    st.builds(Fault, flip_bit=st.just(100), times=st.sampled_from([1, 9])),
    st.builds(Fault, short_bytes=st.sampled_from([0, U]), times=st.just(1)),
    st.sampled_from([Fault(error=errno.EAGAIN, times=1), Fault(drop=True)]),
)


class OptimizerMachine(RuleBasedStateMachine):
    @initialize(
        schedule=st.sampled_from([SEQUENTIAL, AHEAD]),
        gradient_slots=st.integers(1, 3),
        update_slots=st.integers(1, 3),
        shard=st.sampled_from([20_000, 50_000]),
        reorder=st.integers(1, 4),
        threads=st.integers(1, 3),
        faults=st.dictionaries(st.integers(0, 150), FAULTS, max_size=3),
        seed=st.integers(0, 1000),
    )
    def begin(
        self, schedule: Any, gradient_slots: int, update_slots: int, shard: int, reorder: int, threads: int,
        faults: dict[int, Fault], seed: int,
    ) -> None:  # fmt: skip
        signal.alarm(DEADLINE_SECONDS)
        self.before = open_descriptors(), _threads()
        backend = FaultyBackend(
            ThreadPoolBackend(threads), faults, reorder=reorder, seed=seed, hold_seconds=0.001
        )
        self.store = MemoryStore(Tier.HOST, 8 << 20, backend=backend, piece_bytes=16 * U, stall_seconds=20)
        self.engine = Engine({Tier.HOST: self.store}, make_device("cpu"))
        staging = replace(
            STAGING, gradient_slots=gradient_slots, gradient_slot_bytes=16 * U, update_slots=update_slots,
            update_shard_elements=shard,
        )  # fmt: skip
        self.model, self.twin = make_model(), make_model()
        self.plain = adamw(trainable(self.twin))
        self.optimizer = wrap(
            self.model, adamw(trainable(self.model)), self.engine, make_plan(schedule, staging=staging),
            elementwise=True,
        )  # fmt: skip
        self.data = random.Random(seed)
        self.failure: OffloadError | None = None

    def attempt(self, work: Callable[[], Any]) -> None:
        """Whatever is done ends well, or with a typed error; after that nothing counts but the leaving."""
        try:
            work()
        except OffloadError as error:
            self.failure = error

    @precondition(lambda self: self.failure is None)
    @rule(micro_batches=st.integers(1, 2), clip=st.booleans(), late=st.booleans())
    def train(self, micro_batches: int, clip: bool, late: bool) -> None:
        rows = [torch.tensor([[self.data.randrange(701) for _ in range(5)]]) for _ in range(micro_batches)]

        def ours() -> None:
            for row in rows:
                for unit in UNITS:
                    self.optimizer.ensure(unit)
                self.model(row).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(trainable(self.model), 0.05)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if late:
                self.optimizer.flush()

        for row in rows:
            self.twin(row).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trainable(self.twin), 0.05)
        self.plain.step()
        self.plain.zero_grad()
        self.attempt(ours)

    @precondition(lambda self: self.failure is None)
    @rule(unit=st.sampled_from(UNITS))
    def ensure(self, unit: str) -> None:
        self.attempt(lambda: self.optimizer.ensure(unit))

    @precondition(lambda self: self.failure is None)
    @rule()
    def compare(self) -> None:
        def look() -> None:
            self.optimizer.flush()
            for (name, p), q in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
                assert torch.equal(p, q), name

        self.attempt(look)

    @precondition(lambda self: self.failure is None and self.plain.state)
    @rule(name=st.sampled_from(["embed.weight", "first.weight", "second.weight"]))
    def read_state(self, name: str) -> None:
        def look() -> None:
            found = self.optimizer.read_state(name, "exp_avg")
            assert torch.equal(found, self.plain.state[dict(self.twin.named_parameters())[name]]["exp_avg"])

        self.attempt(look)

    @precondition(lambda self: self.failure is not None)
    @rule()
    def end(self) -> None:
        """After a failure there is nothing left to do but to close, which ``teardown`` looks at."""

    def teardown(self) -> None:
        if not hasattr(self, "optimizer"):
            return
        if self.failure is None:
            self.compare()
        self.attempt(self.optimizer.close)
        assert self.store.used_bytes == 0
        for parameter in self.model.parameters():
            assert not parameter._post_accumulate_grad_hooks
        self.attempt(self.engine.close)
        assert (open_descriptors(), _threads()) == self.before


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("memtrain")}


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=STORE_SCHEDULES, stateful_step_count=30, derandomize=True, deadline=None,
    suppress_health_check=HEALTH,
)  # fmt: skip
TestOptimizer = OptimizerMachine.TestCase
TestOptimizer.settings = settings(
    max_examples=OPTIMIZER_SCHEDULES, stateful_step_count=8, derandomize=True, deadline=None,
    suppress_health_check=HEALTH,
)  # fmt: skip
