"""Weights coded on their tier: seconds, bytes, room and memory by hand; what is chosen; seeded faults."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from memtrain.planner.actions import Action, StateDecision, Tier, UpdateSchedule
from memtrain.planner.check import Rule, check
from memtrain.planner.decisions import Decisions, PlannerOptions, staging_for
from memtrain.planner.machine import Budget, Machine, StateCodec
from memtrain.planner.plan import CodedTier, Plan
from memtrain.planner.profile import ModelProfile
from memtrain.planner.simulate import Timeline, simulate
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from memtrain.planner.weight_coding import is_faster, may_be_faster
from memtrain.planner.weight_windows import WantedWindows
from tests.planner.test_solve import brute_force
from tests.planner.test_weight_windows import everybody, states_of, weighty
from tests.planner.toys import make_machine

PAGE = 4096
UNIT = 8 * MiB + PAGE  # what a block's weights take as they are
CODEC = StateCodec(
    name="exponent",
    ratio=0.75,
    read_bytes_per_second=2048 * MiB,
    write_bytes_per_second=512 * MiB,
    cpu_seconds_per_byte=2e-9,
    segment_bytes=4 * MiB,
    staging_bytes=28 * MiB,
)
CODED = CodedTier(tier=Tier.NVME, codec="exponent", segment_bytes=4 * MiB, staging_bytes=28 * MiB)
BUDGET = Budget(device="1GiB", nvme="/x:1GiB")
AWAY = {"block": {"action": "keep"}, "state": {"weight_tier": "nvme", "optimizer_tier": "device"}}
AUTO = (Tier.NVME,)


def coding_machine(**changes: Any) -> Machine:
    machine = make_machine()
    link = dataclasses.replace(machine.links[0], weight_codec=dataclasses.replace(CODEC, **changes))
    return dataclasses.replace(machine, links=(link,))


def plan_for(
    machine: Machine, *, profile: ModelProfile | None = None, budget: Budget = BUDGET, **options: Any
) -> Plan:
    profile = profile or weighty()
    fields: dict[str, Any] = {"force": AWAY, "update_schedule": "sequential"} | options
    plan = make_plan(profile, machine, budget, options=PlannerOptions(**fields))
    assert check(plan, profile, machine, budget) == ()
    assert plan.lower_bound_seconds <= plan.step_seconds + 1e-9
    return plan


def idle(**changes: Any) -> ModelProfile:
    """Whose arithmetic takes no time, so that weights are what is waited for."""
    profile = weighty(prologue_forward_seconds=0.0, prologue_backward_seconds=0.0, **changes)
    none = {"forward_seconds": 0.0, "backward_seconds": 0.0, "attention_seconds": 0.0}
    return dataclasses.replace(
        profile, blocks=tuple(dataclasses.replace(block, **none) for block in profile.blocks)
    )


def timeline_of(machine: Machine, *, coded: bool) -> Timeline:
    profile = weighty()
    states = states_of(profile, everybody)
    blocks = plan_for(make_machine()).blocks
    staging = staging_for(
        profile, blocks, states, saved_slots=1, input_slots=1, shard_elements=1 << 20, on_cpu=True,
        coded_weights=(CODED,) if coded else (), wanted_windows=WantedWindows(2, sized=False),
    )  # fmt: skip
    decisions = Decisions(
        blocks=blocks, states=states, staging=staging, update_schedule=UpdateSchedule.SEQUENTIAL
    )
    return simulate(profile, machine, decisions)


def test_weights_move_at_the_codecs_rates_and_everything_else_at_the_links() -> None:
    """Of four units with two windows a step reads 0 to 3; 1, 0; 2, 3 for their updates; and writes all."""
    plain, coded = (timeline_of(coding_machine(), coded=each) for each in (False, True))
    assert plain.bytes_moved == (8 + 4) * UNIT
    assert coded.bytes_moved == (8 + 4) * UNIT * 0.75
    lengths = {
        name: {
            e.name.split(" layers")[0]: e.end_seconds - e.start_seconds
            for e in each.events
            if e.name in ("read weights layers.0", "write weights layers.0")
        }
        for name, each in (("plain", plain), ("coded", coded))
    }
    assert lengths["plain"] == pytest.approx(
        {"read weights": UNIT / (1024 * MiB), "write weights": UNIT / (1024 * MiB)}, abs=2e-9
    )
    assert lengths["coded"] == pytest.approx(
        {"read weights": UNIT / (2048 * MiB), "write weights": UNIT / (512 * MiB)}, abs=2e-9
    )


def test_coding_takes_processor_time_on_a_cpu_alone() -> None:
    def busy(timeline: Timeline) -> float:
        return sum(e.end_seconds - e.start_seconds for e in timeline.events if e.resource == "compute")

    free, dear = coding_machine(cpu_seconds_per_byte=0.0), coding_machine()
    more = busy(timeline_of(dear, coded=True)) - busy(timeline_of(free, coded=True))
    assert more == pytest.approx(12 * UNIT * 2e-9, abs=1e-7)
    assert busy(timeline_of(dear, coded=False)) == busy(timeline_of(free, coded=False))
    gpu = dataclasses.replace(dear, device="cuda:0")
    assert busy(timeline_of(gpu, coded=True)) == pytest.approx(busy(timeline_of(free, coded=True)), abs=1e-7)


def test_coding_has_its_memory_and_its_room_on_the_bill() -> None:
    base, plan = plan_for(make_machine()), plan_for(coding_machine())
    assert base.staging.coded_weights == ()
    assert plan.staging.coded_weights == (CODED,)
    assert plan.staging.coded == ()
    found, plain = (
        {(line.category, line.tier): line.size_bytes for line in each.bill} for each in (plan, base)
    )
    assert found["staging", Tier.DEVICE] - plain.get(("staging", Tier.DEVICE), 0) == 28 * MiB
    # Two parameters end a segment each, and 8 MiB and a page fill two more.
    assert found["weights", Tier.NVME] - plain["weights", Tier.NVME] == 4 * PAGE * (2 + 2)
    assert Plan.from_json(plan.to_json()) == plan


def test_beside_a_gpu_coding_is_the_hosts() -> None:
    host = dataclasses.replace(make_machine().links[0], tier=Tier.HOST)
    machine = dataclasses.replace(coding_machine(), device="cuda:0", links=(host, *coding_machine().links))
    budget = Budget(device="1GiB", host="1GiB", nvme="/x:1GiB")
    plan = plan_for(machine, budget=budget)
    lines = {(line.category, line.tier): line.size_bytes for line in plan.bill}
    windows = plan.staging.weight_window_bytes
    assert lines["staging", Tier.HOST] == plan.staging.total_bytes + windows
    assert plan.staging.total_bytes >= 28 * MiB


def test_where_no_weights_live_coding_takes_nothing() -> None:
    stay = {"block": {"action": "keep"}, "state": {"weight_tier": "device", "optimizer_tier": "device"}}
    plan = plan_for(coding_machine(), force=stay)
    assert plan.staging.coded_weights == ()
    assert plan.staging.total_bytes == 0


def test_a_budget_of_the_planned_bytes_is_enough_and_a_byte_less_is_not() -> None:
    machine, profile = coding_machine(), weighty()
    least = plan_for(machine).peak(Tier.NVME)
    assert plan_for(machine, budget=Budget(device="1GiB", nvme=f"/x:{least}B")).peak(Tier.NVME) == least
    options = PlannerOptions(force=AWAY, update_schedule="sequential")
    short = make_plan(profile, machine, Budget(device="1GiB", nvme=f"/x:{least - 1}B"), options=options)
    assert short.status == "infeasible"
    assert short.shortfall_bytes == ((Tier.NVME, 1),)


@pytest.mark.parametrize(
    ("rate_mib", "coded"),
    [
        (512, False),  # slower than the tier, both ways
        (1024, False),  # as fast, for processor time
        (4096, True),
    ],
)
@pytest.mark.parametrize("order", ["horizontal", "vertical"])
def test_auto_codes_where_that_is_predicted_to_be_faster(rate_mib: int, coded: bool, order: str) -> None:
    rates = {"read_bytes_per_second": rate_mib * MiB, "write_bytes_per_second": rate_mib * MiB}
    machine = coding_machine(**rates, cpu_seconds_per_byte=0.0)
    changes: dict[str, Any] = {"profile": idle(micro_batches=2), "micro_batch_order": order}
    auto = plan_for(machine, coding_optional=AUTO, **changes)
    always = plan_for(machine, **changes)
    never = plan_for(make_machine(), **changes)
    assert bool(auto.staging.coded_weights) is coded
    assert auto.step_seconds <= min(always.step_seconds, never.step_seconds) + 1e-9
    assert auto.lower_bound_seconds <= min(always.step_seconds, never.step_seconds) + 1e-9


def test_auto_leaves_weights_as_they_are_where_coding_does_not_fit() -> None:
    rates = {"read_bytes_per_second": 1e12, "write_bytes_per_second": 1e12, "cpu_seconds_per_byte": 0.0}
    machine = coding_machine(**rates)
    coded = plan_for(machine, coding_optional=AUTO, profile=idle())
    assert coded.staging.coded_weights == (CODED,)
    least = plan_for(make_machine()).peak(Tier.NVME)
    budget = Budget(device="1GiB", nvme=f"/x:{least}B")
    tight = plan_for(machine, coding_optional=AUTO, profile=idle(), budget=budget)
    assert tight.staging.coded_weights == ()


def test_a_link_says_whether_coding_can_gain() -> None:
    link = coding_machine().links[0]
    assert may_be_faster(link)
    assert not is_faster(link)  # 2/2 + 1/0.5 against 2/1 + 1/1
    faster = dataclasses.replace(link, weight_codec=dataclasses.replace(CODEC, write_bytes_per_second=1e9))
    assert is_faster(faster)
    assert not is_faster(dataclasses.replace(link, weight_codec=None))
    slow = dataclasses.replace(CODEC, read_bytes_per_second=1.0, write_bytes_per_second=1.0)
    assert not may_be_faster(dataclasses.replace(link, weight_codec=slow))


def test_parameters_without_names_have_room_for_the_most_there_can_be() -> None:
    profile = weighty()
    unnamed = dataclasses.replace(
        profile, units=tuple(dataclasses.replace(unit, parameters=()) for unit in profile.units)
    )
    plans = [plan_for(coding_machine(), profile=each) for each in (profile, unnamed)]
    # 8 MiB less 64 bytes of parameters of 64 Ki elements and more, of a byte at least: 128 of them.
    assert plans[1].peak(Tier.NVME) - plans[0].peak(Tier.NVME) == 4 * PAGE * (128 - 2)


SLOW = {"read_bytes_per_second": 400 * MiB, "write_bytes_per_second": 200 * MiB}


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize("device", [173, 190])
@pytest.mark.parametrize("optional", [AUTO, ()])
def test_nothing_beats_the_plan_and_nothing_is_below_the_bound(device: int, optional: Any) -> None:
    """Weights may leave a device that is too small for all of them, coded or not; coding takes 4 MiB."""
    profile = weighty(3, frozen=(0, 2))
    budget = Budget(device=device * MiB, nvme="/x:1GiB")
    codec = dataclasses.replace(
        CODEC, staging_bytes=4 * MiB, read_bytes_per_second=600 * MiB, write_bytes_per_second=190 * MiB
    )
    link = make_machine(**SLOW, mixed_bytes_per_second=400 * MiB).links[0]
    plain = dataclasses.replace(make_machine(), links=(link,))
    machine = dataclasses.replace(plain, links=(dataclasses.replace(link, weight_codec=codec),))
    fields: dict[str, Any] = {
        "allow": frozenset({Action.KEEP, Action.RECOMPUTE}),
        "force": {"state": {"gradient_tier": "device", "optimizer_tier": "device"}},
    }
    options = PlannerOptions(**fields, coding_optional=optional)
    found = [brute_force(profile, machine, budget, PlannerOptions(**fields))]
    found += [brute_force(profile, plain, budget, PlannerOptions(**fields))] if optional else []
    plan = make_plan(profile, machine, budget, options=options)
    assert min(found) < math.inf
    assert plan.step_seconds <= min(found) * (1 + options.gap)
    assert 0 < plan.lower_bound_seconds <= min(found) + 1e-9
    assert check(plan, profile, machine, budget) == ()


def wrong(**changes: Any) -> tuple[CodedTier, ...]:
    return (dataclasses.replace(CODED, **changes),)


@pytest.mark.parametrize(
    ("coded", "detail"),
    [
        (wrong(codec="other"), "weights on nvme are coded as ('other'"),
        (wrong(staging_bytes=MiB), "the machine was measured with ('exponent', 4194304, 29360128)"),
        (wrong(segment_bytes=MiB), "weights on nvme are coded as ('exponent', 1048576"),
        (wrong(tier=Tier.CXL), "measured with None"),
        ((CODED, CODED), "where none live, or twice"),
    ],
)
def test_the_checker_knows_what_is_coded(coded: tuple[CodedTier, ...], detail: str) -> None:
    profile, machine = weighty(), coding_machine()
    plan = plan_for(machine, profile=profile)
    seeded = dataclasses.replace(plan, staging=dataclasses.replace(plan.staging, coded_weights=coded))
    faults = check(seeded, profile, machine, BUDGET)
    assert any(f.rule is Rule.STAGING and detail in f.detail for f in faults), faults


def test_the_checker_finds_a_codec_that_was_left_out_and_one_too_many() -> None:
    profile, machine = weighty(), coding_machine()
    coded = plan_for(machine, profile=profile)
    plain = plan_for(machine, profile=profile, coding_optional=AUTO, time_limit_seconds=2.0)
    rules = {
        f.rule
        for f in check(
            dataclasses.replace(coded, staging=dataclasses.replace(coded.staging, coded_weights=())),
            profile, machine, BUDGET,
        )
    }  # fmt: skip
    assert {Rule.DEVICE_PEAK, Rule.TIER_PEAK, Rule.BYTES_MOVED, Rule.BILL} <= rules
    assert plain.staging.coded_weights in ((), (CODED,))
    states = tuple(StateDecision(unit=s.unit, weight_tier=Tier.DEVICE) for s in coded.states)
    faults = check(dataclasses.replace(coded, states=states), profile, machine, BUDGET)
    assert any("where none live" in f.detail for f in faults)


@pytest.mark.parametrize("direction", ["read", "write"])
def test_the_checker_finds_weights_that_move_faster_than_they_are_coded(direction: str) -> None:
    # More units than windows, or none would be read.
    profile, slow = weighty(6), coding_machine(**{f"{direction}_bytes_per_second": 100 * MiB})
    plan = dataclasses.replace(plan_for(coding_machine(), profile=profile), machine_digest=slow.digest)
    found = {f.detail.split(" takes")[0] for f in check(plan, profile, slow, BUDGET)}
    assert any(name.startswith(f"{direction} weights layers.") for name in found)


def test_the_checker_counts_coded_bytes() -> None:
    profile, other = weighty(), coding_machine(ratio=0.5)
    plan = dataclasses.replace(plan_for(coding_machine(), profile=profile), machine_digest=other.digest)
    assert any(f.rule is Rule.BYTES_MOVED for f in check(plan, profile, other, BUDGET))


def test_a_machine_with_a_codec_for_weights_reads_back() -> None:
    machine = coding_machine()
    assert Machine.from_json(machine.to_json()) == machine
