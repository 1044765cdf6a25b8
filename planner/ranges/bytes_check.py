"""The checker's own count of bytes, from ranges and pieces (see ``check``)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

from memtrain.planner.ranges.model import DEVICE, Problem, StateClass, Update
from memtrain.planner.ranges.plan import Held, RangePlan

Load = tuple[int, int]
"""Bytes, and in how many copies they travel."""
Loads = dict[str, Load]
"""By place."""


def add(loads: Loads, place: str | None, more: Load) -> None:
    """Bytes and copies to those of ``place``."""
    if place is not None and more[0]:
        size, copies = loads.get(place, (0, 0))
        loads[place] = size + more[0], copies + more[1]


class Bill:
    """What a plan puts where, block by block. Expects decisions without faults."""

    def __init__(self, plan: RangePlan, problem: Problem) -> None:
        self.plan, self.problem, self.machine = plan, problem, problem.machine
        count = len(problem.blocks)
        self.kept = [0] * count
        self.slot = [0] * count
        self.restored = [0] * count
        self.sent: list[dict[str, int]] = [defaultdict(int) for _ in range(count)]
        """Activations by place."""
        self.chunks_sent: list[dict[str, int]] = [defaultdict(int) for _ in range(count)]
        self.recompute_seconds = [0.0] * count
        self.compress_seconds = [0.0] * count
        self.decompress_seconds = [0.0] * count
        self.error = 0.0
        for index in range(count):
            self._activations(index)
        self.hops = {p.name: len(p.hops) for p in self.machine.places}
        self.updates = {u.label: u for u in problem.updates}
        self.moved = sum(self._moved(index) for index in range(count))

    def _activations(self, index: int) -> None:
        tensors = {t.name: t for t in self.problem.blocks[index].classes}
        codecs = {c.name: c for c in self.problem.codecs}
        for part in self.plan.blocks[index].ranges:
            tensor, (kind, *rest) = tensors[part.tensor], part.action.split(":")
            chunks = part.stop - part.start
            plain = chunks * tensor.chunk_bytes
            stored = plain
            if kind.startswith("compress"):
                codec = codecs[rest[0]]
                stored = chunks * math.ceil(tensor.chunk_bytes * codec.ratio)
                self.error += codec.error * plain / max(1, self.problem.saved_bytes)
                self.compress_seconds[index] += plain / codec.compress_bytes_per_second
                self.decompress_seconds[index] += plain / codec.decompress_bytes_per_second
                self.restored[index] += plain
            if kind == "recompute":
                self.restored[index] += plain
                self.recompute_seconds[index] += math.fsum(tensor.recompute_seconds[part.start : part.stop])
            elif kind in ("swap", "compress-swap"):
                self.sent[index][rest[-1]] += stored
                self.chunks_sent[index][rest[-1]] += chunks if stored else 0
                self.slot[index] += stored
            elif kind == "slot":
                self.slot[index] += stored
            else:
                self.kept[index] += stored

    def states(self, index: int) -> list[tuple[Held, StateClass, int]]:
        """What is held of a block's state: (entry, class, bytes)."""
        classes = {s.name: s for s in self.problem.blocks[index].states}
        return [
            (h, classes[h.state], h.pieces * classes[h.state].piece_bytes)
            for h in self.plan.blocks[index].held
        ]

    def held(self, index: int, role: str, place: str | None = None, *, away: bool = False) -> int:
        """Bytes of a role, in one place or (``away``) in all but the device."""
        return sum(
            size
            for h, state, size in self.states(index)
            if state.role.value == role
            and (place is None or h.place == place)
            and not (away and h.place == DEVICE)
        )

    def sent_loads(self, index: int) -> Loads:
        """Activations by place, with their chunks."""
        return {p: (size, self.chunks_sent[index][p]) for p, size in self.sent[index].items() if size}

    def loads(self, index: int, wanted: Callable[[Update, str], bool]) -> Loads:
        """State beside the device whose update and role are ``wanted``."""
        found: Loads = {}
        for h, state, size in self.states(index):
            if h.place != DEVICE and wanted(self.updates[h.update], state.role.value):
                add(found, h.place, (size, h.pieces))
        return found

    def fleeting(self, index: int, *, on_cpu: bool) -> Load:
        """Gradients that an update in backward consumes."""
        block = self.problem.blocks[index]
        each = [s.piece_bytes for s in block.states if s.role.value == "gradient" and s.piece_bytes]
        pieces = sum(
            count
            for label, count in self.plan.blocks[index].updates
            if self.updates[label].on_cpu is on_cpu and not self.updates[label].ahead
        )
        return pieces * sum(each), pieces * len(each)

    def streamed(self, index: int) -> int:
        """State that passes through the device's update slots, and parameters that are made there."""
        return sum(
            size
            for h, _, size in self.states(index)
            if h.place != DEVICE and not self.updates[h.update].on_cpu
        )

    def summed(self, index: int, *, on_cpu: bool) -> int:
        """Gradients to which further micro-batches add, on either side; 0 with one micro-batch."""
        return sum(
            size
            for h, state, size in self.states(index)
            if state.role.value == "gradient"
            and self.updates[h.update].on_cpu is on_cpu
            and self.problem.micro_batches > 1
        )

    def new_parameters(self, index: int) -> Load:
        """Parameters of the device that the CPU updates: they wait in the staging place."""
        found: Loads = {}
        for h, state, size in self.states(index):
            if h.place == DEVICE and state.role.value == "parameter" and self.updates[h.update].on_cpu:
                add(found, DEVICE, (size, h.pieces))
        return found.get(DEVICE, (0, 0))

    def _cpu_rate(self, place: str) -> float:
        """Bytes per second of the CPU in ``place``, or in staging where it cannot address that."""
        own = 0.0 if place == DEVICE else self.machine.place(place).cpu_bytes_per_second
        return own or self.machine.place(self.machine.staging or "").cpu_bytes_per_second

    def update_seconds(self, index: int, update: Update) -> float:
        """An update of a block, on the CPU at the speed of each place."""
        block = self.problem.blocks[index]
        if not update.on_cpu:
            pieces = dict(self.plan.blocks[index].updates)[update.label]
            return block.device_update_seconds * pieces / block.pieces
        total = 0.0 if update.ahead else self.fleeting(index, on_cpu=True)[0] / self._cpu_rate(DEVICE)
        for h, state, size in self.states(index):
            if self.updates[h.update] == update:
                # An optimizer's state is read and written.
                total += (2 if state.role.value == "optimizer" else 1) * size / self._cpu_rate(h.place)
        return total

    def adding_seconds(self, index: int) -> float:
        """The CPU reads new gradients in staging, and reads and writes sums in their places."""
        return sum(
            size / self._cpu_rate(DEVICE) + 2 * size / self._cpu_rate(h.place)
            for h, state, size in self.states(index)
            if state.role.value == "gradient" and self.updates[h.update].on_cpu
        )

    def peak(self, place: str) -> tuple[str, int]:
        """Position and bytes of the most that lies in ``place``."""
        if place != DEVICE:
            return "step", self._in_place(place)
        always, blocks = self._always(), self.problem.blocks
        always += (self.problem.in_flight - 1) * sum(self.kept)
        waiting = [self.held(i, "gradient", DEVICE) for i in range(len(blocks))]
        best = ("", -1)
        for index, block in enumerate(blocks):
            base = always + sum(self.kept[: index + 1])
            left = sum(waiting[index:] if self.problem.micro_batches == 1 else waiting)
            forgotten = left if self._sequential() and self.problem.micro_batches == 1 else 0
            again = self.beside_slot(index) + self.summed(index, on_cpu=False)
            for name, more in (
                ("forward", block.forward_transient_bytes + left - forgotten),
                ("backward", block.backward_transient_bytes + left + again),
            ):
                if base + more > best[1]:
                    best = (f"{name} {block.name}", base + more)
        return best

    def _sequential(self) -> bool:
        """Whether a step ends with all of its updates: the next forward begins without gradients."""
        return all(label.endswith("sequential") for label in self.updates)

    def beside_slot(self, index: int) -> int:
        """Of what backward restores, what the block's slot has no room for; all are of the largest's size."""
        free = max(self.slot) - self.slot[index]
        return max(0, self.restored[index] - free)

    def _always(self) -> int:
        machine, every = self.machine, range(len(self.problem.blocks))
        leaving = (
            self.held(i, "gradient", away=True)
            + self.fleeting(i, on_cpu=True)[0]
            + self.fleeting(i, on_cpu=False)[0]
            for i in every
        )
        return (
            self.problem.reserved_bytes
            + machine.slots * max(self.slot)
            + machine.slots * max(self.held(i, "parameter", away=True) for i in every)
            + 2 * max(leaving)
            + 2 * max(self.streamed(i) for i in every)
            + sum(self.held(i, "parameter", DEVICE) + self.held(i, "optimizer", DEVICE) for i in every)
        )

    def _in_place(self, place: str) -> int:
        every = range(len(self.problem.blocks))
        total = sum(self.problem.in_flight * self.sent[i][place] + self._stored(i, place) for i in every)
        if place != self.machine.staging:
            return total
        far = [p.name for p in self.machine.places if len(p.hops) == 2]
        through = max(
            sum(self.sent[i][p] + self._stored(i, p, roles=("parameter",)) for p in far) for i in every
        )
        staged = max(
            sum(self._stored(i, p) for p in far)
            + self.fleeting(i, on_cpu=True)[0]
            + self.summed(i, on_cpu=True)
            for i in every
        )
        total += self.machine.forwarding_slots * through + 2 * staged
        return total + sum(self.new_parameters(i)[0] for i in every)

    def _stored(
        self, index: int, place: str, roles: tuple[str, ...] = ("parameter", "gradient", "optimizer")
    ) -> int:
        """State of a block that lies in ``place``."""
        return sum(size for h, s, size in self.states(index) if h.place == place and s.role.value in roles)

    def written(self, place: str) -> int:
        """Bytes that one step writes to ``place``."""
        total = 0
        for index in range(len(self.problem.blocks)):
            often = self.sent[index][place] + self._stored(index, place, roles=("gradient",))
            total += self.problem.micro_batches * often
            total += self._stored(index, place, roles=("parameter", "optimizer"))
        return total

    def fetched(self, index: int) -> bool:
        """Whether a backward fetches: it need not where no later pass takes over the block's slot."""
        return self.problem.in_flight > 1 or index + self.machine.slots < len(self.problem.blocks)

    def _moved(self, index: int) -> int:
        """Bytes over all links: out and back, counted at every hop."""
        batches, again = self.problem.micro_batches, self.fetched(index)
        total = sum(batches * (1 + again) * size * self.hops[p] for p, size in self.sent[index].items())
        for held, state, size in self.states(index):
            update = self.updates[held.update]
            hops = self.hops.get(held.place, 0)
            # The CPU works in the staging place: what it reads and writes makes the second hop alone.
            own = max(0, hops - 1) if update.on_cpu else hops
            if state.role.value == "parameter":
                left_there = update.ahead and not update.on_cpu and not update.apart
                passes = batches * again + (batches - 1) + (not left_there)
                total += size * (own + passes * hops)
            elif state.role.value == "optimizer":
                total += size * 2 * own
            else:
                # A sum is read and written; what the CPU adds goes to staging first.
                adding = 1 + 2 * own if update.on_cpu else 2 * own
                total += size * (hops + own + (batches - 1) * (adding if hops else 0))
        return total + self.fleeting(index, on_cpu=True)[0] + self.new_parameters(index)[0]
