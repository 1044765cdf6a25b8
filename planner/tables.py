"""Embedding tables that lie on a tier by rows: what they hold, and what a step moves of them.

They are no unit and no choice: they are where ``TableProfile`` says, in every plan. A step reads the rows
that its tokens name, steps them and writes them, in groups; so its bytes are bounded by tokens, and not by
the table's size.
"""

from __future__ import annotations

from memtrain.planner.actions import Tier
from memtrain.planner.profile import ModelProfile, TableProfile

_INDEX_BYTES = 8
_SORT_BYTES = 24
"""Of an index while rows that occur twice are summed: the sorted ones, their places, the different ones."""


def tier_bytes(profile: ModelProfile, tier: Tier) -> int:
    """Extents on ``tier``: all groups of weights and of state."""
    return sum(
        _groups(table.rows, table.weight_group_rows) * table.weight_group_bytes
        + _groups(table.rows, table.state_group_rows) * table.state_group_bytes
        for table in profile.tables
        if table.tier is tier
    )


def resident_bytes(profile: ModelProfile) -> int:
    """Of the device, always: slots, notes of what is written, and a step's gradient, every lookup in it; and
    rows that another batch may use beyond the one that was measured."""
    return sum(
        table.slot_bytes
        + table.note_bytes * _groups(table.rows, table.state_group_rows)
        + _gradient_bytes(profile, table)
        + (table.lookups - table.used_rows) * table.row_bytes
        for table in profile.tables
    )


def accumulating_bytes(profile: ModelProfile) -> int:
    """While the last micro-batch's gradient is added: the old sum beside the new one."""
    if profile.micro_batches == 1:
        return 0
    return sum(_gradient_bytes(profile, table) for table in profile.tables)


def update_bytes(profile: ModelProfile) -> int:
    """While tables are stepped: gradients with each row summed, and the largest temporaries."""
    summed = sum(
        profile.micro_batches * table.lookups * (table.row_bytes + _INDEX_BYTES + _SORT_BYTES)
        for table in profile.tables
    )
    return summed + max((table.workspace_bytes for table in profile.tables), default=0)


def update_seconds(profile: ModelProfile) -> float:
    """Of all tables' steps, reading and writing included: nothing else happens meanwhile."""
    return sum(table.update_seconds for table in profile.tables)


def moved_bytes(profile: ModelProfile) -> int:
    """Both directions, one step: forwards read groups of weights, the update reads them twice (to be stepped,
    and to be put back among their neighbours) and writes them, and reads and writes groups of state."""
    total = 0
    for table in profile.tables:
        once = min(table.used_rows, _groups(table.rows, table.weight_group_rows))
        step = min(profile.micro_batches * table.used_rows, table.rows)
        weights = min(step, _groups(table.rows, table.weight_group_rows)) * table.weight_group_bytes
        state = min(step, _groups(table.rows, table.state_group_rows)) * table.state_group_bytes
        total += profile.micro_batches * once * table.weight_group_bytes + 3 * weights + 2 * state
    return total


def _gradient_bytes(profile: ModelProfile, table: TableProfile) -> int:
    return profile.micro_batches * table.lookups * (table.row_bytes + _INDEX_BYTES)


def _groups(rows: int, group_rows: int) -> int:
    return -(-rows // group_rows)
