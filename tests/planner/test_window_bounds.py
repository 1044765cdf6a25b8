"""The program's bound against every choice of windows, simulated: random models with tables, ties and tiles,
random machines, with weights coded and as they are."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from memtrain.planner import baselines
from memtrain.planner.actions import Tier
from memtrain.planner.check import check
from memtrain.planner.choices import Request
from memtrain.planner.machine import Budget, Machine, StateCodec
from memtrain.planner.options import PlannerOptions
from memtrain.planner.profile import ModelProfile
from memtrain.planner.program import solve_program
from memtrain.planner.solve import make_plan
from memtrain.planner.space import Space, open_space
from memtrain.planner.units import MiB
from memtrain.planner.weight_coding import coding_spaces
from memtrain.planner.weight_windows import WANTED_WINDOWS, WantedWindows, weight_windows
from tests.planner.toys import make_machine
from tests.planner.weighty import everybody, states_of, weighty

BUDGET = Budget(device="4GiB", nvme="/x:1GiB")
PLACEMENTS = 40
"""Of weights, at most, that are simulated."""


def random_model(draw: random.Random, pieces: random.Random) -> ModelProfile:
    """``pieces``: of what is in tiles."""
    profile = weighty(
        draw.randint(2, 7),
        around=draw.random() < 0.7,
        tied=draw.random() < 0.4,
        micro_batches=draw.choice([1, 1, 2]),
    )
    tiles, units = draw.random() < 0.5, []
    for unit in profile.units:
        size = draw.choice([0, 1, 2, 4, 8, 8, 8, 24]) * MiB
        window = draw.choice([0, size // 4]) if tiles and size else 0
        window *= pieces.choice([1, 1, 2])
        written = size if unit.gradient_bytes and draw.random() < 0.8 else 0
        changed: dict[str, Any] = {
            "weight_bytes": size,
            "movable_weight_bytes": size,
            "weight_extent_bytes": size,
            "written_extent_bytes": written,
            "window_bytes": window,
            "least_window_bytes": window // pieces.choice([1, 2, 8]),
            "overwritten": bool(written) and draw.random() < 0.4,
        }
        units.append(replace(unit, **changed))
    return replace(profile, units=tuple(units), weight_bytes=sum(unit.weight_bytes for unit in units))


def random_machine(draw: random.Random) -> Machine:
    codec = StateCodec(
        name="x",
        ratio=0.7,
        read_bytes_per_second=draw.choice([600, 1500]) * MiB,
        write_bytes_per_second=draw.choice([600, 1500]) * MiB,
        cpu_seconds_per_byte=draw.choice([0, 1e-10]),
        segment_bytes=4 * MiB,
        staging_bytes=MiB,
    )
    rate = draw.choice([200, 500, 1024]) * MiB
    link: dict[str, Any] = {
        "read_bytes_per_second": rate,
        "write_bytes_per_second": rate,
        "mixed_bytes_per_second": draw.choice([1, 1.5, 2]) * rate,
        "cpu_seconds_per_byte": draw.choice([0, 1e-10]),
    }
    return make_machine(Tier.NVME, **link, **({"weight_codec": codec} if draw.random() < 0.5 else {}))


def random_options(draw: random.Random) -> PlannerOptions:
    force: dict[str, Any] = {
        "block": {"action": draw.choice(["keep", "recompute"])},
        "state": {"gradient_tier": "device", "optimizer_tier": "device"},
    }
    if draw.random() < 0.7:
        force["state"]["weight_tier"] = "nvme"
    schedule = draw.choice(["sequential", "ahead", "in_backward"])
    return PlannerOptions(force=force, update_schedule=schedule, gap=0.0, safety_margin=0.0)


def least_seconds(search: baselines.Search, space: Space, draw: random.Random) -> float:
    """Of all windows, and of some placements, simulated."""
    placements = list(itertools.product(*space.weights))
    if len(placements) > PLACEMENTS:
        placements = draw.sample(placements, PLACEMENTS)
    blocks = tuple(choices[0] for choices in space.blocks)
    found = float("inf")
    for tiers in placements:
        states = tuple(
            replace(choices[0], weight_tier=tier) for choices, tier in zip(space.states, tiers, strict=True)
        )
        for wanted in WANTED_WINDOWS:
            decisions = search.build(blocks, states, (1, 1, wanted, space.shards[0], space.schedules[0]))
            if not search.excess(decisions):
                found = min(found, search.cost(decisions).step_seconds)
    return found


# The first six had bounds above what was simulated: arithmetic of reads that are found, five windows of one
# size, rows in bytes.
@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize("seed", [513, 90, 19, 136, 245, 97, *range(8)])
def test_no_choice_is_faster_than_the_bound(seed: int) -> None:
    draw = random.Random(seed)
    profile, machine = random_model(draw, random.Random(~seed)), random_machine(draw)
    options = random_options(draw)
    for space in coding_spaces(open_space(profile, machine, BUDGET, options), machine, options):
        parts: dict[str, Any] = {"profile": profile, "machine": machine, "budget": BUDGET, "options": options}
        search = baselines.Search(**parts, space=space)
        answer = solve_program(Request(**parts, space=space), space.schedules[0], 10)
        assert answer.bound_seconds <= least_seconds(search, space, draw) * (1 + 1e-6) + 1e-9


@pytest.mark.usefixtures("solver_here")
@pytest.mark.parametrize("seed", range(8))
def test_plans_of_random_tiles_are_approved(seed: int) -> None:
    draw = random.Random(seed)
    profile, machine = random_model(draw, random.Random(~seed)), random_machine(draw)
    plan = make_plan(profile, machine, BUDGET, options=random_options(draw))
    assert check(plan, profile, machine, BUDGET) == ()


def test_equal_units_have_no_more_windows_than_the_program_knows() -> None:
    profile = weighty(8)
    windows = weight_windows(profile, states_of(profile, everybody), WantedWindows(5, sized=True))
    assert [each.slots for each in windows] == [4]
