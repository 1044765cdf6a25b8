"""Plans move no bytes that there is room for: seeded models on machines of all kinds, and figures by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from memtrain.planner import solve
from memtrain.planner.actions import Action, BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.baselines import Search, default_knobs, knobs_of
from memtrain.planner.bill import tier_peaks
from memtrain.planner.bounding import Bound
from memtrain.planner.check import check
from memtrain.planner.decisions import Decisions
from memtrain.planner.homing import bring_home
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.options import PlannerOptions
from memtrain.planner.plan import Plan
from memtrain.planner.price import PART, cost_of, traffic_seconds_of
from memtrain.planner.profile import ModelProfile
from memtrain.planner.queues import COMPUTE, Job
from memtrain.planner.simulate import simulate
from memtrain.planner.space import open_space
from memtrain.planner.units import MiB
from tests.planner.toys import make_machine
from tests.planner.weighty import everybody, states_of, weighty

ROOM = "64GiB"


def some_model(draw: random.Random) -> ModelProfile:
    profile = weighty(
        draw.randint(2, 8),
        around=draw.random() < 0.7,
        tied=draw.random() < 0.4,
        micro_batches=draw.choice([1, 1, 2, 4]),
    )
    tiles, units, pace = draw.random() < 0.25, [], draw.choice([0.3, 1, 4])
    for unit in profile.units:
        size = draw.choice([1, 2, 4, 8, 8, 8, 24]) * MiB
        trained = bool(unit.gradient_bytes)
        changed: dict[str, Any] = {
            "weight_bytes": size,
            "movable_weight_bytes": size,
            "weight_extent_bytes": size,
            "written_extent_bytes": size * trained,
            "gradient_bytes": size * trained,
            "state_bytes": 2 * size * trained,
            "update_seconds": draw.choice([0.0005, 0.002]) * trained,
            "window_bytes": draw.choice([0, size // 4]) * tiles,
        }
        units.append(replace(unit, **changed))
    blocks = (
        replace(b, forward_seconds=b.forward_seconds * pace, backward_seconds=b.backward_seconds * pace)
        for b in profile.blocks
    )
    total = sum(unit.weight_bytes for unit in units) + 2 * MiB
    return replace(profile, units=tuple(units), blocks=tuple(blocks), weight_bytes=total, boundary_bytes=MiB)


def some_machine(draw: random.Random) -> Machine:
    device = draw.choice(["cpu", "cpu", "cuda:0"])
    beside_a_gpu = draw.choice([(Tier.HOST,), (Tier.HOST, Tier.NVME)])
    rate = draw.choice([500, 2000, 8000]) * MiB
    link: dict[str, Any] = {
        "read_bytes_per_second": rate,
        "write_bytes_per_second": rate * draw.choice([0.5, 1]),
        "mixed_bytes_per_second": rate * draw.choice([1, 1.5]),
        "cpu_seconds_per_byte": draw.choice([0, 0, 1e-10]),
        "dram_copy_bytes_per_second": draw.choice([1e18, 5e9]),
    }
    return make_machine(*((Tier.NVME,) if device == "cpu" else beside_a_gpu), device=device, **link)


def some_options(draw: random.Random) -> PlannerOptions:
    return PlannerOptions(
        micro_batch_order=draw.choice(["horizontal", "auto"]),
        gradients_untouched=draw.random() < 0.5,
        gap=draw.choice([5e-3, 5e-3, 0.0]),
        safety_margin=0.0,
    )


def budget_for(machine: Machine, device: int | str) -> Budget:
    tiers = {link.tier for link in machine.links}
    host, nvme = ROOM if Tier.HOST in tiers else 0, f"/x:{ROOM}" if Tier.NVME in tiers else None
    return Budget(device=device, host=host, nvme=nvme)


def search_of(plan: Plan, *parts: Any) -> tuple[Search, Decisions]:
    decisions = Decisions.of(plan, on_cpu=parts[1].on_cpu)
    return searching(*parts, order=decisions.micro_batch_order), decisions


def searching(
    profile: ModelProfile, machine: Machine, budget: Budget, options: PlannerOptions, **more: Any
) -> Search:
    space = open_space(profile, machine, budget, options)
    return Search(profile=profile, machine=machine, budget=budget, options=options, space=space, **more)


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize("seed", range(16))
def test_with_room_for_everything_everything_stays(seed: int) -> None:
    draw = random.Random(seed)
    profile, machine, options = some_model(draw), some_machine(draw), some_options(draw)
    plan = solve.make_plan(profile, machine, budget_for(machine, ROOM), options=options)
    assert (plan.status, plan.bytes_moved_per_step) == ("optimal", 0)
    assert {state.weight_tier for state in plan.states} == {Tier.DEVICE}


def one_back(decisions: Decisions) -> list[tuple[tuple[BlockDecision, ...], tuple[StateDecision, ...]]]:
    """Each thing that is away by itself on the device, written without the planner's own moves."""
    found = []
    for index, state in enumerate(decisions.states):
        for field in ("gradient_tier", "optimizer_tier", "weight_tier"):
            back = replace(state, **{field: Tier.DEVICE})
            if back != state:
                states = (*decisions.states[:index], back, *decisions.states[index + 1 :])
                found.append((decisions.blocks, states))
    for index, block in enumerate(decisions.blocks):
        action = Action.KEEP if block.action is Action.SWAP else block.action
        kept = replace(block, action=action, saved_tier=Tier.DEVICE, input_tier=Tier.DEVICE)
        if kept != block:
            blocks = (*decisions.blocks[:index], kept, *decisions.blocks[index + 1 :])
            found.append((blocks, decisions.states))
    return found


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize("seed", [100, 101, 104, 105, 109, 110, 112, 115, 120, 121])
def test_nothing_that_there_is_room_for_is_away(seed: int) -> None:
    draw = random.Random(seed)
    profile, machine, options = some_model(draw), some_machine(draw), some_options(draw)
    least = 125 * MiB
    most = least + 4 * profile.weight_bytes + 14 * MiB * len(profile.blocks)
    budget = budget_for(machine, round(least + (most - least) * draw.uniform(0.3, 0.9)))
    plan = solve.make_plan(profile, machine, budget, options=options)
    if plan.status == "infeasible":
        pytest.skip("a budget below the least need")
    assert check(plan, profile, machine, budget) == ()
    search, decisions = search_of(plan, profile, machine, budget, options)
    now = simulate(profile, machine, decisions)
    for blocks, states in one_back(decisions):
        other = search.build(blocks, states, knobs_of(decisions, search.space))
        if not search.excess(other):
            then = simulate(profile, machine, other)
            slower = then.step_seconds > now.step_seconds * (1 + 1e-7)
            assert slower or then.traffic_seconds >= now.traffic_seconds


def away_everywhere(search: Search) -> Decisions:
    profile, space = search.profile, search.space
    blocks = tuple(
        BlockDecision(block=i, action=Action.SWAP, saved_tier=Tier.NVME) for i in range(len(profile.blocks))
    )
    states = tuple(
        replace(
            state,
            gradient_tier=Tier.NVME if unit.gradient_bytes else Tier.DEVICE,
            optimizer_tier=Tier.NVME if unit.state_bytes else Tier.DEVICE,
        )
        for unit, state in zip(profile.units, states_of(profile, everybody), strict=True)
    )
    return search.build(blocks, states, default_knobs(space, UpdateSchedule.AHEAD))


def test_all_that_fits_comes_back_and_no_more() -> None:
    profile, machine, options = weighty(6), make_machine(), PlannerOptions(safety_margin=0.0)
    search = searching(profile, machine, budget_for(machine, ROOM), options)
    search.offer(away_everywhere(search))
    bring_home(search)
    assert search.thrifty is not None
    kept = search.thrifty
    assert simulate(profile, machine, kept).bytes_moved == 0
    need = tier_peaks(profile, kept, search.space.billed_tiers, 0.0)[Tier.DEVICE]
    for budget, stays in ((need, True), (need - 1, False)):
        search = searching(profile, machine, budget_for(machine, budget), options)
        search.offer(away_everywhere(search))
        bring_home(search)
        assert search.thrifty is not None
        assert (simulate(profile, machine, search.thrifty).bytes_moved == 0) is stays
        assert not search.excess(search.thrifty)


def test_nothing_comes_back_when_the_time_is_up() -> None:
    options = PlannerOptions(safety_margin=0.0, time_limit_seconds=1e-9)
    machine = make_machine()
    search = searching(weighty(6), machine, budget_for(machine, ROOM), options)
    start = away_everywhere(search)
    search.offer(start)
    search.deadline = 0.0
    bring_home(search)
    assert search.thrifty is start
    search.deadline = float("inf")
    bring_home(search)
    assert search.thrifty is not start


def test_traffic_is_seconds_of_queues_and_writes_to_a_disk_count_twice() -> None:
    machine = make_machine(Tier.HOST, Tier.NVME, device="cuda:0")
    jobs = [
        Job("a", COMPUTE, 7.0, ()),
        Job("b", "read:nvme", 1024 * MiB, ()),
        Job("c", "write:nvme", 512 * MiB, ()),
        Job("d", "write:host", 2048 * MiB, ()),
    ]
    assert traffic_seconds_of(jobs, machine) == 1.0 + 2 * 0.5 + 2.0
    assert traffic_seconds_of(jobs[:1], machine) == 0


def priced(step_seconds: float, traffic_seconds: float, gap: float = 5e-3) -> float:
    return cost_of(step_seconds, 0, traffic_seconds, gap).priced_seconds


def test_a_little_time_is_worth_more_than_any_traffic() -> None:
    """A step of a second with three busy links in both directions, one of them a disk, has 7 s of traffic."""
    assert priced(1.0, 0.0) < priced(1.0, 0.1)
    assert priced(1.0, 7.0) < priced(1.0 + 0.15 * 5e-3, 0.0)
    assert priced(1.0, 7.0) > priced(1.0 + 0.13 * 5e-3, 0.0)
    assert priced(1.0, 1.0, gap=0.0) == pytest.approx(1 + PART * 1e-5, abs=1e-12)


@pytest.mark.parametrize("seed", range(200, 206))
def test_the_plan_to_take_is_no_slower_than_the_gap_allows(seed: int) -> None:
    """Of everything that a search has looked at, drawn at random."""
    draw = random.Random(seed)
    profile, machine = some_model(draw), some_machine(draw)
    options = PlannerOptions(safety_margin=0.0, gap=0.05)
    search = searching(profile, machine, budget_for(machine, ROOM), options)
    seen = []
    for _ in range(60):
        blocks = tuple(draw.choice(choices) for choices in search.space.blocks)
        states = tuple(
            replace(draw.choice(choices), weight_tier=draw.choice(tiers))
            for choices, tiers in zip(search.space.states, search.space.weights, strict=True)
        )
        schedule = draw.choice(search.space.schedules)
        decisions = search.build(blocks, states, default_knobs(search.space, schedule))
        search.offer(decisions)
        seen.append(simulate(profile, machine, decisions))
    fastest = min(found.step_seconds for found in seen)
    assert search.best_cost.step_seconds == fastest
    assert fastest <= search.thrifty_cost.step_seconds <= fastest * (1 + 0.14 * 0.05)
    assert search.thrifty_cost.priced_seconds <= search.best_cost.priced_seconds
    assert all(found.traffic_seconds <= 5 * found.step_seconds for found in seen)


@pytest.mark.parametrize(
    ("bound_seconds", "takes"),
    [(0.9, "thrifty"), (0.9951, "best"), (0.9956, "thrifty")],
    ids=["neither is within the gap", "the fastest is", "both are"],
)
def test_a_plan_is_not_taken_out_of_the_gap(bound_seconds: float, takes: str) -> None:
    """Steps of 1 and 1.0005 s; the gap is 0.5 %."""
    search = searching(weighty(2), make_machine(), budget_for(make_machine(), ROOM), PlannerOptions())
    search.best = away_everywhere(search)
    search.best_cost = cost_of(1.0, 0, 10.0, 5e-3)
    search.thrifty = replace(search.best, update_schedule=UpdateSchedule.SEQUENTIAL)
    search.thrifty_cost = cost_of(1.0005, 0, 0.0, 5e-3)
    chosen = solve._chosen(search, Bound(seconds=bound_seconds, solver="none"))
    assert chosen is getattr(search, takes)
