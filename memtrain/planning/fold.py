"""What a plan does, said shortly: blocks that are treated alike in one line, and shares of bytes by place.

Two blocks are alike when each class of tensors has the same actions in the same order; how many chunks each
action takes may differ and is given as a range. ``plan.json`` has every block by itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from memtrain.planner.ranges.choices import Kind
from memtrain.planner.ranges.model import DEVICE, Problem, Role
from memtrain.planner.ranges.plan import BlockPlan, RangePlan

_NUMBERED = re.compile(r"^(?:.*\.)?([A-Za-z_]+)\.(\d+)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Some blocks, and what happens in each of them."""

    blocks: str
    """``layers 2-77``."""
    count: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassShare:
    """One class of saved tensors in all blocks."""

    tensor: str
    size_bytes: int
    actions: tuple[tuple[str, int], ...]
    """Bytes by action, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a plan uses, as shares of bytes between 0 and 1."""

    actions: dict[str, float]
    """Of all saved tensors, by kind of action; ``slot`` counts as swap, for its bytes lie in staging."""
    swapped_to: dict[str, float]
    """Of all saved tensors, by place."""
    state: dict[Role, dict[str, float]]
    """Of all bytes of a role, by place."""
    cpu_updates: float
    """Of the pieces of state, the part that the CPU updates."""
    splits_tokens: bool
    """Whether some class has several actions in one block."""
    codecs: tuple[str, ...]


def fold_activations(plan: RangePlan) -> tuple[Line, ...]:
    """One line for each way in which blocks treat what they save."""
    return _fold([block for block in plan.blocks if block.ranges], _ranges_of)


def fold_states(plan: RangePlan) -> tuple[Line, ...]:
    """One line for each way in which blocks' state is placed and updated."""
    return _fold([block for block in plan.blocks if block.updates], _state_of)


Entry = tuple[str, tuple[tuple[str, int], ...], int]
"""A class, its actions with their counts, and their sum."""


def _ranges_of(block: BlockPlan) -> tuple[Entry, ...]:
    by_class: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for part in block.ranges:
        by_class[part.tensor].append((_words(part.action), part.stop - part.start))
    return tuple((name, tuple(parts), sum(n for _, n in parts)) for name, parts in by_class.items())


def _state_of(block: BlockPlan) -> tuple[Entry, ...]:
    by_class: dict[str, dict[str, int]] = defaultdict(dict)
    for held in block.held:
        places = by_class[held.state]
        places[held.place] = places.get(held.place, 0) + held.pieces
    entries = [(name, tuple(places.items()), sum(places.values())) for name, places in by_class.items()]
    updates = tuple((_update_words(label), pieces) for label, pieces in block.updates)
    return (*entries, ("updated", updates, sum(pieces for _, pieces in updates)))


def _fold(
    blocks: Sequence[BlockPlan], entries_of: Callable[[BlockPlan], tuple[Entry, ...]]
) -> tuple[Line, ...]:
    groups: dict[object, list[tuple[str, tuple[Entry, ...]]]] = defaultdict(list)
    for block in blocks:
        entries = entries_of(block)
        alike = tuple((name, tuple(action for action, _ in parts)) for name, parts, _ in entries)
        groups[alike].append((block.name, entries))
    return tuple(
        Line(
            blocks=compress_names([name for name, _ in members]),
            count=len(members),
            text=_text([entries for _, entries in members]),
        )
        for members in groups.values()
    )


def _text(members: Sequence[tuple[Entry, ...]]) -> str:
    """Classes with the same words share them: ``qkv and products keep``."""
    said: dict[str, list[str]] = defaultdict(list)
    for k, (name, parts, _) in enumerate(members[0]):
        counts = [[entries[k][1][i][1] for entries in members] for i in range(len(parts))]
        totals = {entries[k][2] for entries in members}
        said[_actions_text([action for action, _ in parts], counts, totals)].append(name)
    return "; ".join(f"{_and(names)} {text}" for text, names in said.items())


def _actions_text(actions: Sequence[str], counts: Sequence[Sequence[int]], totals: set[int]) -> str:
    if len(actions) == 1:
        return actions[0]
    total = _span(sorted(totals))
    first, *others = [f"{action} {_span(sorted(set(n)))}" for action, n in zip(actions, counts, strict=True)]
    return ", ".join([f"{first} of {total}", *others])


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]}-{values[-1]}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _words(action: str) -> str:
    """``swap:host`` -> ``swap host``; a slot is where the last blocks' swapped tensors still lie."""
    if action == Kind.SLOT.value:
        return "stay in the staging slot"
    return action.replace(":", " ")


def _update_words(label: str) -> str:
    """``cpu-ahead`` -> ``by the CPU before the next forward``."""
    side, _, when = label.partition("-")
    who = "on the device" if side == DEVICE else "by the CPU"
    return f"{who} {'before the next forward' if when == 'ahead' else 'in backward'}"


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


def class_shares(plan: RangePlan, problem: Problem) -> tuple[ClassShare, ...]:
    """Class by class, in the order of first mention."""
    found: dict[str, dict[str, int]] = {}
    for block, decided in zip(problem.blocks, plan.blocks, strict=True):
        sizes = {tensor.name: tensor.chunk_bytes for tensor in block.classes}
        for part in decided.ranges:
            actions = found.setdefault(part.tensor, {})
            words = _words(part.action)
            actions[words] = actions.get(words, 0) + sizes[part.tensor] * (part.stop - part.start)
    return tuple(
        ClassShare(tensor=tensor, size_bytes=sum(actions.values()), actions=tuple(actions.items()))
        for tensor, actions in found.items()
    )


def usage_of(plan: RangePlan, problem: Problem) -> Usage:
    """Shares of bytes; of nothing, no shares."""
    actions: dict[str, float] = defaultdict(float)
    places: dict[str, float] = defaultdict(float)
    codecs: dict[str, None] = {}
    split = False
    for block, decided in zip(problem.blocks, plan.blocks, strict=True):
        sizes = {tensor.name: tensor.chunk_bytes for tensor in block.classes}
        split |= any(len(parts) > 1 for _, parts, _ in _ranges_of(decided))
        for part in decided.ranges:
            kind, *rest = part.action.split(":")
            size = sizes[part.tensor] * (part.stop - part.start)
            actions[Kind.SWAP.value if kind == Kind.SLOT.value else kind] += size
            if kind in (Kind.COMPRESS.value, Kind.COMPRESS_SWAP.value):
                codecs[rest[0]] = None
            if kind in (Kind.SWAP.value, Kind.COMPRESS_SWAP.value):
                places[rest[-1]] += size
    saved = max(1, problem.saved_bytes)
    return Usage(
        actions={kind: size / saved for kind, size in actions.items()},
        swapped_to={place: size / saved for place, size in places.items()},
        state=_state_shares(plan, problem),
        cpu_updates=_cpu_updates(plan),
        splits_tokens=split,
        codecs=tuple(codecs),
    )


def _state_shares(plan: RangePlan, problem: Problem) -> dict[Role, dict[str, float]]:
    sizes: dict[Role, dict[str, float]] = {role: defaultdict(float) for role in Role}
    for block, decided in zip(problem.blocks, plan.blocks, strict=True):
        states = {state.name: state for state in block.states}
        for held in decided.held:
            state = states[held.state]
            sizes[state.role][held.place] += held.pieces * state.piece_bytes
    return {
        role: {place: size / sum(found.values()) for place, size in found.items()}
        for role, found in sizes.items()
        if found and sum(found.values()) > 0
    }


def _cpu_updates(plan: RangePlan) -> float:
    pieces = [(label.startswith("cpu"), count) for block in plan.blocks for label, count in block.updates]
    total = sum(count for _, count in pieces)
    return sum(count for by_cpu, count in pieces if by_cpu) / total if total else 0.0
