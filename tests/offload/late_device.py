"""A device that is as separate and as late as a GPU, for tests on a machine without one.

Its tensors are CPU tensors, but it says that it shares no memory with the host, and a copy happens only when
somebody waits for it, or at a random later call. What would be silent on a GPU shows here:

- a target is poisoned when its copy is queued, so that a read before the wait gives NaN, not luck;
- the source is read when the copy runs, so that one that was changed too early gives other bytes;
- ``wait`` holds for the device alone: host memory counts as in use until the host has learnt that the copy is
  over. A slot that was handed on before that is found out (``faults``), even where the bytes were right;
- copies of one direction run in order, as on a stream;
- staging memory must be registered, and stay so while copies use it.
"""

from __future__ import annotations

import random
import threading
from collections import deque

import torch
from torch import Tensor

from memtrain.offload.device import _bytes_of
from memtrain.offload.errors import OffloadError
from memtrain.offload.slab import Slab
from memtrain.planner import resident

POISON = 0xFF  # NaN in every floating-point format


class LateCopy:
    """One copy, queued; ``seen`` once the device has its bytes, ``over`` once the host knows."""

    def __init__(self, device: LateDevice, source: Tensor, target: Tensor, *, outwards: bool) -> None:
        self.device, self.source, self.target, self.outwards = device, source, target, outwards
        self.moved: Tensor | None = None
        self.over = False
        if outwards:
            device.let_device_go_on(target)
        target.fill_(POISON)

    def wait(self) -> None:
        with self.device.lock:
            self.device.waits += 1
            self.device.see(self)

    def synchronize(self) -> None:
        with self.device.lock:
            self.device.finish(self)

    def done(self) -> bool:
        with self.device.lock:
            self.device.let_time_pass()
            return self.over


class LateDevice:
    """See above.

    Args:
        seed: of when copies happen.
        eagerness: probability that a call lets the next copy of a direction happen; 0 is as late as can be.
        fail_after: raise in the copy of this number, counted from 1.
        refuse_registration: raise in the ``register`` of this number, counted from 1.
    """

    place = torch.device("cpu")
    shares_memory = False

    def __init__(
        self,
        seed: int = 0,
        eagerness: float = 0.2,
        fail_after: int | None = None,
        refuse_registration: int | None = None,
    ) -> None:
        self.lock = threading.RLock()
        self.faults: list[str] = []
        self.copies = {"out": 0, "in": 0}
        self.waits = 0
        self.limit_bytes: int | None = None
        self.registered: dict[int, int] = {}
        self.ever_registered = 0
        self._random = random.Random(seed)
        self._eagerness = eagerness
        self._fail_after = fail_after
        self._refuse_registration = refuse_registration
        self._queues: dict[bool, deque[LateCopy]] = {True: deque(), False: deque()}

    def empty(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def copy_out(self, source: Tensor, target: Tensor) -> LateCopy:
        return self._queue(_bytes_of(source, target), target, outwards=True)

    def copy_in(self, source: Tensor, target: Tensor) -> LateCopy:
        return self._queue(source, _bytes_of(target, source), outwards=False)

    def register(self, slab: Slab) -> None:
        if self.ever_registered + 1 == self._refuse_registration:
            raise OffloadError("the limit of locked memory is reached")
        self.registered[slab.address] = slab.nbytes
        self.ever_registered += 1

    def unregister(self, slab: Slab) -> None:
        self.synchronize()
        del self.registered[slab.address]

    def synchronize(self) -> None:
        with self.lock:
            for queue in self._queues.values():
                if queue:
                    self.finish(queue[-1])

    def used_bytes(self) -> int:
        return resident.rss_bytes()

    def peak_bytes(self) -> int:
        return resident.peak_bytes()

    def limit(self, nbytes: int | None) -> None:
        self.limit_bytes = nbytes

    def reset_peak(self) -> bool:
        return resident.reset_peak()

    # when copies happen -----------------------------------------------------------------------

    def let_time_pass(self) -> None:
        """Perhaps the oldest copy of a direction is over by now."""
        for queue in self._queues.values():
            if queue and self._random.random() < self._eagerness:
                self.finish(queue[0])

    def see(self, copy: LateCopy) -> None:
        """Run the copy, and those queued before it, as far as the device is concerned."""
        for one in list(self._queues[copy.outwards]):
            if one.moved is None:
                one.moved = one.source.clone()
                if not one.outwards:
                    one.target.copy_(one.moved)
            if one is copy:
                return

    def finish(self, copy: LateCopy) -> None:
        """Run the copy, and those queued before it; the host knows."""
        self.see(copy)
        queue = self._queues[copy.outwards]
        while not copy.over:
            first = queue.popleft()
            assert first.moved is not None
            if first.outwards:
                if not bool((first.target == POISON).all()):
                    self.faults.append("a slot was written before the copy to it was over")
                first.target.copy_(first.moved)
            elif not torch.equal(first.moved, first.source):
                self.faults.append("a slot was changed before the copy from it was over")
            first.over = True

    def let_device_go_on(self, target: Tensor) -> None:
        """A copy out starts after the work that was queued before it. A copy in from the same slot that this
        work has waited for is over by then, whether or not the host knows."""
        start, stop = target.data_ptr(), target.data_ptr() + target.numel()
        for one in list(self._queues[False]):
            begin = one.source.data_ptr()
            if one.moved is not None and begin < stop and start < begin + one.source.numel():
                self.finish(one)

    def _queue(self, source: Tensor, target: Tensor, *, outwards: bool) -> LateCopy:
        with self.lock:
            self.let_time_pass()
            self.copies["out" if outwards else "in"] += 1
            if self._fail_after is not None and sum(self.copies.values()) >= self._fail_after:
                raise RuntimeError("the device has failed")
            host = target if outwards else source
            address = host.data_ptr()
            if not any(a <= address and address + host.numel() <= a + n for a, n in self.registered.items()):
                self.faults.append("a copy used staging memory that is not registered")
            copy = LateCopy(self, source, target, outwards=outwards)
            self._queues[outwards].append(copy)
            return copy
