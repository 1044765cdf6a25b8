"""State placed alike in all blocks, for rules that do not decide about it; what it leaves of the machine."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from memtrain.planner.ranges.formulate import Formulated
from memtrain.planner.ranges.model import DEVICE, Problem
from memtrain.planner.ranges.states import open_places

MAX_STATE_PLACEMENTS = 64
"""Uniform placements of state that are looked at; one takes about 10 ms with 80 blocks."""


def uniform_states(formulated: Formulated) -> Iterator[dict[int, int]]:
    """The same update and the same place per class for all blocks; one empty choice without state."""
    problem, states = formulated.problem, formulated.states
    names = list(dict.fromkeys(s.name for b in problem.blocks for s in b.states))
    if not names:
        yield {}
        return
    for update in problem.updates:
        where = {
            name: list(
                dict.fromkeys(
                    p
                    for b in problem.blocks
                    for s in b.states
                    if s.name == name
                    for p in open_places(problem, s, update)
                )
            )
            or [""]
            for name in names
        }
        for places in itertools.product(*where.values()):
            wanted = dict(zip(names, places, strict=True))
            counts: dict[int, int] = {}
            for block, updated, placed in zip(problem.blocks, states.updated, states.placed, strict=True):
                if update in updated:
                    counts[updated[update]] = block.pieces
                for placement, variable in placed.items():
                    if placement.update == update and wanted[placement.state.name] == placement.place:
                        counts[variable] = block.pieces
            yield counts


def beside(formulated: Formulated, placement: dict[int, int]) -> Problem:
    """The problem with what state takes under ``placement`` taken from the machine, for one micro-batch."""
    problem, form = formulated.problem, formulated.form
    x = form.complete(formulated.decisions(placement))
    device = [p.expression.value(x) for p in form.positions if p.place == DEVICE]
    transients = [t for b in problem.blocks for t in (b.forward_transient_bytes, b.backward_transient_bytes)]
    reserved = max(size - transient for size, transient in zip(device, transients, strict=True))
    taken = {p.place: int(p.expression.value(x)) for p in form.positions}
    places = tuple(
        dataclasses.replace(p, capacity_bytes=max(0, p.capacity_bytes - taken[p.name]) // problem.in_flight)
        for p in problem.machine.places
    )
    machine = dataclasses.replace(problem.machine, places=places)
    return dataclasses.replace(problem, machine=machine, reserved_bytes=int(reserved))
