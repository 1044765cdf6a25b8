"""The ring of gradients waits for what it needs and no more, and keeps no slot for what is over or failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtrain.offload.engine import Engine
from memtrain.offload.errors import OffloadError, TierIOError
from memtrain.offload.gradient_home import OffloadedGradient
from memtrain.offload.gradient_ring import GradientRing
from memtrain.offload.gradients import GradientStore
from memtrain.offload.shards import FlatIndex, Piece
from memtrain.offload.slab import Slab
from memtrain.offload.tiers import MemoryStore
from memtrain.planner.actions import Tier
from tests.offload.late_device import LateCopy, LateDevice
from tests.offload.training import open_engine

SHAPE = (256, 257)  # 263,168 bytes in fp32: nine chunks of 32 KiB


def values(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def gradients_on(engine: Engine, count: int, slots: int) -> GradientStore:
    parameters = [(f"p{i}", nn.Parameter(values(i))) for i in range(count)]
    index = FlatIndex([("u", parameters)], 100_000)
    return GradientStore(engine=engine, index=index, tiers={"u": Tier.HOST}, slots=slots, slot_bytes=32 << 10)


@contextmanager
def late_engine(device: LateDevice) -> Iterator[Engine]:
    with Engine({Tier.HOST: MemoryStore(Tier.HOST, 4 << 20)}, device) as engine:
        yield engine


def parts(store: GradientStore) -> tuple[GradientRing, list[OffloadedGradient]]:
    assert store._ring is not None
    return store._ring, list(store.homes.values())


def free(ring: GradientRing) -> int:
    return ring._ring.free_count


def produce(home: OffloadedGradient, gradient: Tensor) -> None:
    """A backward pass of this one parameter."""
    (home.parameter * gradient).sum().backward()


def read(ring: GradientRing, home: OffloadedGradient) -> Tensor:
    found = torch.empty(SHAPE).view(-1)
    for chunk, part in ring.stream(home):
        found[chunk.start : chunk.stop] = part
    return found.view(SHAPE)


def test_reading_one_gradient_does_not_wait_for_the_copies_of_another() -> None:
    device = LateDevice(eagerness=0.0)
    with late_engine(device) as engine:
        store = gradients_on(engine, 2, slots=32)
        ring, (old, new) = parts(store)
        produce(old, values(7))
        store.drain()
        produce(new, values(8))
        copies = [leaving.copy for leaving in ring._leaving]
        assert len(copies) == len(new.chunks) == 9
        ring.expect([old])
        assert len(ring._ahead[old]) == len(old.chunks)
        assert torch.equal(read(ring, old), values(7))
        whole = Piece(name=old.name, parameter=old.parameter, start=0, stop=old.parameter.numel(), whole=True)
        buffer = Slab(sum(chunk.nbytes for chunk in old.chunks)).buffer
        for ticket in store.load(old, old.value, whole, buffer):
            ticket.wait()
        assert torch.equal(buffer[: values(7).nbytes].view(torch.float32).view(SHAPE), values(7))
        assert [copy.over for copy in copies] == [False] * len(copies)  # type: ignore[attr-defined]
        ring.expect([new])  # its own are waited for, or the tier would be asked for what it has not got
        assert all(copy.over for copy in copies)  # type: ignore[attr-defined]
        assert torch.equal(read(ring, new), values(8))
        store.close()
        assert device.faults == []


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_read_ahead_that_fails_half_way_keeps_no_slot(failing: int) -> None:
    with open_engine() as engine:
        ring, (home, _) = parts(gradients_on(engine, 2, slots=8))
        produce(home, values(7))
        ring.drain()
        original, asked = home.store.read, []

        def refuse(*args: Any) -> Any:
            asked.append(args)
            if len(asked) == failing:
                raise OffloadError("no")
            return original(*args)

        home.store.read = refuse  # type: ignore[method-assign]
        with pytest.raises(OffloadError, match="no"):
            ring.expect([home])
        assert free(ring) == 8 - (failing - 1)
        assert torch.equal(read(ring, home), values(7))  # what was begun is used
        assert free(ring) == 8
        asked.clear()
        with pytest.raises(OffloadError, match="no"):
            ring.expect([home])
        ring.forget(home)
        assert free(ring) == 8


def on_a_fast_tier(ring: GradientRing) -> None:
    """Writes are over whenever the ring looks: on a slow one they might hold every slot, and nothing be read
    ahead."""

    def all_over() -> None:
        while ring._in_flight:
            ring._retire()

    ring._retire_done = all_over  # type: ignore[method-assign]


def test_what_was_expected_and_did_not_come_gives_its_slots_to_what_comes() -> None:
    with open_engine() as engine:
        store = gradients_on(engine, 4, slots=8)
        ring, homes = parts(store)
        on_a_fast_tier(ring)
        for home in homes[:3]:
            produce(home, values(7))
        produce(homes[0], values(8))  # another pass, which breaks off: 1 and 2 are expected
        assert list(ring._ahead) == [homes[1]]
        assert 1 <= len(ring._ahead[homes[1]]) <= 4  # half the ring at most
        produce(homes[3], values(9))
        assert ring._ahead == {}
        ring.drain()
        assert free(ring) == 8
        for home in homes:
            home.parameter.grad = None
        for number, home in enumerate(homes[:3]):
            produce(home, values(number))
            assert ring._ahead == {}  # first gradients: nothing is added to
        produce(homes[0], values(3))
        assert list(ring._ahead) == [homes[1]]
        assert torch.equal(read(ring, homes[0]), values(0) + values(3))
        assert torch.equal(read(ring, homes[1]), values(1))


def test_a_gradient_that_has_come_is_not_expected_again_in_the_same_pass() -> None:
    with open_engine() as engine:
        ring, (a, b) = parts(gradients_on(engine, 2, slots=8))
        for home in (a, b, b, a):  # a before b, then b before a
            produce(home, values(7))
        assert ring._ahead == {}
        assert torch.equal(read(ring, a), values(7) + values(7))


def test_a_device_that_fails_leaves_no_slot_held(monkeypatch: pytest.MonkeyPatch) -> None:
    device = LateDevice(eagerness=0.0)
    with late_engine(device) as engine:
        store = gradients_on(engine, 1, slots=8)
        ring, (home,) = parts(store)
        produce(home, values(7))
        store.drain()

        def broken(copy: LateCopy) -> None:
            raise RuntimeError("the device has failed")

        with monkeypatch.context() as patch:
            patch.setattr(LateCopy, "synchronize", broken)
            stream = ring.stream(home)
            next(stream)
            with pytest.raises(RuntimeError, match="the device has failed"):
                next(stream)
        assert free(ring) == 8
        store.close()


class RecordedTicket:
    """Over when it is waited for."""

    def __init__(self, error: OffloadError | None) -> None:
        self.error = error
        self.waited = False

    def done(self) -> bool:
        return self.waited

    def wait(self) -> None:
        self.waited = True
        if self.error is not None:
            raise self.error


def test_close_waits_for_every_write_also_after_one_that_failed() -> None:
    with open_engine() as engine:
        store = gradients_on(engine, 1, slots=16)
        ring, (home,) = parts(store)
        tickets: list[RecordedTicket] = []
        freed: list[list[bool]] = []

        def write(*args: Any) -> RecordedTicket:
            tickets.append(RecordedTicket(None if tickets else TierIOError("no space")))
            return tickets[-1]

        original = home.store.free

        def watched(extent: Any) -> None:
            freed.append([ticket.waited for ticket in tickets])
            original(extent)

        home.store.write, home.store.free = write, watched  # type: ignore[method-assign]
        produce(home, values(7))
        with pytest.raises(TierIOError, match="no space"):
            store.close()
        assert freed == [[True] * len(home.chunks)]
        assert ring._ring.slab.closed
        assert home.parameter.grad is None
        store.close()  # twice is once
