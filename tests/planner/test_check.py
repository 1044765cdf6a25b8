"""Faults planted in sound plans: each must be found and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from memtrain.planner.actions import Action, BlockDecision, Tier
from memtrain.planner.check import Rule, check
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.machine import Budget
from memtrain.planner.plan import BillLine, Event, Plan
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from tests.planner.toys import (
    make_block,
    make_form,
    make_machine,
    make_nearly_free,
    make_prefixes,
    make_profile,
)

# Five blocks are swapped and a ring has four slots at most: the first block is always read back.
BLOCKS = tuple(make_block(index, recomputable=index != 3) for index in range(7))
PROFILE = make_profile(block_profiles=BLOCKS, trainable=True, micro_batches=2)
MACHINE = make_machine(dram_copy_bytes_per_second=1e10)
BUDGET = Budget(device="1GiB", nvme="/x:1GiB")
FORCE = {
    "block": {"action": "swap"},
    "block.2": {"action": "recompute"},
    "block.6": {"action": "keep"},
    "state": {"gradient_tier": "nvme", "optimizer_tier": "nvme"},
    "state.layers.6": {"gradient_tier": "device", "optimizer_tier": "nvme"},
}


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    options = PlannerOptions(force=FORCE, update_schedule="sequential")
    return make_plan(PROFILE, MACHINE, BUDGET, options=options)


def rules(plan: Plan, budget: Budget = BUDGET) -> set[Rule]:
    return {violation.rule for violation in check(plan, PROFILE, MACHINE, budget)}


def test_a_sound_plan_has_no_violation(plan: Plan) -> None:
    assert rules(plan) == set()


def shifted(plan: Plan, name: str, resource: str, by: float) -> Plan:
    """The first such event moved in time, its length kept."""
    events = list(plan.timeline)
    index = next(i for i, e in enumerate(events) if (e.name, e.resource) == (name, resource))
    old = events[index]
    events[index] = Event(
        name=name,
        resource=resource,
        start_seconds=old.start_seconds + by,
        end_seconds=old.end_seconds + by,
    )
    return replace(plan, timeline=tuple(events))


def without(plan: Plan, name: str) -> Plan:
    return replace(plan, timeline=tuple(e for e in plan.timeline if e.name != name))


def quicker(plan: Plan, name: str) -> Plan:
    events = tuple(
        replace(e, end_seconds=(e.start_seconds + e.end_seconds) / 2) if e.name == name else e
        for e in plan.timeline
    )
    return replace(plan, timeline=events)


def shorter(plan: Plan, name: str, by: float) -> Plan:
    events = tuple(replace(e, end_seconds=e.end_seconds - by) if e.name == name else e for e in plan.timeline)
    return replace(plan, timeline=events)


def again_shorter(plan: Plan, name: str, by: float) -> Plan:
    """Only the last such event."""
    last = max((e for e in plan.timeline if e.name == name), key=lambda e: e.end_seconds)
    events = tuple(replace(e, end_seconds=e.end_seconds - by) if e is last else e for e in plan.timeline)
    return replace(plan, timeline=events)


def decided(plan: Plan, block: int, action: Action, tier: Tier = Tier.DEVICE) -> Plan:
    blocks = list(plan.blocks)
    blocks[block] = BlockDecision(block=block, action=action, saved_tier=tier)
    return replace(plan, blocks=tuple(blocks))


def staged(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, staging=replace(plan.staging, **changes))


def placed(plan: Plan, block: int, by: int) -> Plan:
    """The place of what a block keeps made larger or smaller."""
    places = [size + by * (index == block) for index, size in enumerate(plan.staging.kept_bytes)]
    return staged(plan, kept_bytes=tuple(places))


def billed(plan: Plan, category: str, by: int) -> Plan:
    lines = tuple(
        BillLine(category=x.category, tier=x.tier, size_bytes=x.size_bytes + by * (x.category == category))
        if x.tier is Tier.DEVICE
        else x
        for x in plan.bill
    )
    return replace(plan, bill=lines)


def moved(plan: Plan, source: str, target: str) -> Plan:
    """Sums stay right, lines do not."""
    return billed(billed(plan, source, -4096), target, 4096)


def peaked(plan: Plan, tier: Tier, by: int) -> Plan:
    return replace(plan, peaks=tuple((t, size + by * (t is tier)) for t, size in plan.peaks))


FAULTS: list[tuple[str, Rule, Callable[[Plan], Plan]]] = [
    ("profile", Rule.PROFILE_DIGEST, lambda p: replace(p, profile_digest="0" * 16)),
    ("machine", Rule.MACHINE_DIGEST, lambda p: replace(p, machine_digest="0" * 16)),
    ("micro-batches", Rule.MICRO_BATCHES, lambda p: replace(p, micro_batches=3)),
    ("missing block", Rule.BLOCK_DECIDED_ONCE, lambda p: replace(p, blocks=p.blocks[:-1])),
    ("block twice", Rule.BLOCK_DECIDED_ONCE, lambda p: replace(p, blocks=(p.blocks[0], *p.blocks))),
    ("missing unit", Rule.UNIT_DECIDED_ONCE, lambda p: replace(p, states=p.states[1:])),
    ("tier", Rule.TIER_EXISTS, lambda p: decided(p, 0, Action.SWAP, Tier.CXL)),
    ("recompute", Rule.RECOMPUTABLE, lambda p: decided(p, 3, Action.RECOMPUTE)),
    ("small slot", Rule.STAGING, lambda p: staged(p, saved_slot_bytes=p.staging.saved_slot_bytes - 4096)),
    ("no slot", Rule.STAGING, lambda p: staged(p, saved_slots=0)),
    ("unaligned slot", Rule.STAGING, lambda p: staged(p, saved_slot_bytes=p.staging.saved_slot_bytes + 1)),
    ("two update slots", Rule.STAGING, lambda p: staged(p, update_slots=2)),
    ("no gradient ring", Rule.STAGING, lambda p: staged(p, gradient_slots=0)),
    (
        "small update slot",
        Rule.STAGING,
        lambda p: staged(p, update_slot_bytes=p.staging.update_slot_bytes - 4096),
    ),
    ("no shard", Rule.STAGING, lambda p: staged(p, update_shard_elements=0)),
    ("small kept place", Rule.STAGING, lambda p: placed(p, 6, -4096)),
    ("unaligned kept place", Rule.STAGING, lambda p: placed(p, 6, 1)),
    ("no place for an input", Rule.STAGING, lambda p: placed(p, 2, -p.staging.kept_bytes[2])),
    ("a place that nothing uses", Rule.STAGING, lambda p: placed(p, 0, 4096)),
    ("no kept places", Rule.STAGING, lambda p: staged(p, kept_bytes=())),
    ("one place too few", Rule.STAGING, lambda p: staged(p, kept_bytes=p.staging.kept_bytes[:-1])),
    (
        "small gradient slab",
        Rule.STAGING,
        lambda p: staged(p, gradient_slab_bytes=p.staging.gradient_slab_bytes - 4096),
    ),
    (
        "unaligned gradient slab",
        Rule.STAGING,
        lambda p: staged(p, gradient_slab_bytes=p.staging.gradient_slab_bytes + 1),
    ),
    ("kept slab unbilled", Rule.BILL, lambda p: moved(p, "activations", "transients")),
    ("gradient slab unbilled", Rule.BILL, lambda p: moved(p, "gradients", "transients")),
    ("bill", Rule.BILL, lambda p: billed(p, "transients", 1)),
    ("weights forgotten", Rule.BILL, lambda p: billed(p, "weights", -1)),
    ("device peak", Rule.DEVICE_PEAK, lambda p: peaked(billed(p, "activations", -4096), Tier.DEVICE, -4096)),
    ("tier peak", Rule.TIER_PEAK, lambda p: peaked(p, Tier.NVME, 4096)),
    ("bytes", Rule.BYTES_MOVED, lambda p: replace(p, bytes_moved_per_step=p.bytes_moved_per_step - 4096)),
    ("step", Rule.STEP_SECONDS, lambda p: replace(p, step_seconds=p.step_seconds * 0.9)),
    ("bound", Rule.GAP, lambda p: replace(p, lower_bound_seconds=p.step_seconds * 2)),
    ("gap", Rule.GAP, lambda p: replace(p, gap=0.5)),
    ("status", Rule.GAP, lambda p: replace(p, status="best")),
    ("overlap", Rule.OVERLAP, lambda p: shifted(p, "forward layers.1", "compute", -0.005)),
    ("write early", Rule.DEPENDENCY, lambda p: shifted(p, "write layers.0", "write:nvme", -0.005)),
    ("read early", Rule.DEPENDENCY, lambda p: shifted(p, "read layers.0", "read:nvme", -0.5)),
    ("read late", Rule.DEPENDENCY, lambda p: shifted(p, "read layers.0", "read:nvme", 0.5)),
    ("no read", Rule.DEPENDENCY, lambda p: without(p, "read layers.0")),
    ("no write", Rule.DEPENDENCY, lambda p: without(p, "write layers.0")),
    ("no recompute", Rule.DEPENDENCY, lambda p: without(p, "recompute layers.2")),
    ("no backward", Rule.DEPENDENCY, lambda p: without(p, "backward layers.1")),
    ("late recompute", Rule.DEPENDENCY, lambda p: shifted(p, "recompute layers.2", "compute", 0.05)),
    ("update early", Rule.DEPENDENCY, lambda p: shifted(p, "update layers.0", "compute", -0.2)),
    ("fast forward", Rule.DURATION, lambda p: quicker(p, "forward layers.0")),
    # 10 MiB at 10 GB/s take 1.05 ms and 1 MiB 0.105 ms: what is taken away here is the copy.
    ("kept without a copy", Rule.DURATION, lambda p: shorter(p, "forward layers.6", 0.001)),
    ("input without a copy", Rule.DURATION, lambda p: shorter(p, "forward layers.2", 0.0001)),
    ("gradient without a copy", Rule.DURATION, lambda p: shorter(p, "backward layers.6", 0.0001)),
    # The second micro-batch adds to what stays: 0.157 ms for 1 MiB, and not the 0.105 ms of the copy.
    ("gradient added as if copied", Rule.DURATION, lambda p: again_shorter(p, "backward layers.6", 0.00004)),
    # 1 MiB that leaves is gone over 3 and then 3.5 times: 0.31 ms, then 0.37.
    ("gradient left for nothing", Rule.DURATION, lambda p: shorter(p, "gradient layers.1", 0.0003)),
    ("gradient left unjudged", Rule.DURATION, lambda p: shorter(p, "gradient layers.1", 0.0001)),
    ("gradient not stored", Rule.DEPENDENCY, lambda p: without(p, "gradient layers.1")),
    (
        "gradient written early",
        Rule.DEPENDENCY,
        lambda p: shifted(p, "write gradient layers.1", "write:nvme", -0.0002),
    ),
    ("fast write", Rule.DURATION, lambda p: quicker(p, "write layers.0")),
    ("fast recompute", Rule.DURATION, lambda p: quicker(p, "recompute layers.2")),
    ("fast state", Rule.DURATION, lambda p: quicker(p, "read update layers.1")),
    ("fast gradient", Rule.DURATION, lambda p: quicker(p, "write gradient layers.1")),
    ("no update", Rule.DURATION, lambda p: without(p, "update layers.1")),
]


@pytest.mark.parametrize(("rule", "fault"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_planted_fault_is_named(plan: Plan, rule: Rule, fault: Callable[[Plan], Plan]) -> None:
    assert rule in rules(fault(plan))


PARTLY = make_profile(
    block_profiles=tuple(
        make_block(index, nearly_free=make_nearly_free(), prefixes=make_prefixes()) for index in range(5)
    )
)
PARTS: dict[str, dict[str, str | int | None]] = {
    "block": {"action": "recompute_nearly_free", "saved_tier": "nvme", "input_tier": "nvme"},
    "block.0": {"action": "recompute", "recomputed_tokens": 4, "rest_tier": "nvme"},
    "block.1": {"action": "recompute_except_attention", "attention_tokens": 2, "recomputed_tokens": None},
    "block.2": {"action": "recompute_except_attention", "recomputed_tokens": 6, "attention_tokens": 2},
}


def changed(plan: Plan, block: int, **fields: Any) -> Plan:
    """One block decided otherwise, nothing else changed."""
    blocks = list(plan.blocks)
    blocks[block] = replace(blocks[block], **fields)
    return replace(plan, blocks=tuple(blocks))


PARTLY_FAULTS: list[tuple[str, Rule, Callable[[Plan], Plan]]] = [
    ("a tier for rests", Rule.TIER_EXISTS, lambda p: changed(p, 0, rest_tier=Tier.CXL)),
    ("a prefix not tried", Rule.RECOMPUTABLE, lambda p: changed(p, 0, recomputed_tokens=5)),
    ("attention not tried", Rule.RECOMPUTABLE, lambda p: changed(p, 1, attention_tokens=3)),
    # 1 MiB of input and 4 of outputs on lines of 64 bytes: the ring of 4 and 5 MiB has a page to spare.
    ("small slot", Rule.STAGING, lambda p: staged(p, input_slot_bytes=p.staging.input_slot_bytes - 4096)),
    ("small place", Rule.STAGING, lambda p: placed(p, 0, -4096)),
    ("rests unplaced", Rule.STAGING, lambda p: placed(p, 2, -(2 << 20))),
    ("other rows kept", Rule.STAGING, lambda p: changed(p, 2, recomputed_tokens=4)),
    ("rests unbilled", Rule.TIER_PEAK, lambda p: peaked(p, Tier.NVME, -4096)),
    ("other rows sent", Rule.TIER_PEAK, lambda p: changed(p, 0, recomputed_tokens=2)),
    ("fewer bytes", Rule.BYTES_MOVED, lambda p: changed(p, 0, recomputed_tokens=6)),
    # Nearly free takes 2 ms; the prefixes 5 and 5.25, 1 more for cutting, and 1 (or 0.1) to join.
    ("fast nearly free", Rule.DURATION, lambda p: shorter(p, "recompute layers.4", 0.0001)),
    ("prefix without joining", Rule.DURATION, lambda p: shorter(p, "recompute layers.0", 0.001)),
    ("attention without joining", Rule.DURATION, lambda p: shorter(p, "recompute layers.1", 0.0001)),
    ("rest without a copy", Rule.DURATION, lambda p: shorter(p, "forward layers.0", 0.0005)),
    ("no recompute", Rule.DEPENDENCY, lambda p: without(p, "recompute layers.4")),
    ("no write", Rule.DEPENDENCY, lambda p: without(p, "write layers.0")),
]


@pytest.mark.parametrize(("rule", "fault"), [f[1:] for f in PARTLY_FAULTS], ids=[f[0] for f in PARTLY_FAULTS])
def test_a_fault_in_what_is_partly_computed_again_is_named(
    monkeypatch: pytest.MonkeyPatch, rule: Rule, fault: Callable[[Plan], Plan]
) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    plan = make_plan(PARTLY, MACHINE, BUDGET, options=PlannerOptions(force=PARTS, exact_only=False))
    assert check(plan, PARTLY, MACHINE, BUDGET) == ()
    assert rule in {violation.rule for violation in check(fault(plan), PARTLY, MACHINE, BUDGET)}


INT8 = make_form(name="int8", saved_bytes=2 * MiB, forward_seconds=0.012, error=0.01)
FORMED = make_profile(
    block_profiles=tuple(
        make_block(
            index,
            forms=(make_form(backward_transient_bytes=20 * MiB), INT8),
            missing_forms=(("int4", "zero gradients"),),
        )
        for index in range(5)
    )
)
FORMS: dict[str, dict[str, str | int | None]] = {
    "block": {"action": "keep"},
    "block.0": {"action": "keep", "form": "exact"},
    "block.1": {"action": "swap", "form": "exact"},
    "block.2": {"action": "keep", "form": "int8"},
    "block.4": {"action": "recompute"},
}
FORMED_FAULTS: list[tuple[str, Rule, Callable[[Plan], Plan]]] = [
    ("never measured", Rule.RECOMPUTABLE, lambda p: changed(p, 0, form="int2")),
    ("missing", Rule.RECOMPUTABLE, lambda p: changed(p, 0, form="int4")),
    ("lossy, yet exact_only", Rule.RECOMPUTABLE, lambda p: replace(p, exact_only=True)),
    ("plain in an exact place", Rule.STAGING, lambda p: changed(p, 0, form="plain")),
    ("plain in an exact slot", Rule.STAGING, lambda p: changed(p, 1, form="plain")),
    (
        "transients of another form",
        Rule.DEVICE_PEAK,
        lambda p: changed(changed(p, 0, form="int8"), 1, form="int8"),
    ),
    ("tier of another form", Rule.TIER_PEAK, lambda p: changed(p, 1, form="int8")),
    ("bytes of another form", Rule.BYTES_MOVED, lambda p: changed(p, 1, form="int8")),
    ("backward as the plain one", Rule.DURATION, lambda p: shorter(p, "backward layers.0", 0.002)),
    ("forward as the plain one", Rule.DURATION, lambda p: shorter(p, "forward layers.2", 0.002)),
    ("error forgotten", Rule.ERROR_BUDGET, lambda p: replace(p, error=0.0)),
    ("one more lossy block", Rule.ERROR_BUDGET, lambda p: changed(p, 0, form="int8")),
    ("too lossy", Rule.ERROR_BUDGET, lambda p: replace(p, error_budget=0.0019)),
]


@pytest.mark.parametrize(("rule", "fault"), [f[1:] for f in FORMED_FAULTS], ids=[f[0] for f in FORMED_FAULTS])
def test_a_fault_in_forms_is_named(
    monkeypatch: pytest.MonkeyPatch, rule: Rule, fault: Callable[[Plan], Plan]
) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    options = PlannerOptions(force=FORMS, exact_only=False, allow_lossy=("int8",), error_budget=0.002)
    plan = make_plan(FORMED, MACHINE, BUDGET, options=options)
    assert check(plan, FORMED, MACHINE, BUDGET) == ()
    assert rule in {violation.rule for violation in check(fault(plan), FORMED, MACHINE, BUDGET)}


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("changes", [{"probe_bytes": 64 * MiB}, {"witness_bytes": 4096}])
def test_a_look_at_tokens_that_is_on_no_bill_is_named(
    monkeypatch: pytest.MonkeyPatch, device: str, changes: dict[str, int]
) -> None:
    """The plan is sound but for what its maker did not know: a look that takes more than all else, or rows
    that wait for backward."""
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    host = {} if device == "cpu" else {"host": "64MiB"}  # for the rings
    machine = make_machine(Tier.NVME, *([Tier.HOST] if host else []), device=device)
    budget = Budget(device="1GiB", nvme="/x:1GiB", **host)
    blocks = [
        tuple(
            make_block(i, nearly_free=make_nearly_free(), prefixes=make_prefixes(**given)) for i in range(5)
        )
        for given in ({}, changes)
    ]
    before, after = (make_profile(block_profiles=b) for b in blocks)
    options = PlannerOptions(force=PARTS, exact_only=False)
    for profile in (before, after):
        assert check(make_plan(profile, machine, budget, options=options), profile, machine, budget) == ()
    plan = replace(make_plan(before, machine, budget, options=options), profile_digest=after.digest)
    assert {v.rule for v in check(plan, after, machine, budget)} == {Rule.DEVICE_PEAK}


def test_a_prefix_that_is_not_exact_breaks_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    plan = make_plan(PARTLY, MACHINE, BUDGET, options=PlannerOptions(force=PARTS, exact_only=False))
    found = check(replace(plan, exact_only=True), PARTLY, MACHINE, BUDGET)
    assert [v.rule for v in found] == [Rule.RECOMPUTABLE]
    detail = "block 2 (layers.2): a prefix of 6 tokens is not bit-equal, and the plan says exact_only"
    assert found[0].detail == detail


def test_what_was_never_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    plan = make_plan(PARTLY, MACHINE, BUDGET, options=PlannerOptions(force=PARTS, exact_only=False))
    bare = make_profile(5)
    found = check(replace(plan, profile_digest=bare.digest), bare, MACHINE, BUDGET)
    assert {v.rule for v in found} == {Rule.RECOMPUTABLE}
    assert len(found) == 6  # two blocks nearly free; two with one prefix, one with two


def test_arithmetic_as_quick_in_a_step_as_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    slow = make_machine(dram_copy_bytes_per_second=1e10, arithmetic_slowdown=1.25)
    options = PlannerOptions(force=FORCE, update_schedule="sequential")
    plan = make_plan(PROFILE, slow, BUDGET, options=options)
    assert check(plan, PROFILE, slow, BUDGET) == ()
    # What is taken away is the quarter that each takes longer in a step: what is left is what it takes alone.
    for name, extra in (
        ("forward prologue", 0.001 / 4),
        ("forward layers.6", 0.010 / 4),
        ("loss epilogue", 0.007 / 4),
        ("recompute layers.2", 0.010 / 4),
        ("backward layers.6", 0.020 / 4),
        ("backward prologue", 0.002 / 4),
        ("update layers.1", 0.001 / 4),
    ):
        found = check(shorter(plan, name, extra), PROFILE, slow, BUDGET)
        assert {v.rule for v in found} == {Rule.DURATION}, name
        assert all(v.detail.startswith(name) for v in found), found


def test_slabs_on_a_cuda_device_are_named() -> None:
    cuda, options = make_machine(device="cuda:0"), PlannerOptions(allow=frozenset({Action.KEEP}))
    plan = make_plan(PROFILE, cuda, Budget(device="1GiB"), options=options)
    assert check(plan, PROFILE, cuda, BUDGET) == ()
    slabs: list[dict[str, Any]] = [{"kept_bytes": (0,) * 6 + (4096,)}, {"gradient_slab_bytes": 8 * MiB}]
    for changes in slabs:
        found = {v.rule for v in check(staged(plan, **changes), PROFILE, cuda, BUDGET)}
        assert Rule.STAGING in found


def test_a_smaller_budget_than_planned_for_is_named(plan: Plan) -> None:
    assert Rule.CAPACITY in rules(plan, Budget(device="100MiB", nvme="/x:1GiB"))
    assert Rule.CAPACITY in rules(plan, Budget(device="1GiB", nvme="/x:1MiB"))


def test_a_budget_that_preparing_has_overrun_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    profile = replace(PROFILE, prepare_peak_bytes=BUDGET.device_bytes)
    plan = make_plan(profile, MACHINE, BUDGET)
    assert check(plan, profile, MACHINE, BUDGET) == ()
    later = replace(profile, prepare_peak_bytes=BUDGET.device_bytes + 1)
    found = check(replace(plan, profile_digest=later.digest), later, MACHINE, BUDGET)
    assert [v.rule for v in found] == [Rule.PREPARING]
    assert found[0].detail == "1073741825 bytes, 1 more than the device's budget"


def test_every_rule_has_a_planted_fault() -> None:
    # Planted in test_weight_windows: the third and fourth; in test_vertical: the last.
    others = {Rule.CAPACITY, Rule.PREPARING, Rule.MOVABLE, Rule.WINDOWS, Rule.ORDER}
    assert {f[1] for f in (*FAULTS, *FORMED_FAULTS)} | others == set(Rule)


def test_the_checker_shares_nothing_with_what_makes_plans() -> None:
    import ast
    import importlib.util
    from pathlib import Path

    parts = ("blocks", "peaks", "rules", "staging", "tables", "timeline", "units", "weights")
    checkers = ("check", *(f"check_{part}" for part in parts))
    allowed = {*checkers, "actions", "machine", "plan", "profile", "units"}
    for name in checkers:
        spec = importlib.util.find_spec(f"memtrain.planner.{name}")
        assert spec is not None
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text())
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        ours = {m.rsplit(".", 1)[1] for m in modules if m.startswith("memtrain.")}
        assert ours <= allowed
