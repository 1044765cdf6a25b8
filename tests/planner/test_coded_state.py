"""Optimizer state that is coded on its way to a tier: its seconds, bytes, room and memory, by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from memtrain.planner.actions import Tier
from memtrain.planner.check import Rule, check
from memtrain.planner.decisions import PlannerOptions, state_extent_bytes
from memtrain.planner.machine import Budget, Link, Machine, StateCodec
from memtrain.planner.plan import CodedTier, Plan
from memtrain.planner.profile import ModelProfile, ParameterUpdate, UnitProfile
from memtrain.planner.solve import make_plan
from memtrain.planner.units import MiB
from tests.planner.toys import make_machine, make_profile

PAGE = 4096
CODEC = StateCodec(
    name="exponent",
    ratio=0.75,
    read_bytes_per_second=512 * MiB,
    write_bytes_per_second=256 * MiB,
    cpu_seconds_per_byte=0.0,
    segment_bytes=4 * MiB,
    staging_bytes=28 * MiB,
)
BUDGET = Budget(device="1GiB", nvme="/x:1GiB")
AWAY = {"block": {"action": "keep"}, "state": {"optimizer_tier": "nvme", "gradient_tier": "device"}}


def coding_machine(**changes: Any) -> Machine:
    machine = make_machine()
    link = dataclasses.replace(machine.links[0], state_codec=dataclasses.replace(CODEC, **changes))
    return dataclasses.replace(machine, links=(link,))


def plan_for(profile: ModelProfile, machine: Machine, force: Any = AWAY, **options: Any) -> Plan:
    plan = make_plan(profile, machine, BUDGET, options=PlannerOptions(force=force, **options))
    assert check(plan, profile, machine, BUDGET) == ()
    return plan


def one_block() -> ModelProfile:
    """6 MiB of state in one piece of 512 Ki elements: read, 1 ms of update, written."""
    return make_profile(1, trainable=True, elementwise=False, largest_parameter_elements=1 << 19)


def test_a_link_says_what_state_costs_beside_other_traffic() -> None:
    plain, coding = make_machine().links[0], coding_machine(cpu_seconds_per_byte=2e-9).links[0]
    assert plain.state_load(100, read=True) == plain.state_load(100, read=False) == 100
    assert (plain.state_ratio, plain.state_cpu_seconds_per_byte) == (1.0, 0.0)
    assert (coding.state_load(100, read=True), coding.state_load(100, read=False)) == (200, 400)
    assert (coding.state_ratio, coding.state_cpu_seconds_per_byte) == (0.75, 2e-9)


def test_state_moves_at_the_codecs_rates_and_everything_else_at_the_links() -> None:
    profile = one_block()
    base = plan_for(profile, make_machine(), update_schedule="sequential")
    plan = plan_for(profile, coding_machine(), update_schedule="sequential")
    # 6 MiB: 6/1024 s each way plain; coded 6/512 s to read and 6/256 s to write.
    assert plan.step_seconds - base.step_seconds == pytest.approx(6 / 512 + 6 / 256 - 2 * 6 / 1024, abs=2e-9)
    assert base.bytes_moved_per_step == 12 * MiB
    assert plan.bytes_moved_per_step == 9 * MiB
    assert plan.lower_bound_seconds <= plan.step_seconds
    swapped = {**AWAY, "block": {"action": "swap"}}
    forward = {e.name: e for e in plan_for(profile, coding_machine(), swapped).timeline}["write layers.0"]
    assert forward.end_seconds - forward.start_seconds == pytest.approx(10 / 1024)


def test_coding_takes_processor_time_from_the_update_on_a_cpu_alone() -> None:
    """2 ns a byte, 6 MiB there and back."""
    profile = one_block()
    free = plan_for(profile, coding_machine(), update_schedule="sequential")
    plan = plan_for(profile, coding_machine(cpu_seconds_per_byte=2e-9), update_schedule="sequential")
    assert plan.step_seconds - free.step_seconds == pytest.approx(12 * MiB * 2e-9, abs=2e-9)


def test_coding_has_its_memory_and_its_room_on_the_bill() -> None:
    profile = one_block()
    base, plan = plan_for(profile, make_machine()), plan_for(profile, coding_machine())
    assert plan.staging.coded == (
        CodedTier(tier=Tier.NVME, codec="exponent", segment_bytes=4 * MiB, staging_bytes=28 * MiB),
    )
    found, plain = (
        {(line.category, line.tier): line.size_bytes for line in each.bill} for each in (plan, base)
    )
    assert found["staging", Tier.DEVICE] == plain["staging", Tier.DEVICE] + 28 * MiB
    # A profile without names has at most 8 parameters of 64 Ki elements here; 6 MiB end one segment of 4.
    more = found["optimizer state", Tier.NVME] - plain["optimizer state", Tier.NVME]
    assert more == PAGE * (8 + 1)
    assert Plan.from_json(plan.to_json()) == plan


def test_beside_a_gpu_coding_is_the_hosts() -> None:
    profile = one_block()
    nvme = coding_machine().links[0]
    host = Link(
        tier=Tier.HOST,
        read_bytes_per_second=1e9,
        write_bytes_per_second=1e9,
        mixed_bytes_per_second=2e9,
    )
    machine = dataclasses.replace(make_machine(device="cuda:0"), links=(host, nvme))
    budget = Budget(device="1GiB", host="1GiB", nvme="/x:1GiB")
    plan = make_plan(profile, machine, budget, options=PlannerOptions(force=AWAY))
    assert check(plan, profile, machine, budget) == ()
    lines = {(line.category, line.tier): line.size_bytes for line in plan.bill}
    ring = plan.staging.update_slots * plan.staging.update_slot_bytes
    assert lines["staging", Tier.HOST] == ring + 28 * MiB
    assert lines["staging", Tier.DEVICE] == 2 * plan.staging.update_slot_bytes


def test_parameters_that_are_updated_whole_end_a_segment_each_at_most() -> None:
    updates = tuple(
        ParameterUpdate(elements=1 << 20, record_bytes=size, gradient_bytes=MiB, workspace_bytes=0)
        for size in (4 * MiB, 9 * MiB)
    )
    unit = UnitProfile(
        name="u",
        block=0,
        weight_bytes=0,
        gradient_bytes=2 * MiB,
        state_bytes=13 * MiB,
        parameters=("a", "b"),
        updates=updates,
    )
    coded = CodedTier(tier=Tier.NVME, codec="exponent", segment_bytes=4 * MiB, staging_bytes=0)
    profile = dataclasses.replace(one_block(), units=(unit,))
    assert state_extent_bytes(profile, unit) == 13 * MiB
    # 4 MiB are one segment and 9 are three; the bill has room for two more, for it knows their sum alone.
    assert state_extent_bytes(profile, unit, coded) == 13 * MiB + PAGE * (2 + 3)


@pytest.mark.parametrize(
    "change",
    [
        {"coded": ()},
        {"coded": (CodedTier(tier=Tier.NVME, codec="other", segment_bytes=4 * MiB, staging_bytes=28 * MiB),)},
        {"coded": (CodedTier(tier=Tier.NVME, codec="exponent", segment_bytes=4 * MiB, staging_bytes=MiB),)},
    ],
)
def test_the_checker_knows_what_is_coded(change: dict[str, Any]) -> None:
    profile, machine = one_block(), coding_machine()
    plan = plan_for(profile, machine)
    wrong = dataclasses.replace(plan, staging=dataclasses.replace(plan.staging, **change))
    faults = check(wrong, profile, machine, BUDGET)
    assert any(f.rule is Rule.STAGING and "state is coded as" in f.detail for f in faults)


def test_the_checker_finds_state_that_moves_faster_than_it_is_coded() -> None:
    profile, slow = one_block(), coding_machine(read_bytes_per_second=100 * MiB)
    plan = dataclasses.replace(plan_for(profile, coding_machine()), machine_digest=slow.digest)
    found = {f.detail.split(" takes")[0] for f in check(plan, profile, slow, BUDGET)}
    assert "read update layers.0" in found


def test_a_machine_with_a_codec_reads_back() -> None:
    machine = coding_machine()
    assert Machine.from_json(machine.to_json()) == machine
    with pytest.raises(ValueError, match=r"codec exponent: ratio must be > 0, got 0"):
        dataclasses.replace(CODEC, ratio=0)
