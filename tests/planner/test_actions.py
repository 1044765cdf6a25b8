from __future__ import annotations

from typing import Any

import pytest

from memtrain.planner.actions import Action, BlockDecision, Tier


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": -1, "action": Action.KEEP}, "block must be >= 0, got -1"),
        ({"block": 0, "action": Action.SWAP}, "needs saved_tier other than device"),
        ({"block": 0, "action": Action.KEEP, "saved_tier": Tier.NVME}, "stores no saved tensors"),
        ({"block": 0, "action": Action.RECOMPUTE, "saved_tier": Tier.CXL}, "stores no saved tensors"),
        (
            {"block": 0, "action": Action.SWAP, "saved_tier": Tier.NVME, "input_tier": Tier.NVME},
            "input_tier nvme",
        ),
        (
            {"block": 0, "action": Action.RECOMPUTE_NEARLY_FREE, "recomputed_tokens": 8},
            "recompute_nearly_free is for all tokens, yet recomputed_tokens is 8",
        ),
    ],
)
def test_a_contradiction_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockDecision(**fields)


def test_attention_and_input_may_live_on_different_tiers() -> None:
    decision = BlockDecision(
        block=2, action=Action.RECOMPUTE_EXCEPT_ATTENTION, saved_tier=Tier.CXL, input_tier=Tier.NVME
    )
    assert (decision.saved_tier, decision.input_tier) == (Tier.CXL, Tier.NVME)
