"""What options rule out for every block is known before anything is measured, and nothing else is."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from memtrain.planner.actions import EXACT, PLAIN, Action, Tier
from memtrain.planner.block_choices import (
    RULED_OUT,
    block_choices,
    may_be_nearly_free,
    may_cut,
    may_take_forms,
)
from memtrain.planner.block_parts import is_cut
from memtrain.planner.machine import Budget
from memtrain.planner.options import PlannerOptions
from memtrain.planner.solve import make_plan
from tests.planner.toys import (
    make_block,
    make_form,
    make_machine,
    make_nearly_free,
    make_prefixes,
    make_profile,
)

WISHES: list[dict[str, Any]] = [
    {},
    {"saved_tier": "nvme"},
    {"recomputed_tokens": None},
    {"recomputed_tokens": None, "attention_tokens": 0},
    {"attention_tokens": 0},
    {"attention_tokens": 2},
    {"recomputed_tokens": 4},
    {"form": EXACT},
    {"form": PLAIN},
    *({"action": action.value} for action in Action),
    {"action": "keep", "form": EXACT},
    {"action": "swap", "form": EXACT},
    {"action": "recompute", "recomputed_tokens": 4},
    {"action": "recompute", "recomputed_tokens": None},
    {"action": "recompute_except_attention", "attention_tokens": 2},
    {"action": "recompute_except_attention", "recomputed_tokens": None, "attention_tokens": 0},
]
ALLOWED = [
    frozenset(Action),
    frozenset({Action.KEEP}),
    frozenset({Action.SWAP, Action.RECOMPUTE_NEARLY_FREE}),
    frozenset({Action.RECOMPUTE}),
    frozenset({Action.RECOMPUTE_EXCEPT_ATTENTION}),
]


def found(options: PlannerOptions) -> tuple[bool, bool, bool]:
    return may_cut(options), may_be_nearly_free(options), may_take_forms(options)


@pytest.mark.parametrize(
    "own", [None, {}, {"action": "keep"}], ids=["all alike", "one as it likes", "one kept"]
)
def test_what_a_block_can_choose_is_never_ruled_out(own: dict[str, Any] | None) -> None:
    seen = [False, False, False]
    for wanted, allow in product(WISHES, ALLOWED):
        force = {"block": wanted} if own is None else {"block": wanted, "block.1": own}
        options = PlannerOptions(force=force, allow=allow, exact_only=False)
        every = [choice for index in range(2) for choice in choices(index, options)]
        chosen = (
            any(is_cut(choice) for choice in every),
            any(choice.action is Action.RECOMPUTE_NEARLY_FREE for choice in every),
            any(choice.form != PLAIN for choice in every),
        )
        pairs = list(zip(chosen, found(options), strict=True))
        assert all(may or not can for can, may in pairs), (wanted, allow)
        seen = [before or can for before, can in zip(seen, chosen, strict=True)]
    assert all(seen)


@pytest.mark.parametrize(
    ("force", "expected"),
    [
        ({}, (True, True, True)),
        ({"block": {"recomputed_tokens": None, "attention_tokens": 0}}, (False, True, True)),
        ({"block": {"action": "keep"}}, (False, False, False)),
        ({"block": {"action": "swap", "form": EXACT}}, (False, False, True)),
        ({"block": {"action": "recompute"}}, (False, False, False)),
        ({"block": {"action": "recompute", "recomputed_tokens": 4}}, (True, False, False)),
        ({"block": {"action": "recompute_nearly_free"}}, (False, True, False)),
        ({"block": {"action": "keep"}, "block.1": {}}, (True, True, True)),
    ],
)
def test_what_is_ruled_out(force: dict[str, dict[str, Any]], expected: tuple[bool, bool, bool]) -> None:
    assert found(PlannerOptions(force=force)) == expected


def test_actions_that_are_not_allowed_rule_out() -> None:
    assert found(PlannerOptions(allow=frozenset({Action.KEEP}))) == (False, False, True)
    assert found(PlannerOptions(allow=frozenset({Action.RECOMPUTE}))) == (True, False, False)


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize(
    ("told", "measured"),
    [
        (True, {"prefix_reason": RULED_OUT, "nearly_free": make_nearly_free()}),
        (True, {"prefix_reason": "too few tokens"}),
        (False, {"prefix_reason": "too few tokens", "nearly_free": make_nearly_free()}),
        (False, {"prefix_reason": "too few tokens", "recomputable": False}),
    ],
)
def test_a_budget_that_nothing_measured_fits_is_told_of_what_was_not(
    told: bool, measured: dict[str, Any]
) -> None:
    profile = make_profile(block_profiles=tuple(make_block(i, **measured) for i in range(3)))
    options = PlannerOptions(force={"block": {"action": "keep"}})
    plan = make_plan(profile, make_machine(), Budget(device=64 << 20), options=options)
    assert plan.status == "infeasible"
    assert told is any("was not measured, and may fit" in remedy for remedy in plan.remedies)


def choices(index: int, options: PlannerOptions) -> Any:
    """Of a block that can do everything; nothing where that is refused."""
    block = make_block(
        index,
        attention_bytes=1 << 20,
        attention_seconds=0.001,
        nearly_free=make_nearly_free(),
        prefixes=make_prefixes(),
        forms=(make_form(),),
    )
    try:
        return block_choices(index, block, (Tier.NVME,), options)
    except ValueError:
        return ()
