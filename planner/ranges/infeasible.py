"""When nothing fits: the smallest device memory that would, and every single change that would help."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator

from memtrain.planner.ranges.formulate import Decisions, Formulated, formulate
from memtrain.planner.ranges.highs import Solver
from memtrain.planner.ranges.model import DEVICE, Block, Codec, Problem, TensorClass
from memtrain.planner.ranges.plan import Relaxation
from memtrain.planner.ranges.program import build, rounded
from memtrain.planner.ranges.simulate import simulate

PROGRAM_SECONDS = 5.0
"""For one program of least shortage; 80 blocks of 16 chunks take 0.1 to 0.5 s."""
SHORTAGE_GAP = 1e-4


def least_shortage(formulated: Formulated, place: str) -> tuple[int, Decisions] | None:
    """The least bytes by which the capacity of ``place`` alone must grow, and decisions that then fit.

    None when no growth of ``place`` helps, or none was found in ``PROGRAM_SECONDS``.
    """
    found = Solver(build(formulated, shortage_of=place)).solve(PROGRAM_SECONDS, SHORTAGE_GAP)
    if not found.solved:
        return None
    decisions = rounded(formulated, found.values)
    missing = 0
    for peak in simulate(formulated, decisions).peaks:
        if peak.place == place:
            missing = max(0, peak.size_bytes - peak.capacity_bytes)
    allowed = {f"{p.name} on {p.place}" for p in formulated.form.positions if p.place == place}
    if set(formulated.excess(decisions)) - allowed:
        return None
    return missing, decisions


def relaxations(problem: Problem, offered: tuple[Codec, ...], deadline: float) -> Iterator[Relaxation]:
    """Single changes that make ``problem`` possible: bytes first, the fewest first; then codecs, then tokens.

    Args:
        problem: in which nothing fits.
        offered: codecs that the user has not allowed, and might.
        deadline: monotonic time after which no further change is looked at.
    """
    formulated = formulate(problem)
    short = []
    for name in (DEVICE, *(p.name for p in problem.machine.places)):
        answer = least_shortage(formulated, name) if time.monotonic() < deadline else None
        if answer is not None:
            short.append(Relaxation(what=name, missing_bytes=answer[0]))
    yield from sorted(short, key=lambda r: r.missing_bytes)
    for codec in offered:
        if time.monotonic() < deadline:
            known = {p.name for p in problem.machine.places}
            allowed = dataclasses.replace(codec, places=tuple(p for p in codec.places if p in known))
            lossy = dataclasses.replace(
                problem,
                codecs=(*problem.codecs, allowed),
                error_budget=max(codec.error, problem.error_budget),
            )
            if fits(lossy):
                yield Relaxation(what=f"codec {codec.name}")
    share = longest_share(problem, deadline)
    if share > 0:
        yield Relaxation(what="sequence", share=share)


def fits(problem: Problem) -> bool:
    """Whether any decisions were found that fit."""
    answer = least_shortage(formulate(problem), DEVICE)
    return answer is not None and answer[0] == 0


def longest_share(problem: Problem, deadline: float) -> float:
    """The largest number of chunks that fits, over all chunks; 0 when not even one does."""
    most = max((t.chunks for b in problem.blocks for t in b.classes), default=1)
    low, high = 0, most
    while high - low > 1 and time.monotonic() < deadline:
        middle = (low + high) // 2
        if fits(shortened(problem, middle, most)):
            low = middle
        else:
            high = middle
    return low / most


def shortened(problem: Problem, chunks: int, of: int) -> Problem:
    """The step with the first ``chunks`` of ``of`` chunks of its sequence; times are left as they are.

    What is not cut into chunks is scaled, and rounded up.
    """

    def scaled(size: int) -> int:
        return -(-size * chunks // of)

    def tensor(one: TensorClass) -> TensorClass:
        if one.chunks == 1:
            return dataclasses.replace(one, chunk_bytes=scaled(one.chunk_bytes))
        left = max(1, math.ceil(one.chunks * chunks / of))
        return dataclasses.replace(one, chunks=left, recompute_seconds=one.recompute_seconds[:left])

    def block(one: Block) -> Block:
        return dataclasses.replace(
            one,
            forward_transient_bytes=scaled(one.forward_transient_bytes),
            backward_transient_bytes=scaled(one.backward_transient_bytes),
            classes=tuple(tensor(t) for t in one.classes),
        )

    return dataclasses.replace(problem, blocks=tuple(block(b) for b in problem.blocks))
