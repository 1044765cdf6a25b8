"""A tier whose transfers are as late as they may be, and plans that are made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memtrain.offload.device import CpuDevice
from memtrain.planner.actions import BlockDecision, Tier, UpdateSchedule
from memtrain.planner.plan import Plan, Staging


class LatestTicket:
    """Moves its bytes at the latest moment that the contract allows: when somebody waits."""

    def __init__(self, move: Callable[[], None]) -> None:
        self._move: Callable[[], None] | None = move

    def done(self) -> bool:
        return self._move is None

    def wait(self) -> None:
        move, self._move = self._move, None
        if move is not None:
            move()


class LatestStore:
    """A tier whose transfers happen as late as possible, so that reuse without a wait corrupts."""

    def __init__(self, tier: Tier = Tier.NVME) -> None:
        self.tier = tier
        self.live: dict[int, dict[str, Any]] = {}
        self.reads = 0
        self.writes = 0

    def allocate(self, name: str, nbytes: int) -> dict[str, Any]:
        extent = {"name": name, "nbytes": nbytes, "bytes": None, "write": None}
        self.live[id(extent)] = extent
        return extent

    def write(self, extent: dict[str, Any], buffer: torch.Tensor) -> LatestTicket:
        assert buffer.numel() == extent["nbytes"]
        self.writes += 1
        extent["write"] = LatestTicket(lambda: extent.__setitem__("bytes", buffer.clone()))
        return extent["write"]

    def read(self, extent: dict[str, Any], buffer: torch.Tensor) -> LatestTicket:
        self.reads += 1
        buffer.fill_(0xA5)

        def move() -> None:
            extent["write"].wait()
            buffer.copy_(extent["bytes"])

        return LatestTicket(move)

    def free(self, extent: dict[str, Any]) -> None:
        del self.live[id(extent)]


class LatestEngine:
    def __init__(self) -> None:
        self.device = CpuDevice()
        self.nvme = LatestStore()
        self._others = {tier: LatestStore(tier) for tier in (Tier.HOST, Tier.CXL)}

    def store(self, tier: Tier) -> LatestStore:
        return self.nvme if tier is Tier.NVME else self._others[tier]

    @property
    def live_bytes(self) -> int:
        """Of all extents that exist."""
        return sum(
            extent["nbytes"]
            for store in (self.nvme, *self._others.values())
            for extent in store.live.values()
        )


def make_plan(
    decisions: list[BlockDecision], slots: int = 2, slot_bytes: int = 1 << 20, *, exact_only: bool = False
) -> Plan:
    return Plan(
        status="heuristic", blocks=tuple(decisions), states=(), update_schedule=UpdateSchedule.SEQUENTIAL,
        staging=Staging(
            saved_slots=slots, saved_slot_bytes=slot_bytes, input_slots=slots, input_slot_bytes=slot_bytes,
            kept_bytes=(slot_bytes,) * len(decisions),
        ),
        micro_batches=1, step_seconds=0.0, lower_bound_seconds=0.0, gap=0.0, solver="hand", bill=(), peaks=(),
        capacities=(), bytes_moved_per_step=0, exact_only=exact_only,
    )  # fmt: skip
