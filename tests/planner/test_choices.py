"""The program's byte rows against the staging that plans really get."""

from __future__ import annotations

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.planner.actions import UpdateSchedule
from memtrain.planner.choices import Choices, Request
from memtrain.planner.decisions import (
    PlannerOptions,
    open_space,
    staging_for,
)
from memtrain.planner.machine import Budget
from memtrain.planner.units import MiB
from tests.planner.toys import make_block, make_machine, make_profile


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_slabs_of_unequal_blocks_are_the_sum_of_their_places(data: st.DataObject) -> None:
    blocks = tuple(
        make_block(
            index,
            saved_bytes=data.draw(st.integers(1, 4)) * MiB,
            input_bytes=data.draw(st.integers(1, 3)) * MiB,
        )
        for index in range(4)
    )
    profile, machine, budget = make_profile(block_profiles=blocks), make_machine(), Budget(device="4GiB")
    options = PlannerOptions()
    space = open_space(profile, machine, budget, options)
    chosen = tuple(data.draw(st.sampled_from(choices)) for choices in space.blocks)
    request = Request(profile=profile, machine=machine, budget=budget, options=options, space=space)
    program = Choices(request, UpdateSchedule.SEQUENTIAL)
    total = program.kept_slabs()
    for row, choices, wanted in zip(program.x, space.blocks, chosen, strict=True):
        for variable, choice in zip(row, choices, strict=True):
            program.add(variable == int(choice == wanted))
    program.problem.setObjective(total * 1e-6)
    program.problem.solve(pulp.HiGHS(msg=False))
    staging = staging_for(
        profile,
        chosen,
        tuple(choices[0] for choices in space.states),
        saved_slots=2,
        input_slots=2,
        shard_elements=1 << 20,
        on_cpu=True,
    )
    # HiGHS proves within 1e-6 of a megabyte or so; a page would show.
    assert pulp.value(total) == pytest.approx(staging.kept_slab_bytes, abs=64)
