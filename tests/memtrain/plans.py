"""What plans are made to do in tests; and a plan and a summary with numbers to be found again by hand."""

from __future__ import annotations

from memtrain.planner.actions import Action, BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.plan import BillLine, Plan, Staging
from memtrain.report import Phase, Summary

GIB = 1 << 30
WHOLE = {"recomputed_tokens": None, "attention_tokens": 0}
"""Of blocks: no prefix of the tokens. Prefixes take most of a profile's time, and have tests of their own."""
AWAY: dict[str, dict[str, str | int | None]] = {
    "block": WHOLE,
    "state": {"weight_tier": "nvme", "gradient_tier": "nvme", "optimizer_tier": "nvme"},
}
"""What the planner is made to send to the disk: all that outlives a pass."""


def feasible_plan() -> Plan:
    return Plan(
        status="gap",
        blocks=(
            BlockDecision(block=0, action=Action.SWAP, saved_tier=Tier.NVME),
            BlockDecision(block=1, action=Action.SWAP, saved_tier=Tier.NVME),
            BlockDecision(block=2, action=Action.KEEP),
        ),
        states=(
            StateDecision(unit="a", gradient_tier=Tier.NVME, optimizer_tier=Tier.NVME),
            StateDecision(unit="b"),
        ),
        staging=Staging(),
        update_schedule=UpdateSchedule.AHEAD,
        micro_batches=2,
        step_seconds=4.0,
        lower_bound_seconds=3.8,
        gap=0.05,
        solver="highs",
        bill=(
            BillLine(category="weights", tier=Tier.DEVICE, size_bytes=GIB // 4),
            BillLine(category="weights", tier=Tier.DEVICE, size_bytes=GIB // 4),
            BillLine(category="optimizer state", tier=Tier.NVME, size_bytes=3 * GIB),
        ),
        peaks=((Tier.DEVICE, GIB), (Tier.NVME, 3 * GIB)),
        capacities=((Tier.DEVICE, 5 * GIB // 4), (Tier.NVME, 8 * GIB)),
        bytes_moved_per_step=6 * GIB,
    )


def infeasible_plan() -> Plan:
    return Plan(
        status="infeasible",
        blocks=(),
        states=(),
        staging=Staging(),
        update_schedule=UpdateSchedule.SEQUENTIAL,
        micro_batches=1,
        step_seconds=0.0,
        lower_bound_seconds=0.0,
        gap=0.0,
        solver="none",
        bill=(),
        peaks=(),
        capacities=((Tier.DEVICE, GIB),),
        bytes_moved_per_step=0,
        shortfall_bytes=((Tier.DEVICE, 123_456_789),),
        remedies=("device=1.12GiB", "nvme of 2 GiB"),
    )


def summary() -> Summary:
    return Summary(
        name="<run> & co",
        device="cpu",
        steps=3,
        budget_bytes=5 * GIB // 4,
        predicted_peak_bytes=GIB,
        measured_peak_bytes=8 * GIB // 7,
        process_peak_bytes=6 * GIB // 5,
        predicted_optimizer_bytes=1_200,
        measured_optimizer_bytes=1_000,
        predicted_step_seconds=4.0,
        measured_step_seconds=5.0,
        tokens_per_second=409.6,
        heldout_loss_before=2.5,
        heldout_loss_after=2.25,
        checkpoint="runs/x/checkpoint/step-000003",
        phases=(Phase(name="load", start_seconds=0.0, end_seconds=1.0),),
    )
