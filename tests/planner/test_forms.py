"""Blocks that run in another form than the plain one: what plans make of their bytes, seconds and errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from memtrain.planner.actions import EXACT, PLAIN, Action, BlockDecision, Tier
from memtrain.planner.block_parts import plan_error
from memtrain.planner.check import check
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.machine import Budget
from memtrain.planner.plan import Plan, describe
from memtrain.planner.profile import BlockForm, BlockProfile, ModelProfile
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from tests.planner.toys import make_block, make_form, make_machine, make_profile

pytestmark = pytest.mark.usefixtures("solver_here")
INT8 = make_form(name="int8", saved_bytes=5 * MiB // 2, error=0.01, forward_seconds=0.012)
INT8_ALLOWED = PlannerOptions(exact_only=False, allow_lossy=("int8",), allow=frozenset({Action.KEEP}))
PLAIN_SECONDS = 0.001 + 0.002 + 0.003 + 0.004 + 3 * (0.010 + 0.020)


def formed(*forms: BlockForm, **changes: Any) -> ModelProfile:
    return make_profile(block_profiles=tuple(make_block(i, forms=forms, **changes) for i in range(3)))


def planned(profile: ModelProfile, budget: Budget, options: PlannerOptions | None = None) -> Plan:
    plan = make_plan(profile, make_machine(), budget, options=options)
    assert Plan.from_json(plan.to_json()) == plan
    if plan.status != "infeasible":
        assert check(plan, profile, make_machine(), budget) == ()
    return plan


def test_bytes_and_seconds_are_those_of_the_form() -> None:
    options = PlannerOptions(force={"block": {"action": "keep", "form": "exact"}}, safety_margin=0.0)
    plan = planned(formed(make_form()), Budget(device="1GiB"), options)
    place = 5 * MiB + 4096  # 11 tensors on lines of 64 bytes are less than a page
    assert plan.staging.kept_bytes == (place,) * 3
    # Libraries and weights, three places, and the forward of one block: what it saves and 2 MiB.
    assert plan.peak(Tier.DEVICE) == 120 * MiB + 3 * place + 7 * MiB
    assert plan.step_seconds == pytest.approx(PLAIN_SECONDS + 3 * 0.002)
    assert plan.action_counts() == {"keep in exact form": 3}


def test_what_is_swapped_is_what_the_form_saves() -> None:
    options = PlannerOptions(force={"block": {"action": "swap", "form": "exact"}})
    plan = planned(formed(make_form()), Budget(device="1GiB", nvme="/x:1GiB"), options)
    assert plan.staging.saved_slot_bytes == 5 * MiB + 4096
    # Of each pair one way: what is still in one of the slots at the turn is not read.
    assert plan.bytes_moved_per_step == (2 * 3 - plan.staging.saved_slots) * 5 * MiB
    assert plan.action_counts() == {"swap to nvme in exact form": 3}


def test_an_exact_form_wins_over_recompute_where_it_is_faster() -> None:
    """Keeping all needs 120 + 30 + 12 MiB; 160 MiB leave room once one block saves 5 MiB less."""
    budget = Budget(device="160MiB")
    plan = planned(formed(make_form()), budget)
    assert plan.action_counts() == {"keep": 2, "keep in exact form": 1}
    assert (plan.status, plan.step_seconds) == ("optimal", pytest.approx(PLAIN_SECONDS + 0.002))
    without = planned(formed(), budget)
    assert without.step_seconds == pytest.approx(PLAIN_SECONDS + 0.010 - 0.004)  # all but attention again
    slow = planned(formed(make_form(backward_seconds=0.030)), budget)
    assert slow.step_seconds == without.step_seconds


def test_lossy_forms_are_closed_unless_named() -> None:
    tight = Budget(device="136MiB")
    keep = PlannerOptions(allow=frozenset({Action.KEEP}))
    assert planned(formed(make_form(), INT8), tight, keep).status == "infeasible"
    plan = planned(formed(make_form(), INT8), tight, INT8_ALLOWED)
    assert plan.action_counts() == {"keep in int8 form": 3}
    assert (plan.error, plan.error_budget, plan.exact_only) == (0.01, None, False)


def test_errors_count_by_plain_bytes_and_are_limited() -> None:
    profile = formed(make_form(), INT8)
    budget = Budget(device="143MiB")  # exact everywhere needs 142 MiB and the margin of 2.1
    options = replace(INT8_ALLOWED, error_budget=0.01 / 3)
    plan = planned(profile, budget, options)
    assert plan.action_counts() == {"keep in exact form": 2, "keep in int8 form": 1}
    assert (plan.error, plan.error_budget) == (0.003333333, 0.003333333)
    blocks = [make_block(saved_bytes=MiB, attention_bytes=0), make_block(saved_bytes=3 * MiB, forms=(INT8,))]
    decisions = [
        BlockDecision(block=0, action=Action.KEEP),
        BlockDecision(block=1, action=Action.KEEP, form="int8"),
    ]
    assert plan_error(blocks, decisions) == pytest.approx(0.75 * 0.01)


def test_an_error_budget_that_stands_in_the_way_is_named() -> None:
    options = replace(INT8_ALLOWED, error_budget=0.0034)
    plan = planned(formed(make_form(), INT8), Budget(device="136MiB"), options)
    assert plan.status == "infeasible"
    assert plan.error <= 0.0034
    assert "error_budget 0.01 instead of 0.0034" in plan.remedies


def test_a_wish_for_an_action_is_one_for_the_plain_form() -> None:
    options = PlannerOptions(force={"block": {"action": "keep"}})
    plan = planned(formed(make_form()), Budget(device="1GiB"), options)
    assert {decision.form for decision in plan.blocks} == {PLAIN}


def test_a_form_may_be_closed() -> None:
    options = PlannerOptions(force={"block": {"form": "plain"}})
    plan = planned(formed(make_form()), Budget(device="160MiB"), options)
    assert {decision.form for decision in plan.blocks} == {PLAIN}


@pytest.mark.parametrize(
    ("changes", "force", "message"),
    [
        ({}, {"form": "int8"}, "its forms are plain, exact"),
        ({}, {"action": "recompute", "form": "exact"}, "form exact is only for keep and swap"),
        (
            {"missing_forms": (("int8", "no layer was found"),)},
            {"action": "keep", "form": "int8"},
            "it has no form int8: no layer was found",
        ),
        ({"forms": (INT8,)}, {"form": "int8"}, "form int8 is lossy: name it in allow_lossy"),
    ],
)
def test_a_form_that_cannot_be_had_is_named(
    changes: dict[str, Any], force: dict[str, Any], message: str
) -> None:
    profile = make_profile(block_profiles=(make_block(**({"forms": (make_form(),)} | changes)),))
    with pytest.raises(ValueError, match=message):
        make_plan(
            profile, make_machine(), Budget(device="1GiB"), options=PlannerOptions(force={"block": force})
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow_lossy": ("int8",)}, "allow_lossy names int8, but exact_only is on"),
        ({"error_budget": 0.1}, "name them in allow_lossy"),
        (
            {"exact_only": False, "allow_lossy": ("int8",), "error_budget": -1.0},
            "error_budget must be finite and at least 0, got -1.0",
        ),
        ({"force": {"block": {"form": 3}}}, "has form 3; it must be the name of one"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlannerOptions(**options)


def test_a_lossy_form_that_nobody_looked_into_is_an_error() -> None:
    with pytest.raises(ValueError, match="allow_lossy names 'int8', but the profile of toy knows exact"):
        make_plan(formed(make_form()), make_machine(), Budget(device="1GiB"), options=INT8_ALLOWED)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_form(name=PLAIN), "a form beside the plain one needs a name of its own"),
        (lambda: make_form(error=float("inf")), "form exact: error must be finite"),
        (lambda: make_form(saved_bytes=-1), "BlockForm.saved_bytes must be >= 0"),
        (lambda: make_block(forms=(make_form(), make_form())), "name one of them twice"),
        (
            lambda: BlockDecision(block=2, action=Action.RECOMPUTE, form=EXACT),
            "block 2: action recompute computes the plain form again, yet form is 'exact'",
        ),
    ],
)
def test_records_check_themselves(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_profile_with_forms_comes_back() -> None:
    profile = formed(make_form(), INT8, missing_forms=(("int4", "why not"),))
    assert ModelProfile.from_json(profile.to_json()) == profile
    slow = profile.in_a_step(2.0).blocks[0].forms[1]
    assert (slow.forward_seconds, slow.error) == (0.024, 0.01)
    assert isinstance(profile.blocks[0].in_form(PLAIN), BlockProfile)
    with pytest.raises(KeyError, match="has no form 'int4'"):
        profile.blocks[0].in_form("int4")


def test_in_words() -> None:
    swap = BlockDecision(block=0, action=Action.SWAP, saved_tier=Tier.NVME, form="int8")
    assert describe(swap) == "swap to nvme in int8 form"
