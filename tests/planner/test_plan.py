from __future__ import annotations

import json

import pytest

from memtrain.planner.machine import Budget
from memtrain.planner.plan import Plan
from memtrain.planner.solve import make_plan
from tests.planner.toys import make_machine, make_profile

pytestmark = pytest.mark.usefixtures("solver_here")
BUDGET = Budget(device="150MiB", nvme="/x:1GiB")


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
    document["plan"]["version"] = 12
    with pytest.raises(ValueError, match="plan version 12"):
        Plan.from_json(json.dumps(document))


def test_words_for_people() -> None:
    plan = a_plan()
    assert sum(plan.action_counts().values()) == 3
    assert plan.state("layers.1").unit == "layers.1"
    with pytest.raises(KeyError, match=r"no unit 'layers\.9'"):
        plan.state("layers.9")
