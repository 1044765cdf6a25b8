"""Runs whose masters keep what a bf16 weight does not hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from memtrain.planner.actions import Tier
from tests.offload.optimizer_runs import AHEAD, OPTIMIZERS
from tests.offload.snapshot_runs import open_run
from tests.offload.training import STAGING, make_plan

LARGE = {"embed.weight", "first.weight", "second.weight", "unused"}
FUSED = OPTIMIZERS["adamw fused"]
PLANS = {
    "host": make_plan(),
    "ahead": make_plan(AHEAD),
    "device": make_plan(gradient_tier=Tier.DEVICE, optimizer_tier=Tier.DEVICE),
    "state away": make_plan(gradient_tier=Tier.DEVICE),
    "gradients away": make_plan(optimizer_tier=Tier.DEVICE),
    "small shards": make_plan(AHEAD, staging=replace(STAGING, update_shard_elements=9_000)),
}


def fused_run(plan: Any = None, **config: Any) -> Any:
    return open_run(plan, torch.bfloat16, FUSED, master_weights=True, **config)
