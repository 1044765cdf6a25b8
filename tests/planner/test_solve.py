"""The plan against brute force, against figures worked out by hand, and in the directions it must move."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtrain.planner.actions import Action, Tier, UpdateSchedule
from memtrain.planner.baselines import Search
from memtrain.planner.check import Rule, check
from memtrain.planner.decisions import PlannerOptions, open_space
from memtrain.planner.infeasible import overrun
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Plan
from memtrain.planner.profile import BlockProfile, ModelProfile, UnitProfile
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from memtrain.planner.weight_windows import DEFAULT_WINDOWS, WANTED_WINDOWS
from tests.planner.toys import (
    make_block,
    make_form,
    make_machine,
    make_nearly_free,
    make_prefixes,
    make_profile,
)

ROOT = Path(__file__).resolve().parents[2]
EXACT = PlannerOptions(safety_margin=0.0)


def brute_force(profile: ModelProfile, machine: Machine, budget: Budget, options: PlannerOptions) -> float:
    """The least seconds over every action, tier, ring size, shard and schedule; inf when nothing fits."""
    profile = profile.in_a_step(machine.arithmetic_slowdown)
    space = open_space(profile, machine, budget, options)
    search = Search(profile=profile, machine=machine, budget=budget, options=options, space=space)
    rings = range(1, max(1, len(space.tiers)) * len(profile.blocks) + 1)
    windows = WANTED_WINDOWS if any(len(tiers) > 1 for tiers in space.weights) else (DEFAULT_WINDOWS,)
    for schedule, blocks, states, weights, saved, moved, slots, shard in itertools.product(
        space.schedules,
        itertools.product(*space.blocks),
        itertools.product(*space.states),
        itertools.product(*space.weights),
        rings,
        rings,
        windows,
        space.shards,
    ):
        placed = tuple(replace(d, weight_tier=t) for d, t in zip(states, weights, strict=True))
        search.offer(search.build(blocks, placed, (saved, moved, slots, shard, schedule)))
    return search.best_cost.step_seconds


SLOW = {"read_bytes_per_second": 500 * MiB, "write_bytes_per_second": 250 * MiB}


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize(
    ("blocks", "trainable", "micro_batches", "device", "nvme", "link"),
    [
        (3, False, 1, 145, 100, {}),
        (3, False, 2, 150, 100, SLOW | {"mixed_bytes_per_second": 300 * MiB}),
        (3, False, 1, 152, 15, SLOW | {"mixed_bytes_per_second": 750 * MiB, "latency_seconds": 1e-3}),
        (1, True, 2, 146, 100, SLOW | {"mixed_bytes_per_second": 400 * MiB, "cpu_seconds_per_byte": 2e-10}),
        (2, True, 1, 156, 30, {"mixed_bytes_per_second": 1024 * MiB}),
    ],
)
def test_nothing_beats_the_plan_and_nothing_is_below_the_bound(
    blocks: int, trainable: bool, micro_batches: int, device: int, nvme: int, link: dict[str, Any]
) -> None:
    profile = make_profile(blocks, trainable=trainable, micro_batches=micro_batches)
    machine, budget = make_machine(**link), Budget(device=device * MiB, nvme=f"/x:{nvme}MiB")
    allow = frozenset(Action) if not trainable else frozenset({Action.KEEP, Action.SWAP, Action.RECOMPUTE})
    options = PlannerOptions(allow=allow)
    best = brute_force(profile, machine, budget, options)
    plan = make_plan(profile, machine, budget, options=options)
    assert best < math.inf
    assert plan.step_seconds <= best * (1 + options.gap)
    assert plan.lower_bound_seconds <= best + 1e-9
    assert check(plan, profile, machine, budget) == ()


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize(
    ("blocks", "device", "nvme", "actions"),
    [
        # Prefixes of one block, for it cannot mix with others; attention's square is most of its forward.
        (1, 149, 100, {Action.KEEP, Action.RECOMPUTE}),
        (1, 144, 4, {Action.RECOMPUTE, Action.RECOMPUTE_EXCEPT_ATTENTION}),
        (2, 152, 100, {Action.KEEP, Action.SWAP, Action.RECOMPUTE_NEARLY_FREE}),
        (3, 146, 6, {Action.KEEP, Action.RECOMPUTE, Action.RECOMPUTE_NEARLY_FREE}),
    ],
)
def test_nothing_beats_a_plan_that_computes_parts_again(
    blocks: int, device: int, nvme: int, actions: set[Action]
) -> None:
    parts = tuple(
        make_block(index, nearly_free=make_nearly_free(), prefixes=make_prefixes(), attention_seconds=0.009)
        for index in range(blocks)
    )
    profile = make_profile(block_profiles=parts, micro_batches=2)
    machine = make_machine(**SLOW, mixed_bytes_per_second=300 * MiB, dram_copy_bytes_per_second=2e10)
    budget, options = (
        Budget(device=device * MiB, nvme=f"/x:{nvme}MiB"),
        PlannerOptions(allow=frozenset(actions)),
    )
    best = brute_force(profile, machine, budget, options)
    plan = make_plan(profile, machine, budget, options=options)
    assert best < math.inf
    assert plan.step_seconds <= best * (1 + options.gap)
    assert 0 < plan.lower_bound_seconds <= best + 1e-9
    assert check(plan, profile, machine, budget) == ()


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize("link", [{}, SLOW | {"mixed_bytes_per_second": 300 * MiB}])
@pytest.mark.parametrize(("device", "slots"), [(147, 2), (152, 3), (157, 4)])
def test_nothing_beats_a_plan_over_two_tiers(device: int, slots: int, link: dict[str, Any]) -> None:
    """Each block takes two slots, of 5 MiB and a page: beside 120 MiB and 14 of backward there is room for
    two, three or four."""
    parts = tuple(make_block(index, attention_bytes=4 * MiB) for index in range(3))
    profile = make_profile(block_profiles=parts, micro_batches=2)
    machine = make_machine(Tier.CXL, Tier.NVME, **link)
    budget = Budget(device=device * MiB, cxl="1:1GiB", nvme="/x:1GiB")
    both = {"action": "recompute_except_attention", "saved_tier": "cxl", "input_tier": "nvme"}
    options = PlannerOptions(force={"block": both})
    best = brute_force(profile, machine, budget, options)
    plan = make_plan(profile, machine, budget, options=options)
    assert plan.staging.input_slots == slots
    assert plan.step_seconds <= best * (1 + options.gap)
    assert 0 < plan.lower_bound_seconds <= best + 1e-9
    assert check(plan, profile, machine, budget) == ()
    # What went last through the ring is still in its slots when backward begins.
    reads = Counter((e.name, e.resource) for e in plan.timeline if e.name.startswith("read "))
    groups = [(f"read layers.{i}", f"read:{tier}") for i in range(3) for tier in ("cxl", "nvme")]
    assert reads == dict.fromkeys(groups[: 6 - slots], 2)
    halved = replace(plan, timeline=tuple(e for e in plan.timeline if (e.name, e.resource) != groups[0]))
    assert Rule.DEPENDENCY in {v.rule for v in check(halved, profile, machine, budget)}


def test_the_least_memory_is_that_of_nearly_free() -> None:
    # Without it 120 MiB fixed, 1 and a page of input kept, 10 saved again and 4 of backward. With it 7 MiB in
    # backward, but 12 in forward; and 5 MiB and a page kept, or on nvme and in a slot.
    block = make_block(nearly_free=make_nearly_free(), saved_bytes=10 * MiB, backward_transient_bytes=9 * MiB)
    profile = make_profile(block_profiles=(block,))
    plan = make_plan(profile, make_machine(), Budget(device=130 * MiB), options=EXACT)
    assert plan.status == "infeasible"
    assert plan.action_counts() == {"recompute from outputs of products on device": 1}
    assert plan.shortfall_bytes == ((Tier.DEVICE, (120 + 5 + 12 - 130) * MiB + 4096),)


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize("tier", ["device", "nvme"])
def test_no_pass_over_gradients_lifts_the_bound_above_a_plan(tier: str) -> None:
    profile = make_profile(2, trainable=True, micro_batches=2)
    machine = make_machine(
        **SLOW, mixed_bytes_per_second=400 * MiB, dram_copy_bytes_per_second=1e9, arithmetic_slowdown=1.07
    )
    budget = Budget(device="256MiB", nvme="/x:100MiB")
    options = PlannerOptions(
        allow=frozenset({Action.SWAP, Action.RECOMPUTE}), force={"state": {"gradient_tier": tier}}
    )
    best = brute_force(profile, machine, budget, options)
    plan = make_plan(profile, machine, budget, options=options)
    assert best < math.inf
    assert {state.gradient_tier.value for state in plan.states} == {tier}
    assert plan.step_seconds <= best * (1 + options.gap)
    assert 0 < plan.lower_bound_seconds <= best + 1e-9
    assert check(plan, profile, machine, budget) == ()


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize(
    ("force", "alone"),
    [({}, 2 * 0.070 + 0.002), ({"block": {"action": "recompute"}}, 2 * (0.070 + 2 * 0.010) + 0.002)],
)
def test_arithmetic_is_slower_in_a_step_than_alone(force: dict[str, Any], alone: float) -> None:
    # Two blocks of 30 ms and 10 ms around them in each of two micro-batches, 1 ms of update each. What is
    # copied is not slower: 10 MiB or 1 MiB a block and micro-batch, 1 and 1.5 MiB of gradients.
    profile = make_profile(2, trainable=True, micro_batches=2)
    machine = make_machine(dram_copy_bytes_per_second=1e9, arithmetic_slowdown=1.25)
    options = PlannerOptions(force=force, allow=frozenset({Action.KEEP}))
    plan = make_plan(profile, machine, Budget(device="1GiB"), options=options)
    copied = 2 * ((2 * 1 if force else 2 * 10) + 1 + 1.5) * MiB
    assert plan.step_seconds == pytest.approx(1.25 * alone + copied * 1e-9, rel=1e-6)
    assert (plan.status, plan.profile_digest) == ("optimal", profile.digest)
    short = make_plan(profile, machine, Budget(device="10MiB"))
    assert (short.status, short.profile_digest) == ("infeasible", profile.digest)


@pytest.mark.usefixtures("solver_here")
def test_enough_memory_keeps_everything_and_is_proved_without_a_solver() -> None:
    plan = make_plan(make_profile(3), make_machine(), Budget(device="1GiB", nvme="/x:1GiB"))
    assert (plan.status, plan.gap, plan.step_seconds) == ("optimal", 0.0, 0.1)
    assert plan.action_counts() == {"keep": 3}
    # 120 MiB fixed, three slots of 10 MiB and 64 tensors of 64 bytes (a page), then a block's forward: 10 MiB
    # that are copied at its end and 2 for a moment; 1.5 % on top.
    need = 162 * MiB + 3 * 4096
    assert plan.peak(Tier.DEVICE) == need + math.ceil(need * 0.015)


def test_shortfall_by_hand() -> None:
    # Recomputing needs 120 MiB fixed, 1 and a page of input kept, 10 saved again and 4 of backward.
    profile = make_profile(1)
    plan = make_plan(profile, make_machine(), Budget(device=130 * MiB), options=EXACT)
    assert plan.status == "infeasible"
    # Keeping needs 120, a slot of 10 and a page, and 10 + 2 in its forward: 142 MiB and a page, and is more.
    need = 135 * MiB + 4096
    assert plan.shortfall_bytes == ((Tier.DEVICE, need - 130 * MiB),)
    # A hundredth for the next run makes 136.35 MiB: 0.134 when rounded up, and a thousandth to be sure.
    assert plan.remedies[0] == "device at least 0.135 GiB instead of 0.127 GiB"
    again = make_plan(profile, make_machine(), Budget(device=need), options=EXACT)
    assert again.action_counts() == {"recompute": 1}
    assert again.peak(Tier.DEVICE) == need


def test_a_budget_that_preparing_has_overrun_is_infeasible_whatever_a_plan_needs() -> None:
    # A plan needs 135 MiB and a page at the least, preparing took 160.
    profile, machine = make_profile(1, prepare_peak_bytes=160 * MiB), make_machine()
    plan = make_plan(profile, machine, Budget(device=159 * MiB), options=EXACT)
    assert plan.status == "infeasible"
    assert plan.shortfall_bytes == ((Tier.DEVICE, MiB),)
    assert plan.peak(Tier.DEVICE) == sum(line.size_bytes for line in plan.bill if line.tier is Tier.DEVICE)
    assert plan.peak(Tier.DEVICE) == 135 * MiB + 4096
    # No shorter sequence and no other tier is offered. 160 MiB and a hundredth are 0.1578 GiB.
    assert plan.remedies == (
        "device at least 0.159 GiB instead of 0.155 GiB (loading and measuring the model took 0.156 GiB)",
    )
    again = make_plan(profile, machine, Budget(device=160 * MiB), options=EXACT)
    assert (again.status, again.action_counts()) == ("optimal", {"keep": 1})


def test_the_least_budget_is_the_larger_of_what_preparing_took_and_a_plan_needs() -> None:
    profile, machine = make_profile(1, prepare_peak_bytes=132 * MiB), make_machine()
    short = make_plan(profile, machine, Budget(device=131 * MiB), options=EXACT)
    assert short.shortfall_bytes == ((Tier.DEVICE, 4 * MiB + 4096),)
    assert short.remedies[0].startswith("device at least 0.135 GiB instead of 0.128 GiB")
    profile = make_profile(1, prepare_peak_bytes=148 * MiB)
    short = make_plan(profile, machine, Budget(device=131 * MiB), options=EXACT)
    assert short.shortfall_bytes == ((Tier.DEVICE, 17 * MiB),)
    # 148 MiB and a hundredth are 0.14598 GiB.
    assert short.remedies[0].startswith("device at least 0.147 GiB instead of 0.128 GiB")


def test_a_run_that_overran_before_its_first_step() -> None:
    plan = make_plan(make_profile(1), make_machine(), Budget(device=256 * MiB), options=EXACT)
    over = overrun(plan, 257 * MiB)
    assert (over.status, over.shortfall_bytes) == ("infeasible", ((Tier.DEVICE, MiB),))
    assert over.remedies == (
        "device at least 0.255 GiB instead of 0.250 GiB (loading and measuring the model took 0.251 GiB)",
    )


@pytest.mark.parametrize(
    ("action", "cpu", "cuda"),
    [
        # CPU: slots of 10 MiB and a page; cuda: the last block's backward (4) is more than its forward (2).
        ("keep", 3 * (10 * MiB + 4096) + 12 * MiB, 34 * MiB),
        # CPU: slots of 1 MiB and a page, a block saved again and its backward. On cuda without pages.
        ("recompute", 3 * (MiB + 4096) + 14 * MiB, 17 * MiB),
        # CPU: input and attention outputs, 64 bytes each, in a slot.
        ("recompute_except_attention", 3 * (2 * MiB + 4096) + 14 * MiB, 20 * MiB),
    ],
)
def test_what_stays_lives_in_slabs_on_a_cpu_only(action: str, cpu: int, cuda: int) -> None:
    profile = make_profile(3)
    options = PlannerOptions(safety_margin=0.0, force={"block": {"action": action}})
    for device, varying in (("cpu", cpu), ("cuda:0", cuda)):
        machine, budget = make_machine(device=device), Budget(device="1GiB")
        plan = make_plan(profile, machine, budget, options=options)
        assert plan.peak(Tier.DEVICE) == 120 * MiB + varying
        assert (plan.staging.kept_slab_bytes > 0) is (device == "cpu")
        assert plan.staging.total_bytes == 0
        assert check(plan, profile, machine, budget) == ()


def test_every_block_keeps_in_a_place_of_its_own_size() -> None:
    blocks = (make_block(0), make_block(1, saved_bytes=20 * MiB), make_block(2))
    profile, budget = make_profile(block_profiles=blocks), Budget(device="1GiB")
    plan = make_plan(profile, make_machine(), budget, options=EXACT)
    assert plan.staging.kept_bytes == (10 * MiB + 4096, 20 * MiB + 4096, 10 * MiB + 4096)
    # Its bytes are activations; what is for a moment is the forward of the large block.
    lines = {line.category: line.size_bytes for line in plan.bill}
    assert lines["activations"] == 40 * MiB + 3 * 4096
    assert lines["transients"] == 22 * MiB
    assert "staging" not in lines


@pytest.mark.parametrize(("parameters", "pages"), [((), 8), (("a", "b", "c"), 3)])
def test_the_gradient_slab_has_a_page_more_per_parameter(parameters: tuple[str, ...], pages: int) -> None:
    # 1 MiB of gradients are 512 Ki elements, eight times 64 Ki.
    plain = make_profile(2, trainable=True)
    units = tuple(replace(unit, parameters=parameters) for unit in plain.units)
    plan = make_plan(replace(plain, units=units), make_machine(), Budget(device="1GiB"), options=EXACT)
    assert plan.staging.gradient_slab_bytes == 2 * (MiB + pages * 4096)
    lines = {line.category: line.size_bytes for line in plan.bill}
    assert lines["gradients"] == plan.staging.gradient_slab_bytes


def test_a_plan_that_moves_no_state_still_has_a_shard() -> None:
    plan = make_plan(make_profile(1, trainable=True), make_machine(), Budget(device="1GiB"))
    assert (plan.staging.update_slots, plan.staging.update_shard_elements) == (0, 1 << 20)
    whole = make_profile(1, trainable=True, elementwise=False, largest_parameter_elements=3 << 20)
    plan = make_plan(whole, make_machine(), Budget(device="1GiB"))
    assert (plan.staging.update_slots, plan.staging.update_shard_elements) == (0, 3 << 20)


def test_remedies_name_what_may_be_allowed_and_the_tier_that_is_short() -> None:
    profile = make_profile(3)
    keep = PlannerOptions(safety_margin=0.0, allow=frozenset({Action.KEEP}))
    refused = make_plan(profile, make_machine(), Budget(device=150 * MiB), options=keep)
    assert refused.shortfall_bytes == ((Tier.DEVICE, 12 * MiB + 3 * 4096),)
    assert refused.remedies[0] == "allow recompute, recompute_except_attention"  # no tier to swap to
    assert "give an nvme budget, such as nvme='/mnt/fast:40GiB'" in refused.remedies
    forced = PlannerOptions(
        safety_margin=0.0,
        allow=frozenset({Action.SWAP}),
        force={"block": {"action": "swap"}},
    )
    short = make_plan(profile, make_machine(), Budget(device=160 * MiB, nvme="/x:20MiB"), options=forced)
    assert short.shortfall_bytes == ((Tier.NVME, 10 * MiB + 3 * 4096),)
    assert any("nvme +0.010 GiB" in remedy for remedy in short.remedies)


def test_a_state_that_fits_nowhere_is_short_by_what_it_lacks() -> None:
    profile = make_profile(1, trainable=True)
    # Without nvme: 100 + 20 + 6 state + 1 gradient and 8 pages + 1 input and a page + 10 saved + 4 transient.
    plan = make_plan(profile, make_machine(), Budget(device=131 * MiB), options=EXACT)
    assert plan.shortfall_bytes == ((Tier.DEVICE, 11 * MiB + 9 * 4096),)


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize(
    ("force", "words"),
    [
        ({"block": {"action": "swap"}}, {"swap to nvme": 3}),
        ({"block": {"action": "recompute", "input_tier": "nvme"}}, {"recompute (input to nvme)": 3}),
        (
            {"block": {"action": "recompute_except_attention", "saved_tier": "nvme", "input_tier": "device"}},
            {"recompute, attention outputs on nvme": 3},
        ),
        ({"block": {"action": "keep"}, "block.1": {"action": "swap"}}, {"keep": 2, "swap to nvme": 1}),
    ],
)
def test_forced_actions_are_obeyed(force: dict[str, dict[str, str]], words: dict[str, int]) -> None:
    profile, machine = make_profile(3, trainable=True), make_machine()
    budget = Budget(device="1GiB", nvme="/x:1GiB")
    both = {"state": {"gradient_tier": "nvme", "optimizer_tier": "nvme"}}
    plan = make_plan(
        profile, machine, budget, options=PlannerOptions(force=force | both, update_schedule="ahead")
    )
    assert plan.action_counts() == words
    assert {(s.gradient_tier, s.optimizer_tier) for s in plan.states} == {(Tier.NVME, Tier.NVME)}
    assert plan.update_schedule is UpdateSchedule.AHEAD
    assert check(plan, profile, machine, budget) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"force": {"block": {"action": "swap"}}}, "no action is left"),
        ({"force": {"block.7": {"action": "keep"}}}, "has 3 blocks"),
        ({"force": {"state.head": {"gradient_tier": "device"}}}, "names state.head"),
        ({"force": {"block": {"recomputed_tokens": 4}}}, "cannot be cut: the profile has no prefixes"),
        ({"force": {"block": {"action": "recompute_nearly_free"}}}, "products leave was not measured"),
    ],
)
def test_forcing_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(make_profile(3), make_machine(), Budget(device="1GiB"), options=PlannerOptions(**changes))


def test_attention_cannot_be_stored_of_a_cut_block_that_has_none() -> None:
    profile = make_profile(block_profiles=(make_block(0, attention_bytes=0, prefixes=make_prefixes()),))
    force = {"block": {"action": "recompute_except_attention", "recomputed_tokens": 4, "attention_tokens": 2}}
    with pytest.raises(ValueError, match="no action is left"):
        make_plan(profile, make_machine(), Budget(device="1GiB"), options=PlannerOptions(force=force))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time_limit_seconds": 0}, "time_limit_seconds must be > 0"),
        ({"safety_margin": 1.0}, "safety_margin must be in"),
        ({"allow": frozenset()}, "allow is empty"),
        ({"update_schedule": "later"}, "got 'later'"),
        ({"force": {"layer": {}}}, "force key 'layer'"),
        ({"force": {"block": {"tier": "nvme"}}}, "has 'tier'"),
        ({"force": {"block": {"attention_tokens": "4"}}}, "must be a number of tokens"),
    ],
)
def test_options_validate_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlannerOptions(**fields)


def test_a_tier_without_a_link_is_refused() -> None:
    with pytest.raises(ValueError, match="has no link to it"):
        make_plan(make_profile(1), make_machine(), Budget(device="1GiB", cxl="1:1GiB"))
    with pytest.raises(ValueError, match=r"budget\.host is for machines with a GPU"):
        make_plan(make_profile(1), make_machine(), Budget(device="1GiB", host="1GiB"))


def test_a_block_that_may_not_be_recomputed_is_not() -> None:
    blocks = (make_block(0, recomputable=False, reason="draws random numbers"), make_block(1))
    profile = make_profile(block_profiles=blocks)
    only = PlannerOptions(allow=frozenset({Action.RECOMPUTE}))
    with pytest.raises(ValueError, match="draws random numbers"):
        make_plan(profile, make_machine(), Budget(device="1GiB"), options=only)


@pytest.mark.usefixtures("solver_here")
def test_more_memory_bandwidth_or_capacity_is_never_slower() -> None:
    profile = make_profile(4, trainable=True, micro_batches=2)

    def seconds(device: int = 145, nvme: int = 60, rate: int = 300) -> float:
        machine = make_machine(
            read_bytes_per_second=rate * MiB,
            write_bytes_per_second=rate * MiB,
            mixed_bytes_per_second=1.2 * rate * MiB,
        )
        plan = make_plan(profile, machine, Budget(device=device * MiB, nvme=f"/x:{nvme}MiB"))
        return plan.step_seconds if plan.status != "infeasible" else math.inf

    for name, values in (("device", (140, 160, 200)), ("nvme", (20, 50, 100)), ("rate", (200, 600, 2000))):
        times = [seconds(**{name: value}) for value in values]
        # Within the gap of the search; an exact optimum would be monotone.
        assert all(b <= a * (1 + PlannerOptions().gap) for a, b in itertools.pairwise(times)), (name, times)


SIZES = st.integers(0, 3 * MiB)

ANY_FORM = st.builds(
    make_form,
    saved_bytes=SIZES,
    forward_seconds=st.floats(0, 0.01),
    backward_seconds=st.floats(0, 0.01),
    forward_transient_bytes=SIZES,
    backward_transient_bytes=SIZES,
)


@st.composite
def adversarial(draw: st.DrawFn) -> ModelProfile:
    """Sizes that no grid divides, zeros among them."""
    blocks = []
    for index in range(draw(st.integers(1, 4))):
        tokens = draw(st.integers(2, 11))
        saved = draw(SIZES)
        cut = saved // tokens * tokens
        prefixes = make_prefixes(
            tokens=tokens, lengths=(1,), differences=(0.0,), cut_bytes=cut, whole_bytes=saved - cut
        )
        blocks.append(
            BlockProfile(
                name=f"b{index}",
                input_bytes=draw(SIZES) * tokens,
                saved_bytes=saved,
                attention_bytes=draw(st.integers(0, saved)) // tokens * tokens,
                forward_seconds=draw(st.floats(0, 0.01)),
                backward_seconds=draw(st.floats(0, 0.01)),
                attention_seconds=draw(st.floats(0, 0.01)),
                forward_transient_bytes=draw(SIZES),
                backward_transient_bytes=draw(SIZES),
                recomputable=draw(st.booleans()),
                nearly_free=draw(st.none() | st.builds(make_nearly_free, stored_bytes=SIZES)),
                prefixes=draw(st.none() | st.just(prefixes)),
                forms=draw(st.just(()) | st.tuples(ANY_FORM)),
            )
        )
    elements = draw(st.integers(1, 10**6))
    unit = UnitProfile(
        name=draw(st.sampled_from(["prologue", "epilogue", "b0"])),
        block=None,
        weight_bytes=2 * elements,
        gradient_bytes=2 * elements,
        state_bytes=12 * elements,
        movable_elements=draw(st.sampled_from([0, elements, 3 * elements])),
        update_seconds=0.001,
    )
    return make_profile(
        block_profiles=tuple(blocks),
        units=(unit,),
        micro_batches=draw(st.integers(1, 2)),
        baseline_bytes=draw(SIZES),
        weight_bytes=2 * elements,
        update_workspace_bytes_per_element=draw(st.sampled_from([0.0, 2.0, 4.5])),
        persistent_backward_bytes=draw(SIZES),
        parameter_object_bytes=draw(st.integers(0, 10_000)),
        shard_object_bytes=draw(st.sampled_from([0, 4096, MiB])),
    )


@pytest.mark.usefixtures("solver_here")
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(adversarial(), st.integers(1 * MiB, 40 * MiB), st.integers(0, 20 * MiB))
def test_never_over_budget_and_always_approved(profile: ModelProfile, device: int, nvme: int) -> None:
    machine, budget = make_machine(), Budget(device=device, nvme=f"/x:{nvme}B")
    plan = make_plan(profile, machine, budget)
    assert Plan.from_json(plan.to_json()) == plan
    if plan.status == "infeasible":
        assert plan.shortfall_bytes
        return
    assert check(plan, profile, machine, budget) == ()
    assert all(plan.peak(tier) <= budget.capacity(tier) for tier in Tier)


def test_the_solver_in_a_process_of_its_own_agrees() -> None:
    profile, machine = make_profile(3, trainable=True), make_machine(**SLOW)
    plan = make_plan(profile, machine, Budget(device="160MiB", nvme="/x:1GiB"))
    assert plan.solver == "HiGHS through PuLP"
    assert 0 < plan.lower_bound_seconds <= plan.step_seconds


def test_a_solver_that_returns_nothing_costs_only_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtrain.planner.bounding._in_child", lambda search, deadline: [])
    plan = make_plan(make_profile(3), make_machine(**SLOW), Budget(device="145MiB", nvme="/x:1GiB"))
    assert (plan.status, plan.lower_bound_seconds, plan.gap) == ("heuristic", 0.0, 1.0)


def test_planning_does_not_load_the_solver_into_this_process() -> None:
    code = (
        "import sys\n"
        "from tests.planner.toys import make_machine, make_profile\n"
        "from memtrain.planner.machine import Budget\n"
        "from memtrain.planner.solve import make_plan\n"
        "from memtrain.planner.units import MiB\n"
        "plan = make_plan(make_profile(4), make_machine(), Budget(device=145 * MiB, nvme='/x:1GiB'))\n"
        "assert 'HiGHS' in plan.solver, plan.solver\n"
        "assert not {'pulp', 'highspy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
