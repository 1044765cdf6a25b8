"""The checker's own count of bytes, from ranges and pieces (see ``check``)."""

from __future__ import annotations

import math
from collections import defaultdict

from memtrain.planner.ranges.model import DEVICE, Problem, StateClass
from memtrain.planner.ranges.plan import Held, RangePlan


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

    def fleeting(self, index: int, *, on_cpu: bool) -> int:
        """Gradients that an update in backward consumes."""
        block = self.problem.blocks[index]
        each = sum(s.piece_bytes for s in block.states if s.role.value == "gradient")
        return sum(
            count * each
            for label, count in self.plan.blocks[index].updates
            if self.updates[label].on_cpu is on_cpu and not self.updates[label].ahead
        )

    def streamed(self, index: int) -> int:
        """State that passes through the device's update slots."""
        return sum(
            size
            for h, state, size in self.states(index)
            if h.place != DEVICE and state.role.value != "parameter" and not self.updates[h.update].on_cpu
        )

    def new_parameters(self, index: int) -> int:
        """Parameters of the device that the CPU updates: they wait in the staging place."""
        return sum(
            size
            for h, state, size in self.states(index)
            if h.place == DEVICE and state.role.value == "parameter" and self.updates[h.update].on_cpu
        )

    def peak(self, place: str) -> tuple[str, int]:
        """Position and bytes of the most that lies in ``place``."""
        if place != DEVICE:
            return "step", self._in_place(place)
        always, blocks = self._always(), self.problem.blocks
        waiting = [self.held(i, "gradient", DEVICE) for i in range(len(blocks))]
        best = ("", -1)
        for index, block in enumerate(blocks):
            base = always + sum(self.kept[: index + 1]) + sum(waiting[index:])
            for name, more in (
                ("forward", block.forward_transient_bytes),
                ("backward", block.backward_transient_bytes + self.restored[index]),
            ):
                if base + more > best[1]:
                    best = (f"{name} {block.name}", base + more)
        return best

    def _always(self) -> int:
        machine, every = self.machine, range(len(self.problem.blocks))
        leaving = (
            self.held(i, "gradient", away=True)
            + self.fleeting(i, on_cpu=True)
            + self.fleeting(i, on_cpu=False)
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
        total = sum(self.written_by(i, place) for i in every)
        if place != self.machine.staging:
            return total
        far = [p.name for p in self.machine.places if len(p.hops) == 2]
        through = max(sum(self.sent[i][p] for p in far) for i in every)
        staged = max(
            sum(size for h, _, size in self.states(i) if h.place in far) + self.fleeting(i, on_cpu=True)
            for i in every
        )
        total += self.machine.forwarding_slots * through + 2 * staged
        return total + sum(self.new_parameters(i) for i in every)

    def written_by(self, index: int, place: str) -> int:
        """Bytes of a block that come to lie in ``place``."""
        return self.sent[index][place] + sum(size for h, _, size in self.states(index) if h.place == place)

    def written(self, place: str) -> int:
        """Bytes that one step writes to ``place``."""
        return sum(self.written_by(i, place) for i in range(len(self.problem.blocks)))

    def _moved(self, index: int) -> int:
        """Bytes over all links: out and back, counted at every hop."""
        again = index + self.machine.slots < len(self.problem.blocks)
        total = sum((1 + again) * size * self.hops[p] for p, size in self.sent[index].items())
        for held, state, size in self.states(index):
            update = self.updates[held.update]
            hops = self.hops.get(held.place, 0)
            # The CPU works in the staging place: what it reads and writes makes the second hop alone.
            own = max(0, hops - 1) if update.on_cpu else hops
            if state.role.value == "parameter":
                fetched = again + (update.on_cpu or not update.ahead)
                total += size * (own + fetched * hops)
            elif state.role.value == "optimizer":
                total += size * 2 * own
            else:
                total += size * (hops + own)
        return total + self.fleeting(index, on_cpu=True) + self.new_parameters(index)
