from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from memtrain.planner.actions import Action, BlockDecision, Tier
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.machine import Budget
from memtrain.planner.plan import Plan, describe
from memtrain.planner.solve import make_plan
from tests.planner.toys import make_machine, make_profile

pytestmark = pytest.mark.usefixtures("solver_here")
BUDGET = Budget(device="150MiB", nvme="/x:1GiB")
INPUT_AWAY = {"input_tier": Tier.NVME}


def a_plan() -> Plan:
    return make_plan(make_profile(3, trainable=True), make_machine(), BUDGET)


def test_same_inputs_same_bytes_and_round_trip() -> None:
    plan = a_plan()
    assert a_plan().digest == plan.digest
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert json.loads(plan.to_json())["plan"] == json.loads(again.to_json())["plan"]


def test_an_edited_plan_is_refused() -> None:
    document = json.loads(a_plan().to_json())
    document["plan"]["step_seconds"] += 1
    with pytest.raises(ValueError, match="edited or damaged"):
        Plan.from_json(json.dumps(document))
    del document["plan"]["staging"]
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json(json.dumps(document))
    document["plan"]["version"] = 3
    with pytest.raises(ValueError, match="plan version 3, this memtrain reads 9"):
        Plan.from_json(json.dumps(document))


@pytest.mark.parametrize("exact_only", [False, True])
@pytest.mark.parametrize("device", ["1GiB", "1MiB"])
def test_a_promise_of_exactness_is_written_down(exact_only: bool, device: str) -> None:
    budget, options = Budget(device=device, nvme="/x:1GiB"), PlannerOptions(exact_only=exact_only)
    plan = make_plan(make_profile(3, trainable=True), make_machine(), budget, options=options)
    assert (plan.status == "infeasible") == (device == "1MiB")
    assert plan.exact_only is exact_only
    assert Plan.from_json(plan.to_json()).exact_only is exact_only
    assert replace(plan, exact_only=not exact_only).digest != plan.digest


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {
                "action": Action.RECOMPUTE,
                "recomputed_tokens": 4,
                "rest_tier": Tier.NVME,
                "input_tier": Tier.NVME,
            },
            "recompute 4 tokens, the others on nvme (input to nvme)",
        ),
        (
            {"action": Action.RECOMPUTE_EXCEPT_ATTENTION, "attention_tokens": 2},
            "recompute, attention outputs after 2 tokens on device",
        ),
        (
            {"action": Action.RECOMPUTE_NEARLY_FREE, "saved_tier": Tier.NVME},
            "recompute from outputs of products on nvme",
        ),
    ],
)
def test_what_is_computed_again_in_part_in_words_and_back(fields: dict[str, Any], words: str) -> None:
    decision = BlockDecision(block=0, **fields)
    assert describe(decision) == words
    plan = replace(a_plan(), blocks=(decision,))
    assert Plan.from_json(plan.to_json()).blocks == (decision,)


def test_words_for_people() -> None:
    plan = a_plan()
    assert sum(plan.action_counts().values()) == 3
    assert plan.state("layers.1").unit == "layers.1"
    with pytest.raises(KeyError, match=r"no unit 'layers\.9'"):
        plan.state("layers.9")
