"""Blocks that a plan treats alike, told together: once for a terminal's line, a page's table and a program.

Two blocks are alike when each class of tensors has the same actions in the same order; how many chunks each
action takes may differ and is given as a range. ``plan.json`` has every block by itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from memtrain.planner.ranges.model import DEVICE
from memtrain.planner.ranges.plan import BlockPlan, RangePlan
from memtrain.planpage.words import action_text

_NUMBERED = re.compile(r"^(?:.*\.)?([A-Za-z_]+)\.(\d+)$")
UPDATED = "updated"
"""Stands beside the classes of state: who updates them, and when."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alike:
    """Some blocks, and what happens in each of them."""

    blocks: str
    """``layers 2-77``."""
    count: int
    actions: tuple[tuple[str, str], ...]
    """By class, in words: ``recompute 9 of 16, keep 7``."""

    @property
    def text(self) -> str:
        """All classes; those with the same words share them: ``qkv and products keep``."""
        said: dict[str, list[str]] = defaultdict(list)
        for name, words in self.actions:
            said[words].append(name)
        return "; ".join(f"{_and(names)} {words}" for words, names in said.items())


def fold_activations(plan: RangePlan) -> tuple[Alike, ...]:
    """One for each way in which blocks treat what they save."""
    return _fold([block for block in plan.blocks if block.ranges], _ranges_of)


def fold_states(plan: RangePlan) -> tuple[Alike, ...]:
    """One for each way in which blocks' state is placed and updated."""
    return _fold([block for block in plan.blocks if block.updates], _state_of)


Entry = tuple[str, tuple[tuple[str, int], ...], int]
"""A class, its actions with their counts, and their sum."""


def _ranges_of(block: BlockPlan) -> tuple[Entry, ...]:
    by_class: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for part in block.ranges:
        by_class[part.tensor].append((action_text(part.action), part.stop - part.start))
    return tuple((name, tuple(parts), sum(n for _, n in parts)) for name, parts in by_class.items())


def _state_of(block: BlockPlan) -> tuple[Entry, ...]:
    by_class: dict[str, dict[str, int]] = defaultdict(dict)
    for held in block.held:
        places = by_class[held.state]
        places[held.place] = places.get(held.place, 0) + held.pieces
    entries = [(name, tuple(places.items()), sum(places.values())) for name, places in by_class.items()]
    updates = tuple((_update_words(label), pieces) for label, pieces in block.updates)
    return (*entries, (UPDATED, updates, sum(pieces for _, pieces in updates)))


def _fold(
    blocks: Sequence[BlockPlan], entries_of: Callable[[BlockPlan], tuple[Entry, ...]]
) -> tuple[Alike, ...]:
    groups: dict[object, list[tuple[str, tuple[Entry, ...]]]] = defaultdict(list)
    for block in blocks:
        entries = entries_of(block)
        alike = tuple((name, tuple(action for action, _ in parts)) for name, parts, _ in entries)
        groups[alike].append((block.name, entries))
    return tuple(
        Alike(
            blocks=compress_names([name for name, _ in members]),
            count=len(members),
            actions=_actions([entries for _, entries in members]),
        )
        for members in groups.values()
    )


def _actions(members: Sequence[tuple[Entry, ...]]) -> tuple[tuple[str, str], ...]:
    found = []
    for k, (name, parts, _) in enumerate(members[0]):
        counts = [[entries[k][1][i][1] for entries in members] for i in range(len(parts))]
        totals = {entries[k][2] for entries in members}
        found.append((name, _counted([action for action, _ in parts], counts, totals)))
    return tuple(found)


def _counted(actions: Sequence[str], counts: Sequence[Sequence[int]], totals: set[int]) -> str:
    if len(actions) == 1:
        return actions[0]
    total = _span(sorted(totals))
    first, *others = [f"{action} {_span(sorted(set(n)))}" for action, n in zip(actions, counts, strict=True)]
    return ", ".join([f"{first} of {total}", *others])


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]}-{values[-1]}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


_WHEN = {
    "ahead": "before the next forward",
    "in-backward": "in backward",
    "sequential": "when the last backward is over",
}


def _update_words(label: str) -> str:
    """``cpu-ahead`` -> ``by the CPU before the next forward``."""
    side, _, when = label.partition("-")
    who = "on the device" if side == DEVICE else "by the CPU"
    return f"{who} {_WHEN[when]}"


def compress_names(names: Sequence[str]) -> str:
    """``model.layers.0 model.layers.1 model.layers.2 head`` -> ``layers 0-2, head``."""
    numbered: dict[str, list[int]] = defaultdict(list)
    found: list[str] = []
    for name in names:
        match = _NUMBERED.match(name)
        if match is None:
            found.append(name)
            continue
        if match[1] not in numbered:
            found.append(match[1])
        numbered[match[1]].append(int(match[2]))
    return ", ".join(f"{one} {_runs(numbered[one])}" if one in numbered else one for one in found)


def _runs(values: Iterable[int]) -> str:
    """``0 1 2 5`` -> ``0-2, 5``."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(_span(run) for run in runs)
