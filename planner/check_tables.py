"""The checker's part for tables that lie on a tier by rows, in arithmetic of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator

from memtrain.planner.actions import Tier
from memtrain.planner.check_rules import Fault, Rule
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Event, Plan
from memtrain.planner.profile import ModelProfile, TableProfile

_ROUNDING_SECONDS = 1e-8


def table_faults(profile: ModelProfile, machine: Machine, budget: Budget) -> Iterator[Fault]:
    """Tables lie on tiers that there are, beside a CPU."""
    linked = {link.tier for link in machine.links}
    for table in profile.tables:
        if table.tier not in linked or not budget.capacity(table.tier):
            yield Rule.TIER_EXISTS, f"table {table.name} is on {table.tier.value}"
        if not machine.device.startswith("cpu"):
            yield Rule.TIER_EXISTS, f"table {table.name} is used by rows on {machine.device}"


def tables_on(profile: ModelProfile, tier: Tier) -> int:
    """Bytes of a tier."""
    total = 0
    for table in profile.tables:
        if table.tier is tier:
            for rows, size in _cuts(table):
                total += math.ceil(table.rows / rows) * size
    return total


def tables_resident(profile: ModelProfile) -> int:
    """Bytes of the device at every moment."""
    total = 0
    for table in profile.tables:
        looked_up = table.lookups * profile.micro_batches
        beyond = (table.lookups - table.used_rows) * table.row_bytes
        notes = math.ceil(table.rows / table.state_group_rows) * table.note_bytes
        total += table.slot_bytes + notes + beyond + looked_up * table.row_bytes + looked_up * 8
    return total


def gradients_twice(profile: ModelProfile) -> int:
    """Where sums of gradients are made, the one beside the other."""
    if profile.micro_batches < 2:
        return 0
    return sum(t.lookups * profile.micro_batches * (t.row_bytes + 8) for t in profile.tables)


def stepping(profile: ModelProfile) -> int:
    """Beside that, while tables are stepped one after the other: an index of four words and a row for every
    lookup of every table, and temporaries of one."""
    words = sum(t.lookups * profile.micro_batches * (t.row_bytes + 32) for t in profile.tables)
    return words + max([0, *(t.workspace_bytes for t in profile.tables)])


def tables_moved(profile: ModelProfile) -> int:
    """Bytes over all links: weights are read at each lookup, for the step and for writing, and written; state
    is read and written. A row is at worst alone in its group."""
    total = 0
    for table in profile.tables:
        (weight_rows, weight_size), (state_rows, state_size) = _cuts(table)
        weight_groups = math.ceil(table.rows / weight_rows)
        state_groups = math.ceil(table.rows / state_rows)
        stepped = min(table.rows, table.used_rows * profile.micro_batches)
        for _ in range(profile.micro_batches):
            total += min(weight_groups, table.used_rows) * weight_size
        for _ in ("read", "read to put", "write"):
            total += min(weight_groups, stepped) * weight_size
        for _ in ("read", "write"):
            total += min(state_groups, stepped) * state_size
    return total


def step_faults(
    plan: Plan, profile: ModelProfile, events: dict[tuple[str, str], list[Event]]
) -> Iterator[tuple[str, str]]:
    """Tables are stepped once, after the last backward pass and long enough; never where there are none."""
    found = events.get(("update tables", "compute"), [])
    if len(found) != bool(profile.tables):
        yield "DEPENDENCY", f"tables are stepped {len(found)} times, there are {len(profile.tables)}"
        return
    for event in found:
        least = sum(table.update_seconds for table in profile.tables)
        if event.end_seconds - event.start_seconds < least - _ROUNDING_SECONDS:
            took = event.end_seconds - event.start_seconds
            yield "DURATION", f"update tables takes {took:.9f} s, at least {least:.9f} s are needed"
        last = events["backward prologue", "compute"][-1].end_seconds
        if event.start_seconds < last - _ROUNDING_SECONDS:
            yield "DEPENDENCY", "update tables starts before backward is over"


def _cuts(table: TableProfile) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and bytes of a group, of weights and of state."""
    return (
        (table.weight_group_rows, table.weight_group_bytes),
        (table.state_group_rows, table.state_group_bytes),
    )
