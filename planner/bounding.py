"""Runs the program in a process of its own, so that a solver that overruns can be killed.

HiGHS may sit in presolve long past its time limit. A child process is killed by the wall clock, and its
memory (solver, model, PuLP) never counts against the budget of the process that is to train.
``python -m memtrain.planner.bounding`` is that child: a pickled request on stdin, pickled answers on stdout.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memtrain.planner.actions import BlockDecision, Tier, UpdateSchedule
from memtrain.planner.answer import Answer
from memtrain.planner.baselines import Search, default_knobs, greedy
from memtrain.planner.block_parts import copied_bytes, joined_bytes, recompute_seconds
from memtrain.planner.decisions import gradient_passes
from memtrain.planner.profile import BlockProfile

if TYPE_CHECKING:
    from memtrain.planner.choices import Request

RESERVE_SECONDS = 1.0
"""HiGHS looks at its clock between steps of its own: it is asked to stop this much before it is killed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """What is proved about every plan."""

    seconds: float
    """0 when nothing is."""
    solver: str


def improve_and_bound(search: Search, deadline: float) -> Bound:
    """Let the solver look for a better choice until ``deadline`` (monotonic), and return what it proved."""
    arithmetic = compute_seconds(search)
    if search.best is not None and arithmetic >= search.best_cost.step_seconds * (1 - search.options.gap):
        return Bound(seconds=arithmetic, solver="heuristic, bounded by the arithmetic alone")
    answers = _in_child(search, deadline)
    for schedule, answer in answers:
        if answer is not None and answer.blocks:
            default = default_knobs(search.space, schedule)
            saved, moved, windows, shard = answer.knobs
            knobs = (
                saved or default[0],
                moved or default[1],
                windows or default[2],
                shard or default[3],
                schedule,
            )
            search.offer(search.build(answer.blocks, answer.states, knobs))
    greedy(search)
    # A schedule that was not reached is bounded by nothing but the arithmetic.
    proved = min((a.bound_seconds if a is not None else 0.0 for _, a in answers), default=0.0)
    if proved <= 0:
        return Bound(seconds=0.0, solver="heuristic: HiGHS proved nothing in time")
    return Bound(seconds=max(proved, arithmetic), solver="HiGHS through PuLP")


def compute_seconds(search: Search) -> float:
    """The arithmetic of a step with nothing waited for, each block's cheapest choice: no plan takes less.

    On a CPU that is not nothing: whatever outlives a block's forward is copied, and gradients are gone over.
    """
    profile, copy = search.profile, search.machine.on_cpu / search.machine.dram_copy_bytes_per_second
    later = profile.micro_batches - 1
    once = 0.0
    for block, choices in zip(profile.blocks, search.space.blocks, strict=True):
        once += min(_block_seconds(block, d, copy) for d in choices)
    once += profile.prologue_forward_seconds + profile.prologue_backward_seconds
    once += profile.epilogue_forward_seconds + profile.epilogue_backward_seconds
    units = 0.0
    for unit, decisions in zip(profile.units, search.space.states, strict=True):
        kinds = {d.gradient_tier is Tier.DEVICE for d in decisions}
        passes = min(
            gradient_passes(stays=stays, first=True) + later * gradient_passes(stays=stays, first=False)
            for stays in kinds
        )
        units += unit.update_seconds + unit.gradient_bytes * copy * passes
    return profile.micro_batches * once + units


def _block_seconds(block: BlockProfile, decision: BlockDecision, copy_seconds_per_byte: float) -> float:
    form = block.in_form(decision.form)
    copies = (copied_bytes(block, decision) + joined_bytes(block, decision)) * copy_seconds_per_byte
    return form.forward_seconds + form.backward_seconds + recompute_seconds(block, decision) + copies


def _in_child(search: Search, deadline: float) -> list[tuple[UpdateSchedule, Answer | None]]:
    left = deadline - time.monotonic()
    if left <= RESERVE_SECONDS:
        return _answers(b"", search)
    # The request's class lives beside the solver's model; importing it here would load PuLP.
    fields = {name: getattr(search, name) for name in ("profile", "machine", "budget", "options", "space")}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([_package_root(), os.environ.get("PYTHONPATH", "")])
    }
    try:
        child = subprocess.run(
            [sys.executable, "-m", "memtrain.planner.bounding"],
            input=pickle.dumps((fields, time.time() + left - RESERVE_SECONDS)),
            capture_output=True,
            timeout=left,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as stopped:
        return _answers(stopped.stdout or b"", search)
    if child.returncode != 0:
        raise RuntimeError(f"the solver's process failed: {child.stderr.decode(errors='replace')[-2000:]}")
    return _answers(child.stdout, search)


def _answers(text: bytes, search: Search) -> list[tuple[UpdateSchedule, Answer | None]]:
    """What the child wrote before it ended: one pickle per schedule, None for those that it did not reach."""
    found: dict[UpdateSchedule, Answer] = {}
    stream = io.BytesIO(text)
    while stream.tell() < len(text):
        try:
            schedule, answer = pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):
            break
        found[schedule] = answer
    return [(schedule, found.get(schedule)) for schedule in search.space.schedules]


def _package_root() -> str:
    """Where the package lies: above ``memtrain/planner``, by the name under which this was imported."""
    return str(Path(__file__).absolute().parents[2])


def solve_all(request: Request, deadline: float) -> Iterator[tuple[UpdateSchedule, Answer]]:
    """Every open schedule in turn, the time until ``deadline`` (seconds since the epoch) shared."""
    from memtrain.planner.program import solve_program

    # The last schedule is the one more likely to win: it comes first, in case time runs out.
    schedules = request.space.schedules[::-1]
    for position, schedule in enumerate(schedules):
        share = (deadline - time.time()) / (len(schedules) - position)
        yield schedule, solve_program(request, schedule, max(0.1, share))


def _main() -> None:
    from memtrain.planner.choices import Request

    fields, deadline = pickle.load(sys.stdin.buffer)
    for answer in solve_all(Request(**fields), deadline):
        sys.stdout.buffer.write(pickle.dumps(answer))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
