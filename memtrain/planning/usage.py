"""What a plan does to all blocks together: shares of bytes by action and by place."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from memtrain.planner.ranges.choices import Kind
from memtrain.planner.ranges.model import Problem, Role
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planpage.words import action_text


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


def class_shares(plan: RangePlan, problem: Problem) -> tuple[ClassShare, ...]:
    """Class by class, in the order of first mention."""
    found: dict[str, dict[str, int]] = {}
    for block, decided in zip(problem.blocks, plan.blocks, strict=True):
        sizes = {tensor.name: tensor.chunk_bytes for tensor in block.classes}
        for part in decided.ranges:
            actions = found.setdefault(part.tensor, {})
            words = action_text(part.action)
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
        split |= len({part.tensor for part in decided.ranges}) < len(decided.ranges)
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
