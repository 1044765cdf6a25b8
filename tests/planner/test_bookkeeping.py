"""What a session's own objects take: on the bill by parameters and shards, in the program, to the checker."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from memtrain.offload.shards import SMALL, FlatIndex
from memtrain.planner.actions import Action, Tier
from memtrain.planner.bookkeeping import bookkeeping_bytes
from memtrain.planner.check import Rule, check
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.machine import Budget
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile, UnitProfile
from memtrain.planner.solve import make_plan
from memtrain.planner.staging import state_extent_bytes
from memtrain.planner.trace import profile_model
from memtrain.planner.units import MiB, round_up
from tests.planner.test_solve import brute_force
from tests.planner.toys import make_block, make_machine, make_profile
from tests.planner.weighty import billed

BUDGET = Budget(device=400 * MiB, nvme="/x:1GiB")
AWAY: dict[str, dict[str, str]] = {"state": {"optimizer_tier": "nvme", "gradient_tier": "nvme"}}
COSTLY = PlannerOptions(force=AWAY, safety_margin=0.0, allow=frozenset({Action.KEEP, Action.SWAP}))


def noted(blocks: int = 3, **changes: Any) -> ModelProfile:
    """Units of two parameters with 512 Ki elements: three shards of 256 Ki, for each may end 2 Ki short, or
    two of 512 Ki."""
    plain = make_profile(blocks, trainable=True)
    fields = {
        "units": tuple(replace(u, parameters=(f"{u.name}.a", f"{u.name}.b")) for u in plain.units),
        "parameter_object_bytes": 500,
        "shard_object_bytes": 10,
    }
    return replace(plain, **(fields | changes))


def bookkeeping(plan: Plan) -> int | None:
    """The line of the bill."""
    lines = {line.category: line.size_bytes for line in plan.bill if line.tier is Tier.DEVICE}
    return lines.get("bookkeeping")


@pytest.mark.parametrize(("shard", "shards"), [(1 << 18, 9), (1 << 19, 6), (1 << 20, 3)])
def test_bytes_by_hand(shard: int, shards: int) -> None:
    assert bookkeeping_bytes(noted(), shard) == 3 * 1000 + shards * 10


def test_every_tile_may_end_in_a_shard_that_is_not_full() -> None:
    """40 tiles of 300,000 elements are 80 shards of 256 Ki, and not the 47 that they would fill together."""
    sizes = 40 * 300_000
    unit = UnitProfile(
        name="layers.0",
        block=0,
        weight_bytes=2 * sizes,
        gradient_bytes=2 * sizes,
        state_bytes=12 * sizes,
        parameters=tuple(f"tile{i}" for i in range(40)),
        movable_weight_bytes=2 * sizes,
        weight_extent_bytes=2 * sizes,
        window_bytes=600_000,
    )
    profile = make_profile(1, units=(unit,), weight_bytes=2 * sizes, shard_object_bytes=1)
    tiles = [(f"tile{i}", torch.nn.Parameter(torch.empty(300_000, dtype=torch.bfloat16))) for i in range(40)]
    for shard in (1 << 18, 1 << 20, 1 << 22):
        cut = FlatIndex([(f"unit {name}", [(name, tile)]) for name, tile in tiles], shard).all_shards()
        assert len(cut) <= bookkeeping_bytes(profile, shard) <= len(cut) + 40


class Mixed(nn.Module):
    """A block in bf16 and a head in fp32, as many a model keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)
        self.head = nn.Linear(1024, 700, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.head(self.block(hidden).float()))


def test_units_of_several_dtypes_have_no_more_shards_and_pieces_than_are_billed() -> None:
    """Without masters the state has its parameter's dtype, and the bf16 unit's bytes are those of half as
    many fp32 elements."""
    model = Mixed()
    optimizer = torch.optim.AdamW(model.parameters())
    profile = profile_model(
        model,
        torch.ones(2, 1024, dtype=torch.bfloat16, requires_grad=True),
        optimizer=optimizer,
        elementwise=True,
        block_names=["block"],
    )
    assert {unit.name: unit.movable_elements for unit in profile.units} == {
        "prologue": 0,
        "block": 1 << 20,
        "epilogue": 700 << 10,
    }
    assert (profile.gradient_bytes_per_element, profile.state_bytes_per_element) == (4, 8)
    units = [(unit.name, [(n, model.get_parameter(n)) for n in unit.parameters]) for unit in profile.units]
    noted = replace(profile, parameter_object_bytes=0, shard_object_bytes=1)
    for shard in (1 << 18, 1 << 19, 1 << 20):
        index = FlatIndex(units, shard)
        assert len(index.all_shards()) <= bookkeeping_bytes(noted, shard) <= len(index.all_shards()) + 2
        for unit in profile.units:
            pieces = [piece for s in index.shards[unit.name] for piece in s.pieces]
            pages = sum(
                2 * round_up(piece.elements * unit.state_bytes // (2 * unit.movable_elements), 4096)
                for piece in pieces
            )
            assert pages <= state_extent_bytes(profile, unit)


def test_parameters_that_are_not_cut_have_a_shard_each_at_most() -> None:
    units = tuple(replace(unit, parameters=("a", "b", "c", "d")) for unit in noted().units)
    profile = noted(units=units, elementwise=False, largest_parameter_elements=1 << 18)
    assert bookkeeping_bytes(profile, 1 << 20) == 3 * 4 * (500 + 10)


@pytest.mark.parametrize("force", [{}, AWAY])
def test_the_bill_has_what_the_shards_of_the_plan_take(force: dict[str, dict[str, str]]) -> None:
    """Where no state moves it is cut all the same."""
    machine, profile = make_machine(), noted()
    plan = make_plan(profile, machine, BUDGET, options=PlannerOptions(force=force))
    assert check(plan, profile, machine, BUDGET) == ()
    least = plan.staging.update_shard_elements - 2048
    assert bookkeeping(plan) == 3 * 1000 + 3 * math.ceil((1 << 19) / least) * 10
    without = make_plan(
        make_profile(3, trainable=True), machine, BUDGET, options=PlannerOptions(force=force, safety_margin=0)
    )
    assert bookkeeping(without) is None


def test_a_gpu_has_none_of_it() -> None:
    machine = make_machine(Tier.HOST, Tier.NVME, device="cuda")
    budget = Budget(device=400 * MiB, host=str(400 * MiB), nvme="/x:1GiB")
    plan = make_plan(noted(), machine, budget)
    assert bookkeeping(plan) is None
    assert check(plan, noted(), machine, budget) == ()


def test_the_least_budget_is_that_of_the_shards_that_take_the_least() -> None:
    """Not of the smallest ones."""
    profile, machine = noted(2, shard_object_bytes=16 * MiB), make_machine()
    plan = make_plan(profile, machine, Budget(device=200 * MiB, nvme="/x:1GiB"), options=COSTLY)
    least = 200 * MiB + dict(plan.shortfall_bytes)[Tier.DEVICE]
    fits = make_plan(profile, machine, Budget(device=least, nvme="/x:1GiB"), options=COSTLY)
    assert (plan.status, plan.staging.update_shard_elements) == ("infeasible", 1 << 19)
    assert fits.status != "infeasible"
    assert fits.peak(Tier.DEVICE) == least


def test_slots_that_cost_nothing_leave_the_least_to_the_largest_shards() -> None:
    """Those of an update that lies where passes were: all of 32 MiB a block is free by then."""
    parts = tuple(make_block(index, saved_bytes=32 * MiB) for index in range(3))
    plain = noted(3, shard_object_bytes=MiB)
    profile = replace(plain, blocks=parts)
    options = replace(COSTLY, overlay=True, update_schedule="sequential", allow=frozenset({Action.KEEP}))
    machine = make_machine()
    plan = make_plan(profile, machine, Budget(device=200 * MiB, nvme="/x:1GiB"), options=options)
    assert plan.status == "infeasible"
    assert plan.staging.update_overlaid_bytes == plan.staging.update_slots * plan.staging.update_slot_bytes
    assert plan.staging.update_shard_elements == 1 << 19
    assert bookkeeping(plan) == 3 * 1000 + 6 * MiB
    # The tie between larger sizes, which the units do not fill, is the smallest of them.


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize(("device", "shard"), [(254, 1 << 19), (270, 1 << 19), (280, 1 << 18)])
def test_nothing_beats_a_plan_whose_shards_cost_memory(device: int, shard: int) -> None:
    """Six slots of 256 Ki elements take 22 MiB less than those of 512 Ki, and two more shards of 16 MiB."""
    profile, machine = noted(2, shard_object_bytes=16 * MiB), make_machine()
    budget = Budget(device=device * MiB, nvme="/x:1GiB")
    best = brute_force(profile, machine, budget, COSTLY)
    plan = make_plan(profile, machine, budget, options=COSTLY)
    assert plan.staging.update_shard_elements == shard
    assert plan.step_seconds <= best * (1 + COSTLY.gap)
    assert best < math.inf
    assert plan.lower_bound_seconds <= best + 1e-9
    assert check(plan, profile, machine, budget) == ()


def left_out(plan: Plan) -> Plan:
    """As if there were no objects."""
    peaks = dict(plan.peaks)
    peaks[Tier.DEVICE] -= bookkeeping(plan) or 0
    bill = tuple(line for line in plan.bill if line.category != "bookkeeping")
    return replace(plan, bill=bill, peaks=tuple(peaks.items()))


@pytest.mark.parametrize(
    ("fault", "rules"),
    [
        (lambda plan: billed(plan, "bookkeeping", "slack"), {Rule.BILL, Rule.DEVICE_PEAK}),
        (left_out, {Rule.BILL, Rule.DEVICE_PEAK}),
    ],
    ids=["billed as slack", "left out"],
)
def test_the_checker_counts_it_by_itself(fault: Callable[[Plan], Plan], rules: set[Rule]) -> None:
    profile, machine = noted(parameter_object_bytes=MiB), make_machine()  # more than the page that is moved
    plan = make_plan(profile, machine, BUDGET)
    assert {fault.rule for fault in check(fault(plan), profile, machine, BUDGET)} == rules


@settings(max_examples=200, deadline=None, derandomize=True)
@example([SMALL + 1] * 12, 4096, True)
@example([SMALL + 1023] * 12, 4096, True)
@example([300_000] * 12, 4 * SMALL, True)
@given(
    st.lists(st.integers(1, 3 * SMALL), min_size=1, max_size=12),
    st.sampled_from([4096, SMALL, SMALL + 2048, 4 * SMALL]),
    st.booleans(),
)
def test_never_fewer_shards_than_the_index_cuts(sizes: list[int], shard: int, elementwise: bool) -> None:
    """Small parameters have one of their own, which its parameters' bytes stand for."""
    parameters = [(f"p{i}", torch.nn.Parameter(torch.empty(size))) for i, size in enumerate(sizes)]
    index = FlatIndex([("layers.0", parameters)], shard, whole_parameters=not elementwise)
    cut = [each for each in index.all_shards() if not each.small]
    large = sum(size for size in sizes if size >= SMALL)
    unit = UnitProfile(
        name="layers.0",
        block=0,
        weight_bytes=MiB,
        gradient_bytes=4 * large,
        state_bytes=8 * large,
        parameters=tuple(name for name, _ in parameters),
    )
    profile = make_profile(
        1,
        units=(unit,),
        elementwise=elementwise,
        state_bytes_per_element=8.0,
        gradient_bytes_per_element=4.0,
        shard_object_bytes=1,
    )
    most = bookkeeping_bytes(profile, index.shard_elements)
    assert len(cut) <= most
    assert not elementwise or most <= len(cut) * (1 + 2 * 2048 / max(shard - 2048, 2048)) + 1
