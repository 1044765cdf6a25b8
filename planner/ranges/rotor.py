"""Rotor's dynamic program over a chain (Beaumont et al.): which blocks keep all, memory in slots.

Rotor may also drop a block's input and restart from an earlier one; here every input is stored. Where several
micro-batches are in flight, what is kept counts for each.
"""

from __future__ import annotations

import math

from memtrain.planner.ranges.model import Problem

ROTOR_SLOTS = 500
"""Memory steps of the dynamic program, as in rotor's own code; bytes are rounded up to them."""


def least_recompute(problem: Problem, *, inputs_stay: bool) -> tuple[bool, ...] | None:
    """Which blocks keep everything; None when no choice fits."""
    capacity = problem.machine.device_capacity_bytes - problem.reserved_bytes
    if not inputs_stay:
        inputs = [sum(t.total_bytes for t in b.classes if not t.recompute_seconds) for b in problem.blocks]
        capacity -= problem.machine.slots * max(inputs)
    step = max(1, -(-capacity // ROTOR_SLOTS))
    # By slots of memory kept so far: (seconds, choices).
    found: dict[int, tuple[float, tuple[bool, ...]]] = {0: (0.0, ())}
    for block in problem.blocks:
        again = sum(math.fsum(t.recompute_seconds) for t in block.classes)
        heavy = sum(t.total_bytes for t in block.classes if t.recompute_seconds)
        light = sum(t.total_bytes for t in block.classes if not t.recompute_seconds) * inputs_stay
        after: dict[int, tuple[float, tuple[bool, ...]]] = {}
        for slots, (seconds, chosen) in found.items():
            for keeps in (True, False):
                total = slots - (-(problem.in_flight * (light + heavy * keeps)) // step)
                restored = 0 if keeps else heavy
                transient = max(block.forward_transient_bytes, block.backward_transient_bytes + restored)
                if total * step + transient > capacity:
                    continue
                offer = (seconds + (0.0 if keeps else again), (*chosen, keeps))
                if total not in after or offer[0] < after[total][0]:
                    after[total] = offer
        found = after
    return min(found.values())[1] if found else None
