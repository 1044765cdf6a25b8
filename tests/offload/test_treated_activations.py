"""Blocks whose activations are already treated by memtrain.optim, under every action of a plan."""

from __future__ import annotations

import pytest
from torch import nn

from memtrain.optim.autograd import apply_to
from memtrain.planner.actions import Action, BlockDecision, Tier
from tests.offload.test_token_ranges import assert_equal, compare
from tests.offload.token_models import DEPTH, batches, llama


def treated() -> nn.Module:
    model = llama()
    apply_to(model, example=lambda: model(batches(1, 8)[0]))
    return model


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("action", "saved"),
    [
        (Action.KEEP, Tier.DEVICE),
        (Action.SWAP, Tier.NVME),
        (Action.RECOMPUTE, Tier.DEVICE),
        (Action.RECOMPUTE_EXCEPT_ATTENTION, Tier.NVME),
        (Action.RECOMPUTE_NEARLY_FREE, Tier.DEVICE),
    ],
)
def test_bit_equal(action: Action, saved: Tier, autocast: bool, late: bool) -> None:
    decisions = [BlockDecision(block=b, action=action, saved_tier=saved) for b in range(DEPTH)]
    data = [batches(2, 33)[0], batches(1, 20)[0]]
    plain, planned, _ = compare(treated, decisions, data, late=late, autocast=autocast)
    assert_equal(plain, planned)
