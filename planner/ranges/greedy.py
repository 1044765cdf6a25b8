"""Capuchin's order (ASPLOS'20) over chunks: what costs the least time per byte leaves the device first."""

from __future__ import annotations

import heapq

from memtrain.planner.ranges.choices import KEEP, RECOMPUTE, Action, Kind, actions, stored_bytes
from memtrain.planner.ranges.model import Place, Problem, TensorClass

Plan = list[list[dict[Action, int]]]
"""Counts by block, class and action."""

STEPS = 16
"""A class leaves in at most about as many moves; one takes 20 microseconds with 80 blocks."""


class Greedy:
    """Chunks leave their place on the device one by one, the cheapest per byte first."""

    def __init__(self, problem: Problem, slot_bytes: float, room: dict[str, int]) -> None:
        """``slot_bytes`` may leave a block at most; ``room`` has the free bytes of the places to use."""
        self.problem, self.limit, self.free = problem, slot_bytes, dict(room)
        self.plan: Plan = [[{KEEP: t.chunks} for t in b.classes] for b in problem.blocks]
        self.kept = [sum(t.total_bytes for t in b.classes) for b in problem.blocks]
        self.restored = [0] * len(self.kept)
        self.slot = [0] * len(self.kept)
        self.queue: list[float] = [0.0] * len(self.kept)

    def run(self) -> Plan:
        """The plan as soon as the device suffices; empty when nothing is left to move."""
        heap: list[tuple[float, int, int, int, Action]] = []
        for index, block in enumerate(self.problem.blocks):
            for k, tensor in enumerate(block.classes):
                for rank, action in enumerate(actions(self.problem, index, tensor)):
                    if action != KEEP and not action.codec and tensor.chunk_bytes:
                        heap.append((self._cost(index, tensor, action), index, k, rank, action))
        heapq.heapify(heap)
        later: list[tuple[float, int, int, int, Action]] = []
        reached, first = 0, self._overfull()
        while first is not None:
            if first > reached:
                # What stands behind the first overfull position could not help it, and may help this one.
                for entry in later:
                    heapq.heappush(heap, entry)
                later, reached = [], first
            if not heap:
                return []
            cost, index, k, rank, action = heapq.heappop(heap)
            tensor, counts = self.problem.blocks[index].classes[k], self.plan[index][k]
            if index > first:
                later.append((cost, index, k, rank, action))
            elif counts.get(KEEP) and self._room(index, tensor, action):
                now = self._cost(index, tensor, action)
                if now <= cost + 1e-15:
                    for _ in range(max(1, tensor.chunks // STEPS)):
                        if counts.get(KEEP) and self._room(index, tensor, action):
                            self._move(index, tensor, counts, action)
                    first, now = self._overfull(), self._cost(index, tensor, action)
                heapq.heappush(heap, (now, index, k, rank, action))
        return self.plan

    def _overfull(self) -> int | None:
        """The first block at whose forward or backward the device is too small."""
        problem, total = self.problem, self.problem.reserved_bytes
        total += problem.machine.slots * max(self.slot) + (problem.in_flight - 1) * sum(self.kept)
        for index, block in enumerate(problem.blocks):
            total += self.kept[index]
            transient = max(
                block.forward_transient_bytes, block.backward_transient_bytes + self.restored[index]
            )
            if total + transient > problem.machine.device_capacity_bytes:
                return index
        return None

    def _room(self, index: int, tensor: TensorClass, action: Action) -> bool:
        if action.kind is Kind.RECOMPUTE:
            return True
        slot = self.slot[index] + tensor.chunk_bytes <= self.limit
        return slot and (not action.place or self.free.get(action.place, 0) >= tensor.chunk_bytes)

    def _cost(self, index: int, tensor: TensorClass, action: Action) -> float:
        """Seconds per byte of the next chunk."""
        if action.kind is Kind.SLOT:
            return 0.0
        if action.kind is Kind.RECOMPUTE:
            # Chunks before the next one are recomputed already.
            k = self.problem.blocks[index].classes.index(tensor)
            done = self.plan[index][k].get(RECOMPUTE, 0)
            return tensor.recompute_seconds[min(done, tensor.chunks - 1)] / tensor.chunk_bytes
        took = _transfer_seconds(self.problem.machine.place(action.place), tensor.chunk_bytes)
        window = self.problem.blocks[index].forward_seconds
        exposed = max(0.0, self.queue[index] + took - window) - max(0.0, self.queue[index] - window)
        return exposed / tensor.chunk_bytes

    def _move(self, index: int, tensor: TensorClass, counts: dict[Action, int], action: Action) -> None:
        counts[KEEP] -= 1
        counts[action] = counts.get(action, 0) + 1
        self.kept[index] -= tensor.chunk_bytes
        if action.kind is Kind.RECOMPUTE:
            self.restored[index] += tensor.chunk_bytes
            return
        self.slot[index] += stored_bytes(self.problem, tensor, action)
        if action.place:
            self.free[action.place] -= tensor.chunk_bytes
            place = self.problem.machine.place(action.place)
            self.queue[index] += _transfer_seconds(place, tensor.chunk_bytes)


def _transfer_seconds(place: Place, size: int) -> float:
    """Of the slowest copy on the way out."""
    return size / min(hop.write_bytes_per_second for hop in place.hops)
