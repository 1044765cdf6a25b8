"""Runs the program in a process of its own, so that a solver that overruns can be killed.

HiGHS may sit in presolve long past its time limit. A child process is killed by the wall clock, and its
memory (solver, model, PuLP) never counts against the budget of the process that is to train.
``python -m memtrain.planner.bounding`` is that child: a pickled request on stdin, pickled answers on stdout.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memtrain.planner.actions import UpdateSchedule
from memtrain.planner.baselines import Search, default_knobs, greedy

if TYPE_CHECKING:
    from memtrain.planner.choices import Request
    from memtrain.planner.program import Answer

START_SECONDS = 2.0
"""The child imports PuLP and HiGHS in 0.4 s on an idle core; the rest is for a busy machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """What is proved about every plan."""

    seconds: float
    """0 when nothing is."""
    solver: str


def improve_and_bound(search: Search, deadline: float) -> Bound:
    """Let the solver look for a better choice until ``deadline`` (monotonic), and return what it proved."""
    arithmetic = compute_seconds(search)
    if search.best is not None and arithmetic >= search.best_cost[0] * (1 - search.options.gap):
        return Bound(seconds=arithmetic, solver="heuristic, bounded by the arithmetic alone")
    answers = _in_child(search, deadline)
    if answers is None:
        return Bound(seconds=0.0, solver="heuristic: HiGHS gave no answer in time")
    for schedule, answer in answers:
        if answer.blocks:
            default = default_knobs(search.space, schedule)
            knobs = tuple(a or d for a, d in zip(answer.knobs, default[:3], strict=True))
            search.offer(search.build(answer.blocks, answer.states, (knobs[0], knobs[1], knobs[2], schedule)))
    greedy(search)
    proved = min(answer.bound_seconds for _, answer in answers)
    return Bound(seconds=max(proved, arithmetic) if proved > 0 else 0.0, solver="HiGHS through PuLP")


def compute_seconds(search: Search) -> float:
    """The arithmetic of a step with nothing moved and nothing computed twice: no plan takes less."""
    profile = search.profile
    once = sum(block.forward_seconds + block.backward_seconds for block in profile.blocks)
    once += profile.prologue_forward_seconds + profile.prologue_backward_seconds
    once += profile.epilogue_forward_seconds + profile.epilogue_backward_seconds
    return profile.micro_batches * once + sum(unit.update_seconds for unit in profile.units)


def _in_child(search: Search, deadline: float) -> list[tuple[UpdateSchedule, Answer]] | None:
    left = deadline - time.monotonic()
    if left <= 0:
        return None
    # The request's class lives beside the solver's model; importing it here would load PuLP.
    fields = {name: getattr(search, name) for name in ("profile", "machine", "budget", "options", "space")}
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([_package_root(root), os.environ.get("PYTHONPATH", "")])
    }
    try:
        child = subprocess.run(
            [sys.executable, "-m", "memtrain.planner.bounding"],
            input=pickle.dumps((fields, left)),
            capture_output=True,
            timeout=left + START_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if child.returncode != 0:
        raise RuntimeError(f"the solver's process failed: {child.stderr.decode(errors='replace')[-2000:]}")
    answers: list[tuple[UpdateSchedule, Answer]] = pickle.loads(child.stdout)
    return answers


def _package_root(fallback: str) -> str:
    import memtrain

    return str(Path(memtrain.__file__).parents[1]) if memtrain.__file__ else fallback


def solve_all(request: Request, time_limit_seconds: float) -> list[tuple[UpdateSchedule, Answer]]:
    """Every open schedule in turn, the time shared."""
    from memtrain.planner.program import solve_program

    began = time.monotonic()
    answers = []
    for position, schedule in enumerate(request.space.schedules):
        left = time_limit_seconds - (time.monotonic() - began)
        share = max(0.1, left / (len(request.space.schedules) - position))
        answers.append((schedule, solve_program(request, schedule, share)))
    return answers


def _main() -> None:
    from memtrain.planner.choices import Request

    fields, seconds = pickle.load(sys.stdin.buffer)
    answers = solve_all(Request(**fields), seconds)
    sys.stdout.buffer.write(pickle.dumps(answers))


if __name__ == "__main__":
    _main()
